"""Surrogates, one file each: features in, predicted influence out.

The contract. A surrogate is a keyword-only dataclass with `plugin_name`; its options are its fields.

- `fit(X (S, D), y (S, C) or (S,), *, groups=(S,) integers or None, sample_weight=(S,) or None)` returns self. Texts
  with the same group number are near-duplicates and never stand on both sides of a validation split. A text of weight 2
  counts as two texts, one of weight 0 as none; None counts each as one. Learned attributes end in `_`.
- `fit(..., warm_start=earlier)` goes on from a fitted surrogate of the same class, number of features and number of
  targets; each file says how, and what it was worth. The new labels are of texts that the earlier one was not fitted on.
- `predict(X (B, D))` returns scores (B, C), float32, in label units. They do not depend on the other rows.
- A label column that is constant is predicted as that constant.
- Fewer than 10 texts, another number of features, one single group, or predicting before fitting raise
  `InputError`; NaN or infinite features or labels raise `NotFiniteError`.
- Equal inputs and options give equal bytes: rows are first put in an order that only their content decides.
  Global random states are neither read nor changed.
- `save(folder)` writes `surrogate.json` (options), `arrays.safetensors`, and text files for trees;
  `load(folder)` returns a surrogate that predicts the same bytes.

This file holds the protocol and the checks that every surrogate shares.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oracle.artifacts import atomic_path, read_json, write_json
from oracle.errors import InputError, MismatchError, MissingFileError, NotFiniteError
from oracle.plugins import options_of

MIN_TEXTS = 10
RELATIVE_WEIGHT_FLOOR = 1e-9  # of the largest weight; less is lost in the rounding of a rank
OPTIONS_FILE = "surrogate.json"
ARRAYS_FILE = "arrays.safetensors"


class Surrogate(Protocol):
    """What every file of this folder provides."""

    plugin_name: ClassVar[str]

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        groups: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        warm_start: Self | None = None,
    ) -> Self:
        """Learn labels (S, C) from features (S, D)."""

    def predict(self, X: ArrayLike) -> NDArray[np.float32]:
        """Return scores (B, C) for features (B, D)."""

    def save(self, folder: Path) -> None:
        """Write the fitted surrogate into `folder`."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""


@dataclass(frozen=True)
class TrainingData:
    """Checked inputs of a fit, in content order.

    Shapes: features (S, D) float32, labels (S, C) float64, groups (S,), keys S strings made from content, weights (S,)
    float64 and positive, or None: every text counts once; rows (S,) where each stood among the rows that were given.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.float64]
    groups: NDArray[np.int64]
    keys: list[str]
    weights: NDArray[np.float64] | None
    rows: NDArray[np.int64]


def training_data(
    X: ArrayLike, y: ArrayLike, groups: ArrayLike | None, *, sample_weight: ArrayLike | None = None
) -> TrainingData:
    """Check features, labels, groups and weights, and put the rows in an order that only their content decides.

    Rows of weight 0, or of less than a billionth of the largest weight, are left out after the check.

    Raises:
        InputError: Shapes do not fit together, there are too few texts, all texts are one group, or a weight is not a
            finite number from 0 up.
        NotFiniteError: A feature or label is NaN or infinite.
    """
    features = _finite("features X", X)
    labels = np.asarray(y, dtype=np.float64)
    labels = labels[:, None] if labels.ndim == 1 else labels
    if labels.ndim != 2 or labels.shape[1] == 0 or len(labels) != len(features):
        raise InputError(
            f"labels y of shape {np.shape(y)} were given with features X of shape {features.shape}.",
            "one row of labels per row of features, one column per target",
            "join features and labels by text_id before fitting.",
        )
    if not np.isfinite(labels).all():
        raise NotFiniteError(
            f"labels y hold {int((~np.isfinite(labels)).sum())} NaN or infinite values.",
            "finite labels",
            "leave out the texts whose labels are not finite.",
        )
    weights = checked_weights(sample_weight, len(features))
    used = np.flatnonzero(weights > RELATIVE_WEIGHT_FLOOR * weights.max(initial=0.0))
    group_numbers = _group_numbers(groups, len(features))[used]
    features, labels, weights = features[used], labels[used], weights[used]
    if len(features) < MIN_TEXTS:
        raise InputError(
            f"{len(features)} labelled texts{'' if sample_weight is None else ' of positive weight'} were given.",
            f"at least {MIN_TEXTS}; a few hundred to be of use",
            "label more texts.",
        )
    if len(np.unique(group_numbers)) < 2:
        raise InputError(
            "all labelled texts are one group of near-duplicates.", "at least two groups", "label texts that differ more."
        )
    joined = np.concatenate([features, labels.astype(np.float32)], axis=1) + np.float32(0.0)  # -0.0 becomes 0.0
    keys = [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in joined]
    order = np.array(sorted(range(len(keys)), key=lambda row: (keys[row], weights[row])))
    return TrainingData(
        features[order],
        labels[order],
        group_numbers[order],
        [keys[row] for row in order],
        None if (weights == 1.0).all() else weights[order],
        used[order],
    )


def features_to_score(X: ArrayLike, num_features: int | None) -> NDArray[np.float32]:
    """Check features (B, D) for a surrogate fitted on `num_features` columns (None: not fitted).

    Raises:
        InputError: The surrogate is not fitted, or the number of features differs.
        NotFiniteError: A feature is NaN or infinite.
    """
    require_fitted(num_features is not None)
    features = _finite("features X", X)
    if features.shape[1] != num_features:
        raise InputError(
            f"features X have {features.shape[1]} columns.",
            f"the {num_features} columns of the fit",
            "encode the texts with the encoder the surrogate was fitted with.",
        )
    return features


def require_fitted(is_fitted: bool) -> None:
    """Raise `InputError` unless the surrogate is fitted."""
    if not is_fitted:
        raise InputError("this surrogate has not been fitted.", "a fitted surrogate", "call fit(X, y) first.")


def save_state(folder: Path, surrogate: Any, arrays: dict[str, NDArray]) -> None:
    """Write arrays, then the options; the options file comes last, so that its existence means complete."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / OPTIONS_FILE).unlink(missing_ok=True)
    with atomic_path(folder / ARRAYS_FILE) as partial:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial)
    write_json(folder / OPTIONS_FILE, {"plugin": surrogate.plugin_name, "options": options_of(surrogate)})


