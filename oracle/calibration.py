"""Calibration: how far the cheap methods agree with the definition at this checkpoint, on a few dozen texts.

The agreement of a method with `one_step` depends on the model, the optimiser and the phase of training, so it is measured
where it is used. Cheap: 64 to 128 texts with a real step each. All methods have to mean the same step: options of the
reference (clipping, the reduction of the text's loss) are handed on to every method that has them too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oracle import plugins
from oracle.artifacts import fingerprint
from oracle.comparison import TargetAgreement, agreement
from oracle.errors import InputError, MismatchError, StorageError, check_count
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
        flops_per_text: Counted FLOPs of one label, without what is done once; None for a method that refused.
        passes_per_text: The same in forward and backward passes over the text; None for a method without a model.
        labels: What was measured; None for a method that refused.
        handed_on: Options of the reference that were handed on to this method.
        refused: Why the method could not measure here; the other methods are compared all the same.
    """

    method: str
    targets: dict[str, TargetAgreement]
    flops_per_text: float | None
    passes_per_text: float | None
    labels: Labels | None
    handed_on: dict[str, Any]
    refused: InputError | None = None

    def mean(self, name: str) -> float | None:
        """Mean over the targets of a number of `TargetAgreement`; None where a target has none."""
        values = [getattr(row, name) for row in self.targets.values()]
        return None if not values or any(value is None for value in values) else float(np.mean(values))


@dataclass(frozen=True)
class Calibration:
    """The ladder of methods at one checkpoint; the first rung is the reference."""

    rungs: list[Rung]

    @property
    def num_texts(self) -> int:
        """How many texts were labelled with each method."""
        reference = self.rungs[0].labels
        assert reference is not None
        return len(reference)

    def table(self) -> str:
        """Text table: agreement with the reference over the texts and within groups, noise ceiling, signal kept, cost.

        A method that refused has "-", and the reason below the table.
        """
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
        return "\n".join([aligned([header, *rows]), *self._notes()])

    def as_dict(self) -> dict[str, Any]:
        """Everything but the labels, as JSON."""
        return {
            rung.method: {
                "targets": {name: asdict(row) for name, row in rung.targets.items()},
                "flops_per_text": rung.flops_per_text,
                "passes_per_text": rung.passes_per_text,
                "options": None if rung.labels is None else rung.labels.meta["options"],
                "refused": None if rung.refused is None else _parts(rung.refused),
            }
            for rung in self.rungs
        }

    def _notes(self) -> list[str]:
        notes = [
            f"{rung.method}: {', '.join(f'{key}={value!r}' for key, value in rung.handed_on.items())} as {REFERENCE}"
            for rung in self.rungs
            if rung.handed_on
        ]
        for rung in self.rungs:
            if rung.refused is not None:
                notes.append(f"{rung.method} refused: {rung.refused.given} To do: {rung.refused.remedy}")
        return notes


