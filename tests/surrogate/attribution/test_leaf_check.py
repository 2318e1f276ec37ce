"""Each feature of LightGBM that changes leaf values is either understood, or refused by name."""

from __future__ import annotations

import lightgbm as lgb
import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

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


def test_values_lost_in_bundles_of_sparse_features_are_noticed_and_bundling_is_named():
    rng = np.random.default_rng(2)
    X = np.stack([-rng.random(90) * (rng.random(90) < 0.3), 1.0 + (rng.random(90) < 0.05)], axis=1)
    y = X.sum(axis=1) + 0.1 * rng.normal(size=90)
    settings = {"n_estimators": 5, "num_leaves": 7, "min_child_samples": 1, "min_data_in_bin": 1, "feature_pre_filter": False}
    bundled, plain = (
        lgb.LGBMRegressor(**settings, enable_bundle=bundles, n_jobs=1, verbosity=-1).fit(X, y) for bundles in (True, False)
    )
    with pytest.raises(InputError, match=r"\(enable_bundle\), and lost some(.|\n)*enable_bundle=False"):
        BoostIn(bundled).fit(X, y)
    BoostIn(plain).fit(X, y)
    dense = rng.normal(size=(90, 2))
    cannot_be = (plain, X), (lgb.LGBMRegressor(**settings, n_jobs=1, verbosity=-1).fit(dense, y), dense)
    for model, features in cannot_be:
        with pytest.raises(InputError) as refused:
            BoostIn(model).fit(features, -y)
        assert "bundle" not in str(refused.value)


@pytest.mark.parametrize("name", ["lambdarank", "cross_entropy_lambda"])
def test_retraining_is_not_proposed_where_it_is_refused_as_well(name, make_table):
    X, y, _, _ = make_table("binary")
    model = lgb.train({"objective": name, "verbosity": -1}, lgb.Dataset(X, y, group=[60] if name == "lambdarank" else None), 3)
    with pytest.raises(InputError, match=name) as refused:
        BoostIn(model).fit(X, y)
    assert "LeaveOneOut" not in str(refused.value)


def test_what_holds_a_model_is_asked_for_it(make_table):
    X, y, _, _ = make_table("regression")
    search = GridSearchCV(lgb.LGBMRegressor(n_estimators=2, verbosity=-1), {"num_leaves": [3]}, cv=2).fit(X, y)
    with pytest.raises(InputTypeError, match="best_estimator_"):
        BoostIn(search).fit(X, y)
    with pytest.raises(InputTypeError, match="last step"):
        BoostIn(make_pipeline(search.best_estimator_)).fit(X, y)


@pytest.mark.parametrize(
    "settings", [{}, {"objective": "huber"}, {"subsample": 0.6, "subsample_freq": 1}, {"weights": True}], ids=str
)
def test_hessians_are_sums_over_rows_also_where_they_are_counts(settings, train_case):
    case = train_case("regression", **settings)
    rows = TrainingRows.read(TreeEnsemble.read(case.estimator), case.X, case.y, sample_weight=case.sample_weight)
    found = check_leaf_values(rows).hessians
    for this in rows.rounds():
        for leaf, total in enumerate(found[this.number]):
            assert total == pytest.approx(this.hessians[rows.leaves[:, this.number] == leaf, 0].sum(), rel=1e-12)


def test_the_exact_digits_of_rates_and_penalties_are_found(train_case):
    schedule = [0.3, 0.07, 1 / 7, 0.2, 0.01, 0.1]
    case = train_case("regression", reg_lambda=1 / 3, fit={"callbacks": [lgb.reset_parameter(learning_rate=schedule)]})
    statistics = checked(case)
    np.testing.assert_allclose(statistics.learning_rates, schedule, rtol=3e-8)
    penalties = np.concatenate(statistics.denominators) - np.concatenate(statistics.hessians)
    np.testing.assert_allclose(penalties, 1 / 3, rtol=1e-12)


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("regression", {"learning_rate": 0.123456789, "reg_lambda": 1 / 3, "reg_alpha": 1.23456789}),
        ("binary", {"scale_pos_weight": 13.15789473, "sigmoid": 1.23456789, "weights": True}),
        ("regression", {"objective": "tweedie", "tweedie_variance_power": 1.23456789}),
        ("regression", {"objective": "huber", "alpha": 0.123456789, "subsample": 0.7, "subsample_freq": 1}),
        ("regression", {"categories": True, "min_data_per_group": 1, "cat_smooth": 1.0, "cat_l2": 3.14159265}),
    ],
    ids=str,
)
def test_a_model_that_was_read_again_may_have_lost_digits(kind, settings, train_case, tmp_path):
    """LightGBM prints six digits of its parameters; a Booster made from a text remembers those and takes them for all."""
    case = train_case(kind, **settings)
    case.estimator.booster_.save_model(tmp_path / "model.txt")
    truth = BoostIn(case.estimator).fit(case.X, case.y, case.sample_weight).attribute(case.X_test, case.y_test)
    again = lgb.Booster(model_str=case.estimator.booster_.model_to_string())
    for model in (tmp_path / "model.txt", lgb.Booster(model_file=tmp_path / "model.txt"), again):
        method = BoostIn(model).fit(case.X, case.y, case.sample_weight)
        assert method.statistics_.learning_rates[0] == pytest.approx(case.settings["learning_rate"], rel=5e-7)
        found = method.attribute(case.X_test, case.y_test)
        np.testing.assert_allclose(found, truth, rtol=0, atol=2e-5 * np.abs(truth).max())


def test_shares_are_held_to_what_lightgbm_rounds(make_table):
    """It rounds one minus the share to float32, which the small gradients of single rows show."""
    X = make_table("regression")[0]
    shares = 0.5 + 0.02 * np.random.default_rng(0).normal(size=60)
    settings = {
        "objective": "cross_entropy",
        "num_leaves": 60,
        "min_data_in_leaf": 1,
        "min_sum_hessian_in_leaf": 0,
        "verbosity": -1,
    }
    model = lgb.train({**settings, "boost_from_average": False}, lgb.Dataset(X, shares), 3)
    BoostIn(model).fit(X, shares)
    shares[7] += 1e-5
    with pytest.raises(InputError, match="leaf"):
        BoostIn(model).fit(X, shares)


def test_a_rate_is_measured_in_all_rounds_that_print_it(train_case):
    """Rounds whose leaves all lie below categorical splits do not tell it."""
    settings = {
        "categories": True,
        "min_data_per_group": 1,
        "cat_smooth": 1.0,
        "cat_l2": 3.0,
        "num_leaves": 2,
        "n_estimators": 12,
    }
    case = train_case("regression", learning_rate=0.123456789, colsample_bytree=0.5, **settings)
    model = lgb.Booster(model_str=case.estimator.booster_.model_to_string())
    statistics = checked(case, model)
    is_categorical = [tree.has_categorical_splits for tree in TreeEnsemble.read(model).text.trees]
    assert any(is_categorical[1:]) and not all(is_categorical[1:])
    np.testing.assert_allclose(statistics.learning_rates, 0.123456789, rtol=1e-7)


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
