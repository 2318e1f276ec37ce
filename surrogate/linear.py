"""Ridge regression in closed form, with the penalty chosen per target by leaving texts out.

One eigendecomposition serves every penalty and every target, and the predictions for left-out texts follow
from it without refitting. Near-duplicate texts are left out together. The ridge surrogate is this; the
network's linear path is this too.

Paper: Hoerl and Kennard 1970 (ridge); Allen 1974 (PRESS, leave-one-out from the hat matrix).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RELATIVE_ALPHAS = np.logspace(-4, 4, 33)  # times the mean eigenvalue of the Gram matrix
RELATIVE_RANK_TOLERANCE = 1e-10


@dataclass(frozen=True)
class RidgeFit:
    """What `fit_ridge` found.

    Shapes: weights (D, C), intercept (C,), alphas (C,), held_out (S, C).
    """

    weights: NDArray[np.float64]
    intercept: NDArray[np.float64]
    alphas: NDArray[np.float64]
    held_out: NDArray[np.float64]


@dataclass(frozen=True)
class _Spectrum:
    """Centred features as left singular vectors (S, R) and eigenvalues (R,) of their Gram matrix."""

    vectors: NDArray[np.float64]
    eigenvalues: NDArray[np.float64]
    group_rows: list[NDArray[np.intp]]  # only groups of at least two texts

    def held_out_errors(self, y: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
        """Return label minus prediction (S, C) of a ridge that was fitted without the text's group."""
        num_texts = len(y)
        shrink = self.eigenvalues / (self.eigenvalues + alpha)  # (R,)
        errors = y - self.vectors @ (shrink[:, None] * (self.vectors.T @ y))  # (S, C)
        leverage = 1.0 / num_texts + np.square(self.vectors) @ shrink  # (S,), the first part is the intercept's
        held_out = errors / (1.0 - leverage)[:, None]
        for rows in self.group_rows:
            vectors = self.vectors[rows]
            hat = 1.0 / num_texts + (vectors * shrink) @ vectors.T
            held_out[rows] = np.linalg.solve(np.eye(len(rows)) - hat, errors[rows])
        return held_out


def fit_ridge(x: NDArray, y: NDArray, *, groups: NDArray[np.integer], alpha: float | None = None) -> RidgeFit:
    """Fit `y = x @ weights + intercept` with penalty `alpha * |weights|^2` on the sum of squared errors.

    Args:
        x: Features (S, D), on comparable scales.
        y: Labels (S, C).
        groups: (S,) texts with the same number are left out together; at least two different numbers.
        alpha: The penalty; None chooses it for each target by the squared error on left-out groups.
    """
    x_mean, y_mean = x.mean(axis=0, dtype=np.float64), y.mean(axis=0, dtype=np.float64)
    x_centred, y_centred = x - x_mean, y - y_mean
    spectrum = _decompose(x_centred, groups)
    mean_eigenvalue = spectrum.eigenvalues.mean() if len(spectrum.eigenvalues) else 1.0
    grid = RELATIVE_ALPHAS * mean_eigenvalue if alpha is None else np.array([float(alpha)])
    best_error = np.full(y.shape[1], np.inf)
    alphas, held_out = np.zeros(y.shape[1]), np.zeros(y.shape)
    for candidate in grid[::-1]:  # from strong to weak, so that a tie keeps the strong one
        errors = spectrum.held_out_errors(y_centred, candidate)
        mean_error = np.square(errors).mean(axis=0)
        better = mean_error < best_error
        best_error = np.where(better, mean_error, best_error)
        alphas[better] = candidate
        held_out[:, better] = y[:, better] - errors[:, better]
    projected = spectrum.vectors.T @ y_centred  # (R, C)
    weights = x_centred.T @ (spectrum.vectors @ (projected / (spectrum.eigenvalues[:, None] + alphas)))  # (D, C)
    return RidgeFit(weights, y_mean - x_mean @ weights, alphas, held_out)


def _decompose(x_centred: NDArray[np.float64], groups: NDArray[np.integer]) -> _Spectrum:
    num_texts, num_features = x_centred.shape
    is_dual = num_features > num_texts
    gram = x_centred @ x_centred.T if is_dual else x_centred.T @ x_centred
    eigenvalues, vectors = np.linalg.eigh(gram)
    kept = eigenvalues > max(eigenvalues[-1], 0.0) * RELATIVE_RANK_TOLERANCE
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    if not is_dual:
        vectors = x_centred @ vectors / np.sqrt(eigenvalues)  # (S, R)
    numbers, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    group_rows = [np.flatnonzero(inverse == number) for number in range(len(numbers)) if counts[number] > 1]
    return _Spectrum(vectors, eigenvalues, group_rows)
