"""The optimiser that a measurement steps with: whether there is one that changes anything."""

from __future__ import annotations

from oracle.errors import InputError
from oracle.language_model import LanguageModel


def require_optimizer(lm: LanguageModel, *, needed_by: str, otherwise: str | None = None) -> None:
    """Refuse a model whose optimiser is missing or steps by nothing.

    Args:
        lm: The model.
        needed_by: What needs the optimiser, for the message.
        otherwise: What does without one, for the message ("use method='grad_dot'").

    Raises:
        InputError: There is no optimiser, or its learning rate is 0.
    """
    instead = "" if otherwise is None else f", or {otherwise}"
    if lm.optimizer is None:
        raise InputError(
            f"{needed_by} needs the optimiser that trains the model, and there is none.",
            "a LanguageModel with optimizer=..., or a checkpoint folder that has its optimiser state",
            f"pass optimizer=torch.optim.AdamW(module.parameters(), lr=...){instead}.",
        )
    if all(float(group["lr"]) == 0.0 for group in lm.optimizer.param_groups):
        raise InputError(
            f"{needed_by} steps with the optimiser, whose learning rate is 0, so a step changes nothing.",
            "a learning rate above 0",
            f"set the rate of the phase that you select for (schedules end at 0){instead}.",
        )
