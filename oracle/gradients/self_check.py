"""The check that runs on the first batch, always: are the products those of ordinary gradients, text by text?

It needs no per-text reference: one ordinary gradient of the whole batch, and one text alone. A batch without any gradient
(prompts so long that their targets were cut off) shows nothing, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oracle.encoding import Batch
from oracle.gradients.products import GradientProducts, dot_in_blocks, uncompiled


@dataclass(frozen=True)
class SelfCheck:
    """How well a batch's products agree with an ordinary gradient, and with one of its texts alone.

    Attributes:
        error: The largest error over the K directions: of the sum, relative to the sum of the absolute products, and of
            the single text (the one with the largest products), relative to the largest absolute product.
        by_parameter: Each parameter's own error of the sum, relative to the same.
        unused: Parameters that have a gradient, and whose modules were not called.
        is_empty: Whether all products and all ordinary gradients are 0, so that nothing was compared.
    """

    error: float
    by_parameter: dict[str, float]
    unused: list[str]
    is_empty: bool


def check_products(engine: GradientProducts, batch: Batch) -> SelfCheck:
    """Compare a batch's products with one ordinary gradient, and one of its texts with the same text alone.

    The sum has to agree, sum_i <grad L_i, D> = <grad sum_i L_i, D>, which catches what no hook can see, such as a
    weight that is used outside its own module. The text alone catches products given to the wrong text, which
    leave the sum as it is. Call it outside the engine's `with` block.

    Raises:
        UncoveredModuleError: A module's input is not ordered by text.
    """
    parameters = {name: p for name, p in engine.module.named_parameters() if name in engine.directions}
    with uncompiled(engine.module):
        gradients = torch.autograd.grad(engine.losses(batch).sum(), list(parameters.values()), allow_unused=True)
    with engine:
        measured = engine(batch).products  # (B, K)
        sums, uses = engine.by_parameter, engine.uses
        tiny = torch.finfo(torch.float32).tiny
        largest = measured.abs().amax(0).clamp_min(tiny)  # (K,)
        row = int((measured.abs() / largest).sum(1).argmax())
        alone = engine(batch.some(slice(row, row + 1))).products[0] if len(measured) > 1 else measured[0]
    scale = measured.abs().sum(0).clamp_min(tiny)  # (K,)
    expected, by_parameter, unused, is_empty = torch.zeros_like(scale), {}, [], not bool(measured.any())
    for name, gradient in zip(parameters, gradients, strict=True):
        own = torch.zeros_like(scale)
        if gradient is not None:
            directions = engine.directions[name].reshape(engine.num_directions, -1)
            with torch.autocast(gradient.device.type, enabled=False):
                own = dot_in_blocks(gradient.float().reshape(1, -1), directions)[0]
            if bool(gradient.any()):
                is_empty = False
                if name not in uses:
                    unused.append(name)
        expected += own
        by_parameter[name] = float(((sums.get(name, 0.0) - own).abs() / scale).max())
    error_of_sum = (measured.sum(0) - expected).abs() / scale
    error_of_single = (measured[row] - alone).abs() / largest
    return SelfCheck(float(torch.maximum(error_of_sum, error_of_single).max()), by_parameter, unused, is_empty)


def self_check(engine: GradientProducts, batch: Batch) -> float:
    """Return the error of `check_products`.

    Raises:
        UncoveredModuleError: A module's input is not ordered by text.
    """
    return check_products(engine, batch).error
