from __future__ import annotations

import numpy as np
import pytest

from surrogate.attribution import leaf_refit
from surrogate.attribution.leaf_influence import LeafInfluence
from surrogate.attribution.leaf_refit import LeafRefit


def assert_close(found, truth, tolerance=1e-10):
    assert found.shape == truth.shape and np.abs(truth).max() > 0
    assert np.abs(found - truth).max() <= tolerance * np.abs(truth).max()


def followed(slow, case, removed):
    """(m, K) by how much removing a row moves the test rows' scores: every leaf of every round, row by row."""
    moved, of_test = np.zeros((slow.n, slow.K)), np.zeros((slow.m, slow.K))
    weight = np.ones(slow.n) if case.sample_weight is None else case.sample_weight
    before = np.array([slow.F[i] - slow.v[:, :, i].sum(axis=0) for i in range(slow.n)])  # scores before round 0
    for t in range(slow.T):
        now = [slow.derivatives(list(before[i] + moved[i]), slow.y[i]) for i in range(slow.n)]
        changes = []
        for k in range(slow.K):
            grown = set(slow.leaf[t][k][: slow.n])
            for leaf in grown if len(grown) > 1 else ():  # LightGBM gives trees without a split no value
                inside = [i for i in range(slow.n) if slow.leaf[t][k][i] == leaf]
                kept = [i for i in inside if i != removed]
                G, H = sum(slow.g[t, k, i] for i in inside), sum(slow.h[t, k, i] for i in inside)
                new_G, new_H = sum(now[i][k][0] * weight[i] for i in kept), sum(now[i][k][1] * weight[i] for i in kept)
                changes.append((k, leaf, slow.eta * (G / (H + slow.lam) - new_G / (new_H + slow.lam))))
        for k, leaf, change in changes:
            for i in range(slow.n):
                moved[i, k] += change * (slow.leaf[t][k][i] == leaf)
            for e in range(slow.m):
                of_test[e, k] += change * (slow.leaf[t][k][slow.n + e] == leaf)
        before += slow.v[t, :, : slow.n].T
    return of_test


def slow_loss(slow, scores, y):
    if slow.kind == "regression":
        return 0.5 * (scores[0] - y) ** 2
    if slow.kind == "binary":
        return np.log1p(np.exp(scores[0])) - y * scores[0]
    return np.log(np.exp(scores).sum()) - scores[y]


def test_it_equals_the_loop_that_follows_the_removal_of_a_row_through_all_rounds(case, slow):
    method = case.fit(LeafRefit(case.estimator))
    found = method.attribute(case.X_test, case.given(case.y_test))
    of_prediction = method.attribute(case.X_test, of="prediction")
    chosen = slow.F[slow.n :].argmax(axis=1)
    for removed in range(0, slow.n, 11):
        moved = followed(slow, case, removed)
        truth = [
            slow_loss(slow, slow.F[slow.n + e] + moved[e], slow.y[slow.n + e])
            - slow_loss(slow, slow.F[slow.n + e], slow.y[slow.n + e])
            for e in range(slow.m)
        ]
        assert_close(found[removed], np.array(truth), 1e-9)
        assert_close(of_prediction[removed], -moved[np.arange(slow.m), chosen])


def refitted_scores(method, leaves, *, without=None):
    """Raw scores (m, K) of test rows after every leaf was computed again from scratch, without a row."""
    rows, statistics, ensemble = method.rows_, method.statistics_, method.rows_.ensemble
    scores, of_test = np.tile(ensemble.init_scores, (rows.num_rows, 1)), np.tile(ensemble.init_scores, (len(leaves), 1))
    for this in rows.rounds():
        g, h = ensemble.objective.gradients(scores, rows.y)
        counted = np.ones_like(g) if this.weights is None else this.weights * np.ones_like(g)
        if without is not None:
            counted[without] = 0.0
        for output in range(ensemble.num_outputs):
            tree = this.number * ensemble.num_outputs + output
            for leaf in range(len(ensemble.leaf_values[tree])):
                inside = rows.leaves[:, tree] == leaf
                G, H = counted[inside, output] @ g[inside, output], counted[inside, output] @ h[inside, output]
                penalty = (statistics.denominators[tree] - statistics.hessians[tree])[leaf]
                value = (
                    -statistics.learning_rates[this.number] * np.sign(G) * max(abs(G) - ensemble.reg_alpha, 0.0) / (H + penalty)
                )
                scores[inside, output] += value
                of_test[leaves[:, tree] == leaf, output] += value
    return of_test


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("regression", {"reg_alpha": 2.0, "reg_lambda": 1.0}),
        ("binary", {"subsample": 0.7, "subsample_freq": 1, "reg_lambda": 1.0}),
        ("binary", {"scale_pos_weight": 3.0, "weights": True, "reg_lambda": 1.0}),
        ("multiclass", {"subsample": 0.6, "subsample_freq": 2, "reg_lambda": 2.0}),
        ("regression", {"categories": True, "max_cat_to_onehot": 1, "min_data_per_group": 5, "cat_smooth": 1.0, "cat_l2": 4.0}),
        ("regression", {"objective": "huber", "alpha": 1.0}),
    ],
)
def test_penalties_bags_and_label_weights_are_those_of_training(train_case, kind, settings):
    case = train_case(kind, **settings)
    method = case.fit(LeafRefit(case.estimator))
    found, leaves = method.attribute(case.X_test, of="prediction"), method.rows_.ensemble.leaves(case.X_test)
    with_all = refitted_scores(method, leaves)
    chosen = case.estimator.booster_.predict(case.X_test, raw_score=True).reshape(len(leaves), -1).argmax(axis=1)
    for row in range(0, 60, 13):
        truth = (with_all - refitted_scores(method, leaves, without=row))[np.arange(len(leaves)), chosen]
        np.testing.assert_allclose(found[row], truth, rtol=0, atol=1e-6 * np.abs(found).max())


