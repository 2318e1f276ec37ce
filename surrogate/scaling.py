"""Scales for labels and features, so that a surrogate is fitted on well-behaved numbers.

Influence labels have heavy tails: a few texts move the loss a hundred times more than the median text, and
a squared error fitted on raw labels follows those few. `LabelScaler` maps each target's labels to a better
scale before the fit and maps predictions back to label units after it. `FeatureScaler` standardises features.
Both keep what they learned as plain arrays, for safetensors. With weights, every mean, median and rank counts a
text as often as its weight says. Left out: the bias that arises because the mean of a transformed label is not the
transform of its mean; it moves R2 a little and ranks not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oracle.errors import InputError, NotFiniteError, check_choice

LABEL_SCALES = ("rank", "robust", "none")
MAX_KNOTS = 512
NORMAL_MAD_RATIO = 1.4826  # standard deviation over median absolute deviation, for normal data
LABEL_CLIP = 5.0
FEATURE_CLIP = 10.0
RELEVANCE_FLOOR = 1e-4  # added to squared correlations, so that no column is shut out


@dataclass
class LabelScaler:
    """Map labels to the scale a surrogate is fitted on, each target alone, and predictions back.

    - `rank`: ranks become normal quantiles (ties averaged); the way back interpolates the stored table of at most
      512 knots linearly and goes on with the end slopes beyond it. Only the order of the labels matters.
    - `robust`: minus the median, over 1.4826 times the median absolute deviation (the standard deviation where that
      is zero), clipped at +-5. Keeps distances, tames outliers.
    - `none`: labels as they are.

    A constant column becomes 0 and comes back as exactly its constant, with every method.

    Args:
        method: One of `rank`, `robust`, `none`.

    Raises:
        InputError: The method is not known, or the scaler is used before `fit`.
    """

    method: str = "rank"
    _knots: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = field(default_factory=list, init=False, repr=False)
    _center: NDArray[np.float64] | None = field(default=None, init=False, repr=False)
    _scale: NDArray[np.float64] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("label_scale", self.method, LABEL_SCALES)

    def fit(self, y: ArrayLike, weights: NDArray[np.float64] | None = None) -> LabelScaler:
        """Learn the scale of labels (S, C) from texts with these weights (S,); None counts each once.

        Raises:
            NotFiniteError: A label is NaN or infinite.
        """
        labels = _finite_matrix("labels", y)
        if self.method == "rank":
            self._knots = [_quantile_table(column, weights) for column in labels.T]
            return self
        is_constant = labels.max(axis=0) == labels.min(axis=0)
        center, scale = np.zeros(labels.shape[1]), np.ones(labels.shape[1])
        if self.method == "robust":
            center, scale = robust_location_scale(labels, weights)
        self._center, self._scale = np.where(is_constant, labels[0], center), np.where(is_constant, 1.0, scale)
        return self

    def transform(self, y: ArrayLike) -> NDArray[np.float64]:
        """Return labels (B, C) on the scale for fitting."""
        labels = self._checked(y)
        if self.method == "rank":
            columns = [_interpolate(column, *table) for column, table in zip(labels.T, self._knots, strict=True)]
            return np.stack(columns, axis=1)
        assert self._center is not None and self._scale is not None
        scaled = (labels - self._center) / self._scale
        return np.clip(scaled, -LABEL_CLIP, LABEL_CLIP) if self.method == "robust" else scaled

    def inverse(self, z: ArrayLike) -> NDArray[np.float64]:
        """Return predictions (B, C) on the fitted scale in label units."""
        scaled = self._checked(z)
        if self.method == "rank":
            columns = [
                _interpolate(column, quantiles, values) for column, (values, quantiles) in zip(scaled.T, self._knots, strict=True)
            ]
            return np.stack(columns, axis=1)
        assert self._center is not None and self._scale is not None
        return scaled * self._scale + self._center

    def arrays(self) -> dict[str, NDArray]:
        """Return what was learned as named arrays."""
        self._require_fitted()
        arrays: dict[str, NDArray] = {"method": np.array([LABEL_SCALES.index(self.method)], dtype=np.int64)}
        if self.method == "rank":
            arrays["knot_counts"] = np.array([len(values) for values, _ in self._knots], dtype=np.int64)
            arrays["knot_values"] = np.concatenate([values for values, _ in self._knots])
            arrays["knot_quantiles"] = np.concatenate([quantiles for _, quantiles in self._knots])
        else:
            assert self._center is not None and self._scale is not None
            arrays["center"], arrays["scale"] = self._center, self._scale
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray]) -> LabelScaler:
        """Make a fitted scaler from what `arrays` returned."""
        scaler = cls(method=LABEL_SCALES[int(arrays["method"][0])])
        if scaler.method == "rank":
            cuts = np.cumsum(arrays["knot_counts"])[:-1]
            scaler._knots = list(
                zip(np.split(arrays["knot_values"], cuts), np.split(arrays["knot_quantiles"], cuts), strict=True)
            )
        else:
            scaler._center, scaler._scale = arrays["center"], arrays["scale"]
        return scaler

    def _require_fitted(self) -> int:
        num_targets = len(self._knots) if self._center is None else len(self._center)
        if num_targets == 0:
            raise InputError("this LabelScaler has not been fitted.", "a fitted scaler", "call fit(labels) first.")
        return num_targets

    def _checked(self, values: ArrayLike) -> NDArray[np.float64]:
        num_targets = self._require_fitted()
        matrix = np.asarray(values, dtype=np.float64)
        if matrix.ndim != 2 or matrix.shape[1] != num_targets:
            raise InputError(
                f"values of shape {matrix.shape} were given.",
                f"a matrix with {num_targets} target columns",
                "pass one column per target the scaler was fitted on.",
            )
        return matrix


@dataclass
class FeatureScaler:
    """Standardise features column by column; constant columns become 0; clipped at +-10; float32 out.

    Fitted with labels, every column is then multiplied by its relevance: the root of its mean squared correlation
    with the targets, less what chance alone gives, over the columns' root mean square. A penalty on squared weights
    then spares the columns that say something, and a thousand hashed n-grams do not drown seven telling ones.
    Relevance is learned from labels: a text counts as held out only if the scaler was fitted without it too.
    """

    _mean: NDArray[np.float64] | None = field(default=None, init=False, repr=False)
    _inverse_std: NDArray[np.float64] | None = field(default=None, init=False, repr=False)
    _relevance: NDArray[np.float64] | None = field(default=None, init=False, repr=False)

    def fit(self, x: ArrayLike, y: ArrayLike | None = None, *, weights: NDArray[np.float64] | None = None) -> FeatureScaler:
        """Learn mean, standard deviation and (with labels) relevance of the columns.

        Args:
            x: Features (S, D).
            y: Labels (S, C) on a scale without outliers; None weighs all columns alike.
            weights: (S,) how often each text counts; None counts each once.

        Raises:
            NotFiniteError: A feature is NaN or infinite.
        """
        features = _finite_matrix("features", x)
        is_constant = features.max(axis=0) == features.min(axis=0)
        std = np.where(is_constant, 1.0, weighted_std(features, weights))
        std_or_one = np.where(std > 0, std, 1.0)  # a spread below the smallest number rounds to zero
        self._mean = np.where(is_constant, features[0], weighted_mean(features, weights))
        self._inverse_std = np.where(is_constant | (std == 0), 0.0, 1.0 / std_or_one)
        self._relevance = np.ones(features.shape[1])
        return self if y is None else self.weighed_by(features, y, weights=weights)

    def weighed_by(self, x: ArrayLike, y: ArrayLike, *, weights: NDArray[np.float64] | None = None) -> FeatureScaler:
        """Return a scaler with this one's means and spreads, and the relevance that features (S, D) have to labels (S, C)."""
        self._require_fitted()
        weighed = FeatureScaler()
        weighed._mean, weighed._inverse_std = self._mean, self._inverse_std
        weighed._relevance = _relevance(self._standardised(np.asarray(x)), np.asarray(y, dtype=np.float64), weights)
        return weighed

    def transform(self, x: ArrayLike) -> NDArray[np.float32]:
        """Return standardised and weighted features (B, D) as float32."""
        mean, _, relevance = self._require_fitted()
        features = np.asarray(x)
        if features.ndim != 2 or features.shape[1] != len(mean):
            raise InputError(
                f"features of shape {features.shape} were given.",
                f"a matrix with {len(mean)} columns",
                "use the features that the scaler was fitted on.",
            )
        weighed = self._standardised(features)
        weighed *= relevance
        return weighed.astype(np.float32)

    def standardises_like(self, other: FeatureScaler) -> bool:
        """Whether the other has the same means and spreads; the relevance may differ."""
        mine, others = self._require_fitted(), other._require_fitted()
        return all(a is b or np.array_equal(a, b) for a, b in zip(mine[:2], others[:2], strict=True))

    def _standardised(self, features: NDArray) -> NDArray[np.float64]:
        mean, inverse_std, _ = self._require_fitted()
        standardised = np.subtract(features, mean, dtype=np.float64)
        standardised *= inverse_std
        return np.clip(standardised, -FEATURE_CLIP, FEATURE_CLIP, out=standardised)

    def arrays(self) -> dict[str, NDArray]:
        """Return what was learned as named arrays."""
        mean, inverse_std, relevance = self._require_fitted()
        return {"mean": mean, "inverse_std": inverse_std, "relevance": relevance}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray]) -> FeatureScaler:
        """Make a fitted scaler from what `arrays` returned."""
        scaler = cls()
        scaler._mean, scaler._inverse_std, scaler._relevance = arrays["mean"], arrays["inverse_std"], arrays["relevance"]
        return scaler

    def _require_fitted(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return mean, inverse standard deviation and relevance of the columns, (D,) each."""
        if self._mean is None or self._inverse_std is None or self._relevance is None:
            raise InputError("this FeatureScaler has not been fitted.", "a fitted scaler", "call fit(features) first.")
        return self._mean, self._inverse_std, self._relevance


def weighted_mean(values: NDArray, weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Return the mean over the rows of `values`, in double precision; without weights numpy's own."""
    if weights is None:
        return values.mean(axis=0, dtype=np.float64)
    return np.asarray(np.average(values, axis=0, weights=weights), dtype=np.float64)


def weighted_std(values: NDArray[np.float64], weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Return the standard deviation over the rows of `values`; without weights numpy's own."""
    if weights is None:
        return np.asarray(values.std(axis=0))
    return np.sqrt(weighted_mean(np.square(values - weighted_mean(values, weights)), weights))


def robust_location_scale(
    labels: NDArray[np.float64], weights: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the median (C,) of labels (S, C) and 1.4826 times their median absolute deviation (C,).

    Where that deviation is zero the standard deviation stands for it; of a constant column it is zero too.
    """
    center = _weighted_median(labels, weights)
    scale = NORMAL_MAD_RATIO * _weighted_median(np.abs(labels - center), weights)
    scale = np.where(scale > 0, scale, weighted_std(labels, weights))
    return center, np.where(labels.max(axis=0) == labels.min(axis=0), 0.0, scale)


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Return the value (C,) below which half the weight lies, the middle of the two where it is exactly half."""
    if weights is None:
        return np.asarray(np.median(values, axis=0))
    order = np.argsort(values, axis=0, kind="stable")
    ordered, reached = np.take_along_axis(values, order, axis=0), np.cumsum(weights[order], axis=0)
    half, columns = reached[-1] / 2, np.arange(values.shape[1])
    low, high = (reached < half).sum(axis=0), (reached <= half).sum(axis=0)
    return (ordered[low, columns] + ordered[high, columns]) / 2


def _relevance(
    features: NDArray[np.float64], labels: NDArray[np.float64], weights: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Return (D,) weights of standardised columns, root mean square 1.

    Chance alone gives one over the number of texts; of weighted texts, one over Kish's effective number. A text of
    weight 2 is more certain than one of weight 1, but it is no second text.
    """
    counts = np.ones(len(labels)) if weights is None else weights
    total = counts.sum()
    spread = weighted_std(labels, weights)
    targets = (labels - weighted_mean(labels, weights))[:, spread > 0] / spread[spread > 0]  # (S, C')
    if targets.shape[1] == 0:
        return np.ones(features.shape[1])
    squared = np.square(features.T @ (targets * counts[:, None]) / total).mean(axis=1)  # (D,)
    by_chance = np.square(counts).sum() / total**2
    relevance = np.sqrt(np.maximum(squared - by_chance, 0.0) + RELEVANCE_FLOOR)
    return relevance / np.sqrt(np.square(relevance).mean())


def _finite_matrix(what: str, values: ArrayLike) -> NDArray[np.float64]:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise InputError(
            f"{what} of shape {matrix.shape} were given.",
            "a matrix with at least one row and one column",
            f"pass {what} with one row per text.",
        )
    if not np.isfinite(matrix).all():
        raise NotFiniteError(
            f"{what} hold {int((~np.isfinite(matrix)).sum())} NaN or infinite values.",
            "finite numbers",
            f"find the texts whose {what} are not finite and leave them out.",
        )
    return matrix


def _quantile_table(
    column: NDArray[np.float64], weights: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return knots (values, normal quantiles), both strictly increasing, at most MAX_KNOTS of them.

    A value's rank is the weight below it and half its own: the average rank less one half, if each text counts once.
    """
    from scipy.special import ndtri

    values, _, inverse = np.unique(column, return_index=True, return_inverse=True)
    counts = np.bincount(inverse, weights=weights).astype(np.float64)
    quantiles = ndtri((np.cumsum(counts) - counts / 2) / counts.sum())
    if len(values) == 1:
        return values, np.zeros(1)
    kept = np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_KNOTS)).round().astype(int))
    return values[kept], quantiles[kept]


def _interpolate(x: NDArray[np.float64], x_knots: NDArray[np.float64], y_knots: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interpolate linearly between knots and go on with the end slopes beyond them."""
    if len(x_knots) == 1:
        return np.full(x.shape, y_knots[0])
    slopes = np.diff(y_knots)[[0, -1]] / np.diff(x_knots)[[0, -1]]
    below = np.minimum(x - x_knots[0], 0.0) * slopes[0]
    above = np.maximum(x - x_knots[-1], 0.0) * slopes[1]
    return np.interp(x, x_knots, y_knots) + below + above
