from __future__ import annotations

import numpy as np
import pytest

from oracle.errors import InputError
from surrogate.attribution import contract, trex
from surrogate.attribution.leaf_similarity import LeafSimilarity
from surrogate.attribution.tree_kernels import KERNELS
from surrogate.attribution.trex import TREX


def assert_close(found, truth, tolerance=1e-7):
    assert found.shape == truth.shape and np.abs(truth).max() > 0
    assert np.abs(found - truth).max() <= tolerance * np.abs(truth).max()


class SlowTrex:
    """The formulas as loops: similarities over shared leaves, and one row's share taken away at a time."""

    def __init__(self, slow, case):
        weight = np.ones(slow.n) if case.sample_weight is None else case.sample_weight
        self.slow, self.kind, self.weight = slow, case.kind, weight / weight.mean()
        self.similarity = np.zeros((slow.n, slow.n + slow.m))
        for i in range(slow.n):
            for e in range(slow.n + slow.m):
                for t, k, leaf in slow.shared(i, e):
                    count = sum(self.weight[j] for j in range(slow.n) if slow.leaf[t][k][j] == leaf)
                    self.similarity[i, e] += 1.0 / count**2
        self.offset = float(self.weight @ np.array(slow.y[: slow.n])) / slow.n if case.kind == "regression" else 0.0

    def representers(self, alphas, ridge):
        """What the row weights have to be, given the scores that they lead to: only the minimum reproduces itself."""
        scores = self.offset + self.similarity[:, : self.slow.n] @ alphas
        factor = 2.0 if self.kind == "regression" else 1.0  # the published squared error has no one half
        return -factor * self.weight[:, None] * self.gradients(scores, self.slow.y[: self.slow.n]) / (2 * ridge * self.slow.n)

    def gradients(self, scores, y):
        return np.array(
            [[g for g, _, _ in self.slow.derivatives(list(row), target)] for row, target in zip(scores, y, strict=True)]
        )

    def loss(self, scores, y):
        if self.kind == "regression":
            return 0.5 * (scores[0] - y) ** 2
        if self.kind == "binary":
            return np.log1p(np.exp(scores[0])) - y * scores[0]
        return np.log(np.exp(scores).sum()) - scores[int(y)]

    def influence(self, columns, y):
        result = np.zeros((self.slow.n, len(columns)))
        for column, (e, target) in enumerate(zip(columns, y, strict=True)):
            scores = self.offset + self.similarity[:, e] @ self.alphas
            for i in range(self.slow.n):
                without = scores - self.alphas[i] * self.similarity[i, e]
                result[i, column] = self.loss(without, target) - self.loss(scores, target)
        return result


def test_the_row_weights_are_representers_and_influences_equal_the_loop_over_rows(case, slow):
    truth, test = SlowTrex(slow, case), range(slow.n, slow.n + slow.m)
    method = case.fit(TREX(case.estimator, ridge=0.01))
    truth.alphas = method.alphas_
    assert_close(method.alphas_, truth.representers(method.alphas_, 0.01), 1e-8)
    assert_close(method.attribute(case.X_test, case.given(case.y_test)), truth.influence(test, case.y_test), 1e-10)
    own = truth.influence(range(slow.n), case.y)
    assert_close(method.self_influence(), np.diag(own), 1e-10)
    chosen = slow.F[slow.n :].argmax(axis=1)
    shares = truth.similarity[:, slow.n :] * truth.alphas[:, chosen]
    assert_close(method.attribute(case.X_test, of="prediction"), shares, 1e-10)


@pytest.mark.parametrize("name", KERNELS)
def test_with_every_kernel_the_shares_add_up_to_the_surrogates_score(train_case, name, monkeypatch):
    case = train_case("regression")
    method = case.fit(TREX(case.estimator, kernel=name))
    monkeypatch.setattr(trex, "TEST_ROWS_PER_PRODUCT", 2)
    shares = method.attribute(case.X_test, of="prediction")
    np.testing.assert_allclose(shares.sum(axis=0) + case.y.mean(), method.surrogate_scores(case.X_test)[:, 0], rtol=1e-9)


def test_the_representers_are_those_of_a_dense_kernel_system(train_case):
    """Regression: alpha = (K + ridge N)^-1 (y - mean), and half of that without a mean as published."""
    case = train_case("regression")
    method = case.fit(TREX(case.estimator, ridge=0.02))
    leaves = method.rows_.leaves
    same = leaves[:, None, :] == leaves[None, :, :]
    kernel = (same / same.sum(axis=0) ** 2).sum(axis=2)
    ridge = 0.02 * 60 * np.eye(60)
    assert_close(method.alphas_[:, 0], np.linalg.solve(kernel + ridge, case.y - case.y.mean()), 1e-8)
    published = case.fit(TREX(case.estimator, ridge=0.02, offset="zero", halve=True))
    assert_close(published.alphas_[:, 0], 0.5 * np.linalg.solve(kernel + ridge, case.y), 1e-8)


def test_a_shift_of_all_targets_changes_nothing_unless_the_offset_is_zero(train_case):
    case = train_case("regression")
    shifted = type(case.estimator)(**case.settings).fit(case.X, case.y + 1000.0)

    def both(**options):
        near = case.fit(TREX(case.estimator, **options)).attribute(case.X_test, case.y_test)
        far = TREX(shifted, **options).fit(case.X, case.y + 1000.0).attribute(case.X_test, case.y_test + 1000.0)
        return far, near

    assert_close(*both(), 1e-3)
    far, near = both(offset="zero")
    assert np.abs(far).max() > 100 * np.abs(near).max()


