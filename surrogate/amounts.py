"""Amounts: a surrogate's scores as sums, once over the labelled texts and once over the feature columns.

Every surrogate has `explainer(data, method)`, which returns an object with `amounts(X)`. All amounts are on the label scale
that the surrogate was fitted on (`label_scale`), where scores are sums; the way back to label units may be curved.

    score = bias + earlier + sum over labelled rows + remainder          (`rows`)
    score = column_bias + earlier + sum over columns + remainder         (`columns`)

`earlier` is the part of surrogates that a warm start went on from. Ridge and trees leave no remainder beyond rounding.

For ridge regression a row's amount is its weight in the score times its label, less the mean label: the score is linear
in the labels once the penalty is fixed. What the labels say through the feature weights' relevance and the choice of
the penalty is taken as given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from surrogate.linear import LabelWeights
from surrogate.scaling import FeatureScaler

if TYPE_CHECKING:
    from surrogate.continuation import Continuation

CONTRIBUTIONS = "contributions"


@dataclass(frozen=True)
class Amounts:
    """Scores of B texts as sums over S labelled rows and over D columns.

    Shapes: scores, earlier (B, C); bias, column_bias (C,); rows (C, S, B), in the order of the training data; columns
    (C, B, D).
    """

    scores: NDArray[np.float64]
    earlier: NDArray[np.float64]
    bias: NDArray[np.float64]
    rows: NDArray[np.float64]
    column_bias: NDArray[np.float64]
    columns: NDArray[np.float64]

    @property
    def remainder(self) -> NDArray[np.float64]:
        """(B, C) what the rows do not account for."""
        return self.scores - self.earlier - self.bias - self.rows.sum(axis=1).T

    @property
    def column_remainder(self) -> NDArray[np.float64]:
        """(B, C) what the columns do not account for."""
        return self.scores - self.earlier - self.column_bias - self.columns.sum(axis=2).T


class Explainer(Protocol):
    """What `explainer` returns."""

    def amounts(self, features: NDArray[np.float32]) -> Amounts:
        """Account for the scores of features (B, D)."""


@dataclass(frozen=True)
class RidgeAmounts:
    """The account of a ridge regression: weights (D, C), intercept (C,), penalties (C,), and what it was fitted on."""

    scaler: FeatureScaler
    weights: NDArray[np.float64]
    intercept: NDArray[np.float64]
    alphas: NDArray[np.float64]
    labels: LabelWeights
    earlier: Continuation | None

    def amounts(self, features: NDArray[np.float32]) -> Amounts:
        """Account for the scores of features (B, D)."""
        x = self.scaler.transform(features)  # (B, D)
        offset, earlier = earlier_part(self.earlier, features, num_targets=len(self.intercept))
        centre = self.labels.centred.x_mean
        return Amounts(
            scores=x @ self.weights + self.intercept + offset + earlier,
            earlier=earlier,
            bias=self.labels.mean_label + offset,
            rows=self.labels.amounts(x, self.alphas),
            column_bias=self.intercept + centre @ self.weights + offset,
            columns=((x - centre)[None] * self.weights.T[:, None]),  # (C, B, D)
        )


def earlier_part(
    earlier: Continuation | None, features: NDArray[np.float32], *, num_targets: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the offset (C,) and the shares (B, C) of earlier surrogates in the scores, zeros without any."""
    if earlier is None:
        return np.zeros(num_targets), np.zeros((len(features), num_targets))
    return earlier.offset, earlier.output(features) - earlier.offset
