"""Cross-fitting: held-out scores of every labelled text, by surrogates that saw neither it nor a near-duplicate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oracle.errors import InputError
from oracle.progress import track
from surrogate.models import Surrogate


def cross_predict(
    surrogate_factory: Callable[[], Surrogate],
    X: ArrayLike,
    y: ArrayLike,
    *,
    folds: ArrayLike,
    groups: ArrayLike,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Predict every text by a surrogate that never saw it nor a near-duplicate of it.

    Args:
        surrogate_factory: Makes a new, unfitted surrogate.
        X: Features (S, D).
        y: Labels (S, C).
        folds: (S,) fold numbers, as from `grouped_folds`.
        groups: (S,) near-duplicate groups.

    Returns:
        Held-out scores (S, C) and the mean label of the texts that each was fitted on (S, C).

    Raises:
        InputError: There is one fold only, or a group lies in two folds.
    """
    features, labels = np.asarray(X), np.asarray(y, dtype=np.float64)
    fold_numbers, group_numbers = np.asarray(folds), np.asarray(groups)
    names = np.unique(fold_numbers)
    if labels.ndim != 2 or not len(features) == len(labels) == len(fold_numbers) == len(group_numbers) or len(names) < 2:
        raise InputError(
            f"X {features.shape}, y {labels.shape}, {len(fold_numbers)} fold numbers ({len(names)} different) and "
            f"{len(group_numbers)} group numbers were given.",
            "one row of each per text, and at least two folds",
            "make folds with grouped_folds for the same texts.",
        )
    if len(np.unique(np.stack([group_numbers, fold_numbers]), axis=1).T) != len(np.unique(group_numbers)):
        raise InputError(
            "a group of near-duplicates lies in more than one fold.",
            "folds that keep groups whole",
            "make folds with grouped_folds from the same groups.",
        )
    scores, baseline = np.zeros(labels.shape, dtype=np.float32), np.zeros(labels.shape, dtype=np.float32)
    with track("cross-fitting", len(names), unit="folds") as tracker:
        for name in names:
            held_out = fold_numbers == name
            surrogate = surrogate_factory().fit(features[~held_out], labels[~held_out], groups=group_numbers[~held_out])
            scores[held_out] = surrogate.predict(features[held_out])
            baseline[held_out] = labels[~held_out].mean(axis=0)
            tracker.advance()
    return scores, baseline
