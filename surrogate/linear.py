"""Ridge regression in closed form, with the penalty chosen per target by leaving texts out.

One eigendecomposition serves every penalty and every target, and the predictions for left-out texts follow
from it without refitting. Near-duplicate texts are left out together. That shortcut holds only where nothing
else was learned from the labels: features weighed by their relevance to the labels are refitted fold by fold
instead. The ridge surrogate is this; the network's linear path is this too. A text of weight w counts as w texts:
centred features and labels are multiplied by the root of w, and the same algebra holds.

Paper: Hoerl and Kennard 1970 (ridge); Allen 1974 (PRESS, leave-one-out from the hat matrix); Ambroise and
McLachlan 2002 (choosing features outside the folds makes held-out errors far too small).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surrogate.scaling import FeatureScaler, weighted_mean
from surrogate.splits import grouped_folds

NUM_FOLDS = 5
FOLD_SEED = 0
RELATIVE_ALPHAS = np.logspace(-4, 4, 33)  # times the mean eigenvalue of the Gram matrix
RELATIVE_RANK_TOLERANCE = 1e-10


@dataclass(frozen=True)
class RidgeFit:
    """A fitted ridge regression, and what it predicts for each text when fitted without the text's group or fold.

    Shapes: weights (D, C), intercept (C,), alphas (C,), held_out (S, C).
    """

    weights: NDArray[np.float64]
    intercept: NDArray[np.float64]
    alphas: NDArray[np.float64]
    held_out: NDArray[np.float64]


@dataclass(frozen=True)
class _Eigenbasis:
    """Eigenvectors of the smaller Gram matrix of centred features (S, D): of the texts (S, R) or of the columns (D, R).

    Features and labels are centred, and multiplied by the root of each text's weight.
    """

    x_centred: NDArray[np.float64]
    vectors: NDArray[np.float64]
    eigenvalues: NDArray[np.float64]  # (R,), the same for both matrices
    is_of_texts: bool

    def penalties(self, alpha: float | None) -> NDArray[np.float64]:
        """Return the penalties to choose from, strongest first, or the given one alone."""
        if alpha is not None:
            return np.array([float(alpha)])
        return RELATIVE_ALPHAS[::-1] * (self.eigenvalues.mean() if len(self.eigenvalues) else 1.0)

    def project(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what labels (S, C) say about each direction (R, C)."""
        return self.vectors.T @ (y if self.is_of_texts else self.x_centred.T @ y)

    def coordinates(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the coordinates (B, R) of other texts (B, D), for what `project` returns over eigenvalue plus penalty."""
        return (x @ self.x_centred.T) @ self.vectors if self.is_of_texts else x @ self.vectors

    def weights(self, y: NDArray[np.float64], alphas: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return weights (D, C) for labels (S, C) with one penalty per target (C,)."""
        combined = self.vectors @ (self.project(y) / (self.eigenvalues[:, None] + alphas))
        return self.x_centred.T @ combined if self.is_of_texts else combined


@dataclass(frozen=True)
class _Centred:
    """Means of features (D,) and labels (C,), and what the algebra works on: minus the means, times the root of the weights.

    Shapes: root (S, 1), y (S, C).
    """

    x_mean: NDArray[np.float64]
    y_mean: NDArray[np.float64]
    root: NDArray[np.float64]
    y: NDArray[np.float64]
    basis: _Eigenbasis

    @classmethod
    def of(cls, x: NDArray, y: NDArray, sample_weight: NDArray[np.float64] | None) -> _Centred:
        root = np.ones((len(y), 1)) if sample_weight is None else np.sqrt(sample_weight)[:, None]
        x_mean, y_mean = weighted_mean(x, sample_weight), weighted_mean(y, sample_weight)
        return cls(x_mean, y_mean, root, (y - y_mean) * root, _eigenbasis((x - x_mean) * root))


@dataclass(frozen=True)
class _LeaveOut:
    """Left singular vectors (S, R) of centred features, eigenvalues (R,), and what is left out together."""

    shares: NDArray[np.float64]  # (S,), each text's part in the sum of weights: its leverage on the intercept
    vectors: NDArray[np.float64]
    eigenvalues: NDArray[np.float64]
    group_rows: list[NDArray[np.intp]]  # only groups of at least two texts

    @classmethod
    def of(cls, basis: _Eigenbasis, groups: NDArray[np.integer], shares: NDArray[np.float64]) -> _LeaveOut:
        vectors = basis.vectors
        if not basis.is_of_texts:
            vectors = basis.coordinates(basis.x_centred) / np.sqrt(basis.eigenvalues)
        numbers, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
        group_rows = [np.flatnonzero(inverse == number) for number in range(len(numbers)) if counts[number] > 1]
        return cls(shares, vectors, basis.eigenvalues, group_rows)

    def held_out_errors(self, y: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
        """Return label minus prediction (S, C) of a ridge that was fitted without the text's group."""
        shrink = self.eigenvalues / (self.eigenvalues + alpha)  # (R,)
        errors = y - self.vectors @ (shrink[:, None] * (self.vectors.T @ y))  # (S, C)
        leverage = self.shares + np.square(self.vectors) @ shrink  # (S,), the first part is the intercept's
        held_out = errors / (1.0 - leverage)[:, None]
        for rows in self.group_rows:
            vectors = self.vectors[rows]
            hat = np.sqrt(np.outer(self.shares[rows], self.shares[rows])) + (vectors * shrink) @ vectors.T
            held_out[rows] = np.linalg.solve(np.eye(len(rows)) - hat, errors[rows])
        return held_out


def fit_ridge(
    x: NDArray,
    y: NDArray,
    *,
    groups: NDArray[np.integer],
    alpha: float | None = None,
    sample_weight: NDArray[np.float64] | None = None,
) -> RidgeFit:
    """Fit `y = x @ weights + intercept` with penalty `alpha * |weights|^2` on the (weighted) sum of squared errors.

    Args:
        x: Features (S, D), on comparable scales.
        y: Labels (S, C).
        groups: (S,) texts with the same number are left out together; at least two different numbers.
        alpha: The penalty; None chooses it for each target by the squared error on left-out groups.
        sample_weight: (S,) positive; as how many texts each text counts. None: as one.
    """
    centred = _Centred.of(x, y, sample_weight)
    counts = np.ones(len(y)) if sample_weight is None else sample_weight
    leave_out = _LeaveOut.of(centred.basis, groups, counts / counts.sum())
    best_error = np.full(y.shape[1], np.inf)
    alphas, held_out = np.zeros(y.shape[1]), np.zeros(y.shape)
    for candidate in centred.basis.penalties(alpha):  # from strong to weak, so that a tie keeps the strong one
        errors = leave_out.held_out_errors(centred.y, candidate)
        mean_error = np.square(errors).mean(axis=0)
        better = mean_error < best_error
        best_error = np.where(better, mean_error, best_error)
        alphas[better] = candidate
        held_out[:, better] = y[:, better] - errors[:, better] / centred.root
    weights = centred.basis.weights(centred.y, alphas)
    return RidgeFit(weights, centred.y_mean - centred.x_mean @ weights, alphas, held_out)


def fit_scaled_ridge(
    features: NDArray,
    y: NDArray,
    *,
    groups: NDArray[np.integer],
    keys: Sequence[str],
    weigh_features: bool,
    alpha: float | None = None,
    sample_weight: NDArray[np.float64] | None = None,
) -> tuple[FeatureScaler, RidgeFit]:
    """Scale features and fit a ridge regression on them, with predictions for texts that neither step saw.

    Without weighing this is `fit_ridge` on standardised features. With it, the scaler learns from labels, so each of
    at most five folds gets a scaler and a regression of its training texts alone. They choose the penalty as a multiple
    of the mean eigenvalue of the Gram matrix, which means the same in every fold and in the final fit on all texts.

    Args:
        features: Features (S, D) as they are.
        y: Labels (S, C).
        groups: (S,) texts with the same number are left out together; at least two different numbers.
        keys: S content keys, which decide the folds.
        weigh_features: Multiply each column by its relevance to the labels.
        alpha: The penalty; None chooses it for each target by the squared error on left-out texts.
        sample_weight: (S,) positive; as how many texts each text counts. None: as one.

    Returns:
        The scaler of all texts, and the regression for features that it transformed.
    """
    scaler = FeatureScaler().fit(features, y if weigh_features else None, weights=sample_weight)
    x = scaler.transform(features)
    if not weigh_features:
        return scaler, fit_ridge(x, y, groups=groups, alpha=alpha, sample_weight=sample_weight)
    num_folds = min(NUM_FOLDS, len(np.unique(groups)))
    folds = grouped_folds(groups, num_folds=num_folds, seed=FOLD_SEED, keys=keys)
    candidates = _cross_predict(features, y, folds=folds, alpha=alpha, sample_weight=sample_weight)  # (S, G, C)
    errors = weighted_mean(np.square(candidates - y[:, None]), sample_weight)  # (G, C)
    best = errors.argmin(axis=0)  # (C,), the strongest of equal ones
    held_out = np.take_along_axis(candidates, best[None, None, :], axis=1)[:, 0]  # (S, C)
    centred = _Centred.of(x, y, sample_weight)
    alphas = centred.basis.penalties(alpha)[best]
    weights = centred.basis.weights(centred.y, alphas)
    return scaler, RidgeFit(weights, centred.y_mean - centred.x_mean @ weights, alphas, held_out)


@dataclass(frozen=True)
class LabelWeights:
    """A ridge regression told by its labels: with the penalty fixed, a prediction is a weighted sum of them.

    prediction = mean label + sum over texts of weight(text, this row) * (label - mean label). The weights do not depend on
    the labels.
    """

    centred: _Centred

    @classmethod
    def of(cls, x: NDArray, y: NDArray, *, sample_weight: NDArray[np.float64] | None = None) -> LabelWeights:
        """Prepare for features (S, D) and labels (S, C) that a regression was fitted on."""
        return cls(_Centred.of(x, y, sample_weight))

    @property
    def mean_label(self) -> NDArray[np.float64]:
        """(C,), what every text is predicted as before any label says something else."""
        return self.centred.y_mean

    @property
    def penalties(self) -> NDArray[np.float64]:
        """Penalties that are tried where none is given, strongest first."""
        return self.centred.basis.penalties(None)

    def predictions(self, x: NDArray, alpha: float) -> NDArray[np.float64]:
        """Return what a regression with this penalty predicts, (B, C), for features (B, D)."""
        basis = self.centred.basis
        shrunk = basis.project(self.centred.y) / (basis.eigenvalues[:, None] + alpha)
        return self.centred.y_mean + basis.coordinates(x - self.centred.x_mean) @ shrunk

    def amounts(self, x: NDArray, alphas: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return how much each label adds to each prediction, (C, S, B), for features (B, D) and penalties (C,)."""
        basis, y = self.centred.basis, self.centred.y
        directions = basis.vectors if basis.is_of_texts else basis.x_centred @ basis.vectors  # (S, R)
        coordinates = basis.coordinates(x - self.centred.x_mean)  # (B, R)
        amounts = np.zeros((len(alphas), len(y), len(x)))
        for target, alpha in enumerate(alphas):
            amounts[target] = directions @ (coordinates / (basis.eigenvalues + alpha)).T * y[:, [target]]
        return amounts


def _cross_predict(
    features: NDArray,
    y: NDArray,
    *,
    folds: NDArray[np.int64],
    alpha: float | None,
    sample_weight: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    """Return predictions (S, G, C) with each of G penalties, from scalers and regressions without the text's fold."""
    num_penalties = len(RELATIVE_ALPHAS) if alpha is None else 1
    predictions = np.zeros((len(y), num_penalties, y.shape[1]))
    for fold in np.unique(folds):
        out = folds == fold
        weights = None if sample_weight is None else sample_weight[~out]
        scaler = FeatureScaler().fit(features[~out], y[~out], weights=weights)
        centred = _Centred.of(scaler.transform(features[~out]), y[~out], weights)
        basis = centred.basis
        shrunk = basis.project(centred.y)[:, None] / (basis.eigenvalues[:, None] + basis.penalties(alpha))[:, :, None]
        coordinates = basis.coordinates(scaler.transform(features[out]) - centred.x_mean)  # (B, R)
        predictions[out] = centred.y_mean + np.tensordot(coordinates, shrunk, axes=1)  # (B, G, C)
    return predictions


def _eigenbasis(x_centred: NDArray[np.float64]) -> _Eigenbasis:
    num_texts, num_features = x_centred.shape
    is_of_texts = num_features > num_texts
    gram = x_centred @ x_centred.T if is_of_texts else x_centred.T @ x_centred
    eigenvalues, vectors = np.linalg.eigh(gram)
    kept = eigenvalues > max(eigenvalues[-1], 0.0) * RELATIVE_RANK_TOLERANCE
    return _Eigenbasis(x_centred, vectors[:, kept], eigenvalues[kept], is_of_texts)