def test_a_custom_function_may_know_the_rows_by_their_place(train_case, make_table):
    X, y, X_test, _ = make_table("regression")
    factors = np.random.default_rng(0).uniform(0.5, 2.0, len(y))

    def weighted(target, scores):
        return factors * (scores - target), factors

    case = train_case("regression", weights=True, boost_from_average=False)
    own = type(case.estimator)(**{**case.settings, "objective": weighted}).fit(X, y)
    plain = type(case.estimator)(**case.settings).fit(X, y, sample_weight=factors)
    of_own = LeafRefit(own).fit(X, y).attribute(X_test, of="prediction")
    of_plain = LeafRefit(plain).fit(X, y, sample_weight=factors).attribute(X_test, of="prediction")
    assert_close(of_own, of_plain, 1e-5)


def test_in_the_first_round_only_the_rows_leaf_moves(train_case):
    case = train_case("regression", n_estimators=1)
    found = case.fit(LeafRefit(case.estimator)).attribute(case.X_test, case.y_test)
    mine, theirs = (case.estimator.booster_.predict(X, pred_leaf=True).ravel() for X in (case.X, case.X_test))
    np.testing.assert_array_equal(found != 0, mine[:, None] == theirs)


def test_a_row_without_weight_changes_nothing_at_all(train_case, make_table):
    X, y, X_test, y_test = make_table("binary")
    weights = np.where(np.arange(60) % 5 == 0, 0.0, 1.0)
    case = train_case("binary")
    model = type(case.estimator)(**{**case.settings, "n_estimators": 20}).fit(X, y, sample_weight=weights)
    found = LeafRefit(model).fit(X, y, sample_weight=weights).attribute(X_test, y_test)
    assert not found[weights == 0].any() and found[weights > 0].any(axis=1).all()


def test_blocks_of_removed_rows_change_nothing(train_case, monkeypatch):
    case = train_case("multiclass", missing=True)
    method = case.fit(LeafRefit(case.estimator))
    whole, own = method.attribute(case.X_test, case.y_test), method.self_influence()
    monkeypatch.setattr(leaf_refit, "BLOCK_CELLS", 7 * 60 * 3)
    np.testing.assert_array_equal(method.attribute(case.X_test, case.y_test), whole)
    np.testing.assert_array_equal(method.self_influence(), own)
    np.testing.assert_array_equal(own, np.diag(method.attribute(case.X, case.y)))


@pytest.mark.parametrize("k", [1, 4, 1000])
def test_top_k_is_the_top_of_the_full_matrix(train_case, monkeypatch, k):
    case = train_case("regression")
    method = case.fit(LeafRefit(case.estimator))
    whole = method.attribute(case.X_test, case.y_test)
    monkeypatch.setattr(leaf_refit, "BLOCK_CELLS", 7 * 60)
    found, size = method.attribute(case.X_test, case.y_test, top_k=k), min(k, 60)
    rising = np.argsort(whole, axis=0, kind="stable")
    np.testing.assert_array_equal(found.negative_indices, rising[:size].T)
    np.testing.assert_array_equal(found.positive_values, np.sort(whole, axis=0)[::-1][:size].T)


def test_a_leaf_that_loses_its_only_row_adds_nothing(train_case):
    case = train_case("binary", num_leaves=40, min_child_samples=1, min_child_weight=0.0, n_estimators=1)
    found = case.fit(LeafRefit(case.estimator)).attribute(case.X, of="prediction")
    leaves = case.estimator.booster_.predict(case.X, pred_leaf=True).ravel()
    alone = np.flatnonzero(np.bincount(leaves)[leaves] == 1)
    log_odds = np.log(case.y.mean() / (1 - case.y.mean()))
    steps = case.estimator.booster_.predict(case.X, raw_score=True) - log_odds
    assert len(alone) > 2
    np.testing.assert_allclose(found[alone, alone], steps[alone], rtol=1e-5)


def test_limit_for_small_changes_it_is_leaf_influence(train_case):
    case = train_case("regression", num_rows=1000, min_child_samples=100, n_estimators=8)
    refit, linear = (
        case.fit(method(case.estimator)).attribute(case.X_test, case.y_test) for method in (LeafRefit, LeafInfluence)
    )
    assert_close(refit, linear, 0.05)
