"""One small multilayer perceptron: its weights, its output, and training that stops where held-out texts say so.

The influence network is an ensemble of these. Plain tensors and no `torch.nn.Module`, so that a member is saved as
named arrays and nothing of it depends on a global random state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import gelu

from oracle.errors import NotFiniteError
from surrogate.models import with_prefix, without_prefix
from surrogate.scaling import FeatureScaler


@dataclass
class Perceptron:
    """One perceptron: the scaler of its training texts' features, weights (in, out) and biases per layer."""

    scaler: FeatureScaler
    weights: list[Tensor]
    biases: list[Tensor]

    @classmethod
    def new(cls, scaler: FeatureScaler, sizes: Sequence[int], generator: torch.Generator) -> Perceptron:
        """Return one with random hidden layers and zero output, which a constant target never moves; `sizes` are (D, .., C)."""
        weights = [
            torch.randn(before, after, generator=generator, dtype=torch.float32) * math.sqrt(2 / before)
            for before, after in pairwise(sizes[:-1])
        ]
        weights.append(torch.zeros(sizes[-2], sizes[-1], dtype=torch.float32))
        return cls(scaler, weights, [torch.zeros(size, dtype=torch.float32) for size in sizes[1:]])

    def sizes(self) -> list[int]:
        """Return the widths of all layers, (D, .., C)."""
        return [len(self.weights[0]), *(len(bias) for bias in self.biases)]

    def parameters(self) -> list[Tensor]:
        """Return all weights and biases."""
        return self.weights + self.biases

    def output(self, x: Tensor, *, dropout: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Return the output (B, C) for scaled features (B, D); dropout only where a generator is given."""
        hidden = x
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if generator is not None and dropout > 0:
                hidden = hidden * torch.empty_like(hidden).bernoulli_(1 - dropout, generator=generator) / (1 - dropout)
            hidden = hidden @ weight + bias
            hidden = gelu(hidden) if layer < len(self.weights) - 1 else hidden
        return hidden

    def copy(self) -> Perceptron:
        """Return a copy that shares no weights and takes no gradients."""
        weights, biases = ([tensor.detach().clone() for tensor in tensors] for tensors in (self.weights, self.biases))
        return Perceptron(self.scaler, weights, biases)

    def without_output(self, columns: NDArray[np.bool_]) -> Perceptron:
        """Return a copy whose output is zero in these of the C columns; a constant target does not move it from there."""
        copied, dropped = self.copy(), torch.from_numpy(columns)
        copied.weights[-1][:, dropped], copied.biases[-1][dropped] = 0.0, 0.0
        return copied

    def arrays(self) -> dict[str, NDArray]:
        """Return everything as named arrays."""
        arrays = with_prefix("features", self.scaler.arrays())
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            arrays[f"{layer}.weight"], arrays[f"{layer}.bias"] = weight.detach().numpy(), bias.detach().numpy()
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray]) -> Perceptron:
        """Make one from what `arrays` returned."""
        layers = range(sum(name.endswith(".weight") for name in arrays))
        return cls(
            FeatureScaler.from_arrays(without_prefix("features", arrays)),
            [torch.from_numpy(arrays[f"{layer}.weight"]) for layer in layers],
            [torch.from_numpy(arrays[f"{layer}.bias"]) for layer in layers],
        )


@dataclass(frozen=True, kw_only=True)
class PerceptronTraining:
    """How a perceptron is trained: AdamW on the (weighted) squared error, the best epoch on held-out texts is kept."""

    dropout: float
    learning_rate: float
    weight_decay: float
    max_epochs: int
    patience: int
    batch_size: int

    def run(
        self,
        start: Perceptron,
        features: NDArray[np.float32],
        labels: NDArray[np.float64],
        *,
        held_out: NDArray[np.bool_],
        sample_weight: NDArray[np.float64] | None,
        generator: torch.Generator,
        keep_start: bool = False,
    ) -> tuple[Perceptron, Tensor]:
        """Train from `start` on the rows outside `held_out` until those in it (B) stop improving.

        Args:
            start: Where training starts; changed in place.
            features: (S, D) as they are; the perceptron's own scaler scales them.
            labels: (S, C) on the scale for fitting.
            held_out: (S,) True where a row decides about stopping and is not trained on.
            sample_weight: (S,) weights of the squared errors; None weighs all alike.
            generator: Decides batches and dropout.
            keep_start: Whether `start` itself may be the best, as where it was trained before.

        Returns:
            The best perceptron, and its output (B, C) for the held-out rows.

        Raises:
            NotFiniteError: Training diverged.
        """
        x, targets = torch.from_numpy(start.scaler.transform(features)), torch.from_numpy(labels).float()
        training, validation = torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(held_out)
        weights = torch.ones(len(x)) if sample_weight is None else torch.from_numpy(sample_weight).float()
        weights = (weights / weights[training].mean())[:, None]  # (S, 1)
        x_validation, targets_validation, weights_validation = x[validation], targets[validation], weights[validation]
        for parameter in start.parameters():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(start.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)

        def held_out_error() -> float:
            with torch.no_grad():
                return float((weights_validation * (start.output(x_validation) - targets_validation).square()).mean())

        best_error, best, stalled = held_out_error() if keep_start else math.inf, start.copy(), 0
        for _ in range(self.max_epochs):
            self._train_epoch(start, optimizer, (x, targets, weights), training=training, generator=generator)
            error = held_out_error()
            if not math.isfinite(error):
                raise NotFiniteError(
                    f"training diverged with learning_rate={self.learning_rate!r}.",
                    "a finite squared error",
                    "lower learning_rate, or use label_scale='rank'.",
                )
            if error < best_error:
                best_error, best, stalled = error, start.copy(), 0
            else:
                stalled += 1
                if stalled == self.patience:
                    break
        return best, best.output(x_validation)

    def _train_epoch(
        self,
        member: Perceptron,
        optimizer: torch.optim.Optimizer,
        tensors: tuple[Tensor, Tensor, Tensor],
        *,
        training: Tensor,
        generator: torch.Generator,
    ) -> None:
        x, targets, weights = tensors
        order = training[torch.randperm(len(training), generator=generator)]
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            outputs = member.output(x[rows], dropout=self.dropout, generator=generator)
            optimizer.zero_grad()
            (weights[rows] * (outputs - targets[rows]).square()).mean().backward()
            optimizer.step()
