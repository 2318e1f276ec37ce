"""The metric in which a text's gradient meets the target's: plain, or that of the optimiser's own next step.

Adam divides a gradient by the root of its second moments before it steps, so the first-order effect of a text is
<g / (sqrt(v) + eps), G> = <g, G / (sqrt(v) + eps)>: the division is done once, on the target's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oracle.errors import InputError
from oracle.language_model import LanguageModel
from oracle.target_columns import TargetColumns

PRECONDITIONERS = ("auto", "adam", "none")
NORM_BLOCK = 2**20  # elements of one direction that are multiplied in float64 at the same time


@dataclass(frozen=True)
class Directions:
    """What a text's gradient is multiplied with.

    Attributes:
        tensors: Parameter name -> (K, *shape) float32, one direction per target part; trainable parameters only.
        is_adam: Whether they were divided by the root of Adam's second moments.
        step_size: What the next step multiplies the (preconditioned) gradient by; None if that is not one known number.
    """

    tensors: dict[str, Tensor]
    is_adam: bool
    step_size: float | None

    @property
    def units(self) -> str:
        """Unit of a product with them, times `step_size` where it is known."""
        return "nats per target token" if self.step_size is not None else "nats per target token per unit of learning rate"


def prepare_directions(lm: LanguageModel, columns: TargetColumns, *, preconditioner: str = "auto") -> Directions:
    """Measure the gradients of all target parts and put them into the optimiser's metric.

    Args:
        lm: The model; its optimiser's second moments are used where there are any.
        columns: The target sets.
        preconditioner: "adam" divides by the root of the second moments after the next step, "none" does not, "auto"
            does where the optimiser has any.

    Raises:
        InputError: "adam" without Adam state, or Adam state for some of the trainable parameters only.
        NotFiniteError: A target gradient is NaN or infinite.
    """
    moments = adam_moments(lm) if preconditioner != "none" else None
    if preconditioner == "adam" and moments is None:
        raise InputError(
            "preconditioner='adam', and the model has no Adam state.",
            "a LanguageModel whose Adam or AdamW has taken a step",
            "pass the training run's optimizer, or use preconditioner='none'.",
        )
    directions = columns.gradients(lm)
    if moments is not None:
        for name, direction in directions.items():
            moments[name].precondition(direction, columns.shares)
    for name in maximised(lm) & set(directions):
        directions[name].neg_()
    is_adam = moments is not None
    return Directions(directions, is_adam, step_size(lm, is_adam=is_adam))


def direction_norms(columns: TargetColumns, directions: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return the norms of the whole directions (C,) and of their halves (2, C); 1 where a norm is 0."""
    num_parts = len(columns.parts)
    gram = torch.zeros(num_parts, num_parts, dtype=torch.float64)
    for direction in directions.values():
        flat = direction.reshape(num_parts, -1)
        for block in flat.split(NORM_BLOCK, dim=1):  # (K, P'), so that the copy in float64 stays small
            gram += (block.double() @ block.double().T).cpu()
    weights = columns.combine(np.eye(num_parts))  # (K, C)
    whole = np.sqrt(np.maximum(np.einsum("kc,kl,lc->c", weights, gram.numpy(), weights), 0))
    halves = columns.halves(np.sqrt(np.diag(gram.numpy())))
    return np.where(whole > 0, whole, 1.0), np.where(halves > 0, halves, 1.0)


@dataclass(frozen=True)
class SecondMoments:
    """What Adam's next step divides one parameter's gradient by.

    Attributes:
        square: Bias-corrected second moments after the decay of that step, of the parameter's shape.
        new_weight: Weight of a new gradient's square in them.
        eps: The optimiser's own.
    """

    square: Tensor
    new_weight: float
    eps: float

    def precondition(self, directions: Tensor, shares: np.ndarray) -> None:
        """Divide target gradients (K, *shape) in place by the root of the moments after a step on the target itself.

        Where training has hardly touched a weight (the embedding of a rare token) its moments are near 0, and the bare
        division would blow the target's gradient up without bound, which a real step, squaring the new gradient too,
        never does. Elsewhere the target's square adds next to nothing.

        Args:
            directions: Gradients of K target parts.
            shares: (K, C) each part's share of its target set; parts of one set are divided by the same.
        """
        for share in torch.from_numpy(shares).to(directions).T:
            rows = share.nonzero().flatten()
            whole = torch.tensordot(share[rows], directions[rows], dims=1)
            directions[rows] /= (self.square + self.new_weight * whole.square()).sqrt() + self.eps


