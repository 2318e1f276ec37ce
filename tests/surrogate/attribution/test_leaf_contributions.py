"""LeafContributions: the shares of the rows add up to the score, and are those of the formula."""

from __future__ import annotations

import lightgbm as lgb
import numpy as np
import pytest

from surrogate.attribution.bagging import bags
from surrogate.attribution.boostin import BoostIn
from surrogate.attribution.leaf_contributions import LeafContributions


def without_bias(method, X, y=None):
    """The raw scores of test rows less the init score, of the output that is explained."""
    ensemble = method.rows_.ensemble
    scores = ensemble.final_scores(ensemble.leaves(X)) - ensemble.init_scores
    chosen = scores.argmax(axis=1) if y is None and ensemble.num_outputs > 1 else (0 if y is None else y)
    return scores[np.arange(len(scores)), chosen]


def test_amounts_add_up_to_the_score(case):
    method = case.fit(LeafContributions(case.estimator))
    labels = None
    if case.kind == "multiclass":
        labels = np.zeros(len(case.X_test), dtype=int)  # of any class, not only of the predicted one
    found = method.attribute(case.X_test, None if labels is None else case.given(labels), of="prediction")
    np.testing.assert_allclose(found.sum(axis=0), without_bias(method, case.X_test, labels), rtol=0, atol=1e-6)
    assert np.abs(found).max() > 0.01


def test_a_share_is_the_gradient_over_the_leafs_denominator(case, slow):
    found = case.fit(LeafContributions(case.estimator)).attribute(case.X_test, case.given(case.y_test))
    truth = np.zeros_like(found)
    for i in range(slow.n):
        for column in range(slow.m):
            for t, k, leaf in slow.shared(i, slow.n + column):
                share = slow.eta * slow.g[t, k, i] / (slow.H(t, k, leaf) + slow.lam)
                truth[i, column] += slow.g[t, k, slow.n + column] * share
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-10 * np.abs(truth).max())


@pytest.mark.parametrize("reg_alpha", [0.0, 0.5])
def test_rows_outside_the_bag_put_nothing_into_a_tree(make_table, reg_alpha):
    X, y, X_test, _ = make_table("regression")
    settings = {"objective": "regression", "num_leaves": 4, "min_data_in_leaf": 4, "bagging_fraction": 0.5, "bagging_freq": 1}
    settings |= {"lambda_l2": 2.0, "lambda_l1": reg_alpha, "verbosity": -1, "num_threads": 1, "seed": 3}
    booster = lgb.train(settings, lgb.Dataset(X, y, params={"verbosity": -1}), num_boost_round=3)
    method = LeafContributions(booster).fit(X, y)
    found = method.attribute(X_test, of="prediction")
    np.testing.assert_allclose(found.sum(axis=0), without_bias(method, X_test), rtol=0, atol=1e-6)
    in_bags = list(bags(method.rows_.ensemble.text, method.rows_.y, method.rows_.leaves))
    never = ~np.any(in_bags, axis=0)
    assert never.any() and not found[never].any() and np.abs(found[~never]).max() > 0


def test_trees_without_a_split_add_nothing(train_case):
    case = train_case("multiclass", n_estimators=9, learning_rate=0.9, min_child_weight=2.5)
    method = case.fit(LeafContributions(case.estimator))
    assert any(tree.is_constant for tree in method.rows_.ensemble.text.trees)
    found = method.attribute(case.X_test, of="prediction")
    np.testing.assert_allclose(found.sum(axis=0), without_bias(method, case.X_test), rtol=0, atol=1e-6)


def test_boostin_of_the_prediction_does_not_add_up(train_case):
    """Why contributions are needed: a lambda leaves BoostIn's Newton term, which does not cancel within a leaf."""
    case = train_case("regression", reg_lambda=3.0, n_estimators=20)
    method = case.fit(BoostIn(case.estimator))
    missed = method.attribute(case.X_test, of="prediction").sum(axis=0) - without_bias(method, case.X_test)
    assert np.abs(missed).max() > 0.01
