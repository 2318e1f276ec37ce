"""Products of every text's gradient with fixed directions, from forward passes alone.

<grad L_i, D> = (L_i(theta + e D) - L_i(theta - e D)) / 2e + O(e^2): the weights are moved along D and back, and
the losses of all texts are read on both sides. Nothing has to be known about the modules.

The step e. With h the nats by which the loss moves on each side, the error from the loss's bend is about h^2 and that
from rounding about eps / h, so h = eps^(1/3) balances them: 0.005 nats in float32. The slope that turns h into e is
that of the target's own texts, from one ordinary gradient. (A step that is a fixed share of the weights' norm does
worse: between the models tried, the best share differed thirtyfold, and the best h threefold.) Doubling
e makes the bend's error four times as large, so a third of what doubling changes is that error itself. Texts of the sample
move less than the target's own, so rounding costs them more: the step taken is the largest, from 4 h down by halves, at
which doubling changes the target's texts by no more than `AIM`, or else the one where halving helps no more. Rounding is
also why the losses are finished in float64.

The check. On the target's texts the differences have to add up to the ordinary gradient's product, and doubling e may
change them by `TOLERANCE` at most. A direction that fails is refused: what is left is rounding, or a loss with kinks
(ReLU), whose error falls with e alone, or forward passes that do not feel all the weights.

Choices. A layer that routes tokens to its best experts makes the loss jump where the choice flips, and a jump over 2e
is no derivative: on a trained mixture of 8 experts the plain difference was wrong by as much as the largest value.
So the choices of a pass at the weights themselves are held in the others, as an ordinary gradient holds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from oracle.encoding import IGNORED, Batch, EncodedText
from oracle.errors import InputError
from oracle.gradients.forward_mode import summed_slope
from oracle.language_model import LanguageModel

PRECISIONS = (torch.float32, torch.float64)  # in a coarser one, rounding eats most of a step that is small enough
TOLERANCE = 5e-3  # of the largest value; Spearman's correlation stays above 0.999
AIM = 1.5e-4  # of the largest value, changed by doubling the step: a third of it, 5e-5, is the error of the step itself
FLOAT64_TOLERANCE = 1e-6  # met where all of a model computes in float64, else the steps of float32 are tried
LARGEST_FACTOR = 4  # of h: the first step that is tried
MAX_HALVINGS = 11  # where a loss is very flat, the step is long and bends a lot


class InexactDifferencesError(InputError):
    """No step that was tried is exact enough on a target's own texts."""


class InexactDifferencesWarning(UserWarning):
    """Differences of losses on the sample are off by more than `TOLERANCE`."""


@dataclass(frozen=True)
class Step:
    """The step along one direction.

    Attributes:
        size: e.
        relative: |e D| over the norm of the weights (over 1 where they are all 0).
        error: What the check found, relative to the largest absolute value among the texts that it was checked on.
    """

    size: float
    relative: float
    error: float


