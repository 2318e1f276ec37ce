"""The training rows of a model: their leaves, targets and weights, and boosting replayed over them round by round.

All methods read the same replay: scores before the round, each row's weighted gradient and Hessian, and which rows the
round's trees were grown on. Gradients are computed in float64 from the stored leaf values; LightGBM's own are float32.

Shapes: n rows, T rounds, K outputs, C = T K trees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oracle.errors import InputError
from surrogate.attribution.bagging import bags
from surrogate.attribution.ensemble import TreeEnsemble
from surrogate.attribution.objective_reading import Custom
from surrogate.attribution.objectives import Array


@dataclass(frozen=True)
class Round:
    """One round over the training rows.

    Shapes: scores (n, K) before the round; gradients, hessians (n, K), weighted, 0 for rows outside the bag; weights
    (n, K), 0 outside the bag, or None where every row counts once; in_bag (n,) or None for all rows.
    """

    number: int
    scores: Array
    gradients: Array
    hessians: Array
    weights: Array | None
    in_bag: NDArray[np.bool_] | None


@dataclass(frozen=True)
class TrainingRows:
    """Training rows as the model saw them.

    Attributes:
        ensemble: The model, with the init score that these rows lead to.
        leaves: (n, C) leaf of each row in each tree.
        y: (n,) encoded targets.
        sample_weight: (n,) weights given in training, class weights included, or None.
        init_score: (n, K) scores that training started from, or None.
    """

    ensemble: TreeEnsemble
    leaves: NDArray[np.int32]
    y: Array
    sample_weight: Array | None
    init_score: Array | None

    @classmethod
    def read(
        cls,
        ensemble: TreeEnsemble,
        X: Any,
        y: ArrayLike,
        *,
        sample_weight: ArrayLike | None = None,
        init_score: ArrayLike | None = None,
    ) -> TrainingRows:
        """Route rows and encode their targets.

        Raises:
            InputError: Rows, targets, weights or init scores do not fit together or to the model.
        """
        ensemble = ensemble.with_classes_of(y)
        targets = ensemble.encode_targets(y)
        leaves = ensemble.leaves(X)
        if len(targets) != len(leaves) or len(targets) == 0:
            raise InputError(
                f"{len(leaves)} rows and {len(targets)} targets were given.",
                "one target per row, and at least one row",
                "pass the rows and targets that the model was trained on.",
            )
        weights = _weights(ensemble, targets, sample_weight)
        starts = as_init_score(init_score, len(targets), ensemble.num_outputs)
        ensemble = ensemble.with_bias(targets, weights, has_init_score=starts is not None)
        return cls(ensemble, leaves, targets, weights, starts)

    @property
    def num_rows(self) -> int:
        """Number of training rows, n."""
        return len(self.y)

    @property
    def row_weights(self) -> Array | None:
        """Weights (n, 1) or (n, K) of the rows' losses, from samples and labels, or None where every row counts once."""
        of_labels = self.ensemble.objective.label_weights(self.y)
        if self.sample_weight is None:
            return of_labels
        return self.sample_weight[:, None] * (1.0 if of_labels is None else of_labels)

    @property
    def has_unit_hessians(self) -> bool:
        """Whether every row in the bag has a weighted Hessian of 1 in every round, so that their sums are counts."""
        return self.ensemble.objective.has_unit_hessian and self.row_weights is None

    def in_bags(self) -> Iterator[NDArray[np.bool_] | None]:
        """Yield per round which rows (n,) grew its trees, or None for all."""
        return bags(self.ensemble.text, self.y, self.leaves)

    def rounds(self) -> Iterator[Round]:
        """Replay the T rounds."""
        objective, weights = self.ensemble.objective, self.row_weights
        all_scores = self.ensemble.raw_scores_by_round(self.leaves, self.init_score)
        for number, scores, in_bag in zip(range(self.ensemble.num_rounds), all_scores, self.in_bags(), strict=False):
            gradients, hessians = objective.gradients(scores, self.y)
            counted = weights
            if in_bag is not None:
                of_bag = in_bag.astype(np.float64)[:, None]
                counted = of_bag if weights is None else of_bag * weights
            if counted is not None:
                gradients, hessians = gradients * counted, hessians * counted
            yield Round(number, scores, gradients, hessians, counted, in_bag)

    def rounded(self) -> TrainingRows:
        """Return the rows with targets, weights and init scores of the precision that LightGBM stores."""
        y, weights = _as_float32(self.y), None if self.sample_weight is None else _as_float32(self.sample_weight)
        same_weights = weights is None or np.array_equal(weights, self.sample_weight)  # type: ignore[arg-type]
        if np.array_equal(y, self.y) and same_weights:
            return self
        ensemble = self.ensemble.with_bias(y, weights, has_init_score=self.init_score is not None)
        return TrainingRows(ensemble, self.leaves, y, weights, self.init_score)


def as_init_score(init_score: ArrayLike | None, num_rows: int, num_outputs: int) -> Array | None:
    """Return init scores as (n, K), or None.

    Raises:
        InputError: They have another shape, or are not finite.
    """
    if init_score is None:
        return None
    scores = np.asarray(init_score, dtype=np.float64)
    if scores.size != num_rows * num_outputs or len(scores) != num_rows or not np.isfinite(scores).all():
        raise InputError(
            f"init_score of shape {scores.shape} was given.",
            f"finite scores of shape ({num_rows}, {num_outputs})" + (f" or ({num_rows},)" if num_outputs == 1 else ""),
            "pass the init scores that the model was trained with, one per row and output.",
        )
    return scores.reshape(num_rows, num_outputs)


def _as_float32(values: Array) -> Array:
    return values.astype(np.float32).astype(np.float64)


def _weights(ensemble: TreeEnsemble, y: Array, sample_weight: ArrayLike | None) -> Array | None:
    """Return the weights (n,) that training used: those given, times the estimator's class weights."""
    weights: Array | None = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    if weights is not None and (weights.shape != y.shape or not np.isfinite(weights).all() or (weights < 0).any()):
        raise InputError(
            f"sample_weight of shape {weights.shape} was given.",
            f"{len(y)} finite weights of at least 0",
            "pass the weights that the model was trained with.",
        )
    if ensemble.class_weight is not None and ensemble.classes is not None:
        from sklearn.utils.class_weight import compute_sample_weight

        of_classes: Array = compute_sample_weight(ensemble.class_weight, ensemble.classes[y.astype(np.intp)])
        weights = of_classes if weights is None else weights * of_classes
    if weights is not None and isinstance(ensemble.objective, Custom):
        raise InputError(
            "sample_weight was given for a custom objective.",
            "weights inside the objective's function, where LightGBM's training has them too",
            "leave sample_weight out and let the function apply the weights.",
        )
    return weights
