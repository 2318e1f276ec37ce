"""Products of every text's gradient with fixed directions, by forward-mode differentiation: exact, with no step to choose.

Every weight carries its direction along as a tangent, every value on the way carries what the direction does to it, and the
tangent of a text's loss is the product <grad L_i, D>. A layer makes three products of matrices where a forward pass makes
one, as many as a forward and backward pass, and nothing is kept for later. What an ordinary gradient holds, such as the
choice of experts, is held.

Attention is computed by its plain formula, and the experts of a layer one after the other: the fused kernels of either have
no forward derivative. Other operations without one raise, or, as custom operators do, pass no tangent on and say nothing; so
the derivatives of a batch are added up and compared with an ordinary gradient before any is believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from oracle.encoding import IGNORED, Batch
from oracle.gradients.products import dot_in_blocks
from oracle.language_model import LanguageModel

PASSES = 3  # forward passes' worth of products per direction
TOLERANCE = 1e-4  # of the sum of the derivatives' sizes; rounding leaves 1e-6 in float32
COARSE_TOLERANCE = 2e-2  # where there are weights in a coarser precision


class NoForwardModeError(Exception):
    """An operation of the model has no forward derivative, or a wrong one."""


class ForwardMode:
    """Every text's loss derivative along K directions.

    Args:
        lm: The model; it is not changed.
        directions: Parameter name -> (K, *shape).
        reduction: A text's loss as "mean" or "sum" of its target tokens' losses.
    """

    def __init__(self, lm: LanguageModel, directions: dict[str, Tensor], *, reduction: str = "mean") -> None:
        self.lm, self.directions, self.reduction = lm, directions, reduction
        self._losses = _TokenLosses(lm)

    def measure(self, batch: Batch, index: int) -> tuple[Tensor, Tensor]:
        """Return the derivatives (B,) along direction `index` and the losses (B,), float64.

        Raises:
            NoForwardModeError: The model has an operation without a forward derivative.
        """
        parameters = dict(self.lm.module.named_parameters())
        with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]), _PlainExperts(), forward_ad.dual_level():
            weights = {
                f"module.{name}": forward_ad.make_dual(parameters[name].detach(), direction[index].to(parameters[name].dtype))
                for name, direction in self.directions.items()
            }
            try:
                losses, tangents = forward_ad.unpack_dual(functional_call(self._losses, weights, (batch,)))
            except NotImplementedError as error:
                raise NoForwardModeError(str(error)) from error
        if tangents is None:
            raise NoForwardModeError("the losses carry no tangent")
        num_losses = (batch.labels[:, 1:] != IGNORED).sum(1).clamp_min(1) if self.reduction == "mean" else 1
        return tangents.double().sum(1) / num_losses, losses.double().sum(1) / num_losses

    def check(self, batch: Batch, index: int) -> None:
        """Compare the sum of a batch's derivatives with one ordinary gradient's product.

        Raises:
            NoForwardModeError: They differ, or there is no forward mode at all.
        """
        along, _ = self.measure(batch, index)
        slope = summed_slope(self.lm, batch, self.directions, index, reduction=self.reduction)
        error = abs(float(along.sum()) - slope) / max(float(along.abs().sum()), abs(slope), torch.finfo(torch.float32).tiny)
        fine = (torch.float32, torch.float64)
        is_fine = all(parameter.dtype in fine for parameter in self.lm.module.parameters())
        if not error <= (TOLERANCE if is_fine else COARSE_TOLERANCE):
            raise NoForwardModeError(
                f"derivatives in forward mode miss those of an ordinary gradient by {error:.1e} of their size"
            )


def summed_slope(lm: LanguageModel, batch: Batch, directions: dict[str, Tensor], index: int, *, reduction: str) -> float:
    """Return <grad of the texts' summed loss, D> along direction `index` by one backward pass."""
    parameters = {name: p for name, p in lm.module.named_parameters() if name in directions}
    with torch.enable_grad():
        loss = lm.text_losses(batch, reduction=reduction).sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    slope = 0.0
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            slope += float(dot_in_blocks(gradient.reshape(1, -1), directions[name][index].to(gradient.dtype).reshape(1, -1)))
    return slope


class _TokenLosses(nn.Module):
    """A model's token losses (B, L-1) as a module, whose weights a call may replace."""

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__()
        self.module = lm.module
        self._lm = lm

    def forward(self, batch: Batch) -> Tensor:
        return self._lm.token_losses(batch)[0]


class _PlainExperts(TorchFunctionMode):
    """Rows sorted by expert are multiplied expert by expert, whatever kernel the model asks for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "grouped_mm" not in getattr(func, "__name__", ""):
            return func(*args, **kwargs)
        return _grouped(*args, **{name: value for name, value in kwargs.items() if name == "offs"})


def _grouped(rows: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    """Return rows (S, I) times each one's own expert's weights (E, I, O); expert e's rows end at `offs[e]`."""
    ends: Sequence[int] = offs.tolist()
    parts = [rows[start:end] @ weight for start, end, weight in zip([0, *ends], ends, weights, strict=False)]
    rest = rows.new_zeros(len(rows) - (ends[-1] if ends else 0), weights.shape[2])
    return torch.cat([*parts, rest])
