"""The account of an influence network: its ridge path exactly, its members through ridge on their last hidden layer.

A member's last layer is linear, so a ridge regression on its hidden units that comes closest to its outputs tells them by
the labels it was trained on, as in representer points. The penalty is the one under which the regression follows the
member best on its training texts. The member was stopped early and is not that regression: the difference is left in the
remainder, and shown. Texts that only decided when to stop have no part.

Columns: weights times features for the ridge path; integrated gradients from the mean text for the members.

Papers: Yeh et al. 2018, Representer Point Selection for Explaining Deep Neural Networks (arXiv 1811.09720), whose
stationary last layer is replaced by the closest regression; Sundararajan et al. 2017, Axiomatic Attribution for Deep
Networks (arXiv 1703.01365).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import gelu

from surrogate.amounts import Amounts
from surrogate.linear import LabelWeights
from surrogate.perceptron import Perceptron
from surrogate.scaling import FeatureScaler

PATH_POINTS = 8  # of Gauss and Legendre on the way from the mean text: exact for polynomials of degree 15


@dataclass(frozen=True)
class MemberLabels:
    """A member, the training rows (T,) that it was trained on, and the closest ridge regression on its hidden units."""

    member: Perceptron
    rows: NDArray[np.intp]
    labels: LabelWeights
    alphas: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        member: Perceptron,
        rows: NDArray[np.intp],
        features: NDArray[np.float32],
        *,
        targets: NDArray[np.float64],
        sample_weight: NDArray[np.float64] | None,
    ) -> MemberLabels:
        """Find the closest regression for features (S, D) and targets (S, C) of all training data."""
        hidden, outputs = hidden_and_output(member, features[rows])
        weights = None if sample_weight is None else sample_weight[rows]
        labels = LabelWeights.of(hidden, targets[rows], sample_weight=weights)
        penalties = labels.penalties
        misfits = [np.square(labels.predictions(hidden, alpha) - outputs).sum(axis=0) for alpha in penalties]
        return cls(member, rows, labels, penalties[np.argmin(misfits, axis=0)])

    def amounts(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return (C, T, B) for features (B, D)."""
        return self.labels.amounts(hidden_and_output(self.member, features)[0], self.alphas)


@dataclass(frozen=True)
class LinearPath:
    """The ridge path of a network: scaler, weights (D, C), and the labels (S, C) that it was fitted on, with penalties (C,)."""

    scaler: FeatureScaler
    weights: NDArray[np.float64]
    labels: LabelWeights
    alphas: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        scaler: FeatureScaler,
        weights: NDArray[np.float64],
        features: NDArray[np.float32],
        *,
        targets: NDArray[np.float64],
        sample_weight: NDArray[np.float64] | None,
    ) -> LinearPath:
        """Recover the penalties, which a network does not keep: at the optimum X'r = alpha w for the residuals r."""
        x = scaler.transform(features).astype(np.float64)
        labels = LabelWeights.of(x, targets, sample_weight=sample_weight)
        centred = labels.centred
        residuals = centred.y - centred.basis.x_centred @ weights  # (S, C)
        pull = (weights * (centred.basis.x_centred.T @ residuals)).sum(axis=0)
        size = np.square(weights).sum(axis=0)
        alphas = np.divide(pull, size, out=np.full_like(size, np.inf), where=size > 0)
        return cls(scaler, weights, labels, alphas)


@dataclass(frozen=True)
class NetworkAmounts:
    """Per target gate (C,), intercept (C,), ridge path and members of a network; `num_rows` S of its training data."""

    gate: NDArray[np.float64]
    intercept: NDArray[np.float64]
    linear: LinearPath | None
    members: Sequence[MemberLabels]
    num_rows: int

    def amounts(self, features: NDArray[np.float32]) -> Amounts:
        """Account for the scores of features (B, D)."""
        num_texts, num_targets = len(features), len(self.gate)
        share = self.gate / len(self.members)  # of each member
        scores = np.tile(self.intercept, (num_texts, 1))
        bias, column_bias = self.intercept.copy(), self.intercept.copy()
        rows = np.zeros((num_targets, self.num_rows, num_texts))
        columns = np.zeros((num_targets, num_texts, features.shape[1]))
        if self.linear is not None:
            x = self.linear.scaler.transform(features).astype(np.float64)
            weights, of_linear = (1 - self.gate) * self.linear.weights, 1 - self.gate
            scores += x @ weights
            bias += self.linear.labels.centred.x_mean @ weights
            rows += of_linear[:, None, None] * self.linear.labels.amounts(x, self.linear.alphas)
            columns += x[None] * weights.T[:, None]
        for known in self.members:
            scores += share * hidden_and_output(known.member, features)[1]
            bias += share * known.labels.mean_label
            rows[:, known.rows] += share[:, None, None] * known.amounts(features)
            at_mean, gradients = _integrated_gradients(known.member, features)
            column_bias += share * at_mean
            columns += share[:, None, None] * gradients
        return Amounts(scores, np.zeros_like(scores), bias, rows, column_bias, columns)


def hidden_and_output(member: Perceptron, features: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the last hidden layer (B, H) and the output (B, C) for features as they are (B, D)."""
    with torch.no_grad():
        hidden = torch.from_numpy(member.scaler.transform(features))
        for weight, bias in zip(member.weights[:-1], member.biases[:-1], strict=True):
            hidden = gelu(hidden @ weight + bias)
        output = hidden @ member.weights[-1] + member.biases[-1]
    return hidden.double().numpy(), output.double().numpy()


def _integrated_gradients(member: Perceptron, features: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the output (C,) at the mean text, and each column's part (C, B, D) in the way from there."""
    points, point_weights = np.polynomial.legendre.leggauss(PATH_POINTS)
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.from_numpy(member.scaler.transform(features)).double()
        precise = Perceptron(member.scaler, [w.double() for w in member.weights], [b.double() for b in member.biases])
        total = torch.zeros(len(member.biases[-1]), *x.shape, dtype=torch.float64)
        for point, weight in zip((points + 1) / 2, point_weights / 2, strict=True):
            place = (x * float(point)).requires_grad_(True)
            output = precise.output(place)  # (B, C)
            for target in range(output.shape[1]):
                total[target] += float(weight) * _gradient(output[:, target].sum(), place)
        at_mean = precise.output(torch.zeros(1, x.shape[1], dtype=torch.float64))[0]
    return at_mean.detach().numpy(), (total * x).numpy()


def _gradient(output: Tensor, place: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(output, place, retain_graph=True)
    return gradient
