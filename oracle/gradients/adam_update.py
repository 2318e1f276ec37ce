"""The first order of Adam's own next step on one text: <update(g_i), G>.

A step with gradient g moves the weights by -lr u(g), u(g) = m' / (1 - b1^t) / (sqrt(v' / (1 - b2^t)) + eps) with
m' = b1 m + (1 - b1) g and v' = b2 v + (1 - b2) g^2, all of it as `torch.optim.Adam` does it. u is not linear in g,
so it takes the text's whole gradient, one backward pass for each. What a step with a gradient of 0 does (momentum)
is the same for all texts and is subtracted, so that a text without gradient has 0. Decoupled weight decay, which is
part of that, drops out; Adam's own, which is added to the gradient, does not. A parameter that the text's loss does not
reach (an expert that no token was sent to) has no gradient, not one of 0: the step leaves it out, momentum, decay and all.

Kingma and Ba 2015, arXiv 1412.6980; the first order of a step in data selection: LESS, Xia et al. 2024,
arXiv 2402.04333 (which drops the bias correction and the learning rate).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oracle.encoding import IGNORED, Batch, EncodedText
from oracle.errors import InputError
from oracle.gradients.products import LossFunction, Observer, Products, each_text, joined
from oracle.gradients.text_products import TextMeasurements, measure_texts
from oracle.language_model import LanguageModel

BLOCK_ELEMENTS = 2**22  # elements of one parameter that are updated in float64 at the same time


@dataclass(frozen=True)
class AdamStep:
    """What torch's Adam does to one parameter at its next step.

    Attributes:
        mean, square: The moments before the step, flat (P,), or None where the parameter has not been stepped yet.
        largest_square: The largest second moment so far with `amsgrad`, else None.
        decay: The parameter itself (P,) where weight decay is added to its gradient, else None.
        group: The optimiser's own settings for it.
        number: The number of the step, from 1.
    """

    mean: Tensor | None
    square: Tensor | None
    largest_square: Tensor | None
    decay: Tensor | None
    group: Mapping[str, Any]
    number: int

    def update(self, gradient: Tensor, first: int) -> Tensor:
        """Return what the step subtracts from a block (P',) of weights from `first` on, in float64."""
        return float(self.group["lr"]) * self.direction(gradient, first)

    def direction(
        self, gradient: Tensor, first: int, *, include_momentum: bool = True, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Return the same per unit of learning rate, with or without the mean of the gradients before, in `dtype`."""
        rows = slice(first, first + len(gradient))
        g = gradient.to(dtype)
        if self.group.get("maximize"):
            g = -g
        if self.decay is not None:
            g = g + float(self.group["weight_decay"]) * self.decay[rows].to(dtype)
        mean_decay, square_decay = (float(beta) for beta in self.group["betas"])
        mean = g * (1 - mean_decay)
        square = g.square().mul_(1 - square_decay)
        if include_momentum and self.mean is not None:
            mean.add_(self.mean[rows].to(dtype), alpha=mean_decay)
        if self.square is not None:
            square.add_(self.square[rows].to(dtype), alpha=square_decay)
        if self.largest_square is not None:
            square = torch.maximum(square, self.largest_square[rows].to(dtype))
        root = square.sqrt_().mul_((1 - square_decay**self.number) ** -0.5).add_(float(self.group["eps"]))
        return mean.div_(root).mul_(1 / (1 - mean_decay**self.number))


class AdamUpdateProducts:
    """Every text's product of its Adam step with K target gradients, in nats, one backward pass per text.

    Args:
        lm: The model, with its Adam or AdamW optimiser.
        targets: Parameter name -> (K, *shape), plain gradients of the target parts.
        losses: Batch -> (B,) differentiable losses, one per text.
        max_grad_norm: Clip each text's gradient at this global norm before the step; None does not clip.
        observe: Batch and its logits (B, L, V) -> (B, S) further numbers, from the same forward pass.

    Raises:
        InputError: The optimiser is neither Adam nor AdamW, or its learning rate is 0.
    """

    def __init__(
        self,
        lm: LanguageModel,
        targets: dict[str, Tensor],
        *,
        losses: LossFunction,
        max_grad_norm: float | None = None,
        observe: Observer | None = None,
    ) -> None:
        self.lm, self.targets, self.losses, self.max_grad_norm, self.observe = lm, targets, losses, max_grad_norm, observe
        self.steps = adam_steps(lm, targets)
        if all(float(step.group["lr"]) == 0.0 for step in self.steps.values()):
            raise InputError(
                "update='adam', and the optimiser's learning rate is 0, so a step changes nothing.",
                "a learning rate above 0",
                "set the rate of the phase that you select for (schedules end at 0), or use update='linear'.",
            )
        self.num_parts = next(iter(targets.values())).shape[0]
        self._shared_of = {name: self._product(name, None) for name in self.steps}  # (K,) each
        self._decay_of = {name: self._decay(name) for name in self.steps}
        self.shared = torch.stack(list(self._shared_of.values())).sum(0)  # (K,)

    def measure(self, encoded: Sequence[EncodedText]) -> TextMeasurements:
        """One forward and backward pass for each text."""
        return measure_texts(self.lm, encoded, self._run)

    def facts(self) -> dict[str, Any]:
        """How the products were made, and what a step without a gradient does to each target part."""
        covered = sum(target[0].numel() for target in self.targets.values())
        return {
            "route": "per_text (Adam's update is not linear in the gradient)",
            "covered_parameters": covered,
            "parameters": self.lm.num_parameters,
            "covered_share": covered / self.lm.num_parameters,
            "shared_part_of_target_parts": self.shared.tolist(),
        }

    def _run(self, batch: Batch) -> Products:
        products, square_norms, losses, observed = [], [], [], []
        is_target = (batch.labels[:, 1:] != IGNORED).any(1).tolist()
        texts = each_text(self.lm.module, self.targets, self.losses, batch, observe=self.observe)
        for text, has_targets in zip(texts, is_target, strict=True):
            square_norm = sum((g.double().square().sum() for g in text.gradients.values()), torch.zeros((), dtype=torch.float64))
            scale = 1.0
            if self.max_grad_norm is not None:  # torch.nn.utils.clip_grad_norm_ has the same 1e-6
                scale = min(1.0, self.max_grad_norm / (float(square_norm) ** 0.5 + 1e-6))
            products.append(self._products(text.gradients, scale=scale) if has_targets else torch.zeros_like(self.shared))
            square_norms.append(square_norm)
            losses.append(text.loss)
            observed.append(text.observed)
        return Products(torch.stack(products), torch.stack(square_norms), torch.cat(losses), joined(observed))

    def _products(self, gradients: Mapping[str, Tensor], *, scale: float) -> Tensor:
        """(K,) products of the update with each target part, beyond those of a step on all parameters with gradients of 0."""
        total = torch.zeros(self.num_parts, dtype=torch.float64)
        for name, shared in self._shared_of.items():
            total += self._product(name, gradients[name], scale=scale) if name in gradients else -self._decay_of[name]
            total -= shared
        return total

    def _product(self, name: str, gradient: Tensor | None, *, scale: float = 1.0) -> Tensor:
        """(K,) products of one parameter's update; a gradient of None stands for one of 0."""
        target = self.targets[name].reshape(self.num_parts, -1)  # (K, P)
        flat = target.new_zeros(1).expand(target.shape[1]) if gradient is None else gradient.reshape(-1)
        total = torch.zeros(self.num_parts, dtype=torch.float64)
        for first in range(0, target.shape[1], BLOCK_ELEMENTS):
            update = self.steps[name].update(flat[first : first + BLOCK_ELEMENTS] * scale, first)
            total += (target[:, first : first + BLOCK_ELEMENTS].double() @ update).cpu()
        return total

    def _decay(self, name: str) -> Tensor:
        """(K,) products of what decoupled weight decay subtracts from one parameter; 0 without it."""
        step, total = self.steps[name], torch.zeros(self.num_parts, dtype=torch.float64)
        rate = float(step.group["lr"]) * float(step.group["weight_decay"])
        if rate == 0.0 or step.decay is not None:
            return total
        target = self.targets[name].reshape(self.num_parts, -1)  # (K, P)
        weight = self.lm.module.get_parameter(name).detach().reshape(-1)
        for first in range(0, target.shape[1], BLOCK_ELEMENTS):
            rows = slice(first, first + BLOCK_ELEMENTS)
            total += rate * (target[:, rows].double() @ weight[rows].double()).cpu()
        return total


def adam_steps(
    lm: LanguageModel,
    names: Mapping[str, Any],
    *,
    needed_by: str = "update='adam'",
    otherwise: str = "use update='linear'",
) -> dict[str, AdamStep]:
    """Return what Adam's next step does to each of the named parameters; those that it does not hold are left out.

    Args:
        lm: The model with its optimiser.
        names: Parameter names.
        needed_by: What needs the steps, for the message.
        otherwise: What does without them, for the message.

    Raises:
        InputError: The optimiser is neither Adam nor AdamW, or holds none of them.
    """
    optimizer = lm.optimizer
    if optimizer is None or type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        raise InputError(
            f"{needed_by} takes Adam's own step, and the model has "
            f"{'no optimiser' if optimizer is None else f'the optimiser {type(optimizer).__name__}'}.",
            "a LanguageModel with torch.optim.Adam or AdamW, or a checkpoint folder that has its state",
            f"pass the training run's optimizer, or {otherwise}.",
        )
    own = {parameter: name for name, parameter in lm.module.named_parameters() if name in names}
    steps = {
        own[parameter]: _adam_step(parameter.detach(), optimizer.state.get(parameter, {}), group)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter in own
    }
    if not steps:
        raise InputError(
            f"{needed_by} takes Adam's own step, and the optimiser holds none of the parameters that are asked for.",
            "an optimiser that steps trainable parameters",
            f"build it from module.parameters(), choose other layers, or {otherwise}.",
        )
    return steps


def _adam_step(parameter: Tensor, slots: Mapping[str, Any], group: Mapping[str, Any]) -> AdamStep:
    is_coupled = float(group["weight_decay"]) != 0.0 and not group.get("decoupled_weight_decay", False)
    flat = {key: value.reshape(-1) for key, value in slots.items() if isinstance(value, Tensor) and key != "step"}
    return AdamStep(
        flat.get("exp_avg"),
        flat.get("exp_avg_sq"),
        flat.get("max_exp_avg_sq") if group.get("amsgrad") else None,
        parameter.reshape(-1) if is_coupled else None,
        group,
        int(float(slots.get("step", 0))) + 1,
    )
