"""Trains a LightGBM model again as its own text says: parameters, rounds, learning rates, categorical features.

Also for models whose leaf values do not follow from gradients (random forests, linear trees, DART, GOSS, absolute and
quantile losses): nothing is read from the trees but how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import lightgbm as lgb
import numpy as np

from oracle.errors import InputError
from surrogate.attribution.ensemble import TreeEnsemble, booster_of, learning_rates_of
from surrogate.attribution.model_text import ModelText
from surrogate.attribution.objective_reading import NOT_AT_ALL, Custom, ObjectiveFunction, read_objective
from surrogate.attribution.objectives import Array, Objective
from surrogate.attribution.training_rows import TrainingRows

NOT_OF_TRAINING = {
    "seed",  # the seeds that follow from it are given one by one
    "data",
    "valid",
    "num_iterations",
    "early_stopping_round",
    "metric",
    "objective",
    "categorical_feature",
    "verbosity",
}


@dataclass(frozen=True)
class Distance(Objective):
    """Losses of LightGBM whose leaves hold medians or quantiles: only the loss is given.

    `level` 0.5 doubled is the absolute error; `is_relative` divides it by the target's size, at least 1 (mape).
    """

    level: float = 0.5
    scale: float = 2.0
    is_relative: bool = False

    def loss(self, scores: Array, y: Array) -> Array:
        """Return the pinball loss."""
        above = y - scores[:, 0]
        loss = self.scale * np.maximum(self.level * above, (self.level - 1.0) * above)
        return loss / np.maximum(1.0, np.abs(y)) if self.is_relative else loss


@dataclass(frozen=True)
class Recipe:
    """How a model was trained.

    Attributes:
        ensemble: The model; only its Booster, text, objective and classes mean anything.
        parameters: LightGBM's parameters.
        categorical_features: Columns.
        learning_rates: (T,) where they changed between rounds, else None.
    """

    ensemble: TreeEnsemble
    parameters: dict[str, Any]
    categorical_features: list[int]
    learning_rates: list[float] | None

    @classmethod
    def read(cls, model: Any, *, objective: ObjectiveFunction | None = None) -> Recipe:
        """Read an estimator, a Booster, or the path of a saved model.

        Raises:
            InputError: The model cannot be trained from features and labels alone.
        """
        booster, settings = booster_of(model)
        numbers = [float(value) for value in settings.values() if isinstance(value, (int, float)) and not isinstance(value, bool)]
        text = ModelText.parse(booster.model_to_string(), numbers)
        function: Any = objective
        if function is None and isinstance(model, lgb.LGBMModel) and callable(model.objective):
            function = model.objective
        known = _objective(text, function)
        num_outputs = text.num_trees_per_round
        ensemble = TreeEnsemble(
            booster=booster,
            text=text,
            objective=known,
            learning_rates=np.zeros(0),
            reg_lambda=0.0,
            reg_alpha=0.0,
            cat_l2=0.0,
            init_scores=np.zeros(num_outputs),
            leaf_values=[tree.leaf_values for tree in text.trees],
            classes=np.asarray(model.classes_) if isinstance(model, lgb.LGBMClassifier) else None,
            class_weight=settings.get("class_weight"),
        )
        columns = text.parameters.get("categorical_feature", "")
        return cls(ensemble, _parameters(booster, text, known), [int(c) for c in columns.split(",") if c], _schedule(text))

    def labels(self, y: Any, encoded: Array) -> Array:
        """Return the labels as LightGBM's training takes them: class numbers, or the values as given."""
        return encoded if self.ensemble.objective.is_classification else np.asarray(y, dtype=np.float64).ravel()

    def dataset(self, X: Any, labels: Array, rows: TrainingRows, *, without: int | None = None) -> lgb.Dataset:
        """Return rows in LightGBM's form, all or all but one."""
        keep = np.arange(rows.num_rows) if without is None else np.delete(np.arange(rows.num_rows), without)
        kept = X.iloc[keep] if hasattr(X, "iloc") else X[keep]
        starts = rows.init_score
        return lgb.Dataset(
            kept,
            labels[keep],
            weight=None if rows.sample_weight is None else rows.sample_weight[keep],
            init_score=None if starts is None else (starts[keep, 0] if starts.shape[1] == 1 else starts[keep]),
            categorical_feature=self.categorical_features or "auto",
            params=dict(self.parameters),
            free_raw_data=False,
        )

    def train(self, dataset: lgb.Dataset) -> lgb.Booster:
        """Train as many rounds as the model has."""
        callbacks = [lgb.reset_parameter(learning_rate=list(self.learning_rates))] if self.learning_rates else None
        return lgb.train(dict(self.parameters), dataset, num_boost_round=self.ensemble.num_rounds, callbacks=callbacks)

    def with_first_rate(self, X: Any, labels: Array, rows: TrainingRows) -> Recipe:
        """Return the recipe with the learning rate of round 0, which the text does not say where rates changed.

        The structure of the first tree does not depend on it. Its leaves are the init score plus the rate times a step; two
        trainings of one round tell the two apart.
        """
        if self.learning_rates is None:
            return self
        first, half = (
            lgb.train({**self.parameters, "learning_rate": rate}, self.dataset(X, labels, rows), num_boost_round=1)
            for rate in (1.0, 0.5)
        )
        whole, given = self.raw_scores(first, X), self.raw_scores(self.ensemble.booster, X, num_rounds=1)
        step = 2.0 * (whole - self.raw_scores(half, X))  # (n, K)
        size = float(np.vdot(step, step))
        rate = 1.0 + float(np.vdot(given - whole, step)) / size if size > 0 else 1.0
        return replace(self, learning_rates=[rate, *self.learning_rates[1:]])

    def raw_scores(
        self, booster: lgb.Booster, X: Any, init_score: Array | None = None, *, num_rounds: int | None = None
    ) -> Array:
        """Return a model's raw predictions (n, K) plus the rows' init scores; a random forest's are means over its trees."""
        predicted = booster.predict(X, raw_score=True, num_iteration=num_rounds)
        scores = np.asarray(predicted, dtype=np.float64).reshape(-1, self.ensemble.num_outputs)
        if self.parameters.get("boosting") == "rf":
            scores = scores / self.ensemble.num_rounds
        return scores if init_score is None else scores + init_score


