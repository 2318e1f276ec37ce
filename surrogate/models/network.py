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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from oracle.errors import InputError, check_at_least, check_choice
from oracle.plugins import option
from surrogate.continuation import check_warm_start
from surrogate.joint_forward import JointForward
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
from surrogate.perceptron import Perceptron, PerceptronTraining
from surrogate.scaling import LABEL_SCALES, FeatureScaler, LabelScaler, weighted_mean
from surrogate.splits import grouped_holdout

if TYPE_CHECKING:
    from surrogate.network_amounts import NetworkAmounts

ROWS_PER_BLOCK = 4096


@dataclass(kw_only=True, eq=False)
class InfluenceNetwork:
    """Small perceptrons, averaged, and weighed per target against ridge regression; all targets at once.

    Use it where influence is a smooth function of dense embeddings, where targets are several and alike, or where
    the spread of members is wanted; `trees` where single features carry thresholds. Runs on the CPU, repeatably.

    A warm start trains each member on from the weights of the earlier one, whose feature scaler it keeps; the linear path and
    the gate are fitted anew. With 300 new labels and influence that correlates by 0.7 with that of 300 old ones, Spearman was
    0.828 (dense features) and 0.621 (sparse), against 0.811 and 0.582 from new labels only and 0.806 and 0.653 from new
    labels and old ones of half weight; where nothing was kept 0.795, 0.805 and 0.688 (dense). It is the surrogate that a
    warm start helps most (`benchmarks/warm_start.py`).

    Attributes (learned): `members_` the perceptrons; `weights_` (D, C) and `intercept_` (C,) of the linear path on
    scaled features; `gate_` (C,) the share of the members in the score; `num_features_`, `num_targets_`.

    Cost:
        One `ridge`, and per member and epoch one pass over the labelled texts: some 4 seconds per member at 2,400
        texts and 3,000 features on one core.
    Limit:
        Where the gate is zero (perceptrons do not help) it equals `ridge`.
    Paper:
        Agarwal and Hakkani-Tür 2025, arXiv 2502.09969; the linear path, gate and ensemble are this project's.
    """

    plugin_name: ClassVar[str] = "network"
    explanations: ClassVar[tuple[str, ...]] = ("contributions",)
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
    members_: list[Perceptron] = field(init=False, repr=False)
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
        _parse_widths(self.hidden)

    @property
    def num_features_(self) -> int:
        """Number of feature columns D of the fit."""
        return len(self.weights_)

    @property
    def num_targets_(self) -> int:
        """Number of targets C of the fit."""
        return len(self.intercept_)

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        groups: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        warm_start: Self | None = None,
    ) -> Self:
        """Learn from features (S, D) and labels (S, C) or (S,); `groups` stay on one side of each split."""
        with _own_settings():
            data = training_data(X, y, groups, sample_weight=sample_weight)
            if warm_start is not None:
                shape = {"num_features": data.features.shape[1], "num_targets": data.labels.shape[1]}
                check_warm_start(warm_start, self, also_equal=("widths", "ensemble"), **shape)
            return self._fit(data, [None] * self.ensemble if warm_start is None else warm_start.members_)

    def _fit(self, data: TrainingData, earlier: Sequence[Perceptron | None]) -> Self:
        label_scaler = LabelScaler(self.label_scale).fit(data.labels, data.weights)
        scaled = label_scaler.transform(data.labels)
        intercept = weighted_mean(scaled, data.weights)
        targets = scaled - intercept
        scaler = FeatureScaler().fit(data.features, weights=data.weights)
        members, held_out, outputs = zip(
            *(self._train_member(number, data, targets, scaler=scaler, earlier=member) for number, member in enumerate(earlier)),
            strict=True,
        )
        gate = torch.ones(targets.shape[1], dtype=torch.float32)
        weights = torch.zeros(data.features.shape[1], targets.shape[1], dtype=torch.float32)
        linear_scaler = None
        if self.linear_path:
            linear_scaler, ridge = fit_scaled_ridge(
                data.features,
                targets,
                groups=data.groups,
                keys=data.keys,
                weigh_features=self.weigh_features,
                sample_weight=data.weights,
            )
            weights = torch.from_numpy(ridge.weights).float()
            intercept = intercept + ridge.intercept
            rows = np.concatenate(held_out)
            counts = np.ones(len(rows)) if data.weights is None else data.weights[rows]
            gate = _gate(targets[rows], linear=ridge.held_out[rows], outputs=torch.cat(outputs), counts=counts)
        self.weights_, self.intercept_, self.gate_ = weights, torch.from_numpy(intercept).float(), gate
        self.members_, self._linear_scaler, self._label_scaler = list(members), linear_scaler, label_scaler
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
        with _own_settings(), torch.no_grad():
            joint = self._joint_forward()
            for start in range(0, len(features), ROWS_PER_BLOCK):
                block = slice(start, start + ROWS_PER_BLOCK)
                outputs = self._member_outputs(joint, features[block])  # (members, b, C)
                scores[block] = self.from_label_scale(outputs.mean(axis=0))
                if return_spread:
                    spreads[block] = np.stack([self._label_scaler.inverse(output) for output in outputs]).std(axis=0)
        return (scores, spreads) if return_spread else scores

    def from_label_scale(self, output: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return scores (B, C) in label units for scores on the label scale."""
        return self._label_scaler.inverse(output).astype(np.float32)

    def similarity_features(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return features (B, F) whose inner products say how far one text's label moves another's score.

        The ridge path's features and the members' last hidden layers, each of mean square 1 and weighed by the gate.
        """
        from surrogate.network_amounts import hidden_and_output

        gate = float(self.gate_.mean())
        parts = [(gate / len(self.members_), hidden_and_output(member, features)[0]) for member in self.members_]
        if self._linear_scaler is not None:
            parts.append((1 - gate, self._linear_scaler.transform(features).astype(np.float64)))
        return np.concatenate([np.sqrt(share) * part for share, part in parts], axis=1).astype(np.float32)

    def explainer(self, data: TrainingData, method: str) -> NetworkAmounts:
        """Return what accounts for scores by the data of the fit, with a method of `explanations`."""
        from surrogate.network_amounts import LinearPath, MemberLabels, NetworkAmounts

        assert method in self.explanations
        scaled = self._label_scaler.transform(data.labels)
        known: dict[str, Any] = {"targets": scaled - weighted_mean(scaled, data.weights), "sample_weight": data.weights}
        linear = None
        if self._linear_scaler is not None:
            linear = LinearPath.of(self._linear_scaler, self.weights_.double().numpy(), data.features, **known)
        members = [
            MemberLabels.of(member, np.flatnonzero(~self._held_out(data, number)), data.features, **known)
            for number, member in enumerate(self.members_)
        ]
        gate, intercept = self.gate_.double().numpy(), self.intercept_.double().numpy()
        return NetworkAmounts(gate, intercept, linear, members, len(data.features))

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
            Perceptron.from_arrays(without_prefix(f"member{number}", arrays)) for number in range(surrogate.ensemble)
        ]
        features = without_prefix("features", arrays)
        surrogate._linear_scaler = FeatureScaler.from_arrays(features) if surrogate.linear_path else None
        surrogate._label_scaler = LabelScaler.from_arrays(without_prefix("labels", arrays))
        return surrogate

    @property
    def widths(self) -> list[int]:
        """Widths of the hidden layers."""
        return _parse_widths(self.hidden)

    def _member_outputs(self, joint: JointForward, features: NDArray[np.float32]) -> NDArray[np.float64]:
        of_members, of_linear = joint.outputs(features)
        linear = self.intercept_ if of_linear is None else self.intercept_ + (1 - self.gate_) * of_linear
        return torch.stack([linear + self.gate_ * output for output in of_members]).double().numpy()

    def _joint_forward(self) -> JointForward:
        return JointForward.of(self.members_, None if self._linear_scaler is None else (self._linear_scaler, self.weights_))

    def _held_out(self, data: TrainingData, number: int) -> NDArray[np.bool_]:
        """Return which texts (S,) decide when a member stops."""
        seed = self.seed * 1_000 + number
        return grouped_holdout(data.groups, fraction=self.validation_fraction, seed=seed, keys=data.keys)

    def _train_member(
        self,
        number: int,
        data: TrainingData,
        targets: NDArray[np.float64],
        *,
        scaler: FeatureScaler,
        earlier: Perceptron | None,
    ) -> tuple[Perceptron, NDArray, Tensor]:
        """Train one member on all but its own held-out texts, from random weights or from those of an earlier one.

        A new member standardises as `scaler` does, which has seen no label.

        Returns:
            The member, the rows (B,) that were held out, and its output (B, C) for them: nothing but the stopping
            has seen their labels.
        """
        mask = self._held_out(data, number)
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]))
        if earlier is None:
            if self.weigh_features:
                weights = None if data.weights is None else data.weights[~mask]
                scaler = scaler.weighed_by(data.features[~mask], targets[~mask], weights=weights)
            start = Perceptron.new(scaler, [data.features.shape[1], *self.widths, targets.shape[1]], generator)
        else:
            start = earlier.without_output(np.asarray((targets == 0).all(axis=0)))
        training = PerceptronTraining(
            dropout=self.dropout,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            max_epochs=self.max_epochs,
            patience=self.patience,
            batch_size=self.batch_size,
        )
        member, output = training.run(
            start,
            data.features,
            targets,
            held_out=mask,
            sample_weight=data.weights,
            generator=generator,
            keep_start=earlier is not None,
        )
        return member, np.flatnonzero(mask), output


