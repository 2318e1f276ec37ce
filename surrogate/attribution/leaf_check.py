"""Proof that a model's leaf values follow from the given rows: every one is recomputed from gradients and compared.

A leaf's value is -eta S(G) / (H + lambda), with the sums G and H of the gradients and Hessians of its rows and S the soft
threshold of reg_alpha. Whatever changes this (other rows, another order under bagging, missing weights or init scores,
GOSS, DART, monotone constraints, ...) shows as a difference, so one check stands for all of them. What the model text
leaves open is settled on the way: the learning rate of round 0, digits that the text cuts off, and which leaves below a
categorical split carry cat_l2.

Trees without a split are not compared: LightGBM stores 0 for them whatever their rows' gradients are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oracle.errors import InputError
from surrogate.attribution.model_text import NO_SPLIT, ModelText, is_cut_off
from surrogate.attribution.objectives import Array
from surrogate.attribution.training_rows import TrainingRows

FLOAT32_ERROR = 2.0**-22  # of a float32 gradient times a float32 weight, four roundings
CUT_DIGITS_ERROR = 5e-6  # relative, of a number printed with six digits
SMALLEST_HESSIANS = 3e-15  # LightGBM starts sums of Hessians from one to three times 1e-15
SCORE_ERROR = 1e-12  # relative, of scores that were summed in another order
SUSPECTS = {
    "boosting": (("gbdt",), "boosting_type", "train with boosting_type='gbdt'"),
    "data_sample_strategy": (("bagging",), "data_sample_strategy='goss'", "train with data_sample_strategy='bagging'"),
    "monotone_constraints": (("",), "monotone_constraints", "train without monotone constraints"),
    "max_delta_step": (("0",), "max_delta_step", "train with max_delta_step=0"),
    "path_smooth": (("0",), "path_smooth", "train with path_smooth=0"),
    "use_quantized_grad": (("0", "false"), "use_quantized_grad", "train with use_quantized_grad=False"),
    "bagging_by_query": (("0", "false"), "bagging_by_query", "train with bagging_by_query=False"),
    "device_type": (("cpu",), "device_type (float32 sums of a GPU)", "train on the CPU or with gpu_use_dp=True"),
}


@dataclass(frozen=True)
class LeafStatistics:
    """What every leaf's value is made of; each list holds one array (L,) per tree.

    Attributes:
        hessians: H, sum of the weighted Hessians of the rows that grew the tree.
        counts: Number of these rows, n(leaf).
        denominators: H plus the leaf's penalty.
        passes: 1, or 0 where reg_alpha holds the leaf at 0 and no gradient passes.
        steps: What the leaf adds to the score: the stored value without the init score, 0 for trees without a split.
        learning_rates: (T,) proven shrinkage of each round.
    """

    hessians: list[Array]
    counts: list[NDArray[np.int64]]
    denominators: list[Array]
    passes: list[Array]
    steps: list[Array]
    learning_rates: Array


@dataclass(frozen=True)
class _Sums:
    """Per tree (L,): gradients, their absolute values, Hessians, counts; `largest_score` per tree."""

    gradients: list[Array]
    sizes: list[Array]
    hessians: list[Array]
    counts: list[NDArray[np.int64]]
    largest_score: list[float]


def check_leaf_values(rows: TrainingRows) -> LeafStatistics:
    """Recompute every leaf value from the rows' gradients, and return what the leaves are made of.

    Raises:
        InputError: A leaf holds other rows or another value than the given rows lead to; the message names the
            features of the model that may be the cause, and what to do.
    """
    rounded = rows.rounded()
    sums = _sums(rounded)
    _check_counts(rounded, sums)
    numerators = [_soft_threshold(total, rows.ensemble.reg_alpha) for total in sums.gradients]
    rates = _proven_rates(rounded, sums, numerators)
    penalties = _penalties(rounded, sums, numerators, rates)
    worst = _worst_difference(rounded, sums, numerators, rates=rates, penalties=penalties)
    if worst is not None:
        raise _refusal(rows.ensemble.text, worst, rows.ensemble.num_outputs)
    exact = sums if rounded is rows else _sums(rows)
    return LeafStatistics(
        hessians=exact.hessians,
        counts=exact.counts,
        denominators=[total + penalty for total, penalty in zip(exact.hessians, penalties, strict=True)],
        passes=[(np.abs(total) > rows.ensemble.reg_alpha).astype(np.float64) for total in exact.gradients]
        if rows.ensemble.reg_alpha
        else [np.ones(len(total)) for total in exact.gradients],
        steps=rows.ensemble.steps(),
        learning_rates=rates,
    )


def _sums(rows: TrainingRows) -> _Sums:
    sums = _Sums([], [], [], [], [])
    num_outputs = rows.ensemble.num_outputs
    for this in rows.rounds():
        counted = None if this.in_bag is None else this.in_bag.astype(np.float64)
        for output in range(num_outputs):
            tree = this.number * num_outputs + output
            leaves, num_leaves = rows.leaves[:, tree].astype(np.intp), len(rows.ensemble.leaf_values[tree])
            gradients = this.gradients[:, output]
            sums.gradients.append(leaf_totals(leaves, gradients, num_leaves))
            sums.sizes.append(leaf_totals(leaves, np.abs(gradients), num_leaves))
            sums.hessians.append(leaf_totals(leaves, this.hessians[:, output], num_leaves))
            sums.counts.append(np.bincount(leaves, counted, num_leaves).astype(np.int64))
            sums.largest_score.append(float(np.abs(this.scores[:, output]).max()))
    return sums


def leaf_totals(leaves: NDArray[np.integer], values: Array, num_leaves: int) -> Array:
    """Return the sum of values (n,) over the rows of each leaf (L,)."""
    return np.bincount(leaves, values, num_leaves).astype(np.float64)


def _soft_threshold(totals: Array, reg_alpha: float) -> Array:
    return np.sign(totals) * np.maximum(np.abs(totals) - reg_alpha, 0.0)


def _check_counts(rows: TrainingRows, sums: _Sums) -> None:
    for tree, (text, counts) in enumerate(zip(rows.ensemble.text.trees, sums.counts, strict=True)):
        if text.is_constant or (text.leaf_counts < 0).any() or np.array_equal(text.leaf_counts, counts):
            continue
        leaf = int(np.flatnonzero(text.leaf_counts != counts)[0])
        causes, remedies = _suspects(rows.ensemble.text)
        raise InputError(
            f"leaf {leaf} of tree {tree} was grown on {text.leaf_counts[leaf]} rows, but {counts[leaf]} of the given rows reach "
            f"it{causes}.",
            "the very rows that the model was trained on, in the same order (bagging draws rows by their place), without "
            "those of the validation set",
            f"pass these rows{remedies}.",
        )


def _proven_rates(rows: TrainingRows, sums: _Sums, numerators: list[Array]) -> Array:
    """Return the learning rates (T,), with round 0 and cut-off digits settled by the leaves themselves."""
    ensemble = rows.ensemble
    steps, rates = ensemble.steps(), ensemble.learning_rates.copy()
    for number in range(ensemble.num_rounds):
        trees = range(number * ensemble.num_outputs, (number + 1) * ensemble.num_outputs)
        if number and not is_cut_off(float(f"{rates[number]:.6g}")):
            continue
        across = aligned = 0.0
        for tree in trees:
            is_plain = ensemble.text.trees[tree].categorical_parents == NO_SPLIT
            with np.errstate(divide="ignore", invalid="ignore"):
                newton = np.nan_to_num(-numerators[tree] / (sums.hessians[tree] + ensemble.reg_lambda)) * is_plain
            across += float((sums.counts[tree] * newton) @ steps[tree])
            aligned += float((sums.counts[tree] * newton) @ newton) * (not ensemble.text.trees[tree].is_constant)
        if aligned > 0:
            rates[number] = _settled(across / aligned, rates[number], ensemble.text, is_first=number == 0)
    return rates


def _settled(measured: float, stated: float, text: ModelText, *, is_first: bool) -> float:
    """Return the stated rate where the measured one agrees with it, else one that is known and agrees, else the measured."""
    tolerance = CUT_DIGITS_ERROR * 2
    candidates = [stated, *text.known_numbers, *(tree.shrinkage for tree in text.trees[1:])] if is_first else [stated]
    agreeing = [rate for rate in candidates if abs(measured - rate) <= tolerance * abs(rate)]
    if not agreeing:
        return measured if is_first else stated
    return measured if is_cut_off(agreeing[0]) and agreeing[0] not in text.known_numbers else agreeing[0]


def _penalties(rows: TrainingRows, sums: _Sums, numerators: list[Array], rates: Array) -> list[Array]:
    """Return the penalty (L,) of each leaf: lambda, plus cat_l2 below splits of features that LightGBM splits by sorting.

    The text does not say which categorical features these are (those with more than `max_cat_to_onehot` bins), so
    each feature's leaves decide: the reading that comes closer to the stored values over all of them.
    """
    ensemble, steps = rows.ensemble, rows.ensemble.steps()
    misfits: dict[int, list[float]] = {}
    for tree, text in enumerate(ensemble.text.trees):
        for feature in np.unique(text.categorical_parents[text.categorical_parents != NO_SPLIT]):
            below = text.categorical_parents == feature
            misfit = misfits.setdefault(int(feature), [0.0, 0.0])
            for reading, extra in enumerate((0.0, ensemble.cat_l2)):
                value = (
                    -rates[tree // ensemble.num_outputs] * numerators[tree] / (sums.hessians[tree] + ensemble.reg_lambda + extra)
                )
                misfit[reading] += float(np.abs(value - steps[tree])[below].sum())
    is_sorted = {feature for feature, (plain, extra) in misfits.items() if extra < plain}
    return [
        ensemble.reg_lambda + ensemble.cat_l2 * np.isin(text.categorical_parents, list(is_sorted)).astype(np.float64)
        for text in ensemble.text.trees
    ]


@dataclass(frozen=True)
class _Difference:
    tree: int
    leaf: int
    stored: float
    recomputed: float
    num_leaves: int


def _worst_difference(
    rows: TrainingRows, sums: _Sums, numerators: list[Array], *, rates: Array, penalties: list[Array]
) -> _Difference | None:
    """Return the leaf whose value is farthest beyond what rounding explains, or None."""
    ensemble, steps = rows.ensemble, rows.ensemble.steps()
    cut_off = is_cut_off(ensemble.reg_lambda) * CUT_DIGITS_ERROR
    worst, largest, num_bad = None, 1.0, 0
    for tree, text in enumerate(ensemble.text.trees):
        if text.is_constant:
            continue
        rate, hessian = rates[tree // ensemble.num_outputs], sums.hessians[tree]
        denominator = hessian + penalties[tree]
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.where(denominator > 0, -rate * numerators[tree] / denominator, 0.0)
            rounding = FLOAT32_ERROR * (rate * sums.sizes[tree] + np.abs(steps[tree]) * hessian)
            rounding += cut_off * np.abs(steps[tree]) * penalties[tree] + SMALLEST_HESSIANS * np.abs(value)
            allowed = np.where(denominator > 0, rounding / denominator, 0.0)
        allowed += SCORE_ERROR * (sums.largest_score[tree] + np.abs(ensemble.leaf_values[tree]))
        ratio = np.abs(value - steps[tree]) / np.maximum(allowed, np.finfo(np.float64).tiny)
        num_bad += int((ratio > 1).sum())
        leaf = int(np.argmax(ratio))
        if ratio[leaf] > largest:
            largest, worst = float(ratio[leaf]), (tree, leaf, float(steps[tree][leaf]), float(value[leaf]))
    return None if worst is None else _Difference(*worst, num_bad)


def _suspects(text: ModelText) -> tuple[str, str]:
    """Return, as ends of sentences, the features of the model that change leaf values or bags, and what to do."""
    found = [
        (shown, remedy) for name, (plain, shown, remedy) in SUSPECTS.items() if text.parameters.get(name, plain[0]) not in plain
    ]
    if not found:
        return "", ""
    return f"; the model uses {', '.join(shown for shown, _ in found)}", f", or {', '.join(remedy for _, remedy in found)}"


def _refusal(text: ModelText, worst: _Difference, num_outputs: int) -> InputError:
    causes, remedies = _suspects(text)
    total = sum(len(tree.leaf_values) for tree in text.trees)
    place = f"tree {worst.tree} (round {worst.tree // num_outputs}, output {worst.tree % num_outputs})"
    return InputError(
        f"leaf {worst.leaf} of {place} adds {worst.stored:.9g}, but the given rows lead to {worst.recomputed:.9g}; "
        f"{worst.num_leaves} of {total} leaves differ{causes}.",
        "a model whose leaf values follow from the gradients of the given rows, labels, weights and init scores",
        f"pass what the model was trained with (X, y, sample_weight, init_score, in that order of rows){remedies}; "
        "LeaveOneOut retrains and needs no such model.",
    )
