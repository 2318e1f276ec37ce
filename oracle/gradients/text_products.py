"""Products for any number of texts, by the batched identity where it holds and by the plain loop where it does not.

The first batch that has a gradient is checked against an ordinary one (`check_products`). Parameters that the check finds
wrong, or that no rule covers, go to the next larger module, which is then run again for each text; the rest stays as it
is. A model for which that does not help takes one backward pass per text from then on, with a warning and a line in the
labels' facts, which name the parameters in either case.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oracle.encoding import IGNORED, Batch, EncodedText
from oracle.gradients.general_rule import UncoveredModuleError
from oracle.gradients.products import GradientProducts, LossFunction, Observer, PerTextProducts, Products, joined
from oracle.gradients.self_check import check_products
from oracle.language_model import LanguageModel
from oracle.packing import unpacked

SELF_CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative, see `SelfCheck`
LOW_PRECISION_TOLERANCE = 5e-2
NUM_NAMES = 10  # parameters that the facts name


class SlowRouteWarning(UserWarning):
    """The batched identity does not cover the model, so every text takes a backward pass of its own."""


class UnpackedWarning(UserWarning):
    """The batched identity does not cover the model in packed rows, so their texts are taken apart again."""


@dataclass(frozen=True)
class TextMeasurements:
    """What a forward and backward pass over B texts gave.

    Attributes:
        products: (B, K) float64, <grad loss of text, direction>.
        losses: (B,) the losses whose gradients were meant.
        norms: (B,) gradient norms, or None if they were not asked for.
        observed: (B, S) what the observer made of the logits, or None without one.
    """

    products: np.ndarray
    losses: np.ndarray
    norms: np.ndarray | None
    observed: np.ndarray | None = None


def measure_texts(lm: LanguageModel, encoded: Sequence[EncodedText], run: Callable[[Batch], Products]) -> TextMeasurements:
    """Run over the texts in as many batches as fit, and put the results in their order.

    Args:
        lm: The model.
        encoded: B texts, at least one.
        run: What to do with a batch.
    """
    found: dict[str, np.ndarray] = {}
    for batch in lm.batches(encoded):
        measured = run(batch)
        norms = None if measured.square_norms is None else measured.square_norms.clamp_min(0).sqrt()
        rows = {"products": measured.products, "losses": measured.losses, "norms": norms, "observed": measured.observed}
        for key, tensor in rows.items():
            if tensor is not None:
                values = found.setdefault(key, np.zeros((len(encoded), *tensor.shape[1:])))
                values[batch.positions] = tensor.double().cpu().numpy()
    return TextMeasurements(found["products"], found["losses"], found.get("norms"), found.get("observed"))


class TextProducts:
    """Every text's gradient product with K directions, with the check and the fallback around `GradientProducts`.

    Args:
        lm: The model.
        directions: Parameter name -> (K, *shape).
        losses: Batch -> (B,) differentiable losses whose gradients are meant; the mean per target token by default.
        norms: Whether to also give each text's gradient norm over the parameters in `directions`.
        observe: Batch and its logits (B, L, V) -> (B, S) further numbers, from the same forward pass.
        per_text: Take the plain loop from the start.
        method: The oracle method's name, for the warning.
    """

    def __init__(
        self,
        lm: LanguageModel,
        directions: dict[str, Tensor],
        *,
        losses: LossFunction | None = None,
        norms: bool = False,
        observe: Observer | None = None,
        per_text: bool = False,
        method: str = "grad_dot",
    ) -> None:
        self.lm, self.directions, self.norms, self.method = lm, directions, norms, method
        self.route = "per_text" if per_text else "batched"
        self.self_check_error: float | None = None
        # Texts with targets in the batch that was checked, by whether it was packed; one alone cannot go to the wrong text.
        self._largest_checked = {False: 0, True: 0}
        self._unpacked_because = ""  # what the check found wrong with packed rows
        self.slow_parameters: set[str] = set()  # those that forced the plain loop, for the model or for a batch
        loss_function = lm.text_losses if losses is None else losses
        self._fast = GradientProducts(lm.module, directions, loss_function, norms=norms, observe=observe)
        self._slow = PerTextProducts(lm.module, directions, loss_function, norms=norms, observe=observe)

    def measure(self, encoded: Sequence[EncodedText]) -> TextMeasurements:
        """One forward and backward pass over the texts, in as many batches as fit."""
        return measure_texts(self.lm, encoded, self._products)

    def facts(self) -> dict[str, Any]:
        """How the products were made, how well they passed the self-check, and what they cover."""
        covered = sum(direction[0].numel() for direction in self.directions.values())
        return {
            "route": self.route,
            "self_check_relative_error": self.self_check_error,
            "covered_parameters": covered,
            "parameters": self.lm.num_parameters,
            "covered_share": covered / self.lm.num_parameters,
            "rerun_per_text": self._count(self._fast.rerun),
            "forced_the_slow_route": self._count(self.slow_parameters),
            "unpacked_because": self._unpacked_because,
        }

    def _count(self, names: Iterable[str]) -> dict[str, Any]:
        """How many parameters these are, their share of those that are covered, and the first of their names."""
        sizes = {name: direction[0].numel() for name, direction in self.directions.items()}
        found = sorted(names)
        return {
            "num_parameters": sum(sizes[name] for name in found),
            "share": sum(sizes[name] for name in found) / sum(sizes.values()),
            "num_tensors": len(found),
            "names": found[:NUM_NAMES],
        }

    def _products(self, batch: Batch) -> Products:
        if not self.route.startswith("per_text") and self._is_unchecked(batch):
            self._choose_route(batch)
        if not self.route.startswith("per_text"):
            if batch.packed is None or not self._unpacked_because:
                try:
                    with self._fast as engine:
                        return engine(batch)
                except UncoveredModuleError as error:  # of this batch alone: the next one takes the batched way again
                    if batch.packed is None:
                        self._take_slow_route(f"batched, per_text for some batches ({error})", error.parameters)
            if batch.packed is not None:
                return _joined([self._products(part) for part in unpacked(batch)])
        return self._slow(batch)

    def _is_unchecked(self, batch: Batch) -> bool:
        num_checked = self._largest_checked[batch.packed is not None]
        if num_checked >= 2 or (batch.packed is not None and self._unpacked_because):
            return False
        return num_checked == 0 or _num_with_targets(batch) >= 2

    def _choose_route(self, batch: Batch) -> None:
        """Check the identity on a batch, and move up what fails until it holds, or unpack rows, or take the plain loop."""
        dtype = next(self.lm.module.parameters()).dtype
        is_low = dtype not in SELF_CHECK_TOLERANCE or torch.is_autocast_enabled(batch.input_ids.device.type)
        tolerance = LOW_PRECISION_TOLERANCE if is_low else SELF_CHECK_TOLERANCE[dtype]
        moved_up = dict(self._fast.moved_up)
        while True:
            error, failed, reason = self._check(batch, tolerance)
            if not reason and error is None:  # a batch without any gradient shows nothing: the next one is checked
                return
            if not reason:
                break
            if not failed or not self._fast.move_up(failed):
                self._fast.rerun.clear()
                if batch.packed is not None:
                    self._fast.moved_up = moved_up
                    self._unpack_from_now_on(reason)
                    return
                self._take_slow_route(f"per_text ({reason})", failed)
                break
        self.self_check_error = error
        self._largest_checked[batch.packed is not None] = max(_num_with_targets(batch), 1)

    def _unpack_from_now_on(self, reason: str) -> None:
        self._unpacked_because = reason
        told = f"{self.method} reads the texts of packed rows one per row, as without packing: {reason}."
        warnings.warn(told, UnpackedWarning, stacklevel=2)

    def _check(self, batch: Batch, tolerance: float) -> tuple[float | None, list[str], str]:
        """Return the self-check's error, the parameters that fail it, and why; no reason where the products are right.

        Where there was nothing to check there is neither error nor reason.
        """
        try:
            check = check_products(self._fast, batch)
        except UncoveredModuleError as error:
            return None, error.parameters, str(error)
        if check.is_empty:
            return None, [], ""
        if check.error <= tolerance:
            reason = "a weight is used although its module is not called" if check.unused else ""
            return check.error, check.unused, reason
        wrong = [name for name, own in check.by_parameter.items() if not own <= tolerance / 10]
        reason = (
            f"self-check error {check.error:.1e}: a weight is used outside its own module, "
            "or a module does something else than modules of its kind"
        )
        return check.error, sorted({*wrong, *check.unused}), reason

    def _take_slow_route(self, route: str, parameters: Iterable[str]) -> None:
        self.slow_parameters.update(parameters)
        if self.route != route:
            warnings.warn(
                f"{self.method} takes one backward pass per text, several times the cost: {route}.",
                SlowRouteWarning,
                stacklevel=2,
            )
        self.route = route


def _num_with_targets(batch: Batch) -> int:
    return int((batch.labels[:, 1:] != IGNORED).any(1).sum())


def _joined(parts: Sequence[Products]) -> Products:
    """Join what was found of some texts each."""
    norms = [part.square_norms for part in parts if part.square_norms is not None]
    return Products(
        torch.cat([part.products for part in parts]),
        torch.cat(norms) if norms else None,
        torch.cat([part.losses for part in parts]),
        joined([part.observed for part in parts]),
    )
