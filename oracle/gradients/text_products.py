"""Products for any number of texts, by the batched identity where it holds and by the plain loop where it does not.

The first batch is checked against one ordinary gradient (`self_check`). A model that fails the check, or has a module
that no rule covers, takes one backward pass per text from then on, with a warning and a line in the labels' facts.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oracle.encoding import Batch, EncodedText
from oracle.gradients.module_rules import UncoveredModuleError
from oracle.gradients.products import GradientProducts, LossFunction, PerTextProducts, Products, self_check
from oracle.language_model import LanguageModel

SELF_CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative, see `self_check`
LOW_PRECISION_TOLERANCE = 5e-2


class SlowRouteWarning(UserWarning):
    """The batched identity does not cover the model, so every text takes a backward pass of its own."""


@dataclass(frozen=True)
class TextMeasurements:
    """What a forward and backward pass over B texts gave.

    Attributes:
        products: (B, K) float64, <grad loss of text, direction>.
        losses: (B,) the losses whose gradients were meant.
        norms: (B,) gradient norms, or None if they were not asked for.
    """

    products: np.ndarray
    losses: np.ndarray
    norms: np.ndarray | None


class TextProducts:
    """Every text's gradient product with K directions, with the check and the fallback around `GradientProducts`.

    Args:
        lm: The model.
        directions: Parameter name -> (K, *shape).
        losses: Batch -> (B,) differentiable losses whose gradients are meant; the mean per target token by default.
        norms: Whether to also give each text's gradient norm over the parameters in `directions`.
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
        per_text: bool = False,
        method: str = "grad_dot",
    ) -> None:
        self.lm, self.directions, self.norms, self.method = lm, directions, norms, method
        self.route = "per_text" if per_text else "batched"
        self.self_check_error: float | None = None
        loss_function = lm.text_losses if losses is None else losses
        self._fast = GradientProducts(lm.module, directions, loss_function, norms=norms)
        self._slow = PerTextProducts(lm.module, directions, loss_function, norms=norms)

    def measure(self, encoded: Sequence[EncodedText]) -> TextMeasurements:
        """One forward and backward pass over the texts, in as many batches as fit."""
        products = np.zeros((len(encoded), next(iter(self.directions.values())).shape[0]))
        losses, norms = np.zeros(len(encoded)), np.zeros(len(encoded))
        for batch in self.lm.batches(encoded):
            measured = self._products(batch)
            products[batch.positions] = measured.products.cpu().numpy()
            losses[batch.positions] = measured.losses.float().cpu().numpy()
            if measured.square_norms is not None:
                norms[batch.positions] = measured.square_norms.clamp_min(0).sqrt().cpu().numpy()
        return TextMeasurements(products, losses, norms if self.norms else None)

    def facts(self) -> dict[str, Any]:
        """How the products were made, how well they passed the self-check, and what they cover."""
        return {
            "route": self.route,
            "self_check_relative_error": self.self_check_error,
            "covered_parameters": sum(direction[0].numel() for direction in self.directions.values()),
            "parameters": self.lm.num_parameters,
        }

    def _products(self, batch: Batch) -> Products:
        if self.route == "batched" and self.self_check_error is None:
            self._choose_route(batch)
        if not self.route.startswith("per_text"):
            try:
                with self._fast as engine:
                    return engine(batch)
            except UncoveredModuleError as error:  # of this batch alone: the next one takes the batched way again
                self._take_slow_route(f"batched, per_text for some batches ({error})")
        return self._slow(batch)

    def _choose_route(self, batch: Batch) -> None:
        """Check the identity on the first batch; fall back to the plain loop where a module is not covered."""
        try:
            self.self_check_error = self_check(self._fast, batch)
        except UncoveredModuleError as error:
            self._take_slow_route(f"per_text ({error})")
            return
        dtype = next(self.lm.module.parameters()).dtype
        if not self.self_check_error <= SELF_CHECK_TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE):
            self._take_slow_route(
                f"per_text (self-check error {self.self_check_error:.1e}: a weight is used outside its own module, "
                "or a module does something else than modules of its kind)"
            )

    def _take_slow_route(self, route: str) -> None:
        if self.route != route:
            warnings.warn(
                f"{self.method} takes one backward pass per text, several times the cost: {route}.",
                SlowRouteWarning,
                stacklevel=2,
            )
        self.route = route