@contextmanager
def _own_settings() -> Iterator[None]:
    """Shield from a caller's no_grad, inference mode, autocast and default device, as inside a training loop."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        yield


def _parse_widths(hidden: str | Sequence[int]) -> list[int]:
    parts = hidden.split(",") if isinstance(hidden, str) else list(hidden)
    texts = [str(part).strip() for part in parts]
    if not texts or not all(text.isdecimal() and int(text) > 0 for text in texts):
        raise InputError(
            f"hidden={hidden!r} cannot be used.",
            "positive whole numbers such as '128' or '256,64'",
            "give the width of each hidden layer.",
        )
    return [int(text) for text in texts]


def _gate(targets: NDArray[np.float64], *, linear: NDArray[np.float64], outputs: Tensor, counts: NDArray[np.float64]) -> Tensor:
    """Return the share (0 to 1) of the members' outputs beside the linear path's that fits labels best, per target (C,)."""
    step = outputs.numpy() - linear.astype(np.float32)
    weighted = step * counts.astype(np.float32)[:, None]
    power = (weighted * step).sum(axis=0)
    gate = (weighted * (targets - linear).astype(np.float32)).sum(axis=0) / np.maximum(power, np.finfo(np.float32).tiny)
    return torch.from_numpy(gate.clip(0.0, 1.0))