def load_state(folder: Path, plugin_name: str) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Return the options and arrays that `save_state` wrote.

    Raises:
        MissingFileError: The folder holds no surrogate.
        MismatchError: It holds another surrogate.
    """
    from safetensors.numpy import load_file

    stored = read_json(folder / OPTIONS_FILE)
    if stored["plugin"] != plugin_name:
        raise MismatchError(
            f"{folder} holds the surrogate {stored['plugin']!r}.",
            f"a folder of {plugin_name!r}",
            f"load it with the class of {stored['plugin']!r}.",
        )
    if not (folder / ARRAYS_FILE).exists():
        raise MissingFileError(
            f"there is no file {folder / ARRAYS_FILE}.", "a folder that `save` wrote", "fit and save the surrogate again."
        )
    return stored["options"], load_file(folder / ARRAYS_FILE)


def with_prefix(prefix: str, arrays: dict[str, NDArray]) -> dict[str, NDArray]:
    """Return `arrays` with `prefix.` before each name."""
    return {f"{prefix}.{name}": array for name, array in arrays.items()}


def without_prefix(prefix: str, arrays: dict[str, NDArray]) -> dict[str, NDArray]:
    """Return those of `arrays` whose name starts with `prefix.`, without it."""
    return {name.removeprefix(f"{prefix}."): array for name, array in arrays.items() if name.startswith(f"{prefix}.")}


def _finite(what: str, X: ArrayLike) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite and is refused below
        features = np.ascontiguousarray(X, dtype=np.float32)
    if features.ndim != 2 or features.shape[1] == 0:
        raise InputError(
            f"{what} of shape {np.shape(X)} were given.",
            "a matrix with one row per text and at least one column",
            "pass a two-dimensional array.",
        )
    if not np.isfinite(features).all():
        rows = np.flatnonzero(~np.isfinite(features).all(axis=1))
        raise NotFiniteError(
            f"{what} hold NaN or infinite values in {len(rows)} rows, the first is row {rows[0]}.",
            "finite float32 numbers",
            "leave these texts out or correct their features.",
        )
    return features


def _group_numbers(groups: ArrayLike | None, num_texts: int) -> NDArray[np.int64]:
    if groups is None:
        return np.arange(num_texts, dtype=np.int64)
    numbers = np.asarray(groups)
    if numbers.shape != (num_texts,) or not np.issubdtype(numbers.dtype, np.integer):
        raise InputError(
            f"groups of shape {numbers.shape} and type {numbers.dtype} were given.",
            f"{num_texts} integers, one per text",
            "pass what near_duplicate_groups returns.",
        )
    return numbers.astype(np.int64)


def checked_weights(sample_weight: ArrayLike | None, num_texts: int) -> NDArray[np.float64]:
    """Return weights (S,) as float64, ones for None.

    Raises:
        InputError: There is not one per text, or one is negative or not finite.
    """
    if sample_weight is None:
        return np.ones(num_texts)
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (num_texts,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise InputError(
            f"sample_weight of shape {weights.shape} was given, {int((~(np.isfinite(weights) & (weights >= 0))).sum())} "
            "of them negative or not finite.",
            f"{num_texts} finite numbers from 0 up, one per text",
            "pass a weight for each text, 0 for one that should not count.",
        )
    return weights
