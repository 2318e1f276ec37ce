"""From one score per target set to one number per text.

Columns of different targets have different spreads, so sums are taken over z-scores unless asked otherwise.
A column without spread ranks nothing and its z-score is 0. Aggregation is a choice of the selection rule
and happens nowhere else. Every step is done row by row or block by block, so a pool that is streamed from disk in
blocks gets the same bits as one in memory, and equal scores give equal numbers at every position.

Left out: non-linear trade-offs between targets (Pareto fronts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from oracle.errors import InputError, check_choice

BLOCK_ROWS = 65_536  # rows whose sum is taken at once; the sums of blocks are added in order
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
    way = Combination.of(how, target_names=names, weights=weights)
    values = np.asarray(scores, dtype=np.float64)  # (N, C)
    return way.rows(values, moments(lambda: _in_blocks(values)) if way.uses_moments else None)


def standardise(values: np.ndarray) -> np.ndarray:
    """Return z-scores along the first axis; 0 where a column has no spread beyond rounding."""
    return moments(lambda: _in_blocks(values)).z_scores(values)


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of each column; a standard deviation of 0 stands for no spread beyond rounding."""

    mean: np.ndarray
    spread: np.ndarray

    def z_scores(self, values: np.ndarray) -> np.ndarray:
        """Return the z-scores of some rows; 0 where there is no spread."""
        has_spread = self.spread > 0
        return np.where(has_spread, (values - self.mean) / np.where(has_spread, self.spread, 1.0), 0.0)


def moments(blocks: Callable[[], Iterable[np.ndarray]]) -> Moments:
    """Measure columns that come in blocks of `BLOCK_ROWS` rows, float64; `blocks` is called three times."""
    num_rows, total, largest = 0, np.zeros(()), np.zeros(())
    for block in blocks():
        num_rows, total = num_rows + len(block), total + block.sum(axis=0)
        largest = np.maximum(largest, np.abs(block).max(axis=0))
    mean = np.asarray(total / num_rows)
    offset = sum((block - mean).sum(axis=0) for block in blocks()) / num_rows  # what rounding left of the mean
    squares = sum(np.square(block - mean - offset).sum(axis=0) for block in blocks())
    spread = np.sqrt(squares / num_rows)
    return Moments(mean, np.where(spread > 1e-12 * largest, spread, 0.0))


@dataclass(frozen=True)
class Combination:
    """A way to combine targets, ready for blocks of rows; `combine` has the ways."""

    how: str
    column: int | None
    weights: np.ndarray

    @classmethod
    def of(cls, how: str, *, target_names: Sequence[str], weights: Mapping[str, float] | None) -> Combination:
        """Check the options; raise `InputError` where they do not fit."""
        names = list(target_names)
        column_weights = _check(how, names, weights)
        return cls(how, None if how in WAYS else names.index(how), column_weights)

    @property
    def uses_moments(self) -> bool:
        """Whether `rows` needs the moments of all rows."""
        return self.column is None and self.how != "mean"

    def rows(self, values: np.ndarray, measured: Moments | None) -> np.ndarray:
        """Reduce rows (B, C), float64, to (B,)."""
        if self.column is not None:
            return values[:, self.column].copy()
        if measured is not None:
            values = measured.z_scores(values)
        if self.how in WEIGHTED_WAYS:  # a matrix product could round equal rows differently
            total = values[:, 0] * self.weights[0]
            for column in range(1, values.shape[1]):
                total += values[:, column] * self.weights[column]
            return total
        return values.max(axis=1) if self.how == "max_z" else values.min(axis=1)


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


def _in_blocks(values: np.ndarray) -> Iterable[np.ndarray]:
    return (values[start : start + BLOCK_ROWS] for start in range(0, len(values), BLOCK_ROWS))
