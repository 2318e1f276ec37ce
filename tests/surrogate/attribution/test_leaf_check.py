"""Each feature of LightGBM that changes leaf values is either understood, or refused by name."""

from __future__ import annotations

import lightgbm as lgb
import numpy as np
import pytest

from oracle.errors import InputError, InputTypeError
from surrogate.attribution.boostin import BoostIn
from surrogate.attribution.ensemble import TreeEnsemble
from surrogate.attribution.leaf_check import check_leaf_values
from surrogate.attribution.training_rows import TrainingRows


def checked(case, model=None, **given):
    return check_leaf_values(TrainingRows.read(TreeEnsemble.read(model or case.estimator), case.X, case.given(case.y), **given))


def squared_error(y, scores):
    return scores - y, np.ones_like(scores)


SUPPORTED = {
    "sample_weight": ("binary", {"weights": True}),
    "class_weight": ("multiclass", {"class_weight": "balanced"}),
    "class_weight by label": ("binary", {"class_weight": {"no": 0.5, "yes": 3.0}, "labels": np.array(["no", "yes"])}),
    "class and sample weights": ("binary", {"class_weight": "balanced", "weights": True}),
    "scale_pos_weight": ("binary", {"scale_pos_weight": 3.7}),
    "is_unbalance": ("binary", {"is_unbalance": True}),
    "is_unbalance one versus all": ("multiclass", {"objective": "multiclassova", "is_unbalance": True}),
    "bagging": ("regression", {"subsample": 0.6, "subsample_freq": 1, "random_state": 3}),
    "bagging every third round": ("regression", {"subsample": 0.4, "subsample_freq": 3, "num_rows": 2600}),
    "bagging by class": ("binary", {"pos_bagging_fraction": 0.9, "neg_bagging_fraction": 0.5, "bagging_freq": 1}),
    "reg_alpha": ("regression", {"reg_alpha": 6.0}),
    "lambda_l2 beside reg_lambda": ("regression", {"lambda_l2": 4.0}),
    "no boost_from_average": ("multiclass", {"boost_from_average": False}),
    "sigmoid": ("binary", {"sigmoid": 2.5}),
    "digits of the learning rate": ("regression", {"learning_rate": 1 / 7, "reg_lambda": 1 / 3}),
    "learning rates that change": (
        "regression",
        {"fit": {"callbacks": [lgb.reset_parameter(learning_rate=[0.3, 0.07, 1 / 7, 0.2, 0.01, 0.1])]}},
    ),
    "learning rates that change by class": (
        "multiclass",
        {"fit": {"callbacks": [lgb.reset_parameter(learning_rate=lambda number: 0.3 * 0.7**number)]}},
    ),
    "one hot categories": ("regression", {"categories": True, "max_cat_to_onehot": 20, "min_data_per_group": 1}),
    "sorted categories": ("regression", {"categories": True, "min_data_per_group": 1, "cat_smooth": 1.0, "cat_l2": 3.0}),
    "sorted categories with missing values": (
        "binary",
        {"categories": True, "min_data_per_group": 1, "cat_smooth": 1.0, "missing": True},
    ),
    "zero_as_missing": ("binary", {"zero_as_missing": True}),
    "extra_trees": ("regression", {"extra_trees": True}),
    "feature_fraction": ("multiclass", {"colsample_bytree": 0.5}),
    "monotone constraints that never bind": ("regression", {"monotone_constraints": [0, 0, 0, 0]}),
    "reg_sqrt": ("regression", {"reg_sqrt": True}),
    "huber": ("regression", {"objective": "huber", "alpha": 0.4}),
    "fair": ("regression", {"objective": "fair", "fair_c": 0.7}),
    "poisson": ("regression", {"objective": "poisson", "weights": True}),
    "gamma": ("regression", {"objective": "gamma"}),
    "tweedie": ("regression", {"objective": "tweedie", "tweedie_variance_power": 1.3}),
    "an alias": ("regression", {"objective": "mse"}),
    "cross_entropy": ("regression", {"objective": "cross_entropy", "scaled": True}),
    "one versus all": ("multiclass", {"objective": "multiclassova", "weights": True, "sigmoid": 1.5}),
    "custom": ("regression", {"objective": squared_error}),
}
REFUSED = {
    "goss": ("regression", {"data_sample_strategy": "goss", "learning_rate": 0.5}),
    "boosting_type": ("regression", {"boosting_type": "dart", "drop_rate": 0.9, "skip_drop": 0.0}),
    "random forest": ("regression", {"boosting_type": "rf", "subsample": 0.5, "subsample_freq": 1}),
    "linear_tree": ("regression", {"linear_tree": True}),
    "monotone_constraints": ("regression", {"monotone_constraints": [1, 1, 0, 0], "num_leaves": 31, "num_rows": 300}),
    "max_delta_step": ("regression", {"max_delta_step": 0.1}),
    "path_smooth": ("regression", {"path_smooth": 5.0}),
    "use_quantized_grad": ("regression", {"use_quantized_grad": True}),
    "regression_l1": ("regression", {"objective": "regression_l1"}),
    "quantile": ("regression", {"objective": "quantile"}),
    "mape": ("regression", {"objective": "mape"}),
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_features_pass_and_give_the_stored_leaf_values(name, train_case, make_table):
    kind, settings = SUPPORTED[name]
    if settings.get("scaled"):  # targets between 0 and 1
        X, y, _, _ = make_table("regression")
        shares = (y - y.min()) / np.ptp(y)
        model = lgb.train({"objective": "cross_entropy", "verbosity": -1, "num_leaves": 5}, lgb.Dataset(X, shares), 5)
        rows = TrainingRows.read(TreeEnsemble.read(model), X, shares)
        assert len(check_leaf_values(rows).steps) == 5
        return
    case = train_case(kind, **settings)
    statistics = checked(case, sample_weight=case.sample_weight)
    assert all((count > 0).all() for count in statistics.counts)


@pytest.mark.parametrize("name", REFUSED)
def test_other_features_are_refused_by_name(name, train_case):
    kind, settings = REFUSED[name]
    case = train_case(kind, **settings)
    with pytest.raises(InputError, match=name):
        checked(case)


def test_the_exact_digits_of_rates_and_penalties_are_found(train_case):
    schedule = [0.3, 0.07, 1 / 7, 0.2, 0.01, 0.1]
    case = train_case("regression", reg_lambda=1 / 3, fit={"callbacks": [lgb.reset_parameter(learning_rate=schedule)]})
    statistics = checked(case)
    np.testing.assert_allclose(statistics.learning_rates, schedule, rtol=3e-8)
    penalties = np.concatenate(statistics.denominators) - np.concatenate(statistics.hessians)
    np.testing.assert_allclose(penalties, 1 / 3, rtol=1e-12)


def test_only_leaves_below_sorted_categories_carry_cat_l2(train_case):
    settings = {"categories": True, "min_data_per_group": 1, "cat_smooth": 1.0, "cat_l2": 3.0, "reg_lambda": 0.5}
    for onehot, expected in ((4, {0.5, 3.5}), (20, {0.5})):
        statistics = checked(train_case("regression", max_cat_to_onehot=onehot, **settings))
        penalties = np.concatenate(statistics.denominators) - np.concatenate(statistics.hessians)
        assert set(np.round(penalties, 9)) == expected


def test_other_weights_than_those_of_training_are_noticed(train_case):
    case = train_case("binary", weights=True)
    for weights in (None, np.ones(len(case.y)), case.sample_weight * np.where(np.arange(len(case.y)) == 7, 1.01, 1.0)):
        with pytest.raises(InputError, match="sample_weight"):
            checked(case, sample_weight=weights)


def test_a_single_changed_label_is_noticed(train_case):
    case = train_case("multiclass")
    case.y = np.where(np.arange(len(case.y)) == 11, (case.y + 1) % 3, case.y)
    with pytest.raises(InputError, match=r"leaf \d+ of tree \d+"):
        checked(case)


def test_missing_and_extra_rows_and_their_order_under_bagging_are_noticed(train_case):
    case = train_case("regression", subsample=0.7, subsample_freq=1)
    order = np.random.default_rng(0).permutation(len(case.y))
    for rows in (order, np.arange(len(case.y) - 1), np.arange(len(case.y) + 1) % len(case.y)):
        with pytest.raises(InputError, match="grown on"):
            BoostIn(case.estimator).fit(case.X[rows], case.y[rows])


def test_without_bagging_the_order_of_rows_does_not_matter(train_case):
    case = train_case("regression")
    order = np.random.default_rng(0).permutation(len(case.y))
    straight = case.fit(BoostIn(case.estimator)).attribute(case.X_test, case.y_test)
    mixed = BoostIn(case.estimator).fit(case.X[order], case.y[order]).attribute(case.X_test, case.y_test)
    np.testing.assert_allclose(mixed, straight[order], rtol=0, atol=1e-13)


def test_init_scores_are_supported_and_their_absence_is_noticed(train_case):
    start = np.random.default_rng(3).normal(size=60)
    case = train_case("binary", fit={"init_score": start})
    assert checked(case, init_score=start).learning_rates[0] == pytest.approx(0.2)
    with pytest.raises(InputError, match="init_score"):
        checked(case)
    start = np.random.default_rng(3).normal(size=(60, 3))
    case = train_case("multiclass", fit={"init_score": start})
    checked(case, init_score=start)
    with pytest.raises(InputError, match="init_score"):
        checked(case, init_score=start[:, 0])


def test_weights_of_a_custom_objective_belong_inside_it(train_case):
    case = train_case("regression", objective=squared_error)
    with pytest.raises(InputError, match="custom objective"):
        checked(case, sample_weight=np.ones(60))


def test_a_booster_of_a_custom_objective_needs_the_function(train_case):
    case = train_case("regression", objective=squared_error)
    with pytest.raises(InputError, match="custom"):
        BoostIn(case.estimator.booster_).fit(case.X, case.y)
    found = BoostIn(case.estimator.booster_, objective=squared_error).fit(case.X, case.y)
    np.testing.assert_array_equal(found.self_influence(), BoostIn(case.estimator).fit(case.X, case.y).self_influence())
    with pytest.raises(InputTypeError, match="two arguments"):
        BoostIn(case.estimator.booster_, objective=lambda y: y).fit(case.X, case.y)


def test_targets_too_large_for_float32_are_taken_as_lightgbm_took_them(train_case, make_table):
    X, y, _, _ = make_table("regression")
    y = y + 1e6  # float32 keeps 0.06 of it
    model = lgb.LGBMRegressor(n_estimators=8, num_leaves=5, min_child_samples=4, verbosity=-1, n_jobs=1).fit(X, y)
    check_leaf_values(TrainingRows.read(TreeEnsemble.read(model), X, y))


def test_a_class_that_stops_splitting_leaves_trees_without_a_split():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(90, 3))
    y = np.digitize(X[:, 0], [-0.3, 0.5])
    settings = {"n_estimators": 60, "num_leaves": 4, "learning_rate": 0.5, "min_child_samples": 5}
    model = lgb.LGBMClassifier(**settings, verbosity=-1, n_jobs=1).fit(X, y)
    ensemble = TreeEnsemble.read(model)
    assert any(tree.is_constant for tree in ensemble.text.trees)
    rows = TrainingRows.read(ensemble, X, y)
    steps = check_leaf_values(rows).steps
    assert all(not step.any() for step, tree in zip(steps, ensemble.text.trees, strict=True) if tree.is_constant)


def test_a_refitted_model_is_refused(train_case, make_table):
    case = train_case("regression")
    X, y, _, _ = make_table("regression", seed=9)
    with pytest.raises(InputError, match="leaf"):
        BoostIn(case.estimator.booster_.refit(X, y)).fit(case.X, case.y)
