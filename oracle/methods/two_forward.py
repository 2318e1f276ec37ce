"""`grad_dot` without a backward pass over the sample: each text's loss on both sides of a step along the target's gradient.

The values are those of `grad_dot` up to the error of a central difference (`oracle.gradients.central_difference`). Where that
is more than asked for, forward-mode differentiation takes its place (`oracle.gradients.forward_mode`).
Since no module is looked into, any model works in batches. Mirrored influence (Ko et al.) also trades the sample's
backward passes for forward ones, after a real training step on the target; the difference taken on both sides of a
small step has an exact limit, and its error is checked.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from oracle.encoding import EncodedText
from oracle.errors import InputError, check_at_least, check_choice
from oracle.gradients.central_difference import (
    TOLERANCE,
    CentralDifference,
    InexactDifferencesWarning,
    check_precision,
)
from oracle.gradients.coverage import match_parameters, only_trainable
from oracle.gradients.forward_mode import PASSES, ForwardMode, NoForwardModeError
from oracle.gradients.metric import PRECONDITIONERS, Directions, prepare_directions
from oracle.language_model import REDUCTIONS, LanguageModel
from oracle.methods import Measured
from oracle.plugins import option
from oracle.target_columns import TargetColumns

MARGIN = 2.0  # the largest error among a sample is about this many times that among the few texts that are rehearsed


@dataclass(kw_only=True)
class TwoForward:
    """The text's loss on both sides of a small step along each target's gradient, in the optimiser's own metric.

    Paper:
        After mirrored influence, Ko et al. 2024, arXiv 2402.08922; the Adam metric after LESS, Xia et al. 2024,
        arXiv 2402.04333.
    Cost:
        Two forward passes per text and target set, four with halves, and one more in all where the model routes tokens
        to experts: two thirds of `grad_dot` for one target set with `halves=False`, and more than it from two directions
        on. In forward mode as much as three passes per direction, about that of `grad_dot` for each. K gradients and a copy
        of the weights, which are rewritten 2 K + 1 times per block, so take larger blocks.
    Limit:
        As `relative_step` tends to 0 (in float64) it tends to `grad_dot`, the error falling as the step's square: 1e-6 of a
        column's largest value. In float32 rounding leaves 2e-5 to 1e-4 on trained models of a million parameters and up to
        1e-3 where the sample's values are small beside those of the target's own texts. Forward mode leaves 5e-7.

    Units and sign are those of `grad_dot`. A step that is inexact on the target's own texts is refused. Then 16 texts of the
    sample are measured in both ways, and where differences are off by more than half of `tolerance`, all of the sample is
    measured in forward mode (facts: `forward_mode`, `rehearsal_relative_error`). Use `grad_dot` where its batched way covers
    the model and there are several target sets or halves; use this one for a model that is not covered, or for one target
    set.
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
    tolerance: float = option(
        1e-4,
        "Largest error of differences that is put up with, as a share of a column's largest value; beyond it, values come "
        "from forward-mode differentiation. 0 takes no differences at all, inf nothing else.",
    )

    def __post_init__(self) -> None:
        check_at_least("tolerance", self.tolerance, 0.0)
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
        self.forward_mode_ = ForwardMode(lm, self.directions_.tensors, reduction=self.text_loss)
        self.uses_forward_mode_, self.num_rehearsed_tokens_ = self.tolerance == 0, 0
        self.rehearsal_error_: float | None = None
        self.differences_ = CentralDifference(lm, self.directions_.tensors, reduction=self.text_loss, relative=self.relative_step)
        for part, target in enumerate(columns.parts):
            own = [batch for batch, owner in zip(columns.batches, columns.batch_parts, strict=True) if owner == part]
            middle = own[len(own) // 2]  # batches are in the order of length
            if not self.uses_forward_mode_:
                self.differences_.add_step(middle, name=columns.names[target])
        if self.uses_forward_mode_:
            self._check_forward_mode(columns)

    def rehearse(self, encoded: Sequence[EncodedText]) -> None:
        """Choose between differences and forward mode by a few texts of the sample.

        A model without a forward mode is measured by differences, and `InexactDifferencesWarning` tells where twice the steps
        change these texts by more than 5e-3.
        """
        if self.uses_forward_mode_:
            return
        near, _ = self.differences_.measure(encoded)
        try:
            exact = None if math.isinf(self.tolerance) else self._in_forward_mode(encoded)[0]
        except NoForwardModeError:
            exact = None
        other = self.differences_.measure(encoded, factor=2)[0] if exact is None else exact
        passes = (
            2 * self.differences_.passes_per_text if exact is None else self._passes_per_text(False) + self._passes_per_text(True)
        )
        self.num_rehearsed_tokens_ = passes * sum(len(text.input_ids) for text in encoded)
        self.rehearsal_error_ = error = _largest_error(near, other)
        self.uses_forward_mode_ = exact is not None and error > self.tolerance / MARGIN
        if exact is None and error > TOLERANCE:
            steps = ", ".join(f"{step.relative:.1e}" for step in self.differences_.steps)
            told = self.differences_.inexact("on texts of the sample", f"{error:.1e} with steps of {steps}")
            warnings.warn(str(told), InexactDifferencesWarning, stacklevel=2)

    def measure(self, encoded: Sequence[EncodedText]) -> Measured:
        """Measure the texts along every direction, in as many batches as fit."""
        products, losses = self._in_forward_mode(encoded) if self.uses_forward_mode_ else self.differences_.measure(encoded)
        products *= 1.0 if self.directions_.step_size is None else self.directions_.step_size  # (B, K)
        return Measured(self.columns_.combine(products), self.columns_.halves(products), {"text_loss": losses})

    def _check_forward_mode(self, columns: TargetColumns) -> None:
        try:
            self.forward_mode_.measure(columns.batches[0], 0)
        except NoForwardModeError as error:
            raise InputError(
                f"tolerance=0, and the model has an operation with no forward derivative: {error}",
                "a model of operations that torch differentiates in forward mode (custom kernels often lack it)",
                "load the model with attn_implementation='sdpa' or 'eager', or pass tolerance=inf, which takes differences.",
            ) from error

    def _in_forward_mode(self, encoded: Sequence[EncodedText]) -> tuple[np.ndarray, np.ndarray]:
        """Return the derivatives (B, K) and the losses (B,)."""
        products, losses = np.zeros((len(encoded), self.differences_.num_directions)), np.zeros(len(encoded))
        for batch in self.lm_.batches(encoded):
            for index in range(products.shape[1]):
                along, own = self.forward_mode_.measure(batch, index)
                products[batch.positions, index], losses[batch.positions] = along.cpu().numpy(), own.cpu().numpy()
        return products, losses

    def _passes_per_text(self, uses_forward_mode: bool) -> int:
        differences = self.differences_
        return PASSES * differences.num_directions if uses_forward_mode else differences.passes_per_text

    def facts(self) -> dict[str, Any]:
        """The step along each direction, and what doubling it changes on the target's own texts and on a first block."""
        return {
            "relative_steps": [step.relative for step in self.differences_.steps],
            "self_check_relative_errors": [step.error for step in self.differences_.steps],
            "rehearsal_relative_error": self.rehearsal_error_,
            "forward_mode": self.uses_forward_mode_,
            "covered_parameters": sum(direction[0].numel() for direction in self.directions_.tensors.values()),
            "parameters": self.lm_.num_parameters,
            "holds_routing": self.differences_.makes_choices,
            "forward_passes_per_text": self._passes_per_text(self.uses_forward_mode_),
            "preconditioner_used": "adam" if self.directions_.is_adam else "none",
            "step_size": self.directions_.step_size,
        }

    def prepare_flops(self, columns: TargetColumns) -> float:
        """Counted FLOPs of `prepare`: one forward and backward pass over all target sets, and the checks."""
        checked = self.differences_.num_checked_tokens + self.num_rehearsed_tokens_
        return self.lm_.forward_flops_per_token * (3 * columns.num_tokens + checked)

    def flops(self, num_tokens: int, columns: TargetColumns) -> float:
        """Counted FLOPs for one text of `num_tokens`, the target gradients and the rehearsal left out."""
        return self._passes_per_text(self.uses_forward_mode_) * self.lm_.forward_flops_per_token * num_tokens


def _largest_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of a column of (B, K), relative to its largest value; texts with NaN are left out."""
    rows = np.isfinite(found).all(1) & np.isfinite(expected).all(1)
    found, expected = found[rows], expected[rows]
    scale = np.abs(expected).max(0, initial=0.0)
    off = np.abs(found - expected).max(0, initial=0.0)
    return float(np.divide(off, scale, out=np.zeros_like(off), where=scale > 0).max(initial=0.0))
