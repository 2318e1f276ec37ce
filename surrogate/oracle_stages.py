"""What the commands that measure do: `label`, and how far to trust it: `calibrate` and `judge`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oracle import plugins
from oracle.comparison import noise_ceiling
from oracle.errors import InputError, check_choice, check_count
from oracle.labels import Labels
from oracle.methods import needs_of
from oracle.targets import TargetSet, read_targets
from surrogate.option_strings import parse_plugin, split_plugins
from surrogate.pipeline import Run
from surrogate.stages import give_pool, parse_targets, plugin_options, read_target_paths

if TYPE_CHECKING:
    from oracle.language_model import LanguageModel

METHODS = "oracle.methods"
LABEL_OPTIONS = ("max_target_texts", "halves", "block_size", "per")  # of `oracle.label` itself
REFERENCE_OPTIONS = ("max_target_texts",)  # of `oracle.calibrate` itself, beside those of `one_step`


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What `label`, `calibrate` and `judge` are all given.

    Attributes:
        targets: NAME=FILE pairs.
        model: Folder or hub name of the language model.
        pool: Files, globs or URLs, a bundled corpus or a hub name; None for a run that has its pool.
        text_column: Column of the pool that holds plain text.
        max_tokens: Longer texts are cut.
        dtype: Precision of the model's weights.
        seed: Decides the sample, target texts and halves.
    """

    targets: Sequence[str]
    model: str | None
    pool: Sequence[str] | None
    text_column: str
    max_tokens: int | None
    dtype: str
    seed: int

    def target_sets(self) -> dict[str, TargetSet]:
        """Read the target sets by name."""
        if not self.targets:
            return {}
        return {target.name: target for target in read_targets(read_target_paths(parse_targets(self.targets)))}

    def language_model(self, target_sets: Mapping[str, TargetSet]) -> LanguageModel:
        """Load the model, and refuse targets that it cannot read before the folder is bound to a pool."""
        from oracle.language_model import LanguageModel

        assert self.model is not None
        lm = LanguageModel.from_pretrained(self.model, max_tokens=self.max_tokens, dtype=self.dtype)
        for target in target_sets.values():
            lm.encode(target.texts)
        return lm

    def trained_model(self, target_sets: Mapping[str, TargetSet], *, needed_by: str) -> LanguageModel:
        """Load the model with its optimiser; refuse one without, before the folder is bound to a pool."""
        from oracle.optimizers import require_optimizer

        lm = self.language_model(target_sets)
        require_optimizer(lm, needed_by=needed_by)
        return lm


def label_stage(folder: Path, given: Measuring, *, method: str, sample_size: int, options: Sequence[str]) -> dict[str, Any]:
    """Label a sample with a model from a folder or the hub."""
    accepted = plugin_options(METHODS, method, options, also=LABEL_OPTIONS)
    _check_target_texts(accepted)
    target_sets, needs = given.target_sets(), needs_of(plugins.load(METHODS, method))
    _check_needs(f"method {method!r}", {"--model": (needs.model, given.model), "--target": (needs.targets, given.targets)})
    lm = None if given.model is None else given.language_model(target_sets)
    run = Run(folder)
    pool_summary = give_pool(run, given.pool, given.text_column)
    labels = run.label(
        lm,
        target_sets or None,
        sample_size=sample_size,
        method=method,
        seed=given.seed,
        model_path=given.model,
        **accepted,
    )
    return {"run_folder": str(folder), **pool_summary, **describe_labels(labels)}


def calibrate_stage(
    folder: Path, given: Measuring, *, methods: str, num_texts: int, groups: str | None, options: Sequence[str]
) -> dict[str, Any]:
    """Compare cheap methods with real steps on a few texts of the pool; the table goes to stderr."""
    from oracle.calibration import MIN_TEXTS, REFERENCE, calibrate

    _check_needs("calibrate", {"--model": (True, given.model), "--target": (True, given.targets)})
    chosen, accepted = _methods(methods), plugin_options(METHODS, REFERENCE, options, also=REFERENCE_OPTIONS)
    _check_target_texts(accepted)
    check_count("num_texts", num_texts, MIN_TEXTS)
    target_sets = given.target_sets()
    lm = given.trained_model(target_sets, needed_by="calibrate")
    run = Run(folder)
    pool_summary = give_pool(run, given.pool, given.text_column)
    found = calibrate(
        lm,
        run.pool(),
        target_sets,
        methods={name: {"method": method, **own} for name, (method, own) in chosen.items()},
        num_texts=num_texts,
        groups=groups,
        workdir=folder / "calibration",
        seed=given.seed,
        **accepted,
    )
    _count_labels(run, "calibration", [rung.labels for rung in found.rungs if rung.labels is not None])
    sys.stderr.write(found.table() + "\n")
    return {
        "run_folder": str(folder),
        **pool_summary,
        "num_texts": found.num_texts,
        "reference": REFERENCE,
        "methods": found.as_dict(),
        "cost": run.costs()["calibration"],
    }


