"""`surrogate plan`: from strings of the command line to a plan; the table for people, the JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from oracle.errors import InputError
from oracle.texts import read_texts
from surrogate import corpora
from surrogate.planning.planner import plan
from surrogate.stages import parse_targets, read_target_paths


def plan_stage(
    *,
    model: str | None,
    parameters: float | None,
    proxy: str | None,
    pool: Sequence[str] | None,
    text_column: str,
    targets: Sequence[str],
    numbers: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Plan, print the table to stderr and return the plan as JSON values.

    Args:
        model: Folder or hub name of the model that is trained, of which the config is read.
        parameters: Its number of parameters in the place of that.
        proxy: Folder, hub name or number of parameters of a smaller model whose features may be used.
        pool: Files of the pool, or the name of a bundled corpus.
        text_column: Column of the pool with the text.
        targets: NAME=FILE of each target set.
        numbers: Sizes given as numbers, by their name in `plan`.
        options: Further options of `plan`; those that are None or empty are left to it.

    Raises:
        InputError: Something is missing or unusable, or no plan keeps the promise.
    """
    trained = _runnable(model, options) if parameters is None else parameters
    if trained is None or (model is not None and parameters is not None):
        raise InputError(
            f"--model {model} and --parameters {parameters}.", "exactly one of the two", "name the model, or say how large it is."
        )
    given = {name: value for name, value in {**numbers, **options}.items() if value not in (None, ())}
    sets = read_target_paths(parse_targets(targets)) if targets else None
    found = plan(
        trained,
        _read_pool(pool, text_column),
        sets,
        proxy=None if proxy is None else _size_or_name(proxy),
        **given,
    )
    sys.stderr.write(found.table() + "\n")
    if not found.fits:
        raise InputError(
            found.reason + ".",
            f"--max-overhead of at least {found.smallest_max_overhead:.3g} for this run",
            found.remedy + ".",
        )
    return found.as_dict()


def _runnable(model: str | None, options: dict[str, Any]) -> Any:
    """The model itself where it is to be timed; otherwise its name is enough."""
    if model is None or not options.get("measure"):
        return model
    from oracle.language_model import LanguageModel

    return LanguageModel.from_pretrained(model, max_tokens=options.get("max_tokens"))


def _read_pool(pool: Sequence[str] | None, text_column: str) -> Any:
    return read_texts(corpora.pool_source(pool), text_column=text_column) if pool else None


def _size_or_name(proxy: str) -> float | str:
    try:
        return float(proxy)
    except ValueError:
        return proxy