def test_init_scores_are_part_of_the_offset(train_case):
    start = np.random.default_rng(3).normal(size=60)
    case = train_case("regression", fit={"init_score": start})
    with_start = TREX(case.estimator).fit(case.X, case.y, init_score=start)
    method = train_case("regression", boost_from_average=False)
    model = type(method.estimator)(**{**method.settings}).fit(case.X, case.y - start)
    without = TREX(model).fit(case.X, case.y - start)
    shift = np.linspace(-1, 1, 9)
    a = with_start.attribute(case.X_test, case.y_test, init_score=shift)
    b = without.attribute(case.X_test, case.y_test - shift)
    assert_close(a, b, 1e-5)


def test_targets_may_be_the_models_predictions(train_case):
    for kind in ("regression", "binary", "multiclass"):
        case = train_case(kind, n_estimators=30)
        to_labels, to_model = (case.fit(TREX(case.estimator, target=target, ridge=1e-5)) for target in ("labels", "predictions"))
        model = case.estimator.predict(case.X) if kind == "regression" else case.estimator.predict_proba(case.X)
        errors = []
        for method in (to_labels, to_model):
            predicted = method.rows_.ensemble.objective.predict(method.surrogate_scores(case.X))
            errors.append(np.abs(predicted - (model[:, 1] if kind == "binary" else model)).mean())
        assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("objective", ["huber", "fair", "poisson", "gamma", "tweedie", "cross_entropy"])
def test_other_objectives_have_surrogates_with_their_own_loss(train_case, make_table, objective):
    X, y, X_test, y_test = make_table("regression")
    y, y_test = (np.exp(v / 6) if objective != "cross_entropy" else 1 / (1 + np.exp(-v)) for v in (y, y_test))
    case = train_case("regression")
    model = type(case.estimator)(**{**case.settings, "objective": objective}).fit(X, y)
    method = TREX(model).fit(X, y)
    found, scores = method.attribute(X_test, y_test), method.surrogate_scores(X_test)
    shares = method.attribute(X_test, of="prediction")
    loss = method.rows_.ensemble.objective.loss
    for row in (0, 17):
        assert_close(found[row], loss(scores - shares[row][:, None], y_test) - loss(scores, y_test), 1e-9)


def test_one_versus_all_has_a_surrogate_without_weights_only(train_case):
    case = train_case("multiclass", objective="multiclassova")
    assert np.isfinite(case.fit(TREX(case.estimator)).attribute(case.X_test, case.y_test)).all()
    with pytest.raises(InputError, match="one-versus-all"):
        case.fit(TREX(case.estimator, target="predictions"))


def test_weights_count_relative_to_their_mean(train_case):
    case = train_case("binary", weights=True, reg_lambda=0.0, min_child_weight=0.0)
    ten = type(case.estimator)(**case.settings).fit(case.X, case.y, sample_weight=10 * case.sample_weight)
    found = TREX(ten).fit(case.X, case.y, sample_weight=10 * case.sample_weight).attribute(case.X_test, case.y_test)
    assert_close(found, case.fit(TREX(case.estimator)).attribute(case.X_test, case.y_test), 1e-6)


def test_alphas_of_another_solver_take_the_place_of_its_own(train_case):
    case = train_case("multiclass")
    method = case.fit(TREX(case.estimator))
    before = method.attribute(case.X_test, of="prediction")
    np.testing.assert_allclose(
        method.use_alphas(2 * method.alphas_).attribute(case.X_test, of="prediction"), 2 * before, rtol=1e-12
    )
    with pytest.raises(InputError, match="alphas"):
        method.use_alphas(np.ones(60))


@pytest.mark.parametrize("kernel", ["leaf_path_by_count", "node_path_by_count"])
def test_blocks_and_top_k_agree_with_the_whole(train_case, monkeypatch, kernel):
    case = train_case("multiclass")
    method = case.fit(TREX(case.estimator, kernel=kernel))
    whole = method.attribute(case.X_test, case.y_test)
    monkeypatch.setattr(contract, "BLOCK_BYTES", 3000)
    np.testing.assert_allclose(method.attribute(case.X_test, case.y_test), whole, rtol=0, atol=1e-15)
    top = method.attribute(case.X_test, case.y_test, top_k=3)
    np.testing.assert_allclose(top.positive_values, -np.sort(-whole, axis=0)[:3].T, rtol=0, atol=1e-15)


def test_limit_of_a_large_ridge_is_similarity_times_distance_from_the_mean(train_case):
    case = train_case("regression")
    ridge = 1e6
    method = case.fit(TREX(case.estimator, ridge=ridge))
    similarity = np.abs(case.fit(LeafSimilarity(case.estimator)).attribute(case.X_test, case.y_test))
    distance = (case.y - case.y.mean()) / (ridge * 60)
    assert_close(method.attribute(case.X_test, of="prediction"), similarity * distance[:, None], 1e-5)


@pytest.mark.parametrize("options", [{"kernel": "lpw"}, {"offset": "mean"}, {"target": "y"}, {"ridge": 0.0}])
def test_unknown_options_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        TREX("model.txt", **options)


def test_halving_is_refused_where_it_has_no_effect(train_case):
    case = train_case("binary")
    with pytest.raises(InputError, match="halve"):
        case.fit(TREX(case.estimator, halve=True))
