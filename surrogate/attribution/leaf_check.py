"""Proof that a model's leaf values follow from the given rows: every one is recomputed from gradients and compared.

A leaf's value is -eta S(G) / (H + lambda), with the sums G and H of the gradients and Hessians of its rows and S the soft
threshold of reg_alpha. Whatever changes this (other rows, another order under bagging, missing weights or init scores,
GOSS, DART, monotone constraints, ...) shows as a difference, so one check stands for all of them. What the model text
leaves open is settled on the way: the learning rate of round 0, digits that the text cuts off, and which leaves below a
categorical split carry cat_l2.

One cause needs no unusual option: LightGBM bundles features in which one value prevails (`enable_bundle`), and where two of
a bundle differ from it in the same row, one of them can lose its value in training. The row is then routed to another leaf
than it grew.

Trees without a split are not compared: LightGBM stores 0 for them whatever their rows' gradients are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oracle.errors import InputError
from surrogate.attribution.model_text import NO_SPLIT, ModelText, is_cut_off
from surrogate.attribution.objectives import Array, Objective
from surrogate.attribution.training_rows import TrainingRows

FLOAT32_ERROR = 2.0**-22  # of a float32 gradient times a float32 weight, four roundings
CUT_DIGITS_ERROR = 5e-6  # relative, of a number printed with six digits
MEASURED_RATE_ERROR = 1e-7  # relative, of a rate that leaf values of float32 gradients lead to
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
ROWS_LOOKED_AT = 1000
PREVAILING_SHARE = 0.5  # of the rows; bundles were seen from two thirds on
BUNDLING = (
    "; LightGBM may have bundled features in which one value prevails (enable_bundle), and lost some of their values",
    ", or train with enable_bundle=False",
)


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


def check_leaf_values(rows: TrainingRows, features: Any = None) -> LeafStatistics:
    """Recompute every leaf value from the rows' gradients, and return what the leaves are made of.

    Args:
        rows: The training rows.
        features: Their features (n, D), read where values differ: whether LightGBM may have bundled some of them.

    Raises:
        InputError: A leaf holds other rows or another value than the given rows lead to; the message names the
            features of the model that may be the cause, and what to do.
    """
    rounded = rows.rounded()
    sums = _sums(rounded)
    _check_counts(rounded, sums, features)
    numerators = [_soft_threshold(total, rows.ensemble.reg_alpha) for total in sums.gradients]
    rates = _proven_rates(rounded, sums, numerators)
    penalties = _penalties(rounded, sums, numerators, rates)
    worst = _worst_difference(rounded, sums, numerators, rates=rates, penalties=penalties)
    if worst is not None:
        raise _refusal(rows.ensemble.text, worst, rows.ensemble.num_outputs, features)
    is_same = rounded is rows or (rows.has_unit_hessians and not rows.ensemble.reg_alpha)  # of what is read below
    exact = sums if is_same else _sums(rows)
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
    num_outputs, has_units = rows.ensemble.num_outputs, rows.has_unit_hessians
    for this in rows.rounds():
        counted = None if this.in_bag is None else this.in_bag.astype(np.float64)
        for output in range(num_outputs):
            tree = this.number * num_outputs + output
            leaves, num_leaves = rows.leaves[:, tree].astype(np.intp), len(rows.ensemble.leaf_values[tree])
            gradients, hessians = this.gradients[:, output], this.hessians[:, output]
            counts = np.bincount(leaves, counted, num_leaves)
            sums.gradients.append(leaf_totals(leaves, gradients, num_leaves))
            sums.sizes.append(leaf_totals(leaves, rows.ensemble.objective.sizes(gradients, hessians), num_leaves))
            sums.hessians.append(counts.astype(np.float64) if has_units else leaf_totals(leaves, hessians, num_leaves))
            sums.counts.append(counts.astype(np.int64))
            sums.largest_score.append(float(np.abs(this.scores[:, output]).max()))
    return sums


def leaf_totals(leaves: NDArray[np.integer], values: Array, num_leaves: int) -> Array:
    """Return the sum of values (n,) over the rows of each leaf (L,)."""
    return np.bincount(leaves, values, num_leaves).astype(np.float64)


def _soft_threshold(totals: Array, reg_alpha: float) -> Array:
    return np.sign(totals) * np.maximum(np.abs(totals) - reg_alpha, 0.0)


def _check_counts(rows: TrainingRows, sums: _Sums, features: Any) -> None:
    for tree, (text, counts) in enumerate(zip(rows.ensemble.text.trees, sums.counts, strict=True)):
        if text.is_constant or (text.leaf_counts < 0).any() or np.array_equal(text.leaf_counts, counts):
            continue
        leaf = int(np.flatnonzero(text.leaf_counts != counts)[0])
        causes, remedies = _suspects(rows.ensemble.text, features)
        raise InputError(
            f"leaf {leaf} of tree {tree} was grown on {text.leaf_counts[leaf]} rows, but {counts[leaf]} of the given rows reach "
            f"it{causes}.",
            "the very rows that the model was trained on, in the same order (bagging draws rows by their place), without "
            "those of the validation set",
            f"pass these rows{remedies}.",
        )


def _proven_rates(rows: TrainingRows, sums: _Sums, numerators: list[Array]) -> Array:
    """Return the learning rates (T,), with round 0 and cut-off digits settled by the leaves themselves."""
    stated, steps = rows.ensemble.learning_rates, rows.ensemble.steps()
    rates = stated.copy()
    for printed in np.unique(stated[1:]):
        if is_cut_off(printed):
            alike = np.flatnonzero(stated == printed)
            measured = _measured_rate(rows, sums, numerators, steps=steps, rounds=alike[alike > 0])
            rates[alike] = _settled(measured, [printed], otherwise=printed)
    measured = _measured_rate(rows, sums, numerators, steps=steps, rounds=np.zeros(1, dtype=np.intp))
    candidates = [rates[0], *rows.ensemble.text.known_numbers, *rates[1:]]
    rates[0] = _settled(measured, candidates, otherwise=rates[0] if measured is None else measured)
    return rates


def _measured_rate(
    rows: TrainingRows, sums: _Sums, numerators: list[Array], *, steps: list[Array], rounds: NDArray[np.intp]
) -> float | None:
    """Return the rate that brings Newton steps closest to the stored ones in these rounds, or None where there are none."""
    across = aligned = 0.0
    for tree in (rounds[:, None] * rows.ensemble.num_outputs + np.arange(rows.ensemble.num_outputs)).ravel():
        text = rows.ensemble.text.trees[tree]
        if not text.is_constant:
            with np.errstate(divide="ignore", invalid="ignore"):
                newton = np.nan_to_num(-numerators[tree] / (sums.hessians[tree] + rows.ensemble.reg_lambda))
            weights = sums.counts[tree] * (text.categorical_parents == NO_SPLIT)
            across += float((weights * newton) @ steps[tree])
            aligned += float((weights * newton) @ newton)
    return across / aligned if aligned > 0 else None


def _settled(measured: float | None, candidates: Sequence[float], *, otherwise: float) -> float:
    """Return the first candidate that agrees with the measured rate, or the rate itself where it shows further digits."""
    if measured is None:
        return otherwise
    agreeing = [rate for rate in candidates if abs(measured - rate) <= 2 * CUT_DIGITS_ERROR * abs(rate)]
    if not agreeing:
        return otherwise
    has_more_digits = is_cut_off(agreeing[0]) and abs(measured - agreeing[0]) > MEASURED_RATE_ERROR * measured
    return measured if has_more_digits else agreeing[0]


def _penalties(rows: TrainingRows, sums: _Sums, numerators: list[Array], rates: Array) -> list[Array]:
    """Return the penalty (L,) of each leaf: lambda, plus cat_l2 below splits of features that LightGBM splits by sorting.

    The text does not say which categorical features these are (those with more than `max_cat_to_onehot` bins), so
    each feature's leaves decide: the reading that comes closer to the stored values over all of them.
    """
    ensemble, steps = rows.ensemble, rows.ensemble.steps()
    misfits: dict[int, list[float]] = {}
    for tree, text in enumerate(ensemble.text.trees):
        if not text.has_categorical_splits:
            continue
        for feature in np.unique(text.categorical_parents[text.categorical_parents != NO_SPLIT]):
            below = text.categorical_parents == feature
            misfit = misfits.setdefault(int(feature), [0.0, 0.0])
            for reading, extra in enumerate((0.0, ensemble.cat_l2)):
                value = (
                    -rates[tree // ensemble.num_outputs] * numerators[tree] / (sums.hessians[tree] + ensemble.reg_lambda + extra)
                )
                misfit[reading] += float(np.abs(value - steps[tree])[below].sum())
    if not misfits:
        return [np.full(len(text.leaf_values), ensemble.reg_lambda) for text in ensemble.text.trees]
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
    ensemble = rows.ensemble
    trees = np.repeat(np.arange(len(ensemble.leaf_values)), np.diff(ensemble.leaf_offsets))  # (L,) of all leaves
    rate, step, score = (
        rates[trees // ensemble.num_outputs],
        np.concatenate(ensemble.steps()),
        np.array(sums.largest_score)[trees],
    )
    numerator, size, hessian, penalty = map(np.concatenate, (numerators, sums.sizes, sums.hessians, penalties))
    denominator = hessian + penalty
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(denominator > 0, -rate * numerator / denominator, 0.0)
        of_gradients = FLOAT32_ERROR + _lost_digits(*_numbers_of(ensemble.objective)) * 2 * (1 + score)
        rounding = of_gradients * (rate * size + np.abs(step) * hessian) + SMALLEST_HESSIANS * np.abs(value)
        rounding += _lost_digits(ensemble.reg_alpha) * rate * ensemble.reg_alpha
        rounding += _lost_digits(ensemble.reg_lambda, ensemble.cat_l2) * np.abs(step) * penalty
        allowed = np.where(denominator > 0, rounding / denominator, 0.0)
    allowed += SCORE_ERROR * (score + np.abs(np.concatenate(ensemble.leaf_values)))
    allowed += _lost_digits(*_numbers_of(ensemble.objective)) * score * (trees < ensemble.num_outputs)  # the init score's
    ratio = np.abs(value - step) / np.maximum(allowed, np.finfo(np.float64).tiny)
    ratio[np.array([text.is_constant for text in ensemble.text.trees])[trees]] = 0.0
    worst = int(np.argmax(ratio))
    if ratio[worst] <= 1:
        return None
    tree = int(trees[worst])
    leaf = worst - int(ensemble.leaf_offsets[tree])
    return _Difference(tree, leaf, float(step[worst]), float(value[worst]), int((ratio > 1).sum()))


def _lost_digits(*parameters: float) -> float:
    """Return the relative error of parameters whose further digits the text may have cut off."""
    return CUT_DIGITS_ERROR if any(is_cut_off(number) for number in parameters) else 0.0


def _numbers_of(objective: Objective) -> list[float]:
    """Return the parameters of an objective's formulas."""
    values = [getattr(objective, known.name) for known in dataclasses.fields(objective)]
    return [value for value in values if isinstance(value, float)]