def calibrate(
    lm: LanguageModel,
    sample: Any,
    targets: Any,
    *,
    methods: str | Sequence[str] | Mapping[str, Mapping[str, Any]] = ("grad_dot",),
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
        methods: A method name or several, or a name for the table -> options, with "method" among them where the name is
            another one. The reference is measured in any case and is not named.
        num_texts: How many texts are labelled, drawn by content and `seed`.
        groups: A column of the sample (such as its source) for agreement within groups.
        workdir: Where the labels are kept; an interrupted calibration continues there.
        seed: Decides texts, target texts and halves.
        max_target_texts: As in `oracle.label`; the price of `one_step` is the evaluation of the target texts.
        **reference_options: Options of `one_step`; also of every other method that has an option of this name and was not
            given its own value.

    Returns:
        The ladder. A method that refuses while it measures has its reason there, and no figures.

    Raises:
        InputError: The sample has no such column, `methods` names the reference or a method that looks at no target, an
            option is unknown, the reference refuses, or as in `oracle.label`.
    """
    check_count("num_texts", num_texts, MIN_TEXTS)
    if max_target_texts is not None:
        check_count("max_target_texts", max_target_texts)
    ladder = [_Step(REFERENCE, REFERENCE, {"subtract_shared": True, **reference_options}, {})]
    ladder += _steps(methods, reference_options)
    for step in ladder:
        step.check()
    texts = read_texts(sample)
    if groups is not None and groups not in texts.column_names:
        raise InputError(f"the sample has no column {groups!r}.", ", ".join(texts.column_names), "name one of these for groups.")
    text_ids = list_text_ids(texts)
    chosen = set(hash_order(text_ids, f"calibration:{seed}")[:num_texts])
    drawn = texts.select([row for row, text_id in enumerate(text_ids) if text_id in chosen])
    kinds = None if groups is None else [str(kind) for kind in drawn[groups]]
    shared: dict[str, Any] = {"seed": seed, "max_target_texts": max_target_texts}
    rungs: list[Rung] = []
    for step in ladder:
        folder = None if workdir is None else Path(workdir) / folder_name(step.name)
        try:
            labels = label(lm, drawn, targets, method=step.method, workdir=folder, **shared, **step.options, **step.handed_on)
        except InputError as error:
            if not rungs or _concerns_the_whole_call(error):
                raise
            rungs.append(Rung(step.name, {}, None, None, None, step.handed_on, error))
        else:
            rungs.append(_rung(step, labels, rungs[0].labels if rungs else labels, lm=lm, kinds=kinds))
    return Calibration(rungs)


def folder_name(name: str) -> str:
    """Return a name for a folder of its own: `name`, or where it has signs that file names cannot have, one made of it."""
    if re.fullmatch(r"\w[\w. -]*", name):
        return name
    return f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', name)[:60]}-{fingerprint(name)[:8]}"


@dataclass(frozen=True)
class _Step:
    """A method to be measured: its name in the table, its own options, and those of the reference that it has too."""

    name: str
    method: str
    options: dict[str, Any]
    handed_on: dict[str, Any]

    def check(self) -> None:
        """Refuse options that the method does not take, before anything is measured."""
        try:
            plugins.create(METHODS, self.method, {**self.options, **self.handed_on})
        except InputError as error:
            if not self.handed_on:
                raise
            raise type(error)(
                f"{self.name!r} with {', '.join(self.handed_on)} as {REFERENCE}: {error.given}",
                error.accepted,
                f"give {self.name!r} its own value of what it shares with {REFERENCE}, such as "
                f"{next(iter(self.handed_on))}=None; otherwise: {error.remedy}",
            ) from error


def _steps(methods: str | Sequence[str] | Mapping[str, Mapping[str, Any]], reference_options: Mapping[str, Any]) -> list[_Step]:
    """Read what is compared with the reference, and hand options of the reference on to it."""
    if isinstance(methods, str):
        methods = [methods]
    given = {name: dict(methods[name]) if isinstance(methods, Mapping) else {} for name in methods}
    if REFERENCE in given:
        raise InputError(
            f"{REFERENCE!r} is among the methods to compare with {REFERENCE!r}.",
            "the cheaper methods",
            f"leave it out: it is measured in any case. Its options are arguments of `calibrate` itself; for {REFERENCE!r} with "
            "others, give it another name: {'other steps': {'method': 'one_step', ...}}.",
        )
    steps = []
    for name, options in given.items():
        method = options.pop("method", name)
        if not needs_of(plugins.load(METHODS, method)).targets:
            raise InputError(
                f"method {method!r} looks at no target set, so its values are of no target.",
                "methods that measure influence on a target set",
                "leave it out, and compare its column with `oracle.comparison.spearman`.",
            )
        accepted = plugins.option_names(METHODS, method)
        common = [key for key in reference_options if key in accepted and key not in options]
        steps.append(_Step(name, method, options, {key: reference_options[key] for key in common}))
    return steps


def _concerns_the_whole_call(error: InputError) -> bool:
    """Whether to stop: the folder is another's, the disk is full, or other processes wait and have to stop together."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return together or isinstance(error, (MismatchError, StorageError))


def _parts(error: InputError) -> dict[str, str]:
    return {"given": error.given, "accepted": error.accepted, "to_do": error.remedy}


def _rung(step: _Step, labels: Labels, reference: Labels | None, *, lm: LanguageModel, kinds: list[str] | None) -> Rung:
    assert reference is not None  # the reference does not refuse without ending the call
    cost = labels.meta["cost"]
    pass_flops = 3 * lm.forward_flops_per_token * cost["num_tokens"]  # over all texts that the folder has labels of
    looks_at_model = needs_of(plugins.load(METHODS, labels.meta["method"])).model
    return Rung(
        step.name,
        agreement(reference, labels, groups=kinds),
        cost["label_flops"] / cost["num_labelled"],
        cost["label_flops"] / pass_flops if looks_at_model else None,
        labels,
        step.handed_on,
    )


def _mean_ceiling(rung: Rung) -> float | None:
    values = [row.noise_ceilings[1] for row in rung.targets.values()]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
