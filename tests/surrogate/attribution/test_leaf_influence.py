from __future__ import annotations

import numpy as np
import pytest

from oracle.errors import InputError
from surrogate.attribution import leaf_influence
from surrogate.attribution.leaf_influence import LeafInfluence


def assert_close(found, truth, tolerance=1e-10):
    assert found.shape == truth.shape and np.abs(truth).max() > 0
    assert np.abs(found - truth).max() <= tolerance * np.abs(truth).max()


@pytest.mark.parametrize("single_point", [True, False])
def test_the_backward_sweep_equals_following_every_row_forward(case, slow, single_point):
    method = case.fit(LeafInfluence(case.estimator, single_point=single_point))
    assert_close(method.attribute(case.X_test, case.given(case.y_test)), slow.leaf_influence(single_point=single_point))


@pytest.mark.parametrize("single_point", [True, False])
def test_of_a_prediction_is_the_score_that_each_row_adds(train_case, single_point):
    case = train_case("binary", reg_lambda=1.0)
    method = case.fit(LeafInfluence(case.estimator, single_point=single_point))
    probability = case.estimator.predict_proba(case.X_test)[:, 1]
    of_loss = method.attribute(case.X_test, case.y_test)
    assert_close(-(probability - case.y_test) * method.attribute(case.X_test, of="prediction"), of_loss)


def refitted_loss(method, test, y_test, *, row, weight):
    """Loss of the test rows when a training row's weight is multiplied and every leaf is computed again, loop by loop."""
    rows, statistics, objective = method.rows_, method.statistics_, method.rows_.ensemble.objective
    ensemble, base = rows.ensemble, rows.row_weights
    factor = np.ones(rows.num_rows)
    factor[row] = weight
    scores = np.tile(ensemble.init_scores, (rows.num_rows, 1))
    of_test = np.tile(ensemble.init_scores, (len(y_test), 1))
    for this in rows.rounds():
        g, h = objective.gradients(scores, rows.y)
        counted = factor if this.in_bag is None else factor * this.in_bag
        counted = counted if base is None else counted * base[:, 0]
        leaves = rows.leaves[:, this.number]
        for leaf in np.unique(leaves):
            inside = leaves == leaf
            G, H = counted[inside] @ g[inside, 0], counted[inside] @ h[inside, 0]
            penalty = (statistics.denominators[this.number] - statistics.hessians[this.number])[leaf]
            shrunk = np.sign(G) * max(abs(G) - ensemble.reg_alpha, 0.0)
            value = -statistics.learning_rates[this.number] * shrunk / (H + penalty)
            scores[inside] += value
            of_test[test[:, this.number] == leaf] += value
    return objective.loss(of_test, y_test)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reg_lambda": 1.0, "reg_alpha": 2.0},
        {"weights": True, "reg_lambda": 0.5},
        {"subsample": 0.7, "subsample_freq": 2},
        {"categories": True, "min_data_per_group": 1, "cat_smooth": 1.0},
        {"objective": "poisson"},
        {"objective": "tweedie", "reg_lambda": 0.1},
        {"objective": "gamma"},
        {"objective": "fair"},
        {"objective": "huber", "alpha": 0.5},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "plain",
)
def test_it_is_the_derivative_of_the_refitted_loss_by_the_rows_weight(train_case, settings):
    case = train_case("regression", **settings)
    method = case.fit(LeafInfluence(case.estimator))
    found = method.attribute(case.X_test, case.y_test)
    test, step = method.rows_.ensemble.leaves(case.X_test), 1e-5
    truth = np.stack(
        [
            (
                refitted_loss(method, test, case.y_test, row=row, weight=1 - step)
                - refitted_loss(method, test, case.y_test, row=row, weight=1 + step)
            )
            / (2 * step)
            for row in range(0, len(case.X), 4)
        ]
    )
    assert_close(found[::4], truth, 1e-4)


def test_limit_with_one_round_full_and_single_point_are_equal(train_case):
    case = train_case("multiclass", n_estimators=1)
    full, single = (
        case.fit(LeafInfluence(case.estimator, single_point=point)).attribute(case.X_test, case.y_test) for point in (False, True)
    )
    assert_close(full, single, 1e-13)


@pytest.mark.parametrize("single_point", [True, False])
def test_the_self_influence_is_the_diagonal(train_case, single_point):
    case = train_case("binary", weights=True)
    method = case.fit(LeafInfluence(case.estimator, single_point=single_point))
    assert_close(method.self_influence(), np.diag(method.attribute(case.X, case.y)), 1e-13)


def test_the_width_of_a_sweep_changes_nothing(train_case, monkeypatch):
    case = train_case("regression")
    method = case.fit(LeafInfluence(case.estimator))
    at_once = method.attribute(case.X_test, case.y_test)
    monkeypatch.setattr(leaf_influence, "SWEEP_BYTES", 1)
    np.testing.assert_allclose(method.attribute(case.X_test, case.y_test), at_once, rtol=0, atol=1e-14)


def test_a_custom_objective_is_refused_with_its_reason(train_case):
    case = train_case("regression", objective=lambda y, scores: (scores - y, np.ones_like(y)))
    with pytest.raises(InputError, match="custom objective"):
        case.fit(LeafInfluence(case.estimator))
