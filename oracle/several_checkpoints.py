"""Labels over several checkpoints of one run: their weighted mean, and how far the checkpoints differ.

LESS (Xia et al. 2024, arXiv 2402.04333) and TracIn (Pruthi et al. 2020, arXiv 2002.08484) add up influence over
checkpoints, weighted by their learning rates. The checkpoints are labelled one after another by `oracle.label`, each
into a folder of its own, so a killed call goes on where it stopped and one checkpoint more costs only itself.

The variance of a text's gradient norm over the checkpoints is in the spirit of VoG (Agarwal et al. 2022, arXiv
2008.11600), which takes the variance of the input's gradient, element by element. Here it is the plain variance of one
number per text and checkpoint, and it is called what it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from oracle import plugins
from oracle.artifacts import fingerprint, provenance, read_json, require_same, write_json
from oracle.errors import InputError, InputTypeError, MismatchError, check_choice
from oracle.label_store import IDENTITY_FILE
from oracle.labels import Labels
from oracle.language_model import LanguageModel
from oracle.measure import METHODS, label
from oracle.methods import needs_of
from oracle.processes import working_together

WEIGHTINGS = ("learning_rate", "equal")
NORM, NORM_VARIANCE = "gradient_norm", "gradient_norm_variance"
OWN_IDENTITY = ("checkpoint", "device")  # what differs between the checkpoints' labels
SUMMED_COSTS = ("prepare_seconds", "prepare_flops", "label_seconds", "label_flops", "num_measured_now", "num_tokens")


def label_checkpoints(
    checkpoints: Sequence[LanguageModel | str | Path],
    sample: Any,
    targets: Any,
    *,
    method: str = "less",
    weights: str | Sequence[float] = "learning_rate",
    workdir: str | Path | None = None,
    model_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Labels:
    """Measure influence at several checkpoints and take the weighted mean.

    Args:
        checkpoints: Checkpoint folders, loaded one after another, or LanguageModels; of one run, the newest last.
        sample: As in `oracle.label`.
        targets: As in `oracle.label`.
        method: Name of an oracle method.
        weights: "learning_rate" weighs a checkpoint by its optimiser's, for values that do not have it in them;
            "equal"; or one positive number per checkpoint. They are scaled to add up to 1.
        workdir: Folder for the result. Each checkpoint has a folder in it, named by its fingerprint, and the result is
            made anew from these by every call.
        model_options: Options of `LanguageModel.from_pretrained` for the folders (max_tokens, dtype, device, too_long).
        **options: Those of `oracle.label` and of the method.

    Returns:
        Labels in the order of the sample. Values and halves are weighted means. `columns` has `spread.<target>`, the
        standard deviation of the values over the checkpoints; and, where every checkpoint has `gradient_norm`, its mean
        under that name and its variance as `gradient_norm_variance`. In these every checkpoint counts the same.
        `meta` has fingerprints, weights and learning rates; `meta["model"]` is the last checkpoint.

    Raises:
        InputError: No checkpoint, one of them twice, weights that do not fit, or no learning rate to weigh by.
        MismatchError: The checkpoints differ in tokenizer, vocabulary, length or units, or `workdir` has other labels.

    Example:
        >>> labels = label_checkpoints(["run/step-500", "run/step-1000"], sample, targets, workdir="labels")  # doctest: +SKIP
    """
    _check_arguments(checkpoints, weights, model_options)
    _check_method(method)
    folder = None if workdir is None else Path(workdir)
    if folder is not None:
        _refuse_single(folder)
    measured: list[Labels] = []
    rates: list[float | None] = []
    traits: dict[str, Any] = {}
    text_ids: list[str] = []
    for position, lm in enumerate(_open(checkpoints, model_options or {})):
        traits = _check_traits(lm, traits, position=position)
        name = lm.fingerprint(optimizer=True)
        if any(labels.meta["checkpoint"] == name for labels in measured):
            raise InputError(
                f"checkpoint number {position} is the same as an earlier one ({name}).",
                "checkpoints with different weights or optimiser state",
                "leave it out, or give the one checkpoint a larger weight.",
            )
        rates.append(_learning_rate(lm, position=position) if weights == "learning_rate" else None)
        own = None if folder is None else folder / name
        labels = label(lm, sample, targets, method=method, workdir=own, **options)
        text_ids = labels.text_ids
        # A folder also has the texts of earlier samples; meta counts those of this call.
        measured.append(labels if own is None else replace(Labels.load(own), meta=labels.meta))
        _check_units(measured, weights)
        if folder is not None:
            _bind(folder, own=folder / name)
    combined = _combine(measured, _shares(weights, rates), rates, first=text_ids)
    with working_together() as processes, processes.all_or_none():
        if folder is not None and processes.rank == 0:
            combined.save(folder)
    return combined.take(text_ids)


def _check_arguments(checkpoints: Any, weights: Any, model_options: Mapping[str, Any] | None) -> None:
    if isinstance(checkpoints, (str, Path, LanguageModel)) or not isinstance(checkpoints, Sequence):
        raise InputTypeError(
            f"checkpoints is a {type(checkpoints).__name__}.",
            "a list of checkpoint folders or LanguageModels",
            "put it in a list; for one checkpoint use oracle.label.",
        )
    if not checkpoints:
        raise InputError("there is no checkpoint.", "at least one folder or LanguageModel", "name the checkpoints to label at.")
    wrong = sorted({type(item).__name__ for item in checkpoints if not isinstance(item, (str, Path, LanguageModel))})
    if wrong:
        raise InputTypeError(
            f"among the checkpoints is a {wrong[0]}.", "checkpoint folders or LanguageModels", "wrap modules in LanguageModel."
        )
    if model_options and all(isinstance(item, LanguageModel) for item in checkpoints):
        raise InputError(
            "model_options has no effect: every checkpoint is loaded already.",
            "model_options with at least one folder",
            "leave it out, or pass the options to LanguageModel.",
        )
    if isinstance(weights, str):
        check_choice("weights", weights, WEIGHTINGS)
        return
    numbers = list(weights) if isinstance(weights, Iterable) else [weights]
    are_positive = all(isinstance(number, (int, float, np.number)) and math.isfinite(number) and number > 0 for number in numbers)
    if len(numbers) != len(checkpoints) or not are_positive:
        raise InputError(
            f"weights are {numbers} for {len(checkpoints)} checkpoints.",
            f"{', '.join(map(repr, WEIGHTINGS))}, or one positive number per checkpoint",
            "give a weight for each checkpoint, and leave out those that should not count.",
        )


def _check_method(method: str) -> None:
    if not needs_of(plugins.load(METHODS, method)).model:
        raise InputError(
            f"method={method!r} looks at no model, so every checkpoint gives the same labels.",
            "a method that measures at a checkpoint",
            "use oracle.label, or another method.",
        )


def _open(checkpoints: Sequence[LanguageModel | str | Path], model_options: Mapping[str, Any]) -> Iterator[LanguageModel]:
    """Yield the models one after another; a folder's model is dropped before the next is loaded."""
    for checkpoint in checkpoints:
        if isinstance(checkpoint, LanguageModel):
            yield checkpoint
        else:
            yield LanguageModel.from_pretrained(checkpoint, **model_options)


