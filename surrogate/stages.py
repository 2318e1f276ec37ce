"""What each command does: from strings of the command line to a stage of the run and a JSON-able summary."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle import plugins
from oracle.comparison import noise_ceiling
from oracle.errors import InputError
from oracle.labels import Labels
from oracle.methods import needs_of
from oracle.targets import TargetSet, read_targets
from surrogate import corpora
from surrogate.pipeline import DEFAULT_ENCODERS, Run, parse_options
from surrogate.selection import Budget

if TYPE_CHECKING:
    from oracle.language_model import LanguageModel

LABEL_OPTIONS = ("max_target_texts", "halves", "block_size", "per")  # of `oracle.label` itself


def label_stage(
    folder: Path,
    targets: Sequence[str],
    *,
    model: str | None,
    pool: Sequence[str] | None,
    text_column: str,
    method: str,
    sample_size: int,
    max_tokens: int | None,
    dtype: str,
    options: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Label a sample with a model from a folder or the hub."""
    accepted = plugin_options("oracle.methods", method, options, also=LABEL_OPTIONS)
    target_sets = {target.name: target for target in read_targets(read_target_paths(parse_targets(targets)))} if targets else {}
    needs = needs_of(plugins.load("oracle.methods", method))
    _check_needs(method, {"--model": (needs.model, model), "--target": (needs.targets, targets)})
    lm = None if model is None else _load_model(model, max_tokens=max_tokens, dtype=dtype, target_sets=target_sets)
    run = Run(folder)
    pool_summary = give_pool(run, pool, text_column)
    labels = run.label(lm, target_sets or None, sample_size=sample_size, method=method, seed=seed, model_path=model, **accepted)
    return {"run_folder": str(folder), **pool_summary, **describe_labels(labels)}


def _check_needs(method: str, given: Mapping[str, tuple[bool, Any]]) -> None:
    """Refuse a missing option that the method needs."""
    missing = [name for name, (is_needed, value) in given.items() if is_needed and not value]
    if missing:
        raise InputError(
            f"method {method!r} without {' and '.join(missing)}.",
            "--target NAME=FILE for the texts whose loss should fall, --model FOLDER for the checkpoint to measure at",
            f"add {' and '.join(missing)}.",
        )


def _load_model(model: str, *, max_tokens: int | None, dtype: str, target_sets: Mapping[str, TargetSet]) -> LanguageModel:
    """Load the model, and refuse targets that it cannot read before the folder is bound to a pool."""
    from oracle.language_model import LanguageModel

    lm = LanguageModel.from_pretrained(model, max_tokens=max_tokens, dtype=dtype)
    for target in target_sets.values():
        lm.encode(target.texts)
    return lm


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
    source: Any = list(pool)
    if len(pool) == 1 and pool[0] in corpora.names():
        source = corpora.load(pool[0]).pool
    reading = {} if text_column == "text" else {"text_column": text_column}
    summary = run.set_pool(source, **reading)
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


def describe_labels(labels: Labels) -> dict[str, Any]:
    """Summarise labels for people and programs."""
    summary = {
        name: {"mean": float(column.mean()), "std": float(column.std()), "share_positive": float((column > 0).mean())}
        for name, column in zip(labels.target_names, labels.values.T, strict=True)
    }
    return {
        "labelled": len(labels),
        "num_without_target_token": labels.meta["num_without_target_token"],
        "num_truncated": labels.meta["num_truncated"],
        "units": labels.units,
        "labels": summary,
        "noise_ceiling": noise_ceiling(labels),
        "facts": labels.meta["facts"],
        "cost": labels.meta["cost"],
    }