def _suspects(text: ModelText, features: Any) -> tuple[str, str]:
    """Return, as ends of sentences, the features of the model that change leaf values or bags, and what to do."""
    found = [
        (shown, remedy) for name, (plain, shown, remedy) in SUSPECTS.items() if text.parameters.get(name, plain[0]) not in plain
    ]
    causes = f"; the model uses {', '.join(shown for shown, _ in found)}" if found else ""
    remedies = "".join(f", or {remedy}" for _, remedy in found)
    if text.parameters.get("enable_bundle") in ("1", "true") and _may_be_bundled(features):
        causes, remedies = causes + BUNDLING[0], remedies + BUNDLING[1]
    return causes, remedies


def _may_be_bundled(features: Any) -> bool:
    """Whether one value prevails in two of the features at least, as far as the first rows say."""
    if features is None or hasattr(features, "tocsr"):
        return features is not None
    sample = np.asarray(features[:ROWS_LOOKED_AT])
    if sample.ndim != 2 or sample.dtype.kind not in "biuf":  # a DataFrame with categories
        return True
    ordered, run = np.sort(sample, axis=0), int(np.ceil(PREVAILING_SHARE * len(sample)))
    return int((ordered[run - 1 :] == ordered[: len(sample) - run + 1]).any(axis=0).sum()) > 1


def _refusal(text: ModelText, worst: _Difference, num_outputs: int, features: Any) -> InputError:
    causes, remedies = _suspects(text, features)
    total = sum(len(tree.leaf_values) for tree in text.trees)
    place = f"tree {worst.tree} (round {worst.tree // num_outputs}, output {worst.tree % num_outputs})"
    return InputError(
        f"leaf {worst.leaf} of {place} adds {worst.stored:.9g}, but the given rows lead to {worst.recomputed:.9g}; "
        f"{worst.num_leaves} of {total} leaves differ{causes}.",
        "a model whose leaf values follow from the gradients of the given rows, labels, weights and init scores",
        f"pass what the model was trained with (X, y, sample_weight, init_score, in the order of training; an estimator's "
        f"class_weight is part of its Booster's sample_weight){remedies}; "
        "LeaveOneOut retrains and needs no such model.",
    )
