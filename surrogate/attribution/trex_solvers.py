"""The exact minimiser of a regularised linear model on leaf features, by Newton's method with conjugate gradients.

Minimised over W (L, K), with scores F = offset + Phi W of the n rows:

    J(W) = 1 / N * sum_i v_i loss(F_i, y_i) + ridge * |W|^2,        N = sum_i v_i

At the minimum W = Phi^T alpha with alpha_i = -v_i loss'(F_i) / (2 ridge N): each row's share in every prediction, the
representer theorem. Each row of Phi has one entry per tree, so a product costs n T steps and nothing dense is made;
the ridge dominates, so that few conjugate gradients suffice. Squared loss takes one Newton step.

The released code descends gradients in float32 until they have shrunk 200-fold, on a dense matrix, and is left some
parts in a hundred to a thousand away from the minimum that is reached here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from scipy.special import log_softmax, softmax

from oracle.errors import NotFiniteError
from surrogate.attribution.objectives import Array, Objective

GRADIENT_TOLERANCE = 1e-11  # of the gradient at W = 0
INNER_TOLERANCE = 1e-6  # of a Newton step's residual, while further steps follow
MAX_NEWTON_STEPS = 100
MAX_INNER_STEPS = 10_000
MAX_HALVINGS = 60  # of a step that does not lower J
SUFFICIENT_DECREASE = 1e-4  # Armijo's constant, Nocedal and Wright 2006, chapter 3


class ScoreLoss(Protocol):
    """A convex loss of the scores (n, K) of rows whose targets it knows."""

    @property
    def is_quadratic(self) -> bool:
        """Whether the second derivative is the same everywhere, so that one Newton step reaches the minimum."""

    def values(self, scores: Array) -> Array:
        """Return each row's loss (n,)."""

    def gradients(self, scores: Array) -> Array:
        """Return its derivative (n, K)."""

    def curvature(self, scores: Array) -> Callable[[Array], Array]:
        """Return the second derivative as a product with directions (n, K)."""


@dataclass(frozen=True)
class SeparateOutputs:
    """A LightGBM objective whose outputs do not interact; `scale` is 2 for squared error without its one half."""

    objective: Objective
    targets: Array
    scale: float = 1.0

    @property
    def is_quadratic(self) -> bool:
        """Only squared error is."""
        return self.objective.name.startswith("regression")

    def values(self, scores: Array) -> Array:
        """Return the objective's loss."""
        return self.scale * self.objective.loss(scores, self.targets)

    def gradients(self, scores: Array) -> Array:
        """Return its derivative."""
        return self.scale * self.objective.gradients(scores, self.targets)[0]

    def curvature(self, scores: Array) -> Callable[[Array], Array]:
        """Return the product with its second derivative."""
        second = self.scale * self.objective.slopes(scores, self.targets)[0]
        return lambda direction: second * direction


@dataclass(frozen=True)
class SoftmaxLoss:
    """Cross entropy with target shares (n, K), with the whole Hessian of the softmax and not only its diagonal."""

    shares: Array

    @property
    def is_quadratic(self) -> bool:
        """Cross entropy is not."""
        return False

    def values(self, scores: Array) -> Array:
        """Return the cross entropy."""
        return -(self.shares * log_softmax(scores, axis=1)).sum(axis=1)

    def gradients(self, scores: Array) -> Array:
        """Return p - shares."""
        return softmax(scores, axis=1) - self.shares

    def curvature(self, scores: Array) -> Callable[[Array], Array]:
        """Return the product with diag(p) - p p^T."""
        p = softmax(scores, axis=1)
        return lambda direction: p * (direction - (p * direction).sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Representer:
    """A fitted surrogate: its row weights `alphas` (n, K), and how it was reached."""

    alphas: Array
    num_newton_steps: int
    num_products: int
    gradient_ratio: float


def fit_representer(features: Any, loss: ScoreLoss, *, weights: Array, offset: Array, ridge: float) -> Representer:
    """Minimise J.

    Args:
        features: Phi (n, L), a CSR array.
        loss: Loss of the n rows.
        weights: v (n,).
        offset: Scores that W adds to, (K,) or (n, K).
        ridge: The weight of |W|^2, above 0.

    Raises:
        NotFiniteError: J is not finite at its start, or its minimum is not found.
    """
    transposed = features.T  # as fast as a copy by columns, which takes as long as all products together
    share = (weights / weights.sum())[:, None]  # v_i / N
    W = np.zeros((features.shape[1], offset.shape[-1]))
    scores = np.broadcast_to(offset, (features.shape[0], offset.shape[-1])).astype(np.float64)

    def value(at: Array, row_scores: Array) -> float:
        return float(share[:, 0] @ loss.values(row_scores)) + ridge * float(np.vdot(at, at))

    def gradient(at: Array, row_scores: Array) -> Array:
        return transposed @ (share * loss.gradients(row_scores)) + 2.0 * ridge * at

    def hessian(curvature: Callable[[Array], Array], direction: Array) -> Array:
        return transposed @ (share * curvature(features @ direction)) + 2.0 * ridge * direction

    current, slope = value(W, scores), gradient(W, scores)
    start_norm = float(np.linalg.norm(slope))
    num_products = num_steps = 0
    while float(np.linalg.norm(slope)) > GRADIENT_TOLERANCE * start_norm and num_steps < MAX_NEWTON_STEPS:
        rough = 0.0 if loss.is_quadratic else INNER_TOLERANCE * min(1.0, float(np.linalg.norm(slope)) / start_norm)
        step, used = conjugate_gradients(
            partial(hessian, loss.curvature(scores)), -slope, tolerance=max(rough, 0.1 * GRADIENT_TOLERANCE)
        )
        along, descent, length = features @ step, float(np.vdot(slope, step)), 1.0
        for _ in range(MAX_HALVINGS):
            trial = value(W + length * step, scores + length * along)
            if trial <= current + SUFFICIENT_DECREASE * length * descent + 1e-14 * abs(current):
                break
            length *= 0.5
        W, scores = W + length * step, scores + length * along
        current, slope = value(W, scores), gradient(W, scores)
        num_steps, num_products = num_steps + 1, num_products + used
    ratio = float(np.linalg.norm(slope)) / start_norm if start_norm != 0 else 0.0
    if not np.isfinite(ratio) or ratio > np.sqrt(GRADIENT_TOLERANCE):
        raise NotFiniteError(
            f"the surrogate's minimum was not found: after {num_steps} steps its gradient is {ratio:.1e} of the first one.",
            "features and targets whose loss is finite and convex",
            "scale the targets to unit variance, or raise `ridge`.",
        )
    return Representer(-share * loss.gradients(scores) / (2.0 * ridge), num_steps, num_products, ratio)


def conjugate_gradients(product: Callable[[Array], Array], right: Array, *, tolerance: float) -> tuple[Array, int]:
    """Return the solution of product(x) = right, symmetric and positive definite, and the number of products taken."""
    x = np.zeros_like(right)
    residual, direction = right.copy(), right.copy()
    size = start = float(np.vdot(right, right))
    for step in range(MAX_INNER_STEPS):
        if size <= tolerance**2 * start:
            return x, step
        image = product(direction)
        length = size / float(np.vdot(direction, image))
        x += length * direction
        residual -= length * image
        size, before = float(np.vdot(residual, residual)), size
        direction = residual + (size / before) * direction
    return x, MAX_INNER_STEPS
