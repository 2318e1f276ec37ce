from __future__ import annotations

import numpy as np
import pytest

from oracle.errors import InputError
from surrogate.attribution.boostin import BoostIn
from surrogate.attribution.ensemble import TreeEnsemble
from surrogate.attribution.leaf_influence import LeafInfluence


def assert_close(found, truth, tolerance=1e-11):
    assert found.shape == truth.shape and np.abs(truth).max() > 0
    assert np.abs(found - truth).max() <= tolerance * np.abs(truth).max()


@pytest.mark.parametrize("weighting, power", [("none", 0), ("count", 1), ("squared_count", 2)])
def test_it_equals_the_loop_over_rows_and_trees(case, slow, weighting, power):
    found = case.fit(BoostIn(case.estimator, weighting=weighting)).attribute(case.X_test, case.given(case.y_test))
    assert_close(found, slow.boostin(power=power))


def test_the_full_newton_step_is_the_exact_derivative(case, slow):
    found = case.fit(BoostIn(case.estimator, newton_step="full")).attribute(case.X_test, case.given(case.y_test))
    assert_close(found, slow.boostin(full=True))


def test_of_a_prediction_needs_no_labels_and_is_what_each_row_added_to_the_score(case, slow):
    method = case.fit(BoostIn(case.estimator))
    found = method.attribute(case.X_test, of="prediction")
    chosen = slow.F[slow.n :].argmax(axis=1)
    truth = np.stack([slow.boostin(of_prediction=int(k)) for k in range(slow.K)], axis=2)  # (n, m, K)
    assert_close(found, np.take_along_axis(truth, chosen[None, :, None], axis=2)[:, :, 0])


def test_for_several_classes_y_test_names_the_class_that_is_explained(train_case):
    case = train_case("multiclass", labels=np.array(["x", "y", "z"]))
    method = case.fit(BoostIn(case.estimator))
    for label in case.labels:
        found = method.attribute(case.X_test, np.full(len(case.X_test), label), of="prediction")
        predicted = case.estimator.predict(case.X_test) == label
        np.testing.assert_array_equal(found[:, predicted], method.attribute(case.X_test, of="prediction")[:, predicted])


def test_the_self_influence_is_the_diagonal(case):
    method = case.fit(BoostIn(case.estimator))
    assert_close(method.self_influence(), np.diag(method.attribute(case.X, case.given(case.y))))


def test_rows_that_share_no_leaf_get_exactly_zero(train_case):
    case = train_case("regression", num_leaves=20, min_child_samples=1)
    leaves = TreeEnsemble.read(case.estimator).leaves(np.vstack([case.X, case.X_test]))
    shares = (leaves[: len(case.X), None] == leaves[None, len(case.X) :]).any(axis=2)
    found = case.fit(BoostIn(case.estimator)).attribute(case.X_test, case.y_test)
    assert 0 < shares.mean() < 0.7
    np.testing.assert_array_equal(found != 0, shares)


def test_rows_outside_the_bag_do_not_pull_that_tree(train_case):
    case = train_case("regression", n_estimators=1, subsample=0.5, subsample_freq=1)
    method = case.fit(BoostIn(case.estimator))
    in_bag = next(method.rows_.rounds()).in_bag
    assert 0 < in_bag.sum() < len(in_bag)
    assert not method.attribute(case.X_test, case.y_test)[~in_bag].any()


def test_limit_one_round_of_squared_error_is_the_residual_over_the_count(train_case):
    case = train_case("regression", n_estimators=1, boost_from_average=False)
    method = case.fit(BoostIn(case.estimator, newton_step="full"))
    leaves = case.estimator.booster_.predict(np.vstack([case.X, case.X_test]), pred_leaf=True).ravel()
    mine, theirs = leaves[: len(case.X)], leaves[len(case.X) :]
    means = np.array([case.y[mine == leaf].mean() for leaf in mine])
    counts = np.array([(mine == leaf).sum() for leaf in mine])
    pull = case.settings["learning_rate"] * (means - case.y) / counts
    truth = -pull[:, None] * case.y_test * (mine[:, None] == theirs)
    assert_close(method.attribute(case.X_test, case.y_test), truth, 1e-6)


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("regression", {"reg_alpha": 8.0, "reg_lambda": 1.0}),
        ("binary", {"subsample": 0.6, "subsample_freq": 1, "weights": True}),
        ("multiclass", {"class_weight": "balanced"}),
    ],
)
def test_limit_with_one_round_the_full_newton_step_is_leaf_influence(train_case, kind, settings):
    case = train_case(kind, n_estimators=1, **settings)
    boostin, exact = (
        case.fit(method).attribute(case.X_test, of="prediction")
        for method in (BoostIn(case.estimator, newton_step="full"), LeafInfluence(case.estimator))
    )
    assert_close(boostin, exact, 1e-13)


@pytest.mark.parametrize("options", [{"weighting": "sqrt"}, {"newton_step": "none"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        BoostIn("model.txt", **options)
