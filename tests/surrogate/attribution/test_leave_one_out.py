from __future__ import annotations

import lightgbm as lgb
import numpy as np
import pytest
from scipy.stats import spearmanr

from oracle.errors import InputError
from surrogate.attribution.leave_one_out import LeaveOneOut
from surrogate.attribution.top_rows import TopRows


def loss(case, model, X, y):
    if case.kind == "regression":
        return 0.5 * (model.predict(X) - y) ** 2
    return -np.log(model.predict_proba(X)[np.arange(len(y)), y])


def retrained(case, row, *, removal):
    """The estimator's own fit on the other rows, or with a weight of 0."""
    model = lgb.LGBMRegressor if case.kind == "regression" else lgb.LGBMClassifier
    num_rounds = case.estimator.booster_.num_trees() // (3 if case.kind == "multiclass" else 1)  # early stopping keeps fewer
    model = model(**{**case.estimator.get_params(), "n_estimators": num_rounds})
    weight = np.ones(len(case.y)) if case.sample_weight is None else case.sample_weight.copy()
    keep = np.arange(len(case.y))
    if removal == "delete":
        keep = np.delete(keep, row)
    else:
        weight[row] = 0.0
    given = weight[keep] if case.sample_weight is not None or removal == "zero_weight" else None
    columns = case.estimator.booster_.params.get("categorical_column")
    extra = {} if columns is None else {"categorical_feature": columns}
    return model.fit(case.X[keep], case.given(case.y)[keep], sample_weight=given, **extra)


def test_it_is_the_difference_to_the_estimators_own_fit_without_the_row(case):
    found = case.fit(LeaveOneOut(case.estimator)).attribute(case.X_test, case.given(case.y_test))
    before = loss(case, case.estimator, case.X_test, case.y_test)
    for row in (0, 31):
        model = retrained(case, row, removal="delete")
        np.testing.assert_allclose(found[row], loss(case, model, case.X_test, case.y_test) - before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind, weights", [("binary", True), ("regression", False)])
def test_a_row_without_weight_keeps_the_bins(train_case, kind, weights):
    case = train_case(kind, weights=weights)
    method = case.fit(LeaveOneOut(case.estimator, removal="zero_weight"))
    found, own = method.attribute(case.X_test, case.y_test), method.self_influence()
    for row in (0, 31):
        model, one = retrained(case, row, removal="zero_weight"), slice(row, row + 1)
        truth = loss(case, model, case.X_test, case.y_test) - loss(case, case.estimator, case.X_test, case.y_test)
        np.testing.assert_allclose(found[row], truth, rtol=0, atol=1e-9)
        truth = loss(case, model, case.X[one], case.y[one]) - loss(case, case.estimator, case.X[one], case.y[one])
        np.testing.assert_allclose(own[row], truth[0], rtol=0, atol=1e-9)


def test_of_a_prediction_is_the_score_that_the_row_raised(train_case):
    case = train_case("binary")
    method = case.fit(LeaveOneOut(case.estimator))
    found = method.attribute(case.X_test, of="prediction")
    model = retrained(case, 7, removal="delete")
    truth = case.estimator.predict(case.X_test, raw_score=True) - model.predict(case.X_test, raw_score=True)
    np.testing.assert_allclose(found[7], truth, atol=1e-12)


def test_two_versions_that_are_equally_exact_agree_poorly(train_case):
    """The reason why it judges nothing: deleting a row and giving it no weight move splits and bins differently."""
    case = train_case("regression", num_rows=120, num_leaves=15, n_estimators=10)
    deleted, unweighted = (
        case.fit(LeaveOneOut(case.estimator, removal=removal)).attribute(case.X_test, case.y_test)
        for removal in ("delete", "zero_weight")
    )
    agreement = np.mean([spearmanr(a, b)[0] for a, b in zip(deleted.T, unweighted.T, strict=True)])
    assert agreement < 0.75


@pytest.mark.parametrize("k", [2, 1000])
def test_top_k_is_the_top_of_the_full_matrix(train_case, k):
    case = train_case("multiclass")
    method = case.fit(LeaveOneOut(case.estimator))
    found = method.attribute(case.X_test, case.y_test, top_k=k)
    truth = TopRows.of(method.attribute(case.X_test, case.y_test), min(k, 60))
    np.testing.assert_array_equal(found.positive_indices, truth.positive_indices)
    np.testing.assert_array_equal(found.negative_values, truth.negative_values)


def test_init_scores_are_those_of_training(train_case):
    start = np.random.default_rng(3).normal(size=60)
    case = train_case("regression", fit={"init_score": start})
    method = LeaveOneOut(case.estimator).fit(case.X, case.y, init_score=start)
    near, far = (method.attribute(case.X_test, case.y_test, init_score=np.full(9, score)) for score in (0.0, 3.0))
    moved = method.attribute(case.X_test, of="prediction", init_score=np.zeros(9))
    np.testing.assert_allclose(far - near, -3.0 * moved, atol=1e-9)
    with pytest.raises(InputError, match="init scores"):
        method.attribute(case.X_test, case.y_test)


def test_a_model_that_training_does_not_give_back_is_refused_unless_wanted(train_case):
    case = train_case("regression", weights=True)
    with pytest.raises(InputError, match="away from the model's"):
        LeaveOneOut(case.estimator).fit(case.X, case.y)
    method = LeaveOneOut(case.estimator, must_reproduce=False).fit(case.X, case.y)
    assert method.reproduction_error_ > 0.01


def test_what_is_missing_or_without_effect_is_refused(train_case, make_table):
    case = train_case("regression")
    with pytest.raises(InputError, match="not been fitted"):
        LeaveOneOut(case.estimator).attribute(case.X_test, case.y_test)
    with pytest.raises(InputError, match="removal"):
        LeaveOneOut(case.estimator, removal="drop")
    method = case.fit(LeaveOneOut(case.estimator))
    with pytest.raises(InputError, match="no y_test"):
        method.attribute(case.X_test)
    with pytest.raises(InputError, match="9 test rows, 8 targets"):
        method.attribute(case.X_test, case.y_test[:8])
    X, y, _, _ = make_table("regression")
    own = lgb.LGBMRegressor(**{**case.settings, "objective": lambda y, s: (s - y, np.ones_like(y))}).fit(X, y)
    with pytest.raises(InputError, match="no effect on a custom objective"):
        LeaveOneOut(own, removal="zero_weight").fit(X, y)
    assert np.isfinite(LeaveOneOut(own).fit(X, y).attribute(X[:2], of="prediction")).all()
