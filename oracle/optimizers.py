"""The optimiser that a measurement steps with: whether there is one that changes anything, and has a past."""

from __future__ import annotations

import warnings

from oracle.errors import InputError
from oracle.language_model import LanguageModel


class FreshOptimizerWarning(UserWarning):
    """An Adam optimiser that has taken no step yet."""


def require_optimizer(lm: LanguageModel, *, needed_by: str, otherwise: str | None = None) -> None:
    """Refuse a model whose optimiser is missing or steps by nothing.

    Args:
        lm: The model.
        needed_by: What needs the optimiser, for the message.
        otherwise: What does without one, for the message ("use method='grad_dot'").

    Raises:
        InputError: There is no optimiser, its learning rate is 0, or no parameter is trainable.
    """
    require_trainable(lm, needed_by=needed_by)
    instead = "" if otherwise is None else f", or {otherwise}"
    if lm.optimizer is None:
        raise InputError(
            f"{needed_by} needs the optimiser that trains the model, and there is none.",
            "a LanguageModel with optimizer=..., or a checkpoint folder that has its optimiser state",
            f"pass optimizer=..., the run's optimiser, with its state{instead}.",
        )
    if all(float(group["lr"]) == 0.0 for group in lm.optimizer.param_groups):
        raise InputError(
            f"{needed_by} steps with the optimiser, whose learning rate is 0, so a step changes nothing.",
            "a learning rate above 0",
            f"set the rate of the phase that you select for (schedules end at 0){instead}.",
        )


def require_trainable(lm: LanguageModel, *, needed_by: str) -> None:
    """Refuse a model that is frozen altogether.

    Raises:
        InputError: It is.
    """
    if not any(parameter.requires_grad for parameter in lm.module.parameters()):
        raise InputError(
            f"{needed_by} needs a gradient, and the {type(lm.module).__name__} has no trainable parameter.",
            "a model in which the parameters that are trained have requires_grad=True",
            "set requires_grad on them; with peft load the adapter by is_trainable=True.",
        )


def warn_of_fresh_adam(lm: LanguageModel) -> None:
    """Warn where the optimiser is Adam's kind and has no state of any trainable parameter."""
    optimizer = lm.optimizer
    if optimizer is None or not all("betas" in group for group in optimizer.param_groups):
        return
    trainable = [parameter for parameter in lm.module.parameters() if parameter.requires_grad]
    if not trainable or any(optimizer.state.get(parameter) for parameter in trainable):
        return
    warnings.warn(
        f"the {type(optimizer).__name__} has no state, as before its first step: that of Adam is about the learning rate times "
        "the sign of the gradient, and methods that divide by its second moments do without. Unless training starts here, pass "
        "the run's optimiser, with its state.",
        FreshOptimizerWarning,
        stacklevel=4,
    )
