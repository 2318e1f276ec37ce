"""Ridge regression: the surrogate that every other one has to beat.

Features are standardised, labels put on their scale, and one linear map per target fitted in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oracle.errors import InputError, check_choice
from oracle.plugins import option
from surrogate.continuation import Continuation, check_warm_start, full_output
from surrogate.linear import LabelWeights, fit_scaled_ridge
from surrogate.models import (
    TrainingData,
    features_to_score,
    load_state,
    require_fitted,
    save_state,
    training_data,
    with_prefix,
    without_prefix,
)
from surrogate.scaling import LABEL_SCALES, FeatureScaler, LabelScaler

if TYPE_CHECKING:
    from surrogate.amounts import RidgeAmounts


@dataclass(kw_only=True, eq=False)
class RidgeSurrogate:
    """Linear map from features to labels with a squared penalty, chosen per target by leaving texts out.

    Fast, hard to break, and with a few hundred labels often as good as anything; use `network` or `trees`
    where their held-out fidelity is above it.

    A warm start takes the share of the earlier scores that fits the new labels best, and fits the rest: shrinkage
    towards the earlier map in place of zero. With 300 new labels and influence that correlates by 0.7 with that of 300 old
    ones, Spearman was 0.660 (dense features) and 0.652 (sparse), against 0.664 and 0.598 from new labels only and 0.654 and
    0.661 from new labels and old ones of half weight; where nothing was kept 0.647, 0.651 and 0.588 (dense). So it pays
    where features are many and sparse (`benchmarks/warm_start.py`).

    Attributes (learned): `weights_` (D, C) and `intercept_` (C,) for standardised features on the label scale;
    `alphas_` (C,) the penalties; `num_features_`, `num_targets_`; `earlier_` the part of earlier surrogates, or None.

    Cost:
        One eigendecomposition of min(S, D) rows, and one for each of five folds where features are weighed: some
        6 seconds at 2,400 texts and 1,700 features on one core.
    Limit:
        A large `alpha` predicts the middle label for every text.
    Paper:
        Hoerl and Kennard 1970.
    """

    plugin_name: ClassVar[str] = "ridge"
    explanations: ClassVar[tuple[str, ...]] = ("contributions",)
    alpha: float | None = option(None, "Penalty on squared weights of standardised features; none: chosen per target.")
    weigh_features: bool = option(True, "Spare features from the penalty by how much they correlate with the targets.")
    label_scale: str = option("rank", "Scale that labels are fitted on: rank, robust or none.")
    weights_: NDArray[np.float64] = field(init=False, repr=False)
    intercept_: NDArray[np.float64] = field(init=False, repr=False)
    alphas_: NDArray[np.float64] = field(init=False, repr=False)
    earlier_: Continuation | None = field(init=False, repr=False)
    _feature_scaler: FeatureScaler = field(init=False, repr=False)
    _label_scaler: LabelScaler = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("label_scale", self.label_scale, LABEL_SCALES)
        if self.alpha is not None and not (isinstance(self.alpha, (int, float)) and 0 < self.alpha < float("inf")):
            raise InputError(
                f"alpha={self.alpha!r} cannot be used.", "a positive number, or none", "leave alpha out to have it chosen."
            )

    @property
    def num_features_(self) -> int:
        """Number of feature columns D of the fit."""
        return len(self.weights_)

    @property
    def num_targets_(self) -> int:
        """Number of targets C of the fit."""
        return len(self.intercept_)

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        groups: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        warm_start: Self | None = None,
    ) -> Self:
        """Learn from features (S, D) and labels (S, C) or (S,); `groups` are left out together."""
        data = training_data(X, y, groups, sample_weight=sample_weight)
        label_scaler = LabelScaler(self.label_scale).fit(data.labels, data.weights)
        scaled = label_scaler.transform(data.labels)  # (S, C)
        earlier = None
        if warm_start is not None:
            check_warm_start(warm_start, self, num_features=data.features.shape[1], num_targets=scaled.shape[1])
            earlier = Continuation.of(warm_start, data.features, scaled, weights=data.weights)
            scaled = scaled - earlier.output(data.features)
        self._feature_scaler, ridge = fit_scaled_ridge(
            data.features,
            scaled,
            groups=data.groups,
            keys=data.keys,
            weigh_features=self.weigh_features,
            alpha=self.alpha,
            sample_weight=data.weights,
        )
        self.weights_, self.intercept_, self.alphas_ = ridge.weights, ridge.intercept, ridge.alphas
        self._label_scaler, self.earlier_ = label_scaler, earlier
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float32]:
        """Return scores (B, C) in label units for features (B, D)."""
        features = features_to_score(X, self.num_features_ if hasattr(self, "weights_") else None)
        return self.from_label_scale(full_output(self, features))

    def from_label_scale(self, output: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return scores (B, C) in label units for scores on the label scale."""
        return self._label_scaler.inverse(output).astype(np.float32)

    def own_output(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return what this fit learned, (B, C) on the label scale, without the part of earlier surrogates."""
        return self._feature_scaler.transform(features) @ self.weights_ + self.intercept_

    def similarity_features(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return features (B, D) whose inner products say how far one text's label moves another's score."""
        return self._feature_scaler.transform(features)

    def explainer(self, data: TrainingData, method: str) -> RidgeAmounts:
        """Return what accounts for scores by the data of the fit, with a method of `explanations`."""
        from surrogate.amounts import RidgeAmounts

        assert method in self.explanations
        targets = self._label_scaler.transform(data.labels)  # (S, C)
        if self.earlier_ is not None:
            targets = targets - self.earlier_.output(data.features)
        labels = LabelWeights.of(self._feature_scaler.transform(data.features), targets, sample_weight=data.weights)
        return RidgeAmounts(self._feature_scaler, self.weights_, self.intercept_, self.alphas_, labels, self.earlier_)

    def save(self, folder: Path) -> None:
        """Write the fitted surrogate into `folder`."""
        require_fitted(hasattr(self, "weights_"))
        arrays = {"weights": self.weights_, "intercept": self.intercept_, "alphas": self.alphas_}
        if self.earlier_ is not None:
            arrays |= self.earlier_.save(Path(folder))
        save_state(
            Path(folder),
            self,
            arrays | with_prefix("features", self._feature_scaler.arrays()) | with_prefix("labels", self._label_scaler.arrays()),
        )

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        options, arrays = load_state(Path(folder), cls.plugin_name)
        surrogate = cls(**options)
        surrogate.weights_, surrogate.intercept_ = arrays["weights"], arrays["intercept"]
        surrogate.alphas_ = arrays["alphas"]
        surrogate.earlier_ = Continuation.load(Path(folder), arrays, cls)
        surrogate._feature_scaler = FeatureScaler.from_arrays(without_prefix("features", arrays))
        surrogate._label_scaler = LabelScaler.from_arrays(without_prefix("labels", arrays))
        return surrogate
