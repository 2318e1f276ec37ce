"""Influence network: an ensemble of small multilayer perceptrons beside a ridge regression.

With a few hundred labels and thousands of noisy features, a perceptron alone may be worse than ridge regression,
and with smooth nonlinear influence it is far better. So both are fitted, and for each target a gate between 0
(ridge only) and 1 (perceptrons only) is set to what fits held-out labels best: the ridge's predictions for texts
left out of it, against the members' for their own validation texts. Neither saw the labels of those texts, not even
in the weights of the features. The members share their hidden layers among all targets; each has another validation
split, other feature weights and another start. Their spread says where they disagree.

Papers: Agarwal and Hakkani-Tür 2025, Neural Networks for Learnable and Scalable Influence Estimation
(arXiv 2502.09969) for predicting influence from embeddings with a small network; Lakshminarayanan et al. 2017
(ensembles); Wolpert 1992 (weighing models by held-out predictions). Left out: training the text encoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal, Self, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import gelu

from oracle.errors import InputError, NotFiniteError, check_at_least, check_choice
from oracle.plugins import option
from surrogate.linear import fit_scaled_ridge
from surrogate.models import (
    TrainingData,
    features_to_score,
    load_state,
    require_fitted,
    save_state,
    training_data,
    with_prefix,
    without_prefix,
)
from surrogate.scaling import LABEL_SCALES, FeatureScaler, LabelScaler
from surrogate.splits import grouped_holdout

ROWS_PER_BLOCK = 8192


@dataclass
class _Member:
    """One perceptron: the scaler of its training texts' features, weights (in, out) and biases per layer."""

    scaler: FeatureScaler
    weights: list[Tensor]
    biases: list[Tensor]

    def parameters(self) -> list[Tensor]:
        return self.weights + self.biases

    def output(self, x: Tensor, *, dropout: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Return the output (B, C) for standardised features; dropout only where a generator is given."""
        hidden = x
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if generator is not None and dropout > 0:
                hidden = hidden * torch.empty_like(hidden).bernoulli_(1 - dropout, generator=generator) / (1 - dropout)
            hidden = hidden @ weight + bias
            hidden = gelu(hidden) if layer < len(self.weights) - 1 else hidden
        return hidden

    def copy(self) -> _Member:
        weights, biases = ([tensor.detach().clone() for tensor in tensors] for tensors in (self.weights, self.biases))
        return _Member(self.scaler, weights, biases)

    def arrays(self) -> dict[str, NDArray]:
        arrays = with_prefix("features", self.scaler.arrays())
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            arrays[f"{layer}.weight"], arrays[f"{layer}.bias"] = weight.detach().numpy(), bias.detach().numpy()
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray]) -> _Member:
        layers = range(sum(name.endswith(".weight") for name in arrays))
        return cls(
            FeatureScaler.from_arrays(without_prefix("features", arrays)),
            [torch.from_numpy(arrays[f"{layer}.weight"]) for layer in layers],
            [torch.from_numpy(arrays[f"{layer}.bias"]) for layer in layers],
        )


@dataclass(kw_only=True, eq=False)
class InfluenceNetwork:
    """Small perceptrons, averaged, and weighed per target against ridge regression; all targets at once.

    Use it where influence is a smooth function of dense embeddings, where targets are several and alike, or where
    the spread of members is wanted; `trees` where single features carry thresholds. Runs on the CPU, repeatably.

    Attributes (learned): `members_` the perceptrons; `weights_` (D, C) and `intercept_` (C,) of the linear path on
    scaled features; `gate_` (C,) the share of the members in the score; `num_features_`.

    Cost:
        One `ridge`, and per member and epoch one pass over the labelled texts: some 4 seconds per member at 2,400
        texts and 3,000 features on one core.
    Limit:
        Where the gate is zero (perceptrons do not help) it equals `ridge`.
    Paper:
        Agarwal and Hakkani-Tür 2025, arXiv 2502.09969; the linear path, gate and ensemble are this project's.
    """

    plugin_name: ClassVar[str] = "network"
    hidden: str | Sequence[int] = option("128", "Widths of the hidden layers, comma-separated.")
    dropout: float = option(0.2, "Share of inputs and hidden units that are dropped while training.")
    learning_rate: float = option(1e-3, "Step size of AdamW.")
    weight_decay: float = option(0.1, "Decoupled weight decay of AdamW.")
    max_epochs: int = option(100, "Most passes over the labelled texts.")
    patience: int = option(10, "Epochs without improvement on the validation texts after which a member stops.")
    batch_size: int = option(64, "Texts per training step.")
    ensemble: int = option(5, "Number of members, each with another split and start.")
    weigh_features: bool = option(True, "Weigh features by how much they correlate with the targets before anything is fitted.")
    linear_path: bool = option(True, "Fit ridge regression beside the members and weigh both by held-out labels.")
    label_scale: str = option("rank", "Scale that labels are fitted on: rank, robust or none (then of order 1).")
    validation_fraction: float = option(0.2, "Share of the texts that decide when a member stops.")
    seed: int = option(0, "Seed of splits, starts, batches and dropout.")
    members_: list[_Member] = field(init=False, repr=False)
    weights_: Tensor = field(init=False, repr=False)
    intercept_: Tensor = field(init=False, repr=False)
    gate_: Tensor = field(init=False, repr=False)
    _linear_scaler: FeatureScaler | None = field(init=False, repr=False)  # None without the linear path
    _label_scaler: LabelScaler = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("label_scale", self.label_scale, LABEL_SCALES)
        for name, minimum in (
            ("max_epochs", 1),
            ("patience", 1),
            ("batch_size", 1),
            ("ensemble", 1),
            ("seed", 0),
            ("weight_decay", 0),
            ("dropout", 0),
        ):
            check_at_least(name, getattr(self, name), minimum)
        for name, accepted in (
            ("dropout", "a number from 0 to below 1"),
            ("validation_fraction", "a number above 0 and below 1"),
            ("learning_rate", "a number above 0 and below 1"),
        ):
            value = getattr(self, name)
            if not (0 < value < 1 or (name == "dropout" and value == 0)):
                raise InputError(f"{name}={value!r} cannot be used.", accepted, f"pass such a value for {name}.")
        self._widths()

    @property
    def num_features_(self) -> int:
        """Number of feature columns D of the fit."""
        return len(self.weights_)

    def fit(self, X: ArrayLike, y: ArrayLike, *, groups: ArrayLike | None = None) -> Self:
        """Learn from features (S, D) and labels (S, C) or (S,); `groups` stay on one side of each split."""
        with _own_settings():
            return self._fit(training_data(X, y, groups))

    def _fit(self, data: TrainingData) -> Self:
        label_scaler = LabelScaler(self.label_scale).fit(data.labels)
        scaled = label_scaler.transform(data.labels)
        intercept = scaled.mean(axis=0)
        targets = scaled - intercept
        members, held_out, outputs = [], [], []
        for number in range(self.ensemble):
            mask = grouped_holdout(
                data.groups, fraction=self.validation_fraction, seed=self.seed * 1_000 + number, keys=data.keys
            )
            member, output = self._train_member(number, data.features, targets, mask=mask)
            members.append(member)
            held_out.append(np.flatnonzero(mask))
            outputs.append(output)
        gate = torch.ones(targets.shape[1], dtype=torch.float32)
        weights = torch.zeros(data.features.shape[1], targets.shape[1], dtype=torch.float32)
        linear_scaler = None
        if self.linear_path:
            linear_scaler, ridge = fit_scaled_ridge(
                data.features, targets, groups=data.groups, keys=data.keys, weigh_features=self.weigh_features
            )
            weights = torch.from_numpy(ridge.weights).float()
            intercept = intercept + ridge.intercept
            rows = np.concatenate(held_out)
            gate = _gate(targets[rows], linear=ridge.held_out[rows], outputs=torch.cat(outputs))
        self.weights_, self.intercept_, self.gate_ = weights, torch.from_numpy(intercept).float(), gate
        self.members_, self._linear_scaler, self._label_scaler = members, linear_scaler, label_scaler
        return self

    @overload
    def predict(self, X: ArrayLike, return_spread: Literal[False] = False) -> NDArray[np.float32]: ...

    @overload
    def predict(self, X: ArrayLike, return_spread: Literal[True]) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...

    def predict(
        self, X: ArrayLike, return_spread: bool = False
    ) -> NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return scores (B, C) in label units for features (B, D).

        Members are averaged on the label scale, where one outlying member moves the mean least.

        Args:
            X: Features (B, D).
            return_spread: Also return the standard deviation over members (B, C) in label units, zeros for one member.
        """
        features = features_to_score(X, self.num_features_ if hasattr(self, "members_") else None)
        num_targets = len(self.intercept_)
        scores, spreads = np.zeros((2, len(features), num_targets), dtype=np.float32)
        for start in range(0, len(features), ROWS_PER_BLOCK):
            block = slice(start, start + ROWS_PER_BLOCK)
            outputs = self._member_outputs(features[block])  # (members, b, C)
            scores[block] = self._label_scaler.inverse(outputs.mean(axis=0))
            if return_spread:
                spreads[block] = np.stack([self._label_scaler.inverse(output) for output in outputs]).std(axis=0)
        return (scores, spreads) if return_spread else scores

    def save(self, folder: Path) -> None:
        """Write the fitted surrogate into `folder`."""
        require_fitted(hasattr(self, "members_"))
        arrays = {"weights": self.weights_.numpy(), "intercept": self.intercept_.numpy(), "gate": self.gate_.numpy()}
        for number, member in enumerate(self.members_):
            arrays |= with_prefix(f"member{number}", member.arrays())
        if self._linear_scaler is not None:
            arrays |= with_prefix("features", self._linear_scaler.arrays())
        save_state(Path(folder), self, arrays | with_prefix("labels", self._label_scaler.arrays()))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        options, arrays = load_state(Path(folder), cls.plugin_name)
        surrogate = cls(**options)
        surrogate.weights_, surrogate.intercept_, surrogate.gate_ = (
            torch.from_numpy(arrays[name]) for name in ("weights", "intercept", "gate")
        )
        surrogate.members_ = [
            _Member.from_arrays(without_prefix(f"member{number}", arrays)) for number in range(surrogate.ensemble)
        ]
        features = without_prefix("features", arrays)
        surrogate._linear_scaler = FeatureScaler.from_arrays(features) if surrogate.linear_path else None
        surrogate._label_scaler = LabelScaler.from_arrays(without_prefix("labels", arrays))
        return surrogate

    def _widths(self) -> list[int]:
        """Return the widths of the hidden layers."""
        parts = self.hidden.split(",") if isinstance(self.hidden, str) else list(self.hidden)
        texts = [str(part).strip() for part in parts]
        if not texts or not all(text.isdecimal() and int(text) > 0 for text in texts):
            raise InputError(
                f"hidden={self.hidden!r} cannot be used.",
                "positive whole numbers such as '128' or '256,64'",
                "give the width of each hidden layer.",
            )
        return [int(text) for text in texts]

    def _member_outputs(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        with _own_settings(), torch.no_grad():
            linear = self.intercept_.expand(len(features), -1)  # (b, C)
            if self._linear_scaler is not None:
                x = torch.from_numpy(self._linear_scaler.transform(features))
                linear = linear + (1 - self.gate_) * (x @ self.weights_)
            outputs = [
                linear + self.gate_ * member.output(torch.from_numpy(member.scaler.transform(features)))
                for member in self.members_
            ]
        return torch.stack(outputs).double().numpy()

    def _new_member(self, scaler: FeatureScaler, shape: tuple[int, int], generator: torch.Generator) -> _Member:
        """Return a member for (D, C) with random hidden layers and zero output (which a constant target never moves)."""
        sizes = [shape[0], *self._widths(), shape[1]]
        weights = [
            torch.randn(before, after, generator=generator, dtype=torch.float32) * math.sqrt(2 / before)
            for before, after in pairwise(sizes[:-1])
        ]
        weights.append(torch.zeros(sizes[-2], sizes[-1], dtype=torch.float32))
        return _Member(scaler, weights, [torch.zeros(size, dtype=torch.float32) for size in sizes[1:]])

    def _train_member(
        self, number: int, features: NDArray[np.float32], labels: NDArray[np.float64], *, mask: NDArray[np.bool_]
    ) -> tuple[_Member, Tensor]:
        """Train one member on the rows outside `mask` until those in it (B) stop improving; the best epoch is kept.

        Returns:
            The member, and its output (B, C) for the rows in `mask`, whose labels nothing but the stopping has seen.
        """
        scaler = FeatureScaler().fit(features[~mask], labels[~mask] if self.weigh_features else None)
        x, targets = torch.from_numpy(scaler.transform(features)), torch.from_numpy(labels).float()
        training, validation = torch.from_numpy(np.flatnonzero(~mask)), torch.from_numpy(mask)
        x_validation, targets_validation = x[validation], targets[validation]
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]))
        member = self._new_member(scaler, (x.shape[1], targets.shape[1]), generator)
        for parameter in member.parameters():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(member.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        best_error, best, stalled = math.inf, member.copy(), 0
        for _ in range(self.max_epochs):
            self._train_epoch(member, optimizer, (x, targets, training), generator)
            with torch.no_grad():
                error = float((member.output(x_validation) - targets_validation).square().mean())
            if not math.isfinite(error):
                raise NotFiniteError(
                    f"training diverged with learning_rate={self.learning_rate!r}.",
                    "a finite squared error",
                    "lower learning_rate, or use label_scale='rank'.",
                )
            if error < best_error:
                best_error, best, stalled = error, member.copy(), 0
            else:
                stalled += 1
                if stalled == self.patience:
                    break
        return best, best.output(x_validation)

    def _train_epoch(
        self,
        member: _Member,
        optimizer: torch.optim.Optimizer,
        tensors: tuple[Tensor, Tensor, Tensor],
        generator: torch.Generator,
    ) -> None:
        x, targets, training = tensors
        order = training[torch.randperm(len(training), generator=generator)]
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            outputs = member.output(x[rows], dropout=self.dropout, generator=generator)
            optimizer.zero_grad()
            (outputs - targets[rows]).square().mean().backward()
            optimizer.step()


@contextmanager
def _own_settings() -> Iterator[None]:
    """Shield from a caller's no_grad, inference mode, autocast and default device, as inside a training loop."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        yield


def _gate(targets: NDArray[np.float64], *, linear: NDArray[np.float64], outputs: Tensor) -> Tensor:
    """Return the share (0 to 1) of the members' outputs beside the linear path's that fits labels best, per target (C,)."""
    step = outputs.numpy() - linear.astype(np.float32)
    power = np.square(step).sum(axis=0)
    gate = (step * (targets - linear).astype(np.float32)).sum(axis=0) / np.maximum(power, np.finfo(np.float32).tiny)
    return torch.from_numpy(gate.clip(0.0, 1.0))
