"""Influences that come training rows by training rows, kept whole or only the strongest per test row.

Most methods take test rows in blocks and know all training rows at once. Methods that remove rows from the model get
(b, n_test) for b removed rows at a time, and would have to remove them all again for each block of test rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from surrogate.attribution.objectives import Array
from surrogate.attribution.top_rows import TopRows


def whole_matrix(blocks: Iterator[tuple[slice, Array]], *, num_train: int, num_test: int) -> Array:
    """Return (n_train, n_test) from blocks of its rows."""
    result = np.empty((num_test, num_train)).T  # columns are contiguous, as in the other methods
    for rows, influence in blocks:
        result[rows] = influence
    return result


def strongest_rows(blocks: Iterator[tuple[slice, Array]], *, num_test: int, k: int) -> TopRows:
    """Return the k strongest rows of either sign per test row; beside one block, only these are held.

    Args:
        blocks: Consecutive training rows, and their influence (b, n_test).
        num_test: Number of test rows.
        k: At most the number of training rows.
    """
    no_indices, no_values = np.zeros((num_test, 0), dtype=np.int64), np.zeros((num_test, 0))
    best = TopRows(no_indices, no_values, no_indices, no_values)
    for rows, influence in blocks:
        numbers = np.broadcast_to(np.arange(rows.start, rows.stop), influence.T.shape)
        positive = np.hstack([best.positive_values, influence.T])  # (n_test, held + b): earlier rows come first
        negative = np.hstack([best.negative_values, influence.T])
        size = min(k, positive.shape[1])
        for_positive, for_negative = TopRows.of(positive.T, size), TopRows.of(negative.T, size)
        best = TopRows(
            _taken(np.hstack([best.positive_indices, numbers]), for_positive.positive_indices),
            for_positive.positive_values,
            _taken(np.hstack([best.negative_indices, numbers]), for_negative.negative_indices),
            for_negative.negative_values,
        )
    return best


def _taken(numbers: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.take_along_axis(numbers, places, axis=1)
