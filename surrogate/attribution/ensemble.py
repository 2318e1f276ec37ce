"""A trained LightGBM model as attribution sees it: leaves, leaf values, learning rates, penalties, objective, labels.

`TreeEnsemble.read` takes an estimator, a Booster or a saved file, and believes the model's text alone. Rows are routed
by LightGBM itself (`pred_leaf`), so missing values, categorical splits and thresholds mean what they meant in training.

The text does not hold the score that boosting started from: LightGBM adds it to the leaves of round 0. It follows from
the labels, so `with_bias` sets it once they are known; `surrogate.attribution.leaf_check` then proves it.

Shapes: n rows, T rounds, K outputs; C = T K trees in the order of the model, round by round; tree c is round c // K of
output c % K.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
from numpy.typing import ArrayLike, NDArray

from oracle.errors import InputError, InputTypeError, MissingFileError, NotFiniteError
from surrogate.attribution.model_text import ModelText
from surrogate.attribution.objective_reading import ObjectiveFunction, SquareRoot, read_objective
from surrogate.attribution.objectives import Array, Objective

CELLS_PER_CALL = 1_000_000  # leaf numbers that one call of pred_leaf returns


@dataclass(frozen=True)
class TreeEnsemble:
    """A model read for attribution.

    Attributes:
        booster: LightGBM's Booster; `num_rounds` of its rounds count (early stopping).
        text: The model's text, parsed.
        objective: Gradients, loss and bias; `num_outputs` is K.
        learning_rates: (T,) shrinkage of each round.
        reg_lambda, reg_alpha: Penalties of leaf values; `cat_l2` is added to reg_lambda below categorical splits.
        init_scores: (K,) score that boosting started from; zero until `with_bias`.
        leaf_values: Per tree (L,) as stored: shrunk, and in round 0 with the init score added.
        classes: Original labels in the order of the outputs; None for regression or where the model does not say.
        class_weight: An estimator's `class_weight`, which it turned into weights of rows.
    """

    booster: lgb.Booster
    text: ModelText
    objective: Objective
    learning_rates: Array
    reg_lambda: float
    reg_alpha: float
    cat_l2: float
    init_scores: Array
    leaf_values: list[Array]
    classes: NDArray | None
    class_weight: Any = None

    @classmethod
    def read(cls, model: Any, *, objective: ObjectiveFunction | None = None) -> TreeEnsemble:
        """Read an estimator, a Booster, or the path of a saved model.

        Args:
            model: A fitted LGBMRegressor or LGBMClassifier, a `lightgbm.Booster`, or a file that LightGBM saved.
            objective: The function (y, scores) -> (gradient, Hessian) of a Booster or file trained with a custom one.

        Raises:
            InputError: The model is not fitted, or has trees or an objective that cannot be attributed.
            InputTypeError: It is something else.
            MissingFileError: There is no such file.
        """
        booster, settings = booster_of(model)
        function: Any = objective
        if function is None and isinstance(model, lgb.LGBMModel) and callable(model.objective):
            function = model.objective
        numbers = [float(value) for value in settings.values() if isinstance(value, (int, float)) and not isinstance(value, bool)]
        text = ModelText.parse(booster.model_to_string(), numbers)
        _refuse_other_trees(text)
        known = read_objective(text, function)
        return cls(
            booster=booster,
            text=text,
            objective=known,
            learning_rates=learning_rates_of(text),
            reg_lambda=text.number("lambda_l2"),
            reg_alpha=text.number("lambda_l1"),
            cat_l2=text.number("cat_l2"),
            init_scores=np.zeros(known.num_outputs),
            leaf_values=[tree.leaf_values for tree in text.trees],
            classes=np.asarray(model.classes_) if isinstance(model, lgb.LGBMClassifier) else None,
            class_weight=settings.get("class_weight"),
        )

    @property
    def num_outputs(self) -> int:
        """K: scores of a row."""
        return self.objective.num_outputs

    @property
    def num_rounds(self) -> int:
        """T: rounds of boosting that count."""
        return len(self.leaf_values) // self.num_outputs

    @property
    def leaf_offsets(self) -> NDArray[np.int64]:
        """(C + 1,) where each tree's leaves start when all leaves of the model stand in one row."""
        return np.concatenate([[0], np.cumsum([len(values) for values in self.leaf_values])])

    def leaves(self, X: Any) -> NDArray[np.int32]:
        """Return the leaf (n, C) that each row reaches in each tree; columns are contiguous."""
        rows = as_rows(X, self.booster.num_feature())
        num_rows, num_trees = rows.shape[0], len(self.leaf_values)
        leaves = np.empty((num_rows, num_trees), dtype=np.int32, order="F")
        step = max(1, CELLS_PER_CALL // num_trees)
        for start in range(0, num_rows, step):
            block = rows.iloc[start : start + step] if hasattr(rows, "iloc") else rows[start : start + step]
            found = self.booster.predict(block, pred_leaf=True, num_iteration=self.num_rounds)
            leaves[start : start + step] = np.asarray(found).reshape(-1, num_trees)
        return leaves

    def with_bias(self, y: Array, weights: Array | None, *, has_init_score: bool) -> TreeEnsemble:
        """Return the ensemble with the init score that encoded targets `y` (n,) and weights (n,) lead to."""
        boosts_from_average = self.text.number("boost_from_average") != 0 and not has_init_score
        bias = self.objective.bias(y, weights) if boosts_from_average else np.zeros(self.num_outputs)
        return dataclasses.replace(self, init_scores=bias)

    def steps(self) -> list[Array]:
        """Return per tree what boosting added to the scores after the init score: (L,), 0 for trees without a split."""
        steps = []
        for tree, (text, stored) in enumerate(zip(self.text.trees, self.leaf_values, strict=True)):
            bias = self.init_scores[tree] if tree < self.num_outputs else 0.0
            steps.append(np.zeros(1) if text.is_constant else stored - bias)
        return steps

    def raw_scores_by_round(self, leaves: NDArray[np.int32], init_score: Array | None = None) -> Iterator[Array]:
        """Yield T + 1 times the raw scores (n, K): before each round, and the final ones.

        Args:
            leaves: (n, C) from `leaves`.
            init_score: (n, K) of the rows, where training had one.
        """
        scores = np.tile(self.init_scores, (len(leaves), 1))
        if init_score is not None:
            scores += init_score
        yield scores
        for first in range(0, len(self.leaf_values), self.num_outputs):
            scores = scores.copy()
            for output in range(self.num_outputs):
                tree = first + output
                added = self.leaf_values[tree] - (self.init_scores[output] if first == 0 else 0.0)
                scores[:, output] += added[leaves[:, tree]]
            yield scores

    def final_scores(self, leaves: NDArray[np.int32], init_score: Array | None = None) -> Array:
        """Return LightGBM's own raw predictions (n, K), bit for bit, plus the rows' init scores."""
        scores = np.zeros((len(leaves), self.num_outputs))
        for tree, stored in enumerate(self.leaf_values):
            scores[:, tree % self.num_outputs] += stored[leaves[:, tree]]
        return scores if init_score is None else scores + init_score

    def with_classes_of(self, y: ArrayLike) -> TreeEnsemble:
        """Return the ensemble with the classes that training labels `y` show, where the model does not hold them.

        A Booster or a saved file knows class numbers only. Labels that are no such numbers are taken in sorted order,
        as LightGBM's estimators do; the check of the leaf values then proves or refutes it.
        """
        if self.classes is not None or not self.objective.is_classification:
            return self
        labels = np.unique(np.asarray(y).ravel())
        numbers = np.arange(self.objective.num_classes)
        if labels.dtype.kind in "biuf" and np.isin(labels, numbers).all():
            return dataclasses.replace(self, classes=numbers)
        if len(labels) != len(numbers):
            raise InputError(
                f"y has {len(labels)} different labels, {_shown(labels)}.",
                f"{len(numbers)} classes, or the class numbers 0 to {len(numbers) - 1}",
                "pass the labels that the model was trained with, or the fitted estimator, which remembers its classes.",
            )
        return dataclasses.replace(self, classes=labels)

    def encode_targets(self, y: ArrayLike) -> Array:
        """Return targets (n,) as the objective takes them: class numbers, or values (square roots under reg_sqrt).

        Raises:
            InputError: A label is none of the classes, or a value is no number.
        """
        given = np.asarray(y)
        given = given.ravel() if given.ndim == 2 and given.shape[1] == 1 else given
        if given.ndim != 1:
            raise InputError(f"targets of shape {given.shape} were given.", "one target per row", "pass a vector.")
        if not self.objective.is_classification:
            values = _as_numbers(given)
            return np.sign(values) * np.sqrt(np.abs(values)) if isinstance(self.objective, SquareRoot) else values
        classes = np.arange(self.objective.num_classes) if self.classes is None else self.classes
        order = np.argsort(classes, kind="stable")
        try:
            place = np.clip(np.searchsorted(classes[order], given), 0, len(classes) - 1)
        except TypeError as error:  # strings against numbers
            raise InputTypeError(
                f"labels of type {given.dtype} were given.", f"labels among {_shown(classes)}", "pass the original labels."
            ) from error
        codes = order[place]
        unknown = classes[codes] != given
        if unknown.any():
            raise InputError(
                f"y holds labels that the model does not know: {_shown(np.unique(given[unknown]))}.",
                f"labels among {_shown(classes)}",
                "pass the labels that the model was trained with.",
            )
        return codes.astype(np.float64)


def as_rows(X: Any, num_features: int) -> Any:
    """Return rows of features in a form that LightGBM takes and that can be cut: array, DataFrame, or CSR matrix.

    Raises:
        InputError: It is no matrix, or has another number of columns than the model.
    """
    if hasattr(X, "tocsr"):
        X = X.tocsr()
    elif not hasattr(X, "iloc"):
        X = np.asarray(X)
    if len(X.shape) != 2 or X.shape[1] != num_features:
        raise InputError(
            f"features of shape {tuple(X.shape)} were given.",
            f"a matrix with the model's {num_features} columns",
            "pass the features in the form in which the model was trained.",
        )
    return X


def booster_of(model: Any) -> tuple[lgb.Booster, dict[str, Any]]:
    """Return the Booster and the settings that the living model remembers, with all their digits."""
    if isinstance(model, lgb.Booster):
        return model, dict(model.params)
    if isinstance(model, lgb.LGBMModel):
        if not model.__sklearn_is_fitted__():
            raise InputError(f"this {type(model).__name__} has not been fitted.", "a fitted estimator", "call its fit first.")
        return model.booster_, {**model.get_params(), **model.booster_.params}
    if isinstance(model, (str, Path)):
        if not Path(model).is_file():
            raise MissingFileError(f"there is no file {model}.", "a model that LightGBM saved", "check the path.")
        return lgb.Booster(model_file=str(model)), {}
    hint = "pass one of these"
    if hasattr(model, "booster_tables"):
        hint = "call its booster_tables(X, y), which has each target's booster with the rows and targets that it was trained on"
    elif hasattr(model, "best_estimator_"):
        hint = "pass its best_estimator_"
    elif hasattr(model, "named_steps"):
        hint = "pass its last step, and features as they come out of the steps before"
    raise InputTypeError(
        f"a {type(model).__name__} was given as the model.",
        "a fitted LGBMRegressor or LGBMClassifier, a lightgbm.Booster, or the path of a saved model",
        f"{hint}.",
    )


def _refuse_other_trees(text: ModelText) -> None:
    if any(tree.is_linear for tree in text.trees) or text.parameters.get("linear_tree") == "1":
        raise InputError(
            "the model has linear trees (linear_tree), whose leaves hold regressions.",
            "trees with one value per leaf",
            "train the model with linear_tree=False, or use LeaveOneOut, which retrains.",
        )
    if text.parameters.get("boosting") == "rf":
        raise InputError(
            "the model is a random forest (boosting_type='rf'), whose trees do not follow each other.",
            "gradient boosting (boosting_type='gbdt')",
            "train the model with gbdt, or use LeaveOneOut, which retrains.",
        )


def learning_rates_of(text: ModelText) -> Array:
    """Return the rate (T,) of each round; that of round 0 may be a guess, which the leaf check proves or corrects.

    A tree without a split says 1, and so does every tree of round 0 that the init score was added to.
    """
    per_round = text.num_trees_per_round
    rates = np.empty(len(text.trees) // per_round)
    printed = next((tree.shrinkage for tree in text.trees[:per_round] if not tree.is_constant and tree.shrinkage != 1.0), None)
    rates[0] = text.number("learning_rate") if printed is None else text.sharpened(printed)
    for number in range(1, len(rates)):
        trees = text.trees[number * per_round : (number + 1) * per_round]
        printed = next((tree.shrinkage for tree in trees if not tree.is_constant), None)
        rates[number] = rates[number - 1] if printed is None else text.sharpened(printed)
    return rates


def _as_numbers(values: NDArray) -> Array:
    try:
        numbers = values.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InputTypeError(f"targets of type {values.dtype} were given.", "numbers", "pass numeric targets.") from error
    if not np.isfinite(numbers).all():
        raise NotFiniteError("targets hold NaN or infinite values.", "finite numbers", "leave these rows out.")
    return numbers


def _shown(labels: NDArray, most: int = 8) -> str:
    return ", ".join(map(repr, labels[:most].tolist())) + (", ..." if len(labels) > most else "")