def _check_traits(lm: LanguageModel, first: dict[str, Any], *, position: int) -> dict[str, Any]:
    """Refuse a checkpoint that sees texts otherwise than the first; return what the first has."""
    own = {
        "tokenizer": lm.tokenizer_fingerprint(),
        "vocabulary_size": lm.vocabulary_size,
        "max_tokens": lm.max_tokens,
        "too_long": lm.too_long,
        "num_trainable_parameters": sum(p.numel() for p in lm.module.parameters() if p.requires_grad),
    }
    differences = [f"{key} {own[key]!r} and not {value!r}" for key, value in first.items() if own[key] != value]
    if differences:
        raise MismatchError(
            f"checkpoint number {position} has {', '.join(differences)} as the first.",
            "checkpoints of one run: the same tokenizer, vocabulary, max_tokens and trainable parameters",
            "leave it out, or load all of them with the same options.",
        )
    return own


def _learning_rate(lm: LanguageModel, *, position: int) -> float:
    """Return the one learning rate of the trainable parameters."""
    groups = [] if lm.optimizer is None else lm.optimizer.param_groups
    found = sorted({float(group["lr"]) for group in groups if any(parameter.requires_grad for parameter in group["params"])})
    if len(found) != 1 or found[0] <= 0:
        raise InputError(
            f"checkpoint number {position} has {f'the learning rates {found}' if found else 'no optimiser'} to be weighed by.",
            "an optimiser with one learning rate above 0",
            "pass weights as a list (a schedule that ends at 0 has its last checkpoint there: take the mean rate of the "
            "steps before it, as LESS does), or weights='equal'.",
        )
    return found[0]


