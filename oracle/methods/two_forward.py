"""`grad_dot` without a backward pass over the sample: each text's loss on both sides of a step along the target's gradient.

The values are those of `grad_dot` up to the error of a central difference (`oracle.gradients.central_difference`).
Since no module is looked into, any model works in batches. Mirrored influence (Ko et al.) also trades the sample's
backward passes for forward ones, after a real training step on the target; the difference taken on both sides of a
small step has an exact limit, and its error is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from oracle.encoding import EncodedText
from oracle.errors import check_at_least, check_choice
from oracle.gradients.central_difference import CentralDifference, check_precision
from oracle.gradients.coverage import match_parameters, only_trainable
from oracle.gradients.metric import PRECONDITIONERS, Directions, prepare_directions
from oracle.language_model import REDUCTIONS, LanguageModel
from oracle.methods import Measured
from oracle.plugins import option
from oracle.target_columns import TargetColumns


@dataclass(kw_only=True)
class TwoForward:
    """The text's loss on both sides of a small step along each target's gradient, in the optimiser's own metric.

    Paper:
        After mirrored influence, Ko et al. 2024, arXiv 2402.08922; the Adam metric after LESS, Xia et al. 2024,
        arXiv 2402.04333.
    Cost:
        Two forward passes per text and target set, four with halves, and one more in all where the model routes tokens
        to experts: two thirds of `grad_dot` for one target set with `halves=False`, and more than it from two directions
        on. K gradients and a copy of the weights, which are rewritten 2 K + 1 times per block, so take larger blocks.
    Limit:
        As `relative_step` tends to 0 (in float64) it tends to `grad_dot`, the error falling as the step's square: 1e-6 of a
        column's largest value. In float32 rounding leaves 2e-5 to 1e-4 on trained models of a million parameters and up to
        1e-3 where the sample's values are small beside those of the target's own texts.

    Units and sign are those of `grad_dot`. A step that is inexact on the target's own texts is refused; one that is inexact on
    the first block of the sample (facts: `first_block_relative_error` above 0.005) is told in a warning. Use `grad_dot`
    where its batched way covers the model and there are several target sets or halves; use this one for a model that is
    not covered, or for one target set.
    """

    plugin_name: ClassVar[str] = "two_forward"
    needs_optimizer: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = True

    preconditioner: str = option(
        "auto", "'adam' divides by the root of the optimiser's second moments, 'none' does not, 'auto' does where there are any."
    )
    text_loss: str = option(
        "mean", "A text's loss as 'mean' over its target tokens, or as their 'sum', as a batch averaged over tokens weighs it."
    )
    layers: str | None = option(
        None, "A regular expression; only parameters in whose names it is found count, as if the others were frozen."
    )
    relative_step: float | None = option(
        None,
        "Length of the step as a share of the norm of the weights; None takes the longest whose doubling changes "
        "the target's own texts by less than 1.5e-4 of the largest.",
    )

    def __post_init__(self) -> None:
        check_choice("preconditioner", self.preconditioner, PRECONDITIONERS)
        check_choice("text_loss", self.text_loss, REDUCTIONS)
        if self.relative_step is not None:
            check_at_least("relative_step", self.relative_step, 1e-30)

    @property
    def units(self) -> str:
        """Unit of the values, known after `prepare`."""
        return self.directions_.units

    def prepare(self, lm: LanguageModel, columns: TargetColumns) -> None:
        """Measure and precondition the target gradients; choose a step along each and check it on its own texts."""
        self.lm_, self.columns_ = lm, columns
        with only_trainable(lm.module, match_parameters(lm.module, self.layers)):
            check_precision({name: p for name, p in lm.module.named_parameters() if p.requires_grad})
            self.directions_: Directions = prepare_directions(lm, columns, preconditioner=self.preconditioner)
        self.differences_ = CentralDifference(lm, self.directions_.tensors, reduction=self.text_loss, relative=self.relative_step)
        for part, target in enumerate(columns.parts):
            own = [batch for batch, owner in zip(columns.batches, columns.batch_parts, strict=True) if owner == part]
            middle = own[len(own) // 2]  # batches are in the order of length
            self.differences_.add_step(middle, name=columns.names[target])

    def measure(self, encoded: Sequence[EncodedText]) -> Measured:
        """Two forward passes over the texts along every direction, in as many batches as fit."""
        products, losses = self.differences_.measure(encoded)
        products *= 1.0 if self.directions_.step_size is None else self.directions_.step_size  # (B, K)
        return Measured(self.columns_.combine(products), self.columns_.halves(products), {"text_loss": losses})

    def facts(self) -> dict[str, Any]:
        """The step along each direction, and what doubling it changes on the target's own texts and on a first block."""
        return {
            "relative_steps": [step.relative for step in self.differences_.steps],
            "self_check_relative_errors": [step.error for step in self.differences_.steps],
            "first_block_relative_error": self.differences_.sample_error,
            "covered_parameters": sum(direction[0].numel() for direction in self.directions_.tensors.values()),
            "parameters": self.lm_.num_parameters,
            "holds_routing": self.differences_.makes_choices,
            "forward_passes_per_text": self.differences_.passes_per_text,
            "preconditioner_used": "adam" if self.directions_.is_adam else "none",
            "step_size": self.directions_.step_size,
        }

    def prepare_flops(self, columns: TargetColumns) -> float:
        """Counted FLOPs of `prepare`: one forward and backward pass over all target sets, and the checks."""
        return self.lm_.forward_flops_per_token * (3 * columns.num_tokens + self.differences_.num_checked_tokens)

    def flops(self, num_tokens: int, columns: TargetColumns) -> float:
        """Counted FLOPs for one text of `num_tokens`, the target gradients and the check on the first block left out."""
        return self.differences_.passes_per_text * self.lm_.forward_flops_per_token * num_tokens
