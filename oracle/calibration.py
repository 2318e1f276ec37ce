"""Calibration: how far the cheap methods agree with the definition at this checkpoint, on a few dozen texts.

The agreement of a method with `one_step` depends on the model, the optimiser and the phase of training, so it is measured
where it is used. Cheap: 64 to 128 texts with a real step each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oracle import plugins
from oracle.comparison import TargetAgreement, agreement
from oracle.errors import InputError, check_at_least
from oracle.judging.retraining import hash_order
from oracle.labels import Labels
from oracle.language_model import LanguageModel
from oracle.measure import METHODS, label
from oracle.methods import needs_of
from oracle.tables import aligned, figure
from oracle.texts import list_text_ids, read_texts

REFERENCE = "one_step"
MIN_TEXTS = 3  # a rank correlation over fewer says nothing


@dataclass(frozen=True)
class Rung:
    """One method beside the reference.

    Attributes:
        method: Its name in the table.
        targets: Agreement with the reference, by target.
        flops_per_text: Counted FLOPs of one label, without what is done once.
        passes_per_text: The same in forward and backward passes over the text; None for a method without a model.
        labels: What was measured.
    """

    method: str
    targets: dict[str, TargetAgreement]
    flops_per_text: float
    passes_per_text: float | None
    labels: Labels

    def mean(self, name: str) -> float | None:
        """Mean over the targets of a number of `TargetAgreement`; None where a target has none."""
        values = [getattr(row, name) for row in self.targets.values()]
        return None if any(value is None for value in values) else float(np.mean(values))


@dataclass(frozen=True)
class Calibration:
    """The ladder of methods at one checkpoint; the first rung is the reference."""

    rungs: list[Rung]

    def table(self) -> str:
        """Text table: agreement with the reference over the texts and within groups, noise ceiling, signal kept, cost."""
        header = ["method", "spearman", "within group", "top-20 % overlap", "noise ceiling", "signal kept", "passes per text"]
        rows = [
            [
                rung.method,
                figure(rung.mean("spearman")),
                figure(rung.mean("spearman_within")),
                figure(rung.mean("top_overlap")),
                figure(_mean_ceiling(rung)),
                figure(rung.mean("signal_kept")),
                figure(rung.passes_per_text, digits=2),
            ]
            for rung in self.rungs
        ]
        return aligned([header, *rows])

    def as_dict(self) -> dict[str, Any]:
        """Everything but the labels, as JSON."""
        return {
            rung.method: {
                "targets": {name: asdict(row) for name, row in rung.targets.items()},
                "flops_per_text": rung.flops_per_text,
                "passes_per_text": rung.passes_per_text,
            }
            for rung in self.rungs
        }


def calibrate(
    lm: LanguageModel,
    sample: Any,
    targets: Any,
    *,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("grad_dot",),
    num_texts: int = 96,
    groups: str | None = None,
    workdir: str | Path | None = None,
    seed: int = 0,
    max_target_texts: int | None = None,
    **reference_options: Any,
) -> Calibration:
    """Label a few texts with `one_step` and with cheaper methods, and compare.

    Args:
        lm: The model with its optimiser.
        sample: The texts to draw from: anything `read_texts` takes.
        targets: The target sets.
        methods: Method names, or a name for the table -> options, with "method" among them where the name is another one.
            The reference is measured in any case and is not named.
        num_texts: How many texts are labelled, drawn by content and `seed`.
        groups: A column of the sample (such as its source) for agreement within groups.
        workdir: Where the labels are kept; an interrupted calibration continues there.
        seed: Decides texts, target texts and halves.
        max_target_texts: As in `oracle.label`; the price of `one_step` is the evaluation of the target texts.
        **reference_options: Options of `one_step`.

    Raises:
        InputError: The sample has no such column, `methods` names the reference or a method that looks at no target, or as
            in `oracle.label`.
    """
    check_at_least("num_texts", num_texts, MIN_TEXTS)
    ladder = _ladder(methods)
    texts = read_texts(sample)
    if groups is not None and groups not in texts.column_names:
        raise InputError(f"the sample has no column {groups!r}.", ", ".join(texts.column_names), "name one of these for groups.")
    text_ids = list_text_ids(texts)
    chosen = set(hash_order(text_ids, f"calibration:{seed}")[:num_texts])
    drawn = texts.select([row for row, text_id in enumerate(text_ids) if text_id in chosen])
    kinds = None if groups is None else [str(kind) for kind in drawn[groups]]
    shared: dict[str, Any] = {"seed": seed, "max_target_texts": max_target_texts}
    measured = {}
    for name, options in {REFERENCE: {"subtract_shared": True, **reference_options}, **ladder}.items():
        folder = None if workdir is None else Path(workdir) / name
        measured[name] = label(lm, drawn, targets, method=options.pop("method", name), workdir=folder, **shared, **options)
    reference = measured[REFERENCE]
    return Calibration([_rung(name, labels, reference, lm=lm, kinds=kinds) for name, labels in measured.items()])


def _ladder(methods: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name in the table -> options."""
    given = (
        {name: dict(options) for name, options in methods.items()} if isinstance(methods, Mapping) else {n: {} for n in methods}
    )
    if REFERENCE in given:
        raise InputError(
            f"{REFERENCE!r} is among the methods to compare with {REFERENCE!r}.",
            "the cheaper methods",
            f"leave it out: it is measured in any case. Its options are arguments of `calibrate` itself; for {REFERENCE!r} with "
            "others, give it another name: {'other steps': {'method': 'one_step', ...}}.",
        )
    for name, options in given.items():
        method = options.get("method", name)
        if not needs_of(plugins.load(METHODS, method)).targets:
            raise InputError(
                f"method {method!r} looks at no target set, so its values are of no target.",
                "methods that measure influence on a target set",
                "leave it out, and compare its column with `oracle.comparison.spearman`.",
            )
    return given


def _rung(name: str, labels: Labels, reference: Labels, *, lm: LanguageModel, kinds: list[str] | None) -> Rung:
    cost = labels.meta["cost"]
    pass_flops = 3 * lm.forward_flops_per_token * reference.meta["cost"]["num_tokens"]
    has_model = np.isfinite(labels.columns["num_tokens"]).all()
    return Rung(
        name,
        agreement(reference, labels, groups=kinds),
        cost["label_flops"] / cost["num_labelled"],
        cost["label_flops"] / pass_flops if has_model else None,
        labels,
    )


def _mean_ceiling(rung: Rung) -> float | None:
    values = [row.noise_ceilings[1] for row in rung.targets.values()]
    return None if any(value is None for value in values) else float(np.mean([value for value in values if value is not None]))