def judge_stage(
    folder: Path,
    given: Measuring,
    *,
    methods: str,
    num_texts: int,
    num_subsets: int,
    share: float,
    num_seeds: int,
    target_texts: int,
) -> dict[str, Any]:
    """Label some texts of the pool and judge the labels by models retrained on parts of them; the table goes to stderr."""
    from oracle.calibration import folder_name
    from oracle.judging.judge import judge
    from oracle.measure import label

    _check_needs("judge", {"--model": (True, given.model), "--target": (True, given.targets)})
    chosen, target_sets = _methods(methods), given.target_sets()
    check_count("num_texts", num_texts, 1)
    lm = given.trained_model(target_sets, needed_by="judge")
    run = Run(folder)
    pool_summary = give_pool(run, given.pool, given.text_column)
    sample = run.sample(min(num_texts, len(run.pool())), seed=given.seed)
    shared: dict[str, Any] = {"max_target_texts": target_texts, "seed": given.seed}
    labels = {}
    for name, (method, own) in chosen.items():
        own_folder = folder / "judge" / "labels" / folder_name(name)
        looks = needs_of(plugins.load(METHODS, method)).targets
        on_targets: dict[str, Any] = {"targets": target_sets, **shared} if looks else {"seed": given.seed}
        labels[name] = label(lm, sample, method=method, workdir=own_folder, **on_targets, **own)
    _count_labels(run, "judge labels", list(labels.values()))
    found = judge(
        lm,
        sample,
        target_sets,
        labels,
        workdir=folder / "judge" / "retrained",
        num_subsets=num_subsets,
        share=share or None,
        num_seeds=num_seeds,
        **shared,
    )
    run.set_cost("judge", seconds=found.cost["seconds"], flops=found.cost["flops"], num_texts=len(sample))
    sys.stderr.write(found.table() + "\n")
    return {"run_folder": str(folder), **pool_summary, **found.as_dict()}


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


def _check_needs(what: str, given: Mapping[str, tuple[bool, Any]]) -> None:
    """Refuse a missing option that is needed."""
    missing = [name for name, (is_needed, value) in given.items() if is_needed and not value]
    if missing:
        raise InputError(
            f"{what} without {' and '.join(missing)}.",
            "--target NAME=FILE for the texts whose loss should fall, --model FOLDER for the checkpoint to measure at",
            f"add {' and '.join(missing)}.",
        )


def _methods(given: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Read NAME,NAME:option=value,...: each as it was written -> method and options; all are tried before any measures.

    Raises:
        InputError: There is no such method, it refuses these options, or it is named twice with the same ones.
    """
    written = split_plugins(given)
    if len(set(written)) < len(written):
        raise InputError(
            f"--methods {given} names a method twice.", "each method once with the same options", "remove the repeated name."
        )
    chosen = {name: parse_plugin(name) for name in written}
    for method, options in chosen.values():
        check_choice("methods", method, plugins.names(METHODS))
        plugins.create(METHODS, method, options)
    return chosen


def _check_target_texts(options: Mapping[str, Any]) -> None:
    """Refuse a number of target texts by the name that it has here."""
    if options.get("max_target_texts") is not None:
        check_count("max_target_texts", options["max_target_texts"])


def _count_labels(run: Run, stage: str, measured: Iterable[Labels]) -> None:
    """Write what several label sets of the same texts have cost together."""
    costs = [(labels.meta["cost"], len(labels)) for labels in measured]
    run.set_cost(
        stage,
        seconds=sum(cost["prepare_seconds"] + cost["label_seconds"] for cost, _ in costs),
        flops=sum(cost["prepare_flops"] + cost["label_flops"] for cost, _ in costs),
        num_texts=costs[0][1],
    )
