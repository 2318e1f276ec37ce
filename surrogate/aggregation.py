"""From one score per target set to one number per text.

Columns of different targets have different spreads, so sums are taken over z-scores unless asked otherwise.
A column without spread ranks nothing and its z-score is 0. Aggregation is a choice of the selection rule
and happens nowhere else.

Left out: non-linear trade-offs between targets (Pareto fronts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from oracle.errors import InputError, check_choice

WAYS = ("sum_z", "mean", "max_z", "min_z")
WEIGHTED_WAYS = ("sum_z", "mean")
COMBINE_HELP = "How targets become one number: 'sum_z' (mean of z-scores), 'mean', 'max_z', 'min_z', or one target's name."
WEIGHTS_HELP = "Weight of each target by name, for 'sum_z' and 'mean'; None weighs all alike."


def combine(
    scores: np.ndarray, how: str = "sum_z", *, target_names: Sequence[str], weights: Mapping[str, float] | None = None
) -> np.ndarray:
    """Reduce scores of C targets to one number per text; more is better.

    Args:
        scores: (N, C), finite.
        how: "sum_z" is the weighted mean of the columns' z-scores; "mean" that of the raw columns; "max_z"
            favours what helps some target, "min_z" what hurts none; a target's name takes that column alone.
        target_names: Names of the C columns.
        weights: One non-negative weight per target, for "sum_z" and "mean".

    Returns:
        (N,) float64.

    Raises:
        InputError: Unknown `how`, or weights that do not fit.
    """
    names = list(target_names)
    assert scores.ndim == 2 and scores.shape[1] == len(names)
    column_weights = _check(how, names, weights)
    values = np.asarray(scores, dtype=np.float64)  # (N, C)
    if how not in WAYS:
        return values[:, names.index(how)].copy()
    if how == "mean":
        return values @ column_weights
    z_scores = standardise(values)
    if how == "sum_z":
        return z_scores @ column_weights
    return z_scores.max(axis=1) if how == "max_z" else z_scores.min(axis=1)


def standardise(values: np.ndarray) -> np.ndarray:
    """Return z-scores along the first axis; 0 where a column has no spread beyond rounding."""
    centred = values - values.mean(axis=0)
    spread = centred.std(axis=0)
    has_spread = spread > 1e-12 * np.abs(values).max(axis=0)
    return np.where(has_spread, centred / np.where(has_spread, spread, 1.0), 0.0)


def targets_used(how: str, *, target_names: Sequence[str], weights: Mapping[str, float] | None = None) -> list[str]:
    """Return the names of the targets that `combine` looks at (a weight of 0 counts as not looking)."""
    names = list(target_names)
    column_weights = _check(how, names, weights)
    if how not in WAYS:
        return [how]
    return [name for name, weight in zip(names, column_weights, strict=True) if weight > 0]


def _check(how: str, names: list[str], weights: Mapping[str, float] | None) -> np.ndarray:
    """Return C weights that sum to 1."""
    if how in WAYS and how in names:
        raise InputError(
            f"combine={how!r} is both a way to combine and the name of a target.",
            "target names other than " + ", ".join(WAYS),
            "rename the target.",
        )
    check_choice("combine", how, (*WAYS, *names))
    if weights is None:
        return np.full(len(names), 1.0 / len(names))
    if how not in WEIGHTED_WAYS:
        raise InputError(
            f"weights have no effect with combine={how!r}.",
            "weights with " + " or ".join(WEIGHTED_WAYS),
            "leave out weights, or choose another combine.",
        )
    if sorted(weights) != sorted(names):
        raise InputError(
            f"weights name the targets {', '.join(weights) or 'none'}.",
            "one weight for each of " + ", ".join(names),
            "give every target a weight; 0 ignores it.",
        )
    values = np.array([weights[name] for name in names], dtype=np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0):
        raise InputError(
            f"weights={dict(weights)!r} cannot be used.", "finite weights of at least 0, not all 0", "correct the weights."
        )
    return values / values.sum()
