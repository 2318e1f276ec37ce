"""Which objective a model was trained with: read from its text, or a function given by the user.

Refused are objectives whose leaf values are not Newton steps of the rows' gradients, which `LeaveOneOut` takes, and those
where a row's gradient does not follow from its own score, label and weight (rankings, cross_entropy_lambda).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np

from oracle.errors import InputError, InputTypeError
from surrogate.attribution.model_text import ModelText
from surrogate.attribution.objectives import (
    Array,
    Binary,
    Fair,
    Gamma,
    Huber,
    Multiclass,
    Objective,
    OneVersusAll,
    Poisson,
    Tweedie,
)

SUPPORTED = (
    "regression",
    "huber",
    "fair",
    "poisson",
    "gamma",
    "tweedie",
    "binary",
    "cross_entropy",
    "multiclass",
    "multiclassova",
)
RETRAINED_ONLY = {
    "regression_l1": "its leaves hold medians of residuals, not Newton steps of gradients",
    "quantile": "its leaves hold quantiles of residuals, not Newton steps of gradients",
    "mape": "its leaves hold weighted medians of residuals, not Newton steps of gradients",
}
NOT_AT_ALL = {
    "lambdarank": "a row's gradient depends on the other rows of its query",
    "rank_xendcg": "a row's gradient depends on the other rows of its query",
    "cross_entropy_lambda": "its weights change the link between score and target",
}
ObjectiveFunction = Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class SquareRoot(Objective):
    """Squared error on sign(y) sqrt|y| (`reg_sqrt`); targets are given transformed, scores stay on that scale."""

    def predict(self, scores: Array) -> Array:
        """Return the scores: targets and predictions are compared on the transformed scale."""
        return scores[:, 0]


@dataclass(frozen=True)
class Custom(Objective):
    """A function (y, scores) -> (gradient, Hessian) of the user, in the form that LightGBM's sklearn wrapper takes."""

    function: ObjectiveFunction | None = None

    def gradients(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Return what the function gives, as (n, K) each."""
        assert self.function is not None
        gradient, hessian = self.function(y, scores if self.num_outputs > 1 else scores[:, 0])
        shape = scores.shape
        return np.asarray(gradient, np.float64).reshape(shape), np.asarray(hessian, np.float64).reshape(shape)

    def slopes(self, scores: Array, y: Array) -> tuple[Array, Array]:
        """Refuse: the function gives no third derivative."""
        raise InputError(
            "this method follows how gradients move with the scores, and a custom objective does not say.",
            f"one of LightGBM's own objectives: {', '.join(SUPPORTED)}",
            "use BoostIn, LeafSimilarity or LeaveOneOut with a custom objective.",
        )

    def loss(self, scores: Array, y: Array) -> Array:
        """Refuse: the function gives no loss."""
        raise InputError(
            "this method compares losses, and a custom objective gives only their gradients.",
            f"one of LightGBM's own objectives: {', '.join(SUPPORTED)}",
            'use BoostIn or LeafSimilarity, or ask for of="prediction".',
        )

    def bias(self, y: Array, weights: Array | None) -> Array:
        """Return zeros: LightGBM does not boost from the average of a custom objective."""
        return np.zeros(self.num_outputs)


def read_objective(text: ModelText, function: ObjectiveFunction | None) -> Objective:
    """Return the objective that the model text names, or the user's function where the text says that it was custom.

    Raises:
        InputError: The objective cannot be attributed, or a function is missing or not wanted.
    """
    words = text.header.get("objective", "custom").split()
    name, options = words[0], dict(word.split(":", 1) for word in words[1:] if ":" in word)
    if name == "custom":
        return _custom(function, text.num_trees_per_round)
    if function is not None:
        raise InputError(
            f"objective={function!r} was given, but the model was trained with LightGBM's own {name!r}.",
            "a function only for models that were trained with a custom objective",
            "leave `objective` out.",
        )
    if name not in SUPPORTED:
        reason = {**RETRAINED_ONLY, **NOT_AT_ALL}.get(name, "it is not known here")
        or_retrain = ", or use LeaveOneOut, which retrains and needs no gradients" if name in RETRAINED_ONLY else ""
        raise InputError(
            f"the model's objective {name!r} cannot be attributed: {reason}.",
            ", ".join(SUPPORTED),
            f"train the model with one of these{or_retrain}.",
        )
    return _own(name, options, text, is_sqrt="sqrt" in words)


def _own(name: str, options: dict[str, str], text: ModelText, *, is_sqrt: bool) -> Objective:
    if name == "regression":
        return SquareRoot("regression sqrt") if is_sqrt else Objective(name)
    if name == "huber":
        return Huber(name, threshold=text.number("alpha"))
    if name == "fair":
        return Fair(name, c=text.number("fair_c"))
    if name == "poisson":
        return Poisson(name, max_delta_step=text.number("poisson_max_delta_step"))
    if name == "gamma":
        return Gamma(name)
    if name == "tweedie":
        return Tweedie(name, power=text.number("tweedie_variance_power"))
    if name == "cross_entropy":
        return Binary(name)
    if name == "multiclass":
        return Multiclass(name, num_outputs=text.num_trees_per_round)
    sigmoid, of_positive = text.sharpened(float(options["sigmoid"])), text.number("scale_pos_weight")
    kind = Binary if name == "binary" else OneVersusAll
    return kind(name, text.num_trees_per_round, sigmoid, of_positive, text.number("is_unbalance") != 0)


def _custom(function: ObjectiveFunction | None, num_outputs: int) -> Objective:
    if function is None:
        raise InputError(
            "the model was trained with a custom objective, which its text does not hold.",
            "objective=function(y, scores) -> (gradient, Hessian)",
            "pass the function that the model was trained with.",
        )
    if not callable(function) or len(signature(function).parameters) != 2:
        raise InputTypeError(
            f"objective={function!r} cannot be called with targets and scores.",
            "a function of two arguments, (y, scores) -> (gradient, Hessian); weights belong inside it",
            "wrap the function that the model was trained with.",
        )
    return Custom("custom", num_outputs=num_outputs, function=function)