def _check_units(measured: Sequence[Labels], weights: Any) -> None:
    """Refuse to add up different units, and to count a learning rate twice."""
    units = measured[-1].units
    if units != measured[0].units:
        raise MismatchError(
            f"the values of checkpoint number {len(measured) - 1} are in {units!r}, those of the first in {measured[0].units!r}.",
            "checkpoints whose optimiser state gives the same units",
            "load every checkpoint with its optimiser, or choose the method's options so that none needs it.",
        )
    is_whole_step = units.startswith("nats per target token") and "unit of learning rate" not in units
    if is_whole_step and isinstance(weights, str) and weights == "learning_rate":
        raise InputError(
            f"weights='learning_rate' would count the learning rate twice: the values of {measured[0].meta['method']!r} "
            f"are in {units}, the effect of a whole step.",
            "'equal' or a list of weights for values in nats; 'learning_rate' for cosines and values per unit of it",
            "pass weights='equal'; the labels of this checkpoint are kept where there is a workdir.",
        )


def _refuse_single(folder: Path) -> None:
    """Refuse the folder of a call of `label`, before anything is measured."""
    if (folder / IDENTITY_FILE).exists() and "labels_over" not in read_json(folder / IDENTITY_FILE):
        raise MismatchError(
            f"{folder} has the labels of one checkpoint.",
            "a new folder, or one that label_checkpoints made",
            "name another folder.",
        )


def _bind(folder: Path, *, own: Path) -> None:
    """Let the folder hold labels made in one way only; which checkpoints and weights may change.

    Raises:
        MismatchError: It has labels made otherwise.
    """
    shared = {key: value for key, value in read_json(own / IDENTITY_FILE).items() if key not in OWN_IDENTITY}
    identity = {"labels_over": "several checkpoints", **shared}
    if (folder / IDENTITY_FILE).exists():
        require_same(read_json(folder / IDENTITY_FILE), identity, where=folder)
    else:
        write_json(folder / IDENTITY_FILE, identity)


def _shares(weights: str | Sequence[float], rates: Sequence[float | None]) -> np.ndarray:
    """Return the weight of every checkpoint, (M,), which add up to 1."""
    if isinstance(weights, str):
        numbers = np.array([1.0 if rate is None else rate for rate in rates], dtype=np.float64)
    else:
        numbers = np.array(list(weights), dtype=np.float64)
    return numbers / numbers.sum()


def _combine(measured: Sequence[Labels], shares: np.ndarray, rates: Sequence[float | None], *, first: list[str]) -> Labels:
    """Average labels of M checkpoints over the texts that all have: the sample's first, then those of earlier ones."""
    common = set.intersection(*(set(labels.text_ids) for labels in measured))
    text_ids = [*first, *sorted(common - set(first))]
    rows = [labels.take(text_ids) for labels in measured]
    values = np.stack([labels.values for labels in rows]).astype(np.float64)  # (M, S, C)
    halves = np.stack([labels.halves for labels in rows]).astype(np.float64)  # (M, 2, S, C)
    columns = {"num_tokens": rows[-1].columns["num_tokens"]}
    for name, spread in zip(rows[0].target_names, values.std(0).T, strict=True):
        columns[f"spread.{name}"] = spread.astype(np.float32)
    if all(NORM in labels.columns for labels in rows):
        norms = np.stack([labels.columns[NORM] for labels in rows]).astype(np.float64)  # (M, S)
        columns[NORM], columns[NORM_VARIANCE] = norms.mean(0).astype(np.float32), np.var(norms, axis=0).astype(np.float32)
    return Labels(
        np.tensordot(shares, values, axes=1).astype(np.float32),
        text_ids,
        rows[0].target_names,
        rows[0].units,
        np.tensordot(shares, halves, axes=1).astype(np.float32),
        columns,
        _meta(measured, shares, rates),
    )


def _meta(measured: Sequence[Labels], shares: np.ndarray, rates: Sequence[float | None]) -> dict[str, Any]:
    """Join what is known of the checkpoints; costs are summed, what they share is taken from the last."""
    last = {key: value for key, value in measured[-1].meta.items() if key not in OWN_IDENTITY}
    names = [labels.meta["checkpoint"] for labels in measured]
    costs = [labels.meta["cost"] for labels in measured]
    return {
        **last,
        "checkpoint": fingerprint(names),
        "checkpoints": names,
        "weights": shares.tolist(),
        "learning_rates": list(rates),
        "facts": {"checkpoints": [labels.meta["facts"] for labels in measured]},
        "cost": {**{key: sum(cost[key] for cost in costs) for key in SUMMED_COSTS}, "num_labelled": costs[-1]["num_labelled"]},
        "provenance": provenance(),
    }
