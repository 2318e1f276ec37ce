"""LESS: the angle between the target's gradient and the Adam update that the text alone would cause.

The update is the step that torch's Adam would take next, divided by the learning rate: the optimiser's own moments,
betas, eps (outside the root), bias correction, `amsgrad`, `maximize`, and the decay that Adam adds to the gradient. The released
code fixes beta2 at 0.999, puts eps inside the root and corrects no bias, so its update is another one than training's.
The text's square stands in the denominator, so the update is not linear in the text's gradient and the batched
identity of `oracle.gradients.products` does not apply: each text takes a backward pass of its own.

Of several target texts the token-weighted mean gradient is taken, as everywhere in this project. LESS takes the mean within a
subtask and the maximum over subtasks: give each subtask a name as a target set of its own, and leave the maximum
to the selection rule. For several checkpoints see `oracle.several_checkpoints`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from oracle.encoding import EncodedText, make_batch
from oracle.errors import InputError, check_choice, check_count
from oracle.gradients import adam_update
from oracle.gradients.adam_update import AdamStep, adam_steps
from oracle.gradients.metric import direction_norms
from oracle.gradients.products import dot_in_blocks
from oracle.gradients.projections import RademacherProjection
from oracle.language_model import REDUCTIONS, LanguageModel
from oracle.methods import Measured
from oracle.plugins import option
from oracle.target_columns import TargetColumns

PROJECTED = "projected"  # the one direction that stands for all parameters after a projection


@dataclass(kw_only=True)
class Less:
    """Cosine of each target's gradient with the Adam update that the text alone would cause.

    Paper:
        LESS, Xia et al. 2024, arXiv 2402.04333.
    Cost:
        One forward and backward pass per text, one text at a time, and the products of its update with K target
        gradients. With `projection_dim` D each text costs P * D signs and products more, and only K * D numbers are kept
        of the target gradients; without it nothing is approximated.
    Limit:
        `similarity="dot"` times the learning rate is what Adam `one_step` tends to as the learning rate tends to 0.

    Trainable parameters only, so with adapters on frozen weights these are the adapters' gradients. By default the
    update includes the momentum that all texts share, as the paper's does. That adds nearly the same number to every
    product (not exactly: the text's own square is in the denominator) and draws all cosines towards that of momentum
    alone, which `facts` tells. The decay that AdamW takes apart from the gradient is left out. With weights and moments in
    bfloat16, values of small models were off by at most 0.03 of the largest one from those of the same numbers in float64.
    """

    plugin_name: ClassVar[str] = "less"
    needs_optimizer: ClassVar[bool] = True
    changes_weights: ClassVar[bool] = False

    similarity: str = option("cosine", "'cosine' for the angle between update and target gradient, 'dot' for their product.")
    include_momentum: bool = option(
        True, "Let the update include the momentum of the steps before, as the paper does; without it only the text's own part."
    )
    text_loss: str = option(
        "mean", "A text's loss as 'mean' over its target tokens, or as their 'sum', as a batch averaged over tokens weighs it."
    )
    projection_dim: int | None = option(
        None, "Project updates and target gradients to so many dimensions by random signs, as the paper does; None is exact."
    )
    projection_seed: int = option(0, "Which random projection; without projection_dim it must stay 0.")

    def __post_init__(self) -> None:
        check_choice("similarity", self.similarity, ("cosine", "dot"))
        check_choice("text_loss", self.text_loss, REDUCTIONS)
        if self.projection_dim is not None:
            check_count("projection_dim", self.projection_dim)
        elif self.projection_seed:
            raise InputError(
                f"projection_seed={self.projection_seed} has no effect without projection_dim.",
                "both, or neither",
                "pass projection_dim (the paper takes 8192), or leave projection_seed out.",
            )

    @property
    def units(self) -> str:
        """Unit of the values."""
        return "cosine" if self.similarity == "cosine" else "nats per target token per unit of learning rate"

    def prepare(self, lm: LanguageModel, columns: TargetColumns) -> None:
        """Measure the target gradients, project them where asked for, and what momentum alone would give."""
        self.lm_, self.columns_ = lm, columns
        self.parameters_ = {name: p for name, p in lm.module.named_parameters() if p.requires_grad}
        self.steps_ = _adam_steps(lm, self.parameters_)
        self.projection_ = (
            None if self.projection_dim is None else RademacherProjection(dim=self.projection_dim, seed=self.projection_seed)
        )
        self.directions_ = columns.gradients(lm) if self.projection_ is None else self._projected_gradients()
        self.direction_norms_ = direction_norms(columns, self.directions_)  # whole (C,) and halves (2, C)
        products, norm = self._products({name: torch.zeros_like(p) for name, p in self.parameters_.items()})
        self.shared_ = self._scaled(products[None], np.array([norm]))[0][0]  # (C,)

    def measure(self, encoded: Sequence[EncodedText]) -> Measured:
        """One backward pass per text; each update is dropped when its products are taken."""
        products = np.zeros((len(encoded), len(self.columns_.parts)))
        losses, norms, update_norms = np.zeros(len(encoded)), np.zeros(len(encoded)), np.zeros(len(encoded))
        for row, text in enumerate(encoded):
            losses[row], gradients = self._gradients(text)
            flat = [g.reshape(1, -1).float() for g in gradients.values()]
            norms[row] = sum(float(dot_in_blocks(g, g)) for g in flat) ** 0.5
            products[row], update_norms[row] = self._products(gradients)
        columns = {"text_loss": losses, "gradient_norm": norms, "update_norm": update_norms}
        return Measured(*self._scaled(products, update_norms), columns)

    def facts(self) -> dict[str, Any]:
        """What a text with a zero gradient gets (momentum alone), and which parameters count."""
        return {
            "shared_part": self.shared_.tolist(),
            "covered_parameters": sum(p.numel() for p in self.parameters_.values()),
            "parameters": self.lm_.num_parameters,
        }

    def prepare_flops(self, columns: TargetColumns) -> float:
        """Counted FLOPs of `prepare`: one forward and backward pass over all target sets, and their projection."""
        return 3 * self.lm_.forward_flops_per_token * columns.num_tokens + len(columns.parts) * self._projection_flops()

    def flops(self, num_tokens: int, columns: TargetColumns) -> float:
        """Counted FLOPs for one text of `num_tokens`: its passes, the projection of its update, the products."""
        num_factors = sum(p.numel() for p in self.parameters_.values()) if self.projection_dim is None else self.projection_dim
        passes = 3 * self.lm_.forward_flops_per_token * num_tokens
        return passes + self._projection_flops() + 2.0 * len(columns.parts) * num_factors

    def _projection_flops(self) -> float:
        return 2.0 * (self.projection_dim or 0) * sum(p.numel() for p in self.parameters_.values())

    def _projected_gradients(self) -> dict[str, Tensor]:
        """Project the target gradients, holding one part's at a time: "projected" -> (K, D) float32."""
        rows = []
        for part, target in enumerate(self.columns_.parts):
            batches = [
                batch for batch, owner in zip(self.columns_.batches, self.columns_.batch_parts, strict=True) if owner == part
            ]
            alone = replace(
                self.columns_,
                names=[self.columns_.names[target]],
                parts=[0],
                part_tokens=self.columns_.part_tokens[part : part + 1],
                batches=batches,
                batch_parts=[0] * len(batches),
            )
            rows.append(self._project(alone.gradients(self.lm_)))
        return {PROJECTED: torch.cat(rows).float()}

    def _project(self, values: dict[str, Tensor]) -> Tensor:
        """Project values (1, *shape) of every parameter to (1, D) float64."""
        assert self.projection_ is not None
        parts = [
            self.projection_.project(name, value.float().reshape(1, -1), shape=value.shape[1:]) for name, value in values.items()
        ]
        return torch.stack(parts).sum(0)

    def _gradients(self, text: EncodedText) -> tuple[float, dict[str, Tensor]]:
        """Return a text's loss and gradients; a text without a target token has zeros, unused parameters have none."""
        if not text.num_targets:
            return 0.0, {name: torch.zeros_like(p) for name, p in self.parameters_.items()}
        loss = self.lm_.text_losses(make_batch([text], positions=[0], device=self.lm_.device), reduction=self.text_loss).sum()
        gradients = torch.autograd.grad(loss, list(self.parameters_.values()), allow_unused=True)
        found = {name: g for name, g in zip(self.parameters_, gradients, strict=True) if g is not None}
        return float(loss.detach()), found

    def _products(self, gradients: dict[str, Tensor]) -> tuple[np.ndarray, float]:
        """Return the products of one text's update with the K directions, and its norm, a parameter at a time."""
        device = next(iter(self.directions_.values())).device
        products = torch.zeros(len(self.columns_.parts), dtype=torch.float64, device=device)
        square = torch.zeros((), dtype=torch.float64, device=device)
        projected = torch.zeros(1, self.projection_dim or 0, dtype=torch.float64, device=device)
        for name, gradient in gradients.items():
            update = self._update(name, gradient)  # (1, P)
            if self.projection_ is not None:
                projected += self.projection_.project(name, update, shape=gradient.shape)
                continue
            products += dot_in_blocks(update, self.directions_[name].flatten(1))[0]
            square += dot_in_blocks(update, update)[0, 0]
        if self.projection_ is not None:
            products = self.directions_[PROJECTED].double() @ projected[0]
            square = projected.square().sum()
        return products.cpu().numpy(), float(square.sqrt())

    @torch.no_grad()
    def _update(self, name: str, gradient: Tensor) -> Tensor:
        """What Adam's next step would subtract from a parameter, per unit of learning rate: (1, P) float32."""
        flat, size, step = gradient.reshape(-1), adam_update.BLOCK_ELEMENTS, self.steps_[name]
        dtype = torch.promote_types(gradient.dtype, torch.float32)  # its rounding is each weight's own; the sums are in float64
        blocks = [
            step.direction(flat[first : first + size], first, include_momentum=self.include_momentum, dtype=dtype).float()
            for first in range(0, len(flat), size)
        ]
        return torch.cat(blocks).unsqueeze(0)

    def _scaled(self, products: np.ndarray, update_norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        whole, halves = self.columns_.combine(products), self.columns_.halves(products)  # (B, C), (2, B, C)
        if self.similarity == "dot":
            return whole, halves
        own = np.where(update_norms > 0, update_norms, 1.0)[:, None]
        return whole / (own * self.direction_norms_[0]), halves / (own * self.direction_norms_[1][:, None, :])


def _adam_steps(lm: LanguageModel, parameters: dict[str, torch.nn.Parameter]) -> dict[str, AdamStep]:
    """Return what Adam's next step does to every trainable parameter.

    Raises:
        InputError: The optimiser is not torch's Adam or AdamW, or has no moments for some of the parameters.
    """
    steps = adam_steps(lm, parameters, needed_by="less", otherwise="use method='grad_dot' with similarity='cosine'")
    missing = [name for name in parameters if name not in steps or steps[name].mean is None or steps[name].square is None]
    if missing:
        raise InputError(
            f"the optimiser has no Adam state for {len(missing)} of {len(parameters)} trainable parameters, first {missing[:3]}.",
            "an Adam state for every trainable parameter",
            "take a few training steps first, freeze the parameters that are not trained, or use method='grad_dot'.",
        )
    return steps
