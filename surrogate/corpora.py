"""The bundled corpora by name: a pool, its target sets and the card that describes them.

The folder `data/` is installed as `surrogate._data`, one folder for each corpus with a `card.md` and a `recipe.py`
whose `build` makes the rows. Rows come as plain datasets; `oracle.read_texts` adds `text_id`, as for any other pool.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from oracle.errors import InputError, InputTypeError, MissingFileError, check_at_least, check_choice, closest

if TYPE_CHECKING:
    import datasets

PACKAGE = "surrogate._data"


@dataclass(frozen=True)
class Corpus:
    """A bundled corpus.

    Attributes:
        pool: All candidate texts, with the columns that the card lists.
        targets: The target sets by name.
        card: What the corpus is, in Markdown; it says which columns mark the truth and are for evaluation only.
    """

    pool: datasets.Dataset
    targets: dict[str, datasets.Dataset]
    card: str


def names() -> list[str]:
    """List the bundled corpora, sorted."""
    folders = (folder for folder in resources.files(PACKAGE).iterdir() if folder.is_dir())
    return sorted(folder.name for folder in folders if folder.joinpath("recipe.py").is_file())


def pool_source(given: Sequence[str]) -> Any:
    """Return the pool of a bundled corpus where its name alone was given, else what was given: files, globs or URLs."""
    return load(given[0]).pool if len(given) == 1 and given[0] in names() else list(given)


def load(name: str, **options: Any) -> Corpus:
    """Make a bundled corpus; the same name, options and Python version give the same corpus.

    Args:
        name: One of `names()`.
        **options: Options of the recipe's `build`, such as `num_texts` and `seed`.

    Raises:
        InputError: No such corpus or option, or fewer texts than `num_texts` can be made.
        MissingFileError: A file that the recipe reads is not on this machine.

    Example:
        >>> corpus = surrogate.corpora.load("skills", num_texts=100)
        >>> corpus.pool.num_rows, sorted(corpus.targets)[0]
        (100, 'addition')
    """
    check_choice("corpus", name, names())
    build = importlib.import_module(f"{PACKAGE}.{name}.recipe").build
    defaults = {key: parameter.default for key, parameter in inspect.signature(build).parameters.items()}
    for key, value in options.items():
        if key not in defaults:
            raise InputError(
                f"corpus {name!r} has no option {key!r}{closest(key, defaults)}.",
                ", ".join(defaults),
                "remove the option or correct its name.",
            )
        _check_value(key, value)
    try:
        rows, target_rows = build(**options)
    except FileNotFoundError as error:
        raise MissingFileError(
            f"corpus {name!r} needs a file that is not here: {error.filename}.",
            "an installation of Python with its whole standard library",
            "install the missing part of Python, or load another corpus.",
        ) from error
    num_texts = options.get("num_texts", defaults["num_texts"])
    if len(rows) < num_texts:
        raise InputError(
            f"num_texts={num_texts} is more than corpus {name!r} has here.", f"at most {len(rows)}", "ask for fewer texts."
        )
    from datasets import Dataset  # slow to import

    card = resources.files(PACKAGE).joinpath(name, "card.md").read_text(encoding="utf-8")
    return Corpus(Dataset.from_list(rows), {key: Dataset.from_list(value) for key, value in target_rows.items()}, card)


def _check_value(key: str, value: Any) -> None:
    """Refuse values that the recipes cannot use; their names tell what they are."""
    if key == "seed" or key.startswith("num_"):
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputTypeError(f"{key}={value!r} is not a whole number.", "an int", f"pass an int for {key}.")
        if key != "seed":
            check_at_least(key, value, 1)
    if key.endswith("_share") and not (isinstance(value, (int, float)) and 0 <= value <= 1):
        raise InputError(f"{key}={value!r} is not a share.", "a number from 0 to 1", f"pass such a number for {key}.")
