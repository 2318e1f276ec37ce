"""What a network says of many texts: features are standardised once for all its parts.

The members and the linear path read the same columns by the same means and spreads and weigh them each in its own way. The
weights of the columns are folded into those of a part's first layer. Parts that read by other means, as members of a warm
start do beside a new linear path, form a group of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import gelu

from surrogate.perceptron import Perceptron
from surrogate.scaling import FEATURE_CLIP, FeatureScaler

STANDARDISED_VALUES = 2**18  # at a time: a megabyte of float32, which stays in the cache
FEW_COLUMNS = 32


@dataclass(frozen=True)
class JointForward:
    """The layers of all parts of a network, and by which group's standardised features each part reads."""

    groups: list[_Standardising]
    members: list[_Layers]
    linear: _Layers | None
    places: list[int]  # the group of each member, and of the linear path, if any, last

    @classmethod
    def of(cls, members: Sequence[Perceptron], linear: tuple[FeatureScaler, Tensor] | None) -> JointForward:
        """Join members and, where there is one, a linear path with its weights (D, C)."""
        scalers = [member.scaler for member in members] + ([] if linear is None else [linear[0]])
        first: list[FeatureScaler] = []  # of each group
        places = []
        for scaler in scalers:
            number = next((n for n, other in enumerate(first) if other.standardises_like(scaler)), len(first))
            if number == len(first):
                first.append(scaler)
            places.append(number)
        return cls(
            [_Standardising.of(scaler) for scaler in first],
            [_Layers.of(member.scaler, member.weights, member.biases) for member in members],
            None
            if linear is None
            else _Layers.of(linear[0], [linear[1]], [torch.zeros(linear[1].shape[1], dtype=torch.float32)]),
            places,
        )

    def outputs(self, features: NDArray[np.float32]) -> tuple[list[Tensor], Tensor | None]:
        """Return each member's output (b, C) and the linear path's (b, C), None without one, for features (b, D)."""
        read = [group.standardised(features) for group in self.groups]
        outputs = [member.output(read[place]) for member, place in zip(self.members, self.places, strict=False)]
        return outputs, None if self.linear is None else self.linear.output(read[self.places[-1]])


@dataclass(frozen=True)
class _Layers:
    """Weights (in, out) and biases (out,) of a part's layers; the first has the relevance of the columns in it."""

    weights: list[Tensor]
    biases: list[Tensor]

    @classmethod
    def of(cls, scaler: FeatureScaler, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> _Layers:
        relevance = torch.from_numpy(scaler.arrays()["relevance"])[:, None]
        first, *others = [weight.detach() for weight in weights]
        folded = [(relevance * first).float(), *others]
        return cls([_laid_out(weight) for weight in folded], [bias.detach() for bias in biases])

    def output(self, hidden: Tensor) -> Tensor:
        """Return what comes out (b, C) for standardised features (b, D)."""
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.addmm(bias, gelu(hidden) if layer else hidden, weight)
        return hidden


@dataclass(frozen=True)
class _Standardising:
    """How a group standardises columns (D,), their relevance left out.

    The mean is held in two parts, which together have twice the digits of one: a column far from zero keeps its own.
    """

    mean: NDArray[np.float32]
    mean_rest: NDArray[np.float32]
    inverse_std: NDArray[np.float32]

    @classmethod
    def of(cls, scaler: FeatureScaler) -> _Standardising:
        learned = scaler.arrays()
        mean = learned["mean"].astype(np.float32)
        largest = float(np.finfo(np.float32).max)
        return cls(
            mean,
            (learned["mean"] - mean).astype(np.float32),
            np.minimum(learned["inverse_std"], largest).astype(np.float32),
        )

    def standardised(self, features: NDArray[np.float32]) -> Tensor:
        """Return standardised features (b, D)."""
        standardised = np.empty(features.shape, dtype=np.float32)
        step = max(STANDARDISED_VALUES // max(features.shape[1], 1), 1)
        for start in range(0, len(features), step):
            out = standardised[start : start + step]
            np.subtract(features[start : start + step], self.mean, out=out)
            out -= self.mean_rest
            out *= self.inverse_std
            np.clip(out, -FEATURE_CLIP, FEATURE_CLIP, out=out)
        return torch.from_numpy(standardised)


def _laid_out(weight: Tensor) -> Tensor:
    """Return weights (in, out), few columns one after the other in memory: their product is four times as fast."""
    return weight.t().contiguous().t() if weight.shape[1] < FEW_COLUMNS else weight.contiguous()
