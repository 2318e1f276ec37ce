"""What each command does: from strings of the command line to a stage of the run and a JSON-able summary.

The commands that measure (`label`, `calibrate`, `judge`) are in `surrogate.oracle_stages`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oracle import plugins
from oracle.errors import InputError
from surrogate import corpora
from surrogate.option_strings import parse_options
from surrogate.pipeline import DEFAULT_ENCODERS, Run
from surrogate.selection import Budget


def embed_stage(folder: Path, encoders: Sequence[str] | None, *, pool: Sequence[str] | None, text_column: str) -> dict[str, Any]:
    """Encode the pool."""
    run = Run(folder)
    give_pool(run, pool, text_column)
    chosen = list(encoders or DEFAULT_ENCODERS)
    return {"run_folder": str(folder), "encoders": chosen, **run.embed(chosen)}


def fit_stage(folder: Path, encoders: Sequence[str] | None, *, surrogate: str, folds: int, seed: int) -> dict[str, Any]:
    """Fit a surrogate; the fidelity table goes to stderr."""
    predictor = Run(folder).fit(list(encoders or DEFAULT_ENCODERS), surrogate, num_folds=folds, seed=seed)
    sys.stderr.write(predictor.fidelity_.table() + "\n")
    return {
        "run_folder": str(folder),
        "surrogate": predictor.surrogate_name,
        "fidelity": predictor.fidelity_.as_dict(),
        "cost": predictor.cost_,
    }


def score_stage(folder: Path, surrogate: str | None) -> dict[str, Any]:
    """Score the pool."""
    run = Run(folder)
    scores = run.score(surrogate)
    values = np.asarray(scores)
    ranges = {
        name: {"mean": float(column.mean()), "min": float(column.min()), "max": float(column.max())}
        for name, column in zip(scores.target_names, values.T, strict=True)
    }
    return {
        "run_folder": str(folder),
        "surrogate": surrogate or run.predictor().surrogate_name,
        "num_texts": len(values),
        "scores": ranges,
    }


def select_stage(
    folder: Path,
    budget: Mapping[str, float | int | None],
    *,
    rule: str,
    surrogate: str | None,
    options: Sequence[str],
    allow_low_fidelity: bool,
    seed: int,
) -> dict[str, Any]:
    """Spend the budget."""
    spending = Budget(**{name: value for name, value in budget.items() if value is not None})  # type: ignore[arg-type]
    selection = Run(folder).select(
        spending,
        rule=rule,
        surrogate=surrogate,
        seed=seed,
        allow_low_fidelity=allow_low_fidelity,
        **plugin_options("surrogate.rules", rule, options),
    )
    return {
        "run_folder": str(folder),
        "selection": str(folder / "selection"),
        "num_texts": selection.num_texts,
        "num_tokens": selection.num_tokens,
        "counts": selection.counts,
    }


def give_pool(run: Run, pool: Sequence[str] | None, text_column: str) -> dict[str, Any]:
    """Set the run's pool if one was named: files, or the name of a bundled corpus."""
    if not pool:
        return {"pool": len(run.pool())}
    reading = {} if text_column == "text" else {"text_column": text_column}
    summary = run.set_pool(corpora.pool_source(pool), **reading)
    return {"pool": summary["num_texts"], "rejected": summary["rejected"]}


def plugin_options(package: str, name: str, given: Sequence[str], *, also: Sequence[str] = ()) -> dict[str, Any]:
    """Read `option=value` pairs for a plug-in; only its own options and those in `also` may be named.

    Raises:
        InputError: A pair cannot be read, or there is no such option.
    """
    options = parse_options(given)
    plugins.check_options(package, name, options, also=also)
    return options


def parse_targets(given: Sequence[str]) -> dict[str, str]:
    """Read NAME=FILE pairs.

    Raises:
        InputError: A pair has no name, or a name is given twice.
    """
    paths: dict[str, str] = {}
    for pair in given:
        name, equals, path = pair.partition("=")
        if not equals or not name or not path or name in paths:
            raise InputError(
                f"--target {pair!r} cannot be used.",
                "NAME=FILE, each name once",
                "write for example --target math=math_dev.jsonl.",
            )
        paths[name] = path
    return paths


def read_target_paths(paths: Mapping[str, str]) -> dict[str, Any]:
    """Resolve target paths; `CORPUS:NAME` is a target set of a bundled corpus."""
    sources: dict[str, Any] = {}
    for name, path in paths.items():
        corpus, colon, inner = path.partition(":")
        if colon and corpus in corpora.names():
            known = corpora.load(corpus).targets
            if inner not in known:
                raise InputError(f"corpus {corpus!r} has no target set {inner!r}.", ", ".join(known), "name one of these.")
            sources[name] = known[inner]
        else:
            sources[name] = path
    return sources
