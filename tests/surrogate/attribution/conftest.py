"""Tiny LightGBM models, and attribution as slow loops over rows, trees and classes, written from the formulas alone."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import lightgbm as lgb
import numpy as np
import pytest

COMMON = {
    "n_estimators": 6,
    "num_leaves": 5,
    "min_child_samples": 4,
    "learning_rate": 0.2,
    "n_jobs": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}


@dataclass
class Case:
    """A trained estimator with its rows; `y` are class numbers or values, whatever labels the estimator was given."""

    estimator: Any
    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    kind: str
    sample_weight: np.ndarray | None = None
    labels: np.ndarray | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def given(self, y: np.ndarray) -> np.ndarray:
        """Targets in the form that the estimator was given."""
        return y if self.labels is None else self.labels[y]

    def fit(self, method: Any) -> Any:
        return method.fit(self.X, self.given(self.y), sample_weight=self.sample_weight)


def table(kind: str, *, num_rows: int = 60, num_test: int = 9, seed: int = 0, missing: bool = False, categories: bool = False):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(num_rows + num_test, 4))
    if categories:
        X[:, 3] = rng.integers(0, 9, len(X))
    truth = 2.0 * (X[:, 0] > 0.2) + X[:, 1] + (np.isin(X[:, 3], [1, 4, 6]) * 3.0 if categories else 0.0)
    truth += 0.5 * rng.normal(size=len(X))
    if missing:
        X[rng.random(X.shape) < 0.2] = np.nan
    if kind == "regression":
        y = truth + 3.0
    elif kind == "binary":
        y = (truth > np.median(truth)).astype(int)
    else:
        y = np.digitize(truth, np.quantile(truth, [0.4, 0.7]))
    return X[:num_rows], y[:num_rows], X[num_rows:], y[num_rows:]


def train(
    kind: str, *, missing=False, categories=False, weights=False, labels=None, seed=0, fit=None, num_rows=60, **settings
) -> Case:
    X, y, X_test, y_test = table(kind, seed=seed, missing=missing, categories=categories, num_rows=num_rows)
    sample_weight = np.random.default_rng(seed + 1).uniform(0.3, 2.0, len(y)) if weights else None
    settings = {**COMMON, **settings}
    estimator = (lgb.LGBMRegressor if kind == "regression" else lgb.LGBMClassifier)(**settings)
    case = Case(estimator, X, y, X_test, y_test, kind, sample_weight, labels, settings)
    extra = {"categorical_feature": [3]} if categories else {}
    estimator.fit(X, case.given(y), sample_weight=sample_weight, **extra, **(fit or {}))
    return case


def with_early_stopping(kind: str) -> Case:
    X, y, X_test, y_test = table(kind)
    estimator = (lgb.LGBMRegressor if kind == "regression" else lgb.LGBMClassifier)(**{**COMMON, "n_estimators": 60})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of LightGBM ask for eval_X, which older ones lack
        estimator.fit(X, y, eval_set=[(X_test, y_test)], callbacks=[lgb.early_stopping(2, verbose=False)])
    assert 1 < estimator.best_iteration_ < 58
    return Case(estimator, X, y, X_test, y_test, kind)


CASES = {
    "regression": lambda: train("regression"),
    "binary": lambda: train("binary"),
    "multiclass": lambda: train("multiclass"),
    "regression-lambda": lambda: train("regression", reg_lambda=3.0),
    "binary-lambda-missing": lambda: train("binary", missing=True, reg_lambda=1.5),
    "multiclass-missing": lambda: train("multiclass", missing=True),
    "regression-categories": lambda: train("regression", categories=True, max_cat_to_onehot=20),
    "binary-weights": lambda: train("binary", weights=True, reg_lambda=1.0),
    "multiclass-weights-strings": lambda: train("multiclass", weights=True, labels=np.array(["b", "c", "d"])),
    "regression-weights-missing": lambda: train("regression", weights=True, missing=True),
    "regression-early-stopping": lambda: with_early_stopping("regression"),
    "multiclass-early-stopping": lambda: with_early_stopping("multiclass"),
}


class SlowTruth:
    """Every quantity of the formulas as nested lists, from LightGBM's public functions and the settings of training.

    Rows of the training table come first; `g[t][k][i]` and so on. No bagging, plain Newton leaves.
    """

    def __init__(self, case: Case) -> None:
        booster, self.kind, self.n = case.estimator.booster_, case.kind, len(case.y)
        self.K = 3 if case.kind == "multiclass" else 1
        self.lam, self.eta = case.estimator.reg_lambda, case.estimator.learning_rate
        X, self.y = np.vstack([case.X, case.X_test]), [*case.y, *case.y_test]
        leaves = booster.predict(X, pred_leaf=True).reshape(len(X), -1)
        self.T = leaves.shape[1] // self.K
        self.m = len(case.y_test)
        weight = np.ones(self.n) if case.sample_weight is None else case.sample_weight
        bias = self._bias(case.y, weight)
        shape = (self.T, self.K, len(X))
        self.leaf = [[[int(leaves[i, t * self.K + k]) for i in range(len(X))] for k in range(self.K)] for t in range(self.T)]
        self.v, self.g, self.h, self.c = (np.zeros(shape) for _ in range(4))
        F = [[bias[k] for k in range(self.K)] for _ in range(len(X))]
        for t in range(self.T):
            for i in range(len(X)):
                for k, (g, h, c) in enumerate(self.derivatives(F[i], self.y[i])):
                    w = weight[i] if i < self.n else 1.0
                    self.g[t, k, i], self.h[t, k, i], self.c[t, k, i] = g * w, h * w, c * w
            for i in range(len(X)):
                for k in range(self.K):
                    stored = booster.get_leaf_output(t * self.K + k, self.leaf[t][k][i])
                    self.v[t, k, i] = stored - (bias[k] if t == 0 else 0.0)
                    F[i][k] += self.v[t, k, i]
        self.final = np.array([[g for g, _, _ in self.derivatives(F[i], self.y[i])] for i in range(len(X))])  # (n + m, K)
        self.F = np.array(F)
        self.unweighted = 1.0 / np.concatenate([weight, np.ones(self.m)])

    def _bias(self, y, weight):
        if self.kind == "regression":
            return [sum(a * w for a, w in zip(y, weight, strict=True)) / sum(weight)]
        if self.kind == "binary":
            p = sum(a * w for a, w in zip(y, weight, strict=True)) / sum(weight)
            return [math.log(p / (1 - p))]
        return [math.log(sum(w for a, w in zip(y, weight, strict=True) if a == k) / sum(weight)) for k in range(3)]

    def derivatives(self, F, y):
        if self.kind == "regression":
            return [(F[0] - y, 1.0, 0.0)]
        if self.kind == "binary":
            p = 1 / (1 + math.exp(-F[0]))
            return [(p - y, p * (1 - p), p * (1 - p) * (1 - 2 * p))]
        top = sum(math.exp(f) for f in F)
        found = []
        for k, f in enumerate(F):
            p, factor = math.exp(f) / top, 3 / 2
            found.append((p - (y == k), factor * p * (1 - p), factor * p * (1 - p) * (1 - 2 * p)))
        return found

    def H(self, t, k, leaf):
        return sum(self.h[t, k, j] for j in range(self.n) if self.leaf[t][k][j] == leaf)

    def count(self, t, k, leaf):
        return sum(1 for j in range(self.n) if self.leaf[t][k][j] == leaf)

    def shared(self, i, e):
        """Trees in which training row i and row e share a leaf, with the leaf."""
        return [
            (t, k, self.leaf[t][k][i]) for t in range(self.T) for k in range(self.K) if self.leaf[t][k][i] == self.leaf[t][k][e]
        ]

    def boostin(self, *, power: int = 0, full: bool = False, of_prediction: int | None = None) -> np.ndarray:
        """(n, m); `of_prediction`: the output whose score is explained."""
        result = np.zeros((self.n, self.m))
        for i in range(self.n):
            for column in range(self.m):
                e = self.n + column
                for t, k, leaf in self.shared(i, e):
                    v = self.v[t, k, i] / (self.eta if full else 1.0)
                    pull = self.eta * (self.g[t, k, i] + v * self.h[t, k, i]) / (self.H(t, k, leaf) + self.lam)
                    pull /= self.count(t, k, leaf) ** power
                    sensitivity = self.g[t, k, e] if of_prediction is None else -(k == of_prediction)
                    result[i, column] += sensitivity * pull
        return result

    def similarity(self) -> np.ndarray:
        """(n, m), unsigned."""
        return np.array(
            [
                [sum(1 / self.count(t, k, leaf) ** 2 for t, k, leaf in self.shared(i, self.n + e)) for e in range(self.m)]
                for i in range(self.n)
            ]
        )

    def leaf_influence(self, *, single_point: bool, of_prediction: int | None = None) -> np.ndarray:
        """(n, m): every training row followed forward through all trees, or its own score alone."""
        result = np.zeros((self.n, self.m))
        for r in range(self.n):
            moved = np.zeros((self.n, self.K))  # of the training rows' scores
            of_test = np.zeros((self.m, self.K))
            for t in range(self.T):
                before = moved.copy()
                for k in range(self.K):
                    for leaf in set(self.leaf[t][k]):
                        inside = [i for i in range(self.n) if self.leaf[t][k][i] == leaf]
                        if not inside:
                            continue
                        v = self.v[t, k, inside[0]] / self.eta
                        total = 0.0
                        for i in inside:
                            if not single_point or i == r:
                                total += before[i, k] * (self.h[t, k, i] + v * self.c[t, k, i])
                        if r in inside:
                            total += self.g[t, k, r] + v * self.h[t, k, r]
                        elif single_point:
                            continue
                        change = -self.eta * total / (self.H(t, k, leaf) + self.lam)
                        for i in inside:
                            moved[i, k] += change
                        for e in range(self.m):
                            if self.leaf[t][k][self.n + e] == leaf:
                                of_test[e, k] += change
            for e in range(self.m):
                if of_prediction is None:
                    result[r, e] = -sum(self.final[self.n + e][k] * of_test[e, k] for k in range(self.K))
                else:
                    result[r, e] = of_test[e, of_prediction]
        return result


@pytest.fixture(scope="session", params=sorted(CASES))
def case(request) -> Case:
    return CASES[request.param]()


@pytest.fixture(scope="session")
def slow(case) -> SlowTruth:
    return SlowTruth(case)


@pytest.fixture(scope="session")
def slow_truth() -> type[SlowTruth]:
    return SlowTruth


@pytest.fixture(scope="session")
def train_case() -> Any:
    return train


@pytest.fixture(scope="session")
def make_table() -> Any:
    return table
