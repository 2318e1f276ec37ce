"""Boosted regression trees (LightGBM), one booster per target.

Trees find thresholds and interactions that a linear map misses and are not moved by monotone changes of a
feature. The boosters stay reachable, because attribution methods read which labelled texts share leaves; what each was
trained on is `booster_tables`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import lightgbm as lgb
import numpy as np
from numpy.typing import ArrayLike, NDArray

from oracle.artifacts import atomic_path
from oracle.errors import InputError, MissingFileError, check_at_least, check_choice
from oracle.plugins import option
from surrogate.continuation import Continuation, check_warm_start, full_output
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
from surrogate.scaling import LABEL_SCALES, LabelScaler, weighted_mean
from surrogate.splits import grouped_folds

if TYPE_CHECKING:
    from surrogate.tree_amounts import BoosterTable, TreeAmounts

MAX_BIN = 31  # with thousands of features and few texts, time goes into bins; more of them ranked no better
ENOUGH_VALIDATION_TEXTS = 400  # a correlation over so many has a standard error of 0.05; more folds would not pay
STALL_ROUNDS = 50  # rounds without improvement on the validation texts after which boosting stops


@dataclass(kw_only=True, eq=False)
class InfluenceTrees:
    """Boosted regression trees on raw features, one LightGBM booster per target.

    The number of trees is the one that orders held-out texts best (cross-validation, near-duplicates together);
    the boosters are then trained on all labelled texts. Prefer `network` where influence is a smooth function of
    dense embeddings, `ridge` where labels are few.

    A warm start takes the share of the earlier scores that fits the new labels best, and grows trees on the rest. With 300
    new labels and influence that correlates by 0.7 with that of 300 old ones, Spearman was 0.782 (dense features) and 0.620
    (sparse), against 0.780 and 0.594 from new labels only and 0.766 and 0.652 from new labels and old ones of half weight;
    where nothing was kept 0.749, 0.756 and 0.649 (dense). Old labels, where they still hold, are the better help, and the
    worse harm where they do not (`benchmarks/warm_start.py`).

    Attributes (learned): `boosters_` C boosters, predicting on the label scale; `num_trees_` their sizes;
    `num_features_`, `num_targets_`; `earlier_` the part of earlier surrogates, or None. With one, the boosters predict
    what it leaves of the labels.

    Cost:
        Per target some 5 seconds at 2,400 texts and 3,000 features on one core, 1 second at 300 and 400.
    Limit:
        With `num_leaves=2` it is additive in the features: no interactions.
    Paper:
        Ke et al. 2017, LightGBM; Friedman 2001, gradient boosting.
    """

    plugin_name: ClassVar[str] = "trees"
    explanations: ClassVar[tuple[str, ...]] = ("contributions", "boostin")
    num_trees: int = option(300, "Most trees per target; fewer are grown where held-out texts are ordered best by fewer.")
    min_trees: int = option(100, "Fewest trees per target: with few texts, a noisy stop would leave too few to order the pool.")
    learning_rate: float = option(0.03, "Share of each tree's correction that is kept.")
    num_leaves: int = option(7, "Most leaves of a tree.")
    min_leaf_size: int = option(10, "Fewest texts in a leaf.")
    feature_fraction: float = option(0.3, "Share of the features that each tree may use.")
    bagging: float = option(0.8, "Share of the texts that each tree sees.")
    l2: float = option(10.0, "Penalty on squared leaf values.")
    label_scale: str = option("rank", "Scale that labels are fitted on: rank, robust or none.")
    validation_folds: int = option(4, "Folds whose held-out texts choose the number of trees; 0 grows num_trees trees.")
    num_threads: int = option(0, "Threads of LightGBM; 0 takes all cores; results do not depend on it.")
    seed: int = option(0, "Seed of the validation split, of bagging and of feature sampling.")
    boosters_: list[lgb.Booster] = field(init=False, repr=False)
    num_trees_: list[int] = field(init=False, repr=False)
    num_features_: int = field(init=False, repr=False)
    earlier_: Continuation | None = field(init=False, repr=False)
    _label_scaler: LabelScaler = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("label_scale", self.label_scale, LABEL_SCALES)
        for name, minimum in (
            ("min_trees", 1),
            ("num_trees", self.min_trees),
            ("num_leaves", 2),
            ("min_leaf_size", 1),
            ("l2", 0),
            ("num_threads", 0),
            ("seed", 0),
        ):
            check_at_least(name, getattr(self, name), minimum)
        for name in ("learning_rate", "feature_fraction", "bagging"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(
                    f"{name}={getattr(self, name)!r} cannot be used.",
                    "a number above 0 and up to 1",
                    f"pass such a value for {name}.",
                )
        if self.validation_folds != 0:
            check_at_least("validation_folds", self.validation_folds, 2)

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        groups: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        warm_start: Self | None = None,
    ) -> Self:
        """Learn from features (S, D) and labels (S, C) or (S,); `groups` stay on one side of the validation split."""
        data = training_data(X, y, groups, sample_weight=sample_weight)
        scaler, earlier = LabelScaler(self.label_scale).fit(data.labels, data.weights), None
        targets = scaler.transform(data.labels)  # (S, C)
        if warm_start is not None:
            check_warm_start(warm_start, self, num_features=data.features.shape[1], num_targets=targets.shape[1])
            earlier = Continuation.of(warm_start, data.features, targets, weights=data.weights)
            targets = targets - earlier.output(data.features)
        splits = self._splits(data)
        dataset = lgb.Dataset(data.features, weight=data.weights, params=self._parameters(), free_raw_data=False)
        boosters = []
        for column in targets.T:
            dataset.set_label(column)
            num_trees = self._best_num_trees(dataset, splits) if splits else self.num_trees
            boosters.append(lgb.train(self._parameters(), dataset, num_boost_round=num_trees))
        self.boosters_, self._label_scaler, self.earlier_ = boosters, scaler, earlier
        self.num_trees_ = [booster.num_trees() for booster in boosters]
        self.num_features_ = data.features.shape[1]
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float32]:
        """Return scores (B, C) in label units for features (B, D)."""
        features = features_to_score(X, self.num_features_ if hasattr(self, "boosters_") else None)
        if len(features) == 0:
            return np.zeros((0, len(self.boosters_)), dtype=np.float32)
        return self.from_label_scale(full_output(self, features))

    def from_label_scale(self, output: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return scores (B, C) in label units for scores on the label scale."""
        return self._label_scaler.inverse(output).astype(np.float32)

    def own_output(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return what this fit learned, (B, C) on the label scale, without the part of earlier surrogates."""
        return np.stack([booster.predict(features, num_threads=self.num_threads) for booster in self.boosters_], axis=1)

    def similarity_features(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return features (B, F) whose inner products are the share of trees in which two texts share a leaf."""
        blocks = []
        for booster in self.boosters_:
            leaves = np.asarray(booster.predict(features, pred_leaf=True, num_threads=self.num_threads)).reshape(
                len(features), -1
            )
            numbers = np.arange(self.num_leaves)
            blocks += [(leaves[:, [tree]] == numbers).astype(np.float32) for tree in range(leaves.shape[1])]
        return (np.concatenate(blocks, axis=1) / math.sqrt(sum(self.num_trees_))).astype(np.float32)

    def booster_targets(self, X: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """Return what the boosters are to predict (B, C) of features (B, D) with labels (B, C) or (B,).

        That is the labels on the fitted scale, less the part of earlier surrogates.
        """
        features = features_to_score(X, self.num_features_ if hasattr(self, "boosters_") else None)
        targets = self._label_scaler.transform(np.asarray(y, dtype=np.float64).reshape(len(features), self.num_targets_))
        return targets if self.earlier_ is None else targets - self.earlier_.output(features)

    def booster_tables(self, X: ArrayLike, y: ArrayLike, *, sample_weight: ArrayLike | None = None) -> list[BoosterTable]:
        """Return per target its booster with what it was trained on, for the methods of `surrogate.attribution`.

        Args:
            X: Features (S, D) of the fit.
            y: Labels (S, C) or (S,) of the fit.
            sample_weight: Weights (S,) of the fit.

        Example:
            >>> table = trees.booster_tables(X, y)[0]  # doctest: +SKIP
            >>> method = BoostIn(table.booster).fit(table.features, table.targets, table.weights)  # doctest: +SKIP
            >>> method.attribute(X_test, of="prediction")  # row r is that of X[table.rows[r]]  # doctest: +SKIP
        """
        require_fitted(hasattr(self, "boosters_"))
        return self._tables(training_data(X, y, None, sample_weight=sample_weight))

    def explainer(self, data: TrainingData, method: str) -> TreeAmounts:
        """Return what accounts for scores by the data of the fit, with a method of `explanations`."""
        from surrogate.tree_amounts import TreeAmounts

        assert method in self.explanations
        return TreeAmounts.of(self._tables(data), self.earlier_, method=method, num_threads=self.num_threads)

    def save(self, folder: Path) -> None:
        """Write the fitted surrogate into `folder`."""
        require_fitted(hasattr(self, "boosters_"))
        folder = Path(folder)
        for column, booster in enumerate(self.boosters_):
            with atomic_path(_booster_path(folder, column)) as partial:
                partial.write_text(booster.model_to_string(), encoding="utf-8")
        shape = {
            "num_features": np.array([self.num_features_], dtype=np.int64),
            "num_trees": np.array(self.num_trees_, dtype=np.int64),
        }
        earlier = {} if self.earlier_ is None else self.earlier_.save(folder)
        save_state(folder, self, shape | earlier | with_prefix("labels", self._label_scaler.arrays()))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        folder = Path(folder)
        options, arrays = load_state(folder, cls.plugin_name)
        surrogate = cls(**options)
        surrogate.num_features_ = int(arrays["num_features"][0])
        surrogate.num_trees_ = [int(size) for size in arrays["num_trees"]]
        surrogate._label_scaler = LabelScaler.from_arrays(without_prefix("labels", arrays))
        surrogate.earlier_ = Continuation.load(folder, arrays, cls)
        surrogate.boosters_ = []
        for column in range(len(surrogate.num_trees_)):
            path = _booster_path(folder, column)
            if not path.exists():
                raise MissingFileError(
                    f"there is no file {path}.", "a folder that `save` wrote", "fit and save the surrogate again."
                )
            surrogate.boosters_.append(lgb.Booster(model_str=path.read_text(encoding="utf-8")))
        return surrogate

    @property
    def num_targets_(self) -> int:
        """Number of targets C of the fit."""
        return len(self.boosters_)

    def _tables(self, data: TrainingData) -> list[BoosterTable]:
        from surrogate.tree_amounts import BoosterTable

        targets = self.booster_targets(data.features, data.labels)
        return [
            BoosterTable.of(booster, self._parameters(), data, column)
            for booster, column in zip(self.boosters_, targets.T, strict=True)
        ]

    def _splits(self, data: TrainingData) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """Return (training rows, validation rows) of as many folds as give enough validation texts."""
        if self.validation_folds == 0:
            return []
        num_folds = min(self.validation_folds, len(np.unique(data.groups)))
        folds = grouped_folds(data.groups, num_folds=num_folds, seed=self.seed, keys=data.keys)
        num_used = min(num_folds, math.ceil(ENOUGH_VALIDATION_TEXTS * num_folds / len(folds)))
        return [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in range(num_used)]

    def _best_num_trees(self, dataset: lgb.Dataset, splits: list[tuple[NDArray[np.intp], NDArray[np.intp]]]) -> int:
        """Return the number of trees whose held-out scores correlate best with the labels, averaged over the folds."""
        curve = lgb.cv(
            self._parameters(),
            dataset,
            num_boost_round=self.num_trees,
            folds=splits,
            feval=_correlation,
            callbacks=[lgb.early_stopping(STALL_ROUNDS, verbose=False)],
        )["valid correlation-mean"]
        return max(self.min_trees, int(np.argmax(np.asarray(curve))) + 1)

    def _parameters(self) -> dict[str, Any]:
        return {
            "objective": "regression",
            "metric": "none",
            "learning_rate": self.learning_rate,
            "num_leaves": self.num_leaves,
            "min_data_in_leaf": self.min_leaf_size,
            "feature_fraction": self.feature_fraction,
            "lambda_l2": self.l2,
            "bagging_fraction": self.bagging,
            "bagging_freq": int(self.bagging < 1),
            "max_bin": MAX_BIN,
            "min_data_in_bin": 1,
            "feature_pre_filter": False,
            "num_threads": self.num_threads,
            "seed": self.seed,
            "deterministic": True,
            "enable_bundle": False,  # bundles lose values of sparse columns: texts would be scored by other leaves than trained
            "force_row_wise": True,
            "verbosity": -1,
        }


def _booster_path(folder: Path, column: int) -> Path:
    return folder / f"target-{column:04d}.txt"


def _correlation(scores: NDArray[np.float64], dataset: lgb.Dataset) -> tuple[str, float, bool]:
    """Return Pearson's correlation in the form that LightGBM asks for; 0 where scores or labels are constant."""
    labels = np.asarray(dataset.get_label(), dtype=np.float64)
    given = dataset.get_weight()
    weights = None if given is None else np.asarray(given, dtype=np.float64)
    root = 1.0 if weights is None else np.sqrt(weights)
    scores, labels = (scores - weighted_mean(scores, weights)) * root, (labels - weighted_mean(labels, weights)) * root
    norm = np.sqrt((scores @ scores) * (labels @ labels))
    return "correlation", float(scores @ labels / norm) if norm > 0 else 0.0, True