def adam_moments(lm: LanguageModel) -> dict[str, SecondMoments] | None:
    """Return what the next step divides each trainable parameter's gradient by (see `second_moments`).

    Returns:
        Parameter name -> moments of every trainable parameter; None if the optimiser has no Adam state.

    Raises:
        InputError: The optimiser has moments for some of the trainable parameters only.
    """
    trainable = {name for name, p in lm.module.named_parameters() if p.requires_grad}
    found = {name: moments for name, moments in second_moments(lm).items() if name in trainable}
    missing = trainable - set(found)
    if found and missing:
        raise InputError(
            f"the optimiser has no second moments for {sorted(missing)[:3]} and {max(len(missing) - 3, 0)} more parameters.",
            "an Adam state for every trainable parameter",
            "freeze those parameters, or use preconditioner='none'.",
        )
    return found or None


def second_moments(lm: LanguageModel) -> dict[str, SecondMoments]:
    """Return the second moments that the next Adam step divides by, this text's own square left out.

    With `amsgrad` that is the largest second moment so far.

    Returns:
        Parameter name -> moments of the parameters with Adam state, trainable or not.
    """
    found: dict[str, SecondMoments] = {}
    names = {p: name for name, p in lm.module.named_parameters()}
    for group in [] if lm.optimizer is None else lm.optimizer.param_groups:
        for parameter in group["params"]:
            slots = lm.optimizer.state.get(parameter, {}) if lm.optimizer is not None else {}
            if parameter not in names or "betas" not in group or slots.get("exp_avg_sq") is None or "step" not in slots:
                continue
            decay = group["betas"][1]
            correction = 1.0 - decay ** (float(slots["step"]) + 1)
            moments = slots["exp_avg_sq"].float() * decay
            if group.get("amsgrad"):
                moments = torch.maximum(slots["max_exp_avg_sq"].float(), moments)
            found[names[parameter]] = SecondMoments(moments / correction, (1.0 - decay) / correction, float(group["eps"]))
    return found


def maximised(lm: LanguageModel) -> set[str]:
    """Name the parameters whose optimiser goes up the loss (`maximize=True`)."""
    groups = [] if lm.optimizer is None else lm.optimizer.param_groups
    own = {parameter for group in groups if group.get("maximize") for parameter in group["params"]}
    return {name for name, parameter in lm.module.named_parameters() if parameter in own}


def step_size(lm: LanguageModel, *, is_adam: bool) -> float | None:
    """What the next step multiplies the (preconditioned) gradient of this text by; None if that is not one known number.

    Known are SGD, and Adam and AdamW in Adam's metric; the number has to be the same for all trainable parameters.
    """
    optimizer = lm.optimizer
    if optimizer is None or type(optimizer) not in ((torch.optim.Adam, torch.optim.AdamW) if is_adam else (torch.optim.SGD,)):
        return None
    left = {parameter for parameter in lm.module.parameters() if parameter.requires_grad}
    sizes = set()
    for group in optimizer.param_groups:
        for parameter in left & set(group["params"]):
            slots = optimizer.state.get(parameter, {})
            sizes.add(float(group["lr"]) * (_adam_share(group, slots) if is_adam else _sgd_share(group, slots)))
        left -= set(group["params"])
    return sizes.pop() if len(sizes) == 1 and 0.0 not in sizes and not left else None


def _adam_share(group: dict[str, Any], slots: dict[str, Any]) -> float:
    """The share of this gradient in Adam's bias-corrected mean at the next step."""
    decay = float(group["betas"][0])
    return (1 - decay) / (1 - decay ** (float(slots["step"]) + 1))


def _sgd_share(group: dict[str, Any], slots: dict[str, Any]) -> float:
    """The share of this gradient in SGD's next step: the first one sets the momentum buffer without dampening."""
    momentum, is_first = float(group["momentum"]), slots.get("momentum_buffer") is None
    share = 1.0 if momentum == 0 or is_first else 1 - float(group["dampening"])
    return 1 + momentum * share if group["nesterov"] else share