class HeldChoices(TorchFunctionMode):
    """The first pass inside it notes what `topk` and `argmax` choose; every later pass is given the same choices."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: list[Tensor] = []
        self._replays, self._position = False, 0

    def __enter__(self) -> HeldChoices:
        self._position = 0
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._replays = True
        super().__exit__(kind, error, trace)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_top = func in (torch.topk, Tensor.topk)
        if not is_top and func not in (torch.argmax, Tensor.argmax):
            return func(*args, **kwargs)
        if not self._replays:
            result = func(*args, **kwargs)
            self.choices.append(result.indices if is_top else result)
            return result
        assert self._position < len(self.choices), "a pass makes more choices than the pass at the weights themselves"
        chosen = self.choices[self._position]
        self._position += 1
        if not is_top:
            return chosen
        values = args[0] if args else kwargs["input"]
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
        return torch.return_types.topk((values.gather(dim, chosen), chosen))


class CentralDifference:
    """Every text's loss derivative along K directions, two forward passes each.

    Args:
        lm: The model; it is left as it was after every call, also when that raises.
        directions: Parameter name -> (K, *shape); of parameters that pass `check_precision`.
        reduction: A text's loss as "mean" or "sum" of its target tokens' losses.
        relative: |e D| over the norm of the weights; None takes the rule in this file's head.
    """

    def __init__(
        self, lm: LanguageModel, directions: dict[str, Tensor], *, reduction: str = "mean", relative: float | None = None
    ) -> None:
        self.lm, self.directions, self.reduction, self.relative = lm, directions, reduction, relative
        self.parameters = {name: p for name, p in lm.module.named_parameters() if name in directions}
        self.originals = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.num_directions = next(iter(directions.values())).shape[0]
        self.steps: list[Step] = []
        self.makes_choices = False
        self.num_checked_tokens = 0  # padded tokens of the checks' forward passes; a backward pass counts as two

    @property
    def passes_per_text(self) -> int:
        """Forward passes for one text: two per direction, and one at the weights themselves where choices are held."""
        return 2 * self.num_directions + int(self.makes_choices)

    def add_step(self, batch: Batch, *, name: str) -> None:
        """Choose and check the step along the next direction.

        Args:
            batch: Texts of the direction's own target.
            name: The target's name, for errors.

        Raises:
            InexactDifferencesError: No step that was tried passes the check.
            InputError: The direction is zero.
        """
        index = len(self.steps)
        length = _norm([direction[index] for direction in self.directions.values()])
        slope, held = self._slope(batch, index)
        if length == 0 or slope == 0:
            raise InputError(
                f"the loss of target set {name!r} is flat along its own gradient.",
                "a target set that the trainable parameters have an effect on",
                "check which parameters are trainable, or take other target texts.",
            )
        whole = (_norm(list(self.originals.values())) or 1.0) / length  # e for a step as long as the weights
        tried: list[Step] = []
        for size, tolerance in self._candidates(batch, slope, whole, tried):
            error = self._error(batch, held, index, size=size, slope=slope)
            tried.append(Step(size, size / whole, error))
            if error <= tolerance:
                break
        best = min(tried, key=lambda step: step.error)
        if best.error <= TOLERANCE:
            self.steps.append(best)
            return
        told = ", ".join(f"{step.error:.1e} with a step of {step.relative:.1e}" for step in tried)
        raise self.inexact(f"on target set {name!r} itself", told)

    def measure(self, encoded: Sequence[EncodedText], *, factor: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return the derivatives (B, K) by `factor` times the steps, and the losses (B,), the mean of all sides."""
        batches = list(self.lm.batches(encoded))
        held: list[AbstractContextManager[Any]] = [HeldChoices() if self.makes_choices else nullcontext() for _ in batches]
        products, losses = np.zeros((len(encoded), self.num_directions)), np.zeros(len(encoded))
        with self._restored():
            if self.makes_choices:
                self._token_losses(batches, held)
            for index, step in enumerate(self.steps):
                sides = self._differences(batches, held, index, size=factor * step.size)
                for batch, (slopes, means) in zip(batches, sides, strict=True):
                    products[batch.positions, index] = slopes.cpu().numpy()
                    losses[batch.positions] += means.cpu().numpy() / self.num_directions
        return products, losses

    # ------------------------------------------------------------------ the step and its check

    def _slope(self, batch: Batch, index: int) -> tuple[float, HeldChoices]:
        """Return <grad of the texts' summed loss, D> by one backward pass, and the choices made on the way."""
        held = HeldChoices()
        with held:
            slope = summed_slope(self.lm, batch, self.directions, index, reduction=self.reduction)
        self.num_checked_tokens += 3 * math.prod(batch.model_shape)
        self.makes_choices |= bool(held.choices)
        return slope, held

    def _candidates(self, batch: Batch, slope: float, whole: float, tried: list[Step]) -> Iterator[tuple[float, float]]:
        """Yield (step, error at which to stop): that of the weights' precision, then smaller ones as long as they help.

        Some layers of a float64 model compute in float32 (the norms of Llama); float32's steps follow for those.
        """
        if self.relative is not None:
            yield self.relative * whole, TOLERANCE
            return
        num_losses = len(batch.positions) if self.reduction == "mean" else int(_mask(batch).sum())
        per_nat = num_losses / abs(slope)
        if all(p.dtype == torch.float64 for p in self.parameters.values()):
            yield per_nat * torch.finfo(torch.float64).eps ** (1 / 3), FLOAT64_TOLERANCE
        for halvings in range(MAX_HALVINGS + 1):
            yield per_nat * torch.finfo(torch.float32).eps ** (1 / 3) * LARGEST_FACTOR / 2**halvings, AIM
            if halvings and tried[-2].error <= min(TOLERANCE, tried[-1].error):
                return

    def _error(self, batch: Batch, held: HeldChoices, index: int, *, size: float, slope: float) -> float:
        """Return what doubling the step changes of the largest value, or the sum misses of the gradient's if more."""
        with self._restored():
            near, far = (self._differences([batch], [held], index, size=factor * size)[0][0] for factor in (1, 2))  # (B,)
        self.num_checked_tokens += 4 * math.prod(batch.model_shape)
        tiny = torch.finfo(torch.float32).tiny
        largest = near.abs().max()
        of_step = (near - far).abs().max() / largest.clamp_min(tiny)
        of_sum = (near.sum() - slope).abs() / near.abs().sum().clamp_min(tiny)
        return float(torch.maximum(of_step, of_sum))

    def inexact(self, where: str, told: str) -> InexactDifferencesError:
        """Return the error that says where and by how much differences are off."""
        hint = (
            ", or pass a relative_step smaller than these, if their error falls with them"
            if self.relative is None
            else ", or leave relative_step out, and a rule chooses the step"
        )
        return InexactDifferencesError(
            f"differences of losses {where} are off by too much of the largest one: {told} of the norm of the weights.",
            f"an error of at most {TOLERANCE:g}, from doubling the step or from an ordinary gradient",
            "switch autocast and TF32 off; load a model with kinks (ReLU) in float64; pass tolerance=0, which takes no "
            "differences; or use method='grad_dot'" + hint + ".",
        )

    # ------------------------------------------------------------------ passes

    @contextmanager
    def _restored(self) -> Iterator[None]:
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.originals[name])

    def _differences(
        self, batches: Sequence[Batch], held: Sequence[AbstractContextManager[Any]], index: int, *, size: float
    ) -> list[tuple[Tensor, Tensor]]:
        """Return for each batch the derivatives (B,) and the mean losses of both sides (B,), float64.

        The difference is taken token by token: the sum of a long text's losses has fewer digits left for it.
        """
        sides = []
        for signed in (size, -size):
            for name, parameter in self.parameters.items():
                torch.add(self.originals[name], self.directions[name][index], alpha=signed, out=parameter.detach())
            sides.append(self._token_losses(batches, held))
        result = []
        for batch, up, down in zip(batches, *sides, strict=True):
            num_losses = _mask(batch).sum(1).clamp_min(1) if self.reduction == "mean" else 1
            up, down = up.double(), down.double()
            result.append(((up - down).sum(1) / (2 * size * num_losses), (up + down).sum(1) / (2 * num_losses)))
        return result

    def _token_losses(self, batches: Sequence[Batch], held: Sequence[AbstractContextManager[Any]]) -> list[Tensor]:
        result = []
        for batch, choices in zip(batches, held, strict=True):
            with torch.no_grad(), choices:
                result.append(self.lm.token_losses(batch, fine=True)[0])
        return result


def check_precision(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Refuse weights whose own rounding is larger than a small enough step.

    Raises:
        InputError: A weight has another precision than `PRECISIONS`.
    """
    for name, parameter in parameters.items():
        if parameter.dtype not in PRECISIONS:
            raise InputError(
                f"the weights {name} are {str(parameter.dtype).removeprefix('torch.')}, where rounding eats a small step.",
                "trainable weights in float32 or float64",
                "load the model in float32, pass tolerance=0, which takes no steps, or use method='grad_dot'.",
            )


def _mask(batch: Batch) -> Tensor:
    return batch.labels[:, 1:] != IGNORED  # (B, L-1)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(sum(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 for tensor in tensors)) ** 0.5
