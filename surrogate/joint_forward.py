"""What a network says of many texts: one standardising pass and one product for the first layers of all its parts.

The members and the linear path read the same columns by the same means and spreads and weigh them each in its own way. The
weights of the columns are folded into those of the first layer, so that features are read once and multiplied once. Parts
that read by other means, as members of a warm start do beside a new linear path, form a group of their own.
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


@dataclass(frozen=True)
class JointForward:
    """The first layers of all parts of a network, by group, and what follows in each member."""

    groups: list[_Group]
    members: Sequence[Perceptron]
    places: list[tuple[int, slice]]  # where each part's first layer stands: group, columns; the linear path, if any, is last

    @classmethod
    def of(cls, members: Sequence[Perceptron], linear: tuple[FeatureScaler, Tensor] | None) -> JointForward:
        """Join members and, where there is one, a linear path with its weights (D, C)."""
        parts = [(member.scaler, member.weights[0].detach()) for member in members] + ([] if linear is None else [linear])
        groups: list[list[tuple[FeatureScaler, Tensor]]] = []
        places: list[tuple[int, slice]] = []
        for part in parts:
            number = next((n for n, group in enumerate(groups) if group[0][0].standardises_like(part[0])), len(groups))
            if number == len(groups):
                groups.append([])
            start = sum(weights.shape[1] for _, weights in groups[number])
            places.append((number, slice(start, start + part[1].shape[1])))
            groups[number].append(part)
        return cls([_Group.of(group) for group in groups], members, places)

    def outputs(self, features: NDArray[np.float32]) -> tuple[list[Tensor], Tensor | None]:
        """Return each member's output (b, C) and the linear path's (b, C), None without one, for features (b, D)."""
        first = [group.products(features) for group in self.groups]
        parts = [first[number][:, columns] for number, columns in self.places]
        outputs = []
        for member, hidden in zip(self.members, parts, strict=False):
            hidden = hidden + member.biases[0]
            for weights, bias in zip(member.weights[1:], member.biases[1:], strict=True):
                hidden = gelu(hidden) @ weights + bias
            outputs.append(hidden)
        return outputs, parts[-1] if len(parts) > len(self.members) else None


@dataclass(frozen=True)
class _Group:
    """First layers (D, F) of parts that standardise alike, relevance of the columns included.

    The mean is held in two parts, which together have twice the digits of one: a column far from zero keeps its own.
    """

    mean: NDArray[np.float32]
    mean_rest: NDArray[np.float32]
    inverse_std: NDArray[np.float32]
    weights: Tensor

    @classmethod
    def of(cls, parts: Sequence[tuple[FeatureScaler, Tensor]]) -> _Group:
        arrays = [scaler.arrays() for scaler, _ in parts]
        mean = arrays[0]["mean"].astype(np.float32)
        largest = float(np.finfo(np.float32).max)
        folded = [
            (torch.from_numpy(learned["relevance"])[:, None] * weights).float()
            for learned, (_, weights) in zip(arrays, parts, strict=True)
        ]
        return cls(
            mean,
            (arrays[0]["mean"] - mean).astype(np.float32),
            np.minimum(arrays[0]["inverse_std"], largest).astype(np.float32),
            torch.cat(folded, dim=1),
        )

    def products(self, features: NDArray[np.float32]) -> Tensor:
        """Return the first layers' products (b, F) with standardised features."""
        standardised = np.empty(features.shape, dtype=np.float32)
        step = max(STANDARDISED_VALUES // max(features.shape[1], 1), 1)
        for start in range(0, len(features), step):
            out = standardised[start : start + step]
            np.subtract(features[start : start + step], self.mean, out=out)
            out -= self.mean_rest
            out *= self.inverse_std
            np.clip(out, -FEATURE_CLIP, FEATURE_CLIP, out=out)
        return torch.from_numpy(standardised) @ self.weights
