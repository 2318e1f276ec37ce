"""Leaf similarity: training rows that share small leaves with the test row, signed by whether they agree with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from surrogate.attribution.contract import LeafAttribution, TestRows
from surrogate.attribution.leaf_join import LeafJoin
from surrogate.attribution.objectives import Array


@dataclass(eq=False)
class LeafSimilarity(LeafAttribution):
    """Sum over shared leaves of 1 / count^2, positive where the training row speaks for the test row's label.

    Classification: positive for equal labels. Regression: positive where both targets lie on the same side of the
    model's prediction for the test row. With of="prediction": positive where the training row's label is the class whose
    score is explained, or its target lies at or above the prediction. It uses no gradients and is the cheapest baseline;
    `TREX` fits a kernel model on the same similarity.

    Args:
        model: Estimator, Booster or file; see `TreeEnsemble.read`.
        objective: The function of a model that was trained with a custom objective.

    Paper:
        The LeafSim baseline of Brophy, Hammoudeh and Lowd 2023 (JMLR 24): tree kernel `lpw`.
    Cost:
        One addition per shared leaf.
    Limit:
        In a single tree it is the sign of agreement over the squared size of the shared leaf.
    """

    _join: LeafJoin = field(init=False, repr=False)

    def self_influence(self) -> Array:
        """Return the similarity (n_train,) of each training row with itself, signed like any other pair."""
        self._require_fitted()
        rows = self.rows_
        similarity = np.zeros(rows.num_rows)
        for share in self._shares():
            similarity += share
        if rows.ensemble.objective.is_classification:
            return similarity
        prediction = rows.ensemble.objective.predict(rows.ensemble.final_scores(rows.leaves, rows.init_score))
        return np.where(_same_side(rows.y, prediction, rows.y), similarity, -similarity)

    def _prepare(self) -> None:
        self._join = LeafJoin.of(self.rows_.leaves, self._shares(), self.rows_.ensemble.leaf_offsets)

    def _shares(self) -> Iterator[Array]:
        """Yield per tree 1 / count^2 (n,) of each row's leaf, 0 for rows outside the bag."""
        rows, num_outputs = self.rows_, self.rows_.ensemble.num_outputs
        for number, in_bag in enumerate(rows.in_bags()):
            for tree in range(number * num_outputs, (number + 1) * num_outputs):
                share = 1.0 / np.square(np.maximum(self.statistics_.counts[tree], 1).astype(np.float64))
                of_rows = share[rows.leaves[:, tree]]
                yield of_rows if in_bag is None else of_rows * in_bag

    def _influence(self, test: TestRows) -> Array:
        similarity = self._join.sums(test.leaves, np.ones(test.leaves.shape))
        for column, agrees in enumerate(self._agreement(test)):
            np.negative(similarity[:, column], out=similarity[:, column], where=~agrees)
        return similarity

    def _agreement(self, test: TestRows) -> list[NDArray[np.bool_]]:
        """Return per test row whether each training row (n,) speaks for its label or score."""
        y, objective = self.rows_.y, test.ensemble.objective
        if objective.is_classification:
            return [y == label for label in self._wanted_classes(test)]
        predictions = objective.predict(test.final_scores)
        if test.of == "prediction":
            return [y >= prediction for prediction in predictions]
        assert test.y is not None
        return [_same_side(y, prediction, target) for prediction, target in zip(predictions, test.y, strict=True)]

    def _wanted_classes(self, test: TestRows) -> NDArray[np.intp]:
        """Return the class (B,) that training rows speak for: the label, or the one whose score is explained."""
        if test.of == "loss":
            assert test.y is not None
            return test.y.astype(np.intp)
        return test.chosen_output() if test.ensemble.num_outputs > 1 else np.ones(len(test.leaves), dtype=np.intp)


def _same_side(y: Array, prediction: Array, target: Array) -> NDArray[np.bool_]:
    """Return whether training targets and test targets lie on one side of the prediction; ties as in the published code."""
    return (y >= prediction) == (target > prediction)
