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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from oracle.encoding import Batch, EncodedText
from oracle.errors import InputError, check_at_least, check_choice
from oracle.gradients.central_difference import (
    TOLERANCE,
    CentralDifference,
    InexactDifferencesError,
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
        1e-3 where the sample's values are small beside those of the target's own texts. Forward mode leaves less than 1e-6 in
        float32.

    Units and sign are those of `grad_dot`. Forward mode is believed where it agrees with an ordinary gradient of target texts. It
    measures all of the sample where no step is exact enough on the target's own texts, or where differences are off by more
    than half of `tolerance` on 16 texts of the sample that are measured in both ways (facts: `forward_mode`,
    `rehearsal_relative_error`); a folder of labels keeps to the way that was chosen first. Use `grad_dot` where its batched
    way covers the model and there are several target sets or halves; use this one for a model that is not covered, or for one
    target set.
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
            if self.tolerance > 0:
                check_precision({name: p for name, p in lm.module.named_parameters() if p.requires_grad})
            self.directions_: Directions = prepare_directions(lm, columns, preconditioner=self.preconditioner)
        self.forward_mode_ = ForwardMode(lm, self.directions_.tensors, reduction=self.text_loss)
        self.num_directions_ = next(iter(self.directions_.tensors.values())).shape[0]
        self.differences_: CentralDifference | None = None
        self.rehearsal_error_: float | None = None
        self.num_checked_tokens_ = 0
        try:
            self.differences_ = self._exact_differences() if self.tolerance > 0 else None
        except InexactDifferencesError:
            if math.isinf(self.tolerance) or not self._has_forward_mode():
                raise
        if self.tolerance == 0:
            self._check_forward_mode()

    def rehearse(self, encoded: Sequence[EncodedText]) -> dict[str, Any]:
        """Choose between differences and forward mode by a few texts of the sample.

        A model without a forward mode, or without the memory for it, is measured by differences, and
        `InexactDifferencesWarning` tells where twice the steps change these texts by more than 5e-3.
        """
        if self.differences_ is None:
            return {"forward_mode": True, "error": None}
        near, _ = self.differences_.measure(encoded)
        exact = None if math.isinf(self.tolerance) or not self._has_forward_mode() else self._one_by_one(encoded)
        other = self.differences_.measure(encoded, factor=2)[0] if exact is None else exact
        passes = self.differences_.passes_per_text
        passes += passes if exact is None else PASSES * self.num_directions_
        self.num_checked_tokens_ += passes * sum(len(text.input_ids) for text in encoded)
        error = _largest_error(near, other)
        if exact is None and error > TOLERANCE:
            steps = ", ".join(f"{step.relative:.1e}" for step in self.differences_.steps)
            told = self.differences_.inexact("on texts of the sample", f"{error:.1e} with steps of {steps}")
            warnings.warn(str(told), InexactDifferencesWarning, stacklevel=2)
        return {"forward_mode": exact is not None and error > self.tolerance / MARGIN, "error": error}

    def choose(self, choice: dict[str, Any]) -> None:
        """Take up what `rehearse` returned, here, in another process or for an earlier sample."""
        self.rehearsal_error_ = choice["error"]
        if choice["forward_mode"]:
            self.differences_ = None  # and the copy of the weights with it

    def measure(self, encoded: Sequence[EncodedText]) -> Measured:
        """Measure the texts along every direction, in as many batches as fit."""
        if self.differences_ is None:
            products, losses = self._in_forward_mode(self.lm_.batches(encoded), len(encoded))
        else:
            products, losses = self.differences_.measure(encoded)
        products *= 1.0 if self.directions_.step_size is None else self.directions_.step_size  # (B, K)
        return Measured(self.columns_.combine(products), self.columns_.halves(products), {"text_loss": losses})

    # ------------------------------------------------------------------ choosing

    def _exact_differences(self) -> CentralDifference:
        directions = self.directions_.tensors
        differences = CentralDifference(self.lm_, directions, reduction=self.text_loss, relative=self.relative_step)
        try:
            for part, batch in enumerate(self._own_batches()):
                differences.add_step(batch, name=self.columns_.names[self.columns_.parts[part]])
        finally:
            self.num_checked_tokens_ += differences.num_checked_tokens
        return differences

    def _own_batches(self) -> list[Batch]:
        """Return a batch of each direction's own target texts, of middling length."""
        columns = self.columns_
        own = [
            [batch for batch, owner in zip(columns.batches, columns.batch_parts, strict=True) if owner == part]
            for part in range(self.num_directions_)
        ]
        return [batches[len(batches) // 2] for batches in own]  # they are in the order of length

    def _check_forward_mode(self) -> None:
        try:
            self._compare_with_gradients()
        except NoForwardModeError as error:
            raise InputError(
                f"tolerance=0, and the model cannot be measured in forward mode: {error}.",
                "a model of operations that torch differentiates in forward mode (custom kernels often lack it)",
                "load the model with attn_implementation='sdpa' or 'eager', or pass tolerance=inf, which takes differences.",
            ) from error

    def _has_forward_mode(self) -> bool:
        try:
            self._compare_with_gradients()
        except (NoForwardModeError, torch.OutOfMemoryError):
            return False
        return True

    def _compare_with_gradients(self) -> None:
        for index, batch in enumerate(self._own_batches()):
            self.num_checked_tokens_ += (PASSES + 3) * math.prod(batch.model_shape)
            self.forward_mode_.check(batch, index)

    def _one_by_one(self, encoded: Sequence[EncodedText]) -> np.ndarray | None:
        """Return derivatives (B, K) in forward mode, with as little memory as it takes; None where that is too much."""
        batches = self.lm_.batches(encoded, batch_tokens=1)
        try:
            return self._in_forward_mode(batches, len(encoded))[0]
        except torch.OutOfMemoryError:
            return None

    def _in_forward_mode(self, batches: Iterable[Batch], num_texts: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the derivatives (B, K) and the losses (B,)."""
        products, losses = np.zeros((num_texts, self.num_directions_)), np.zeros(num_texts)
        for batch in batches:
            for index in range(self.num_directions_):
                along, own = self.forward_mode_.measure(batch, index)
                products[batch.positions, index], losses[batch.positions] = along.cpu().numpy(), own.cpu().numpy()
        return products, losses

    # ------------------------------------------------------------------ what is told

    @property
    def _passes_per_text(self) -> int:
        """What a text costs, in forward passes."""
        return PASSES * self.num_directions_ if self.differences_ is None else self.differences_.passes_per_text

    def facts(self) -> dict[str, Any]:
        """How texts were measured, how exact differences were on a few of them, and the steps that were taken."""
        differences = self.differences_
        steps = [] if differences is None else differences.steps
        return {
            "forward_mode": differences is None,
            "rehearsal_relative_error": self.rehearsal_error_,
            "relative_steps": [step.relative for step in steps],
            "self_check_relative_errors": [step.error for step in steps],
            "covered_parameters": sum(direction[0].numel() for direction in self.directions_.tensors.values()),
            "parameters": self.lm_.num_parameters,
            "holds_routing": differences is not None and differences.makes_choices,
            "cost_in_forward_passes": self._passes_per_text,
            "preconditioner_used": "adam" if self.directions_.is_adam else "none",
            "step_size": self.directions_.step_size,
        }

    def prepare_flops(self, columns: TargetColumns) -> float:
        """Counted FLOPs before the sample: one forward and backward pass over all target sets, the checks, the rehearsal."""
        return self.lm_.forward_flops_per_token * (3 * columns.num_tokens + self.num_checked_tokens_)

    def flops(self, num_tokens: int, columns: TargetColumns) -> float:
        """Counted FLOPs for one text of `num_tokens`, the target gradients and the rehearsal left out."""
        return self._passes_per_text * self.lm_.forward_flops_per_token * num_tokens


def _largest_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of a column of (B, K), relative to its largest value.

    Texts for which neither is finite are left out; a value that only one has is infinitely far off, as is one beside zeros.
    """
    rows = np.isfinite(found).any(1) | np.isfinite(expected).any(1)
    found, expected = found[rows], expected[rows]
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return math.inf if np.isfinite(expected).all() else 0.0
    scale = np.abs(expected).max(0, initial=0.0)
    off = np.abs(found - expected).max(0, initial=0.0)
    return float(np.divide(off, scale, out=np.where(off > 0, np.inf, 0.0), where=scale > 0).max(initial=0.0))