def _objective(text: ModelText, function: Any) -> Objective:
    name = text.header.get("objective", "custom").split()[0]
    if name == "regression_l1":
        return Distance(name)
    if name == "quantile":
        return Distance(name, level=text.number("alpha"), scale=1.0)
    if name == "mape":
        return Distance(name, is_relative=True)
    if name in NOT_AT_ALL:
        raise InputError(
            f"models with the objective {name!r} are not retrained here.",
            "objectives whose loss follows from a row's own label, raw score and weight",
            "train the model with another objective.",
        )
    return read_objective(text, function)


def _parameters(booster: lgb.Booster, text: ModelText, objective: Objective) -> dict[str, Any]:
    """Return the parameters for training as LightGBM itself reads them from the text, with all the digits that are known."""
    parameters: dict[str, Any] = {"verbosity": -1, "metric": "none", "objective": text.parameters["objective"]}
    for name, value in lgb.Booster(model_str=booster.model_to_string()).params.items():
        if name in text.parameters and name not in NOT_OF_TRAINING and value not in ("", []):
            parameters[name] = text.sharpened(value) if isinstance(value, float) else value
    if isinstance(objective, Custom):
        parameters["objective"] = lambda scores, data: _as_lightgbm_takes_it(objective, scores, data.get_label())
    return parameters


def _as_lightgbm_takes_it(objective: Custom, scores: Array, y: Array) -> tuple[Array, Array]:
    gradients, hessians = objective.gradients(scores.reshape(len(y), -1), y)
    return (gradients, hessians) if objective.num_outputs > 1 else (gradients[:, 0], hessians[:, 0])


def _schedule(text: ModelText) -> list[float] | None:
    """Return the learning rate of each round where they differ; DART and random forests scale trees by rules of their own."""
    if text.parameters.get("boosting", "gbdt") != "gbdt":
        return None
    rates = learning_rates_of(text)
    return None if np.allclose(rates, rates[0], rtol=1e-6, atol=0.0) else [float(rate) for rate in rates]
