"""LightGBM's objectives as functions: gradient and Hessian of each row's loss, their slopes, the loss, the first score.

Every formula is the one that the trees were grown with, including factors that are not part of the loss itself (the
K / (K - 1) of softmax, the safety factor of Poisson), because leaf values follow from these. Attribution needs three
more things: how gradient and Hessian move with the score, the loss of a row, and the bias that boosting starts from.

Shapes: scores (n, K) raw scores, y (n,) encoded targets; K is 1 except for several classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, softmax

Array = NDArray[np.float64]
UNIT_HESSIANS = ("regression", "regression sqrt", "huber")
SMALLEST_SHARE = float(np.float32(1e-15))  # LightGBM's kEpsilon: class shares are kept above it


@dataclass(frozen=True)
class Objective:
    """Squared error, and what all objectives share."""

    name: str
    num_outputs: int = 1

    @property
    def is_classification(self) -> bool:
        """Whether targets are class numbers."""
        return False

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for regression."""
        return 0

    @property
    def has_unit_hessian(self) -> bool:
        """Whether every row's Hessian is 1, whatever its score."""
        return self.name in UNIT_HESSIANS

    def gradients(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return first and second derivative (n, K) of each row's loss, unweighted, as LightGBM computes them."""
        return scores - y[:, None], np.ones_like(scores)

    def sizes(self, gradients: Array, hessians: Array) -> Array:
        """Return the size (n,) of what a gradient (n,) is computed from: its rounding error is relative to that."""
        return np.abs(gradients)

    def slopes(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return how gradient and Hessian (n, K) move with the score of the same output."""
        return np.ones_like(scores), np.zeros_like(scores)

    def loss(self, scores: Array, y: Array) -> Array:
        """Return each row's loss (n,)."""
        return 0.5 * np.square(scores[:, 0] - y)

    def bias(self, y: Array, weights: Array | None) -> Array:
        """Return the scores (K,) that boosting starts from when it boosts from the average."""
        return np.array([np.average(y, weights=weights)])

    def label_weights(self, y: Array) -> Array | None:
        """Return weights (n, K) that follow from the labels alone, or None."""
        return None

    def predict(self, scores: Array) -> Array:
        """Return predictions in the units of the targets: values (n,), or probabilities of class 1 (n,) or of all (n, K)."""
        return scores[:, 0]


@dataclass(frozen=True)
class Huber(Objective):
    """Squared error near zero, absolute error beyond `threshold`; the Hessian is 1 everywhere, as in LightGBM."""

    threshold: float = 0.9

    def gradients(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return the clipped residual and ones."""
        return np.clip(scores - y[:, None], -self.threshold, self.threshold), np.ones_like(scores)

    def slopes(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return 1 within the threshold, else 0; the Hessian does not move."""
        return (np.abs(scores - y[:, None]) <= self.threshold).astype(np.float64), np.zeros_like(scores)

    def loss(self, scores: Array, y: Array) -> Array:
        """Return the Huber loss."""
        size = np.abs(scores[:, 0] - y)
        return np.where(size <= self.threshold, 0.5 * size**2, self.threshold * (size - 0.5 * self.threshold))


@dataclass(frozen=True)
class Fair(Objective):
    """The Fair loss, c |x| - c^2 log(1 + |x| / c)."""

    c: float = 1.0

    def gradients(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return c x / (|x| + c) and its derivative."""
        x = scores - y[:, None]
        size = np.abs(x) + self.c
        return self.c * x / size, np.square(self.c / size)

    def slopes(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return the Hessian and its derivative."""
        x = scores - y[:, None]
        size = np.abs(x) + self.c
        return np.square(self.c / size), -2.0 * np.sign(x) * self.c**2 / size**3

    def loss(self, scores: Array, y: Array) -> Array:
        """Return the Fair loss."""
        ratio = np.abs(scores[:, 0] - y) / self.c
        return self.c**2 * (ratio - np.log1p(ratio))


@dataclass(frozen=True)
class Poisson(Objective):
    """Poisson deviance with a log link; LightGBM multiplies the Hessian by exp(poisson_max_delta_step)."""

    max_delta_step: float = 0.7

    def gradients(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return exp(score) - y and the enlarged Hessian."""
        rate = np.exp(scores)
        return rate - y[:, None], rate * np.exp(self.max_delta_step)

    def slopes(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return the true second derivative and the slope of the enlarged Hessian."""
        rate = np.exp(scores)
        return rate, rate * np.exp(self.max_delta_step)

    def loss(self, scores: Array, y: Array) -> Array:
        """Return exp(score) - y score."""
        return np.exp(scores[:, 0]) - y * scores[:, 0]

    def bias(self, y: Array, weights: Array | None) -> Array:
        """Return the logarithm of the mean."""
        return np.log(super().bias(y, weights))

    def predict(self, scores: Array) -> Array:
        """Return exp(score)."""
        return np.exp(scores[:, 0])


@dataclass(frozen=True)
class Gamma(Poisson):
    """Gamma deviance with a log link."""

    def gradients(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return 1 - y exp(-score) and its derivative."""
        ratio = y[:, None] * np.exp(-scores)
        return 1.0 - ratio, ratio

    def slopes(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return the Hessian and its derivative."""
        ratio = y[:, None] * np.exp(-scores)
        return ratio, -ratio

    def loss(self, scores: Array, y: Array) -> Array:
        """Return score + y exp(-score)."""
        return scores[:, 0] + y * np.exp(-scores[:, 0])


@dataclass(frozen=True)
class Tweedie(Poisson):
    """Tweedie deviance with a log link and variance power between 1 and 2."""

    power: float = 1.5

    def _parts(self, scores: Array, y: Array) -> tuple[Array, Array, float, float]:
        a, b = 1.0 - self.power, 2.0 - self.power
        return -y[:, None] * np.exp(a * scores), np.exp(b * scores), a, b

    def gradients(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return first and second derivative of the Tweedie loss."""
        falling, rising, a, b = self._parts(scores, y)
        return falling + rising, a * falling + b * rising

    def slopes(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return second and third derivative."""
        falling, rising, a, b = self._parts(scores, y)
        return a * falling + b * rising, a**2 * falling + b**2 * rising

    def loss(self, scores: Array, y: Array) -> Array:
        """Return -y exp((1 - p) score) / (1 - p) + exp((2 - p) score) / (2 - p)."""
        falling, rising, a, b = self._parts(scores, y)
        return (falling / a + rising / b)[:, 0]


@dataclass(frozen=True)
class Binary(Objective):
    """Logistic loss of two classes (y is 0 or 1), or of shares between 0 and 1 (`cross_entropy`)."""

    sigmoid: float = 1.0
    scale_pos_weight: float = 1.0
    is_unbalance: bool = False

    @property
    def is_classification(self) -> bool:
        """Whether targets are classes; shares are not."""
        return self.name == "binary"

    @property
    def num_classes(self) -> int:
        """Two classes, or none for shares."""
        return 2 if self.is_classification else 0

    def gradients(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return s (p - y) and s^2 p (1 - p), without cancellation where p is near y."""
        p, q, positive = expit(self.sigmoid * scores), expit(-self.sigmoid * scores), y[:, None]
        return self.sigmoid * ((1.0 - positive) * p - positive * q), self.sigmoid**2 * p * q

    def sizes(self, gradients: Array, hessians: Array) -> Array:
        """Return |g|; for shares (1 - y) p + y (1 - p), of which LightGBM rounds 1 - y to float32, or a little more."""
        return np.abs(gradients) + (0.0 if self.is_classification else 4.0) * hessians

    def slopes(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return the Hessian and its derivative s^3 p (1 - p) (1 - 2 p)."""
        p, q = expit(self.sigmoid * scores), expit(-self.sigmoid * scores)
        return self.sigmoid**2 * p * q, self.sigmoid**3 * p * q * (q - p)

    def loss(self, scores: Array, y: Array) -> Array:
        """Return the logistic loss."""
        x = self.sigmoid * scores[:, 0]
        return np.logaddexp(0.0, x) - y * x

    def bias(self, y: Array, weights: Array | None) -> Array:
        """Return the log odds of the mean."""
        share = np.clip(np.average(y, weights=weights), SMALLEST_SHARE, 1.0 - SMALLEST_SHARE)
        return np.array([np.log(share / (1.0 - share)) / self.sigmoid])

    def label_weights(self, y: Array) -> Array | None:
        """Return the weights (n, 1) of scale_pos_weight or is_unbalance."""
        if not self.is_classification:
            return None
        num_positive = int(y.sum())
        num_negative = len(y) - num_positive
        of_positive, of_negative = self.scale_pos_weight, 1.0
        if self.is_unbalance and num_positive and num_negative:
            of_positive *= max(1.0, num_negative / num_positive)
            of_negative = max(1.0, num_positive / num_negative)
        if of_positive == of_negative == 1.0:
            return None
        return np.where(y > 0, of_positive, of_negative)[:, None]

    def predict(self, scores: Array) -> Array:
        """Return probabilities of class 1."""
        return expit(self.sigmoid * scores[:, 0])


@dataclass(frozen=True)
class Multiclass(Objective):
    """Softmax over K classes; LightGBM multiplies the Hessian by K / (K - 1)."""

    @property
    def is_classification(self) -> bool:
        """Targets are class numbers 0 to K - 1."""
        return True

    @property
    def num_classes(self) -> int:
        """The K classes."""
        return self.num_outputs

    def _one_hot(self, y: Array) -> Array:
        return (y[:, None] == np.arange(self.num_outputs)).astype(np.float64)

    def gradients(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return p - 1[y = k] and K / (K - 1) p (1 - p)."""
        p = softmax(scores, axis=1)
        return p - self._one_hot(y), self.num_outputs / (self.num_outputs - 1.0) * p * (1.0 - p)

    def slopes(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return the Hessian with its factor and that Hessian's slope; other classes' scores are held (diagonal Hessian)."""
        p = softmax(scores, axis=1)
        hessian = self.num_outputs / (self.num_outputs - 1.0) * p * (1.0 - p)
        return hessian, hessian * (1.0 - 2.0 * p)

    def loss(self, scores: Array, y: Array) -> Array:
        """Return the cross entropy."""
        return -np.take_along_axis(log_softmax(scores, axis=1), y.astype(np.intp)[:, None], axis=1)[:, 0]

    def bias(self, y: Array, weights: Array | None) -> Array:
        """Return the logarithms of the class shares."""
        return np.log(np.maximum(np.average(self._one_hot(y), axis=0, weights=weights), SMALLEST_SHARE))

    def predict(self, scores: Array) -> Array:
        """Return probabilities (n, K)."""
        return softmax(scores, axis=1)


@dataclass(frozen=True)
class OneVersusAll(Multiclass):
    """K logistic losses, one per class against all others."""

    sigmoid: float = 1.0
    scale_pos_weight: float = 1.0
    is_unbalance: bool = False

    def _columns(self, scores: Array, y: Array) -> list[tuple[Binary, Array, Array]]:
        binary = Binary("binary", 1, self.sigmoid, self.scale_pos_weight, self.is_unbalance)
        return [(binary, scores[:, k : k + 1], (y == k).astype(np.float64)) for k in range(self.num_outputs)]

    def gradients(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return the gradients of the K logistic losses side by side."""
        pairs = [binary.gradients(column, positive) for binary, column, positive in self._columns(scores, y)]
        return np.hstack([g for g, _ in pairs]), np.hstack([h for _, h in pairs])

    def slopes(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return the slopes of the K logistic losses side by side."""
        pairs = [binary.slopes(column, positive) for binary, column, positive in self._columns(scores, y)]
        return np.hstack([g for g, _ in pairs]), np.hstack([h for _, h in pairs])

    def loss(self, scores: Array, y: Array) -> Array:
        """Return the sum of the K logistic losses."""
        return sum((b.loss(c, positive) for b, c, positive in self._columns(scores, y)), np.zeros(len(y)))

    def bias(self, y: Array, weights: Array | None) -> Array:
        """Return each class's log odds."""
        columns = self._columns(np.zeros((len(y), self.num_outputs)), y)
        return np.concatenate([binary.bias(positive, weights) for binary, _, positive in columns])

    def label_weights(self, y: Array) -> Array | None:
        """Return weights (n, K) of scale_pos_weight or is_unbalance, class by class."""
        columns = self._columns(np.zeros((len(y), self.num_outputs)), y)
        weights = [binary.label_weights(positive) for binary, _, positive in columns]
        if all(weight is None for weight in weights):
            return None
        return np.hstack([np.ones((len(y), 1)) if weight is None else weight for weight in weights])

    def predict(self, scores: Array) -> Array:
        """Return the K probabilities, each class against all others."""
        return expit(self.sigmoid * scores)
