"""The strongest training rows of each test row, for results whose full matrix fits no memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surrogate.attribution.objectives import Array


@dataclass(frozen=True)
class TopRows:
    """Per test row the k most positive and the k most negative training rows, strongest first.

    Equal values are ordered by row number. Where fewer than k rows are positive, the list goes on with smaller values.

    Shapes: all (n_test, k); indices are row numbers of X_train.
    """

    positive_indices: NDArray[np.int64]
    positive_values: Array
    negative_indices: NDArray[np.int64]
    negative_values: Array

    @classmethod
    def of(cls, influence: Array, k: int) -> TopRows:
        """Pick from influences (n_train, n_test)."""
        positive = _largest(influence, k, sign=1.0)
        negative = _largest(influence, k, sign=-1.0)
        columns = np.arange(influence.shape[1])[:, None]
        return cls(positive, influence.T[columns, positive], negative, influence.T[columns, negative])

    @classmethod
    def joined(cls, parts: Sequence[TopRows], k: int) -> TopRows:
        """Put blocks of test rows one below the other."""
        no_rows, no_values = np.zeros((0, k), dtype=np.int64), np.zeros((0, k))
        return cls(
            np.concatenate([no_rows, *(part.positive_indices for part in parts)]),
            np.concatenate([no_values, *(part.positive_values for part in parts)]),
            np.concatenate([no_rows, *(part.negative_indices for part in parts)]),
            np.concatenate([no_values, *(part.negative_values for part in parts)]),
        )


def _largest(influence: Array, k: int, *, sign: float) -> NDArray[np.int64]:
    """Return the rows (n_test, k) with the largest sign * influence, largest first, equal ones by row number."""
    chosen = np.empty((influence.shape[1], k), dtype=np.int64)
    for column, values in enumerate(influence.T):
        falling = -sign * values
        threshold = np.partition(falling, k - 1)[k - 1]
        candidates = np.flatnonzero(falling <= threshold)
        chosen[column] = candidates[np.argsort(falling[candidates], kind="stable")[:k]]
    return chosen
