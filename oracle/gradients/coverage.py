"""Which parameters a label covers (all trainable ones, or those whose names a pattern finds), and where they are held."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from oracle.errors import InputError, closest

NUM_NAMES = 8  # parameters that an error names


def match_parameters(module: nn.Module, pattern: str | None) -> list[str]:
    """Return the names of the trainable parameters that a regular expression finds; None finds all.

    Raises:
        InputError: The pattern is no regular expression, or finds nothing.
    """
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if pattern is None:
        return names
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"layers={pattern!r} is not a regular expression: {error}.",
            r"a regular expression that is searched for in the parameters' names, such as 'layers\.(10|11)\.'",
            "correct the pattern; a backslash makes a dot or bracket stand for itself.",
        ) from error
    found = [name for name in names if expression.search(name)]
    if not found:
        without_numbers = sorted({re.sub(r"\.\d+\.", ".0.", name) for name in names})
        raise InputError(
            f"layers={pattern!r} finds none of the {len(names)} trainable parameters{closest(pattern, names)}.",
            f"a regular expression that finds some of them; they are called {', '.join(without_numbers[:NUM_NAMES])}, ...",
            "correct the pattern, or make the parameters trainable.",
        )
    return found


@contextmanager
def only_trainable(module: nn.Module, names: Collection[str]) -> Iterator[None]:
    """A block in which only the named parameters are trainable."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    wanted = set(names)
    try:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in wanted)
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


def holders(module: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """Say which modules hold each parameter (a tied one has several): name -> path of the module and key in it."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in names.values()}
    for path, part in module.named_modules():
        for key, parameter in part.named_parameters(recurse=False):
            found[names[parameter]].append((path, key))
    return found
