"""Plug-ins: one file, one keyword-only dataclass; the file's name is the plug-in's name.

Oracle methods, encoders, surrogates and selection rules are found by listing the files of their folder.
A plug-in's options are its dataclass fields, each made by `option` with a sentence of help; the command
line, the README's table and the contract tests read them from there, and nothing else is edited.
Listing the names imports nothing.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Sequence
from typing import Any

from oracle.errors import InputError, InputTypeError, check_choice, closest

KIND_NAMES = {
    "oracle.methods": "method",
    "surrogate.features": "encoder",
    "surrogate.models": "surrogate",
    "surrogate.rules": "rule",
    "surrogate.training.strategies": "strategy",
}
LABEL_ARGUMENTS = ("block_size", "halves", "max_target_texts", "per", "seed", "workdir")  # named where an option is mistaken


def option(default: Any, help_text: str) -> Any:
    """Declare an option of a plug-in: a dataclass field with its default and one sentence of help."""
    if isinstance(default, (list, dict, set)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help_text})
    return dataclasses.field(default=default, metadata={"help": help_text})


def names(package: str) -> list[str]:
    """List the plug-ins of a package by file name, sorted, without importing them."""
    folder = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def load(package: str, name: str) -> type:
    """Return the plug-in class of `package` called `name`.

    Raises:
        InputError: There is no such plug-in; the message lists those that there are.
    """
    check_choice(KIND_NAMES.get(package, "plug-in"), name, names(package))
    module = importlib.import_module(f"{package}.{name}")
    classes = [
        member
        for member in vars(module).values()
        if inspect.isclass(member)
        and member.__module__ == module.__name__
        and dataclasses.is_dataclass(member)
        and getattr(member, "plugin_name", None) == name
    ]
    assert len(classes) == 1, f"{module.__name__} must define one dataclass with plugin_name = {name!r}"
    return classes[0]


def create(package: str, name: str, options: dict[str, Any]) -> Any:
    """Make the plug-in `name` with `options`; an integer in the place of a string, such as `word_ngrams=1`, is its digits.

    Raises:
        InputError: No such plug-in, or it has no such option; the message lists what there is.
        InputTypeError: An option that is on or off has another value than True and False.
    """
    check_options(package, name, options, beside=LABEL_ARGUMENTS if package == "oracle.methods" else ())
    plugin = load(package, name)
    given = dict(options)
    for field in dataclasses.fields(plugin):
        value = given.get(field.name, field.default)
        if isinstance(field.default, str) and isinstance(value, int) and not isinstance(value, bool):
            given[field.name] = str(value)
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise InputTypeError(
                f"{field.name}={value!r} of {name!r} is neither on nor off.",
                "True or False",
                f"write {field.name}=True or {field.name}=False, without quotes.",
            )
    return plugin(**given)


def check_options(
    package: str, name: str, options: Iterable[str], *, also: Iterable[str] = (), beside: Sequence[str] = ()
) -> None:
    """Refuse options that neither the plug-in `name` has nor `also` lists.

    Args:
        package: Where the plug-in is.
        name: Its name.
        options: Names of the options given.
        also: What else is accepted here.
        beside: Arguments of `oracle.label`, which are no options but may have been meant.

    Raises:
        InputError: There is such an option, or no such plug-in; the message lists what there is.
    """
    accepted = [*option_names(package, name), *also]
    for key in options:
        if key not in accepted:
            hint = "" if key in beside else closest(key, [*accepted, *beside])
            arguments = f"; arguments of oracle.label itself: {', '.join(beside)}" if beside else ""
            raise InputError(
                f"{key!r} is no option of {name!r}{hint}.",
                (", ".join(accepted) or "no options") + arguments,
                "remove the option or correct its name; what has a flag of its own on the command line is given there.",
            )


def option_names(package: str, name: str) -> list[str]:
    """List the options of the plug-in `name`."""
    return [field.name for field in dataclasses.fields(load(package, name)) if field.init]


def options_of(plugin: Any) -> dict[str, Any]:
    """Return the options of a plug-in object as plain values (fields marked `repr=False` are left out)."""
    return {field.name: getattr(plugin, field.name) for field in dataclasses.fields(plugin) if field.init and field.repr}


def describe(package: str, name: str) -> dict[str, Any]:
    """Return what people are told of a plug-in: summary, paper, cost, limit and options with help."""
    plugin = load(package, name)
    lines = inspect.cleandoc(plugin.__doc__ or "").splitlines()
    sections: dict[str, str] = {}
    current = ""
    for line in lines[1:]:
        if line and not line.startswith(" ") and line.endswith(":"):
            current = line[:-1].lower()
            sections[current] = ""
        elif current and line.startswith(" "):
            sections[current] = f"{sections[current]} {line.strip()}".strip()
    options = [
        {
            "name": field.name,
            "default": None if field.default is dataclasses.MISSING else field.default,
            "help": field.metadata.get("help", ""),
        }
        for field in dataclasses.fields(plugin)
        if field.init
    ]
    return {
        "name": name,
        "summary": lines[0] if lines else "",
        "paper": sections.get("paper", ""),
        "cost": sections.get("cost", ""),
        "limit": sections.get("limit", ""),
        "options": options,
    }
