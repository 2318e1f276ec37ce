from __future__ import annotations

import lightgbm as lgb
import numpy as np
import pandas as pd
import pytest

from oracle.errors import InputError
from surrogate.attribution.retraining import Recipe
from surrogate.attribution.training_rows import TrainingRows


def trained_again(model, X, y):
    """Raw scores of the model and of the one that its recipe leads to."""
    recipe = Recipe.read(model)
    rows = TrainingRows.read(recipe.ensemble, X, y)
    labels = recipe.labels(y, rows.y)
    recipe = recipe.with_first_rate(X, labels, rows)
    again = recipe.train(recipe.dataset(X, labels, rows))
    return recipe.raw_scores(recipe.ensemble.booster, X), recipe.raw_scores(again, X)


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "l1"},
        {"objective": "quantile", "alpha": 0.3},
        {"objective": "mape"},
        {"boosting_type": "dart"},
        {"boosting_type": "rf", "subsample": 0.7, "subsample_freq": 1},
        {"data_sample_strategy": "goss", "top_rate": 0.3},
        {"linear_tree": True},
        {"learning_rate": 0.123456789},
        {"reg_sqrt": True},
        {"monotone_constraints": [0, 1, 0, 0], "path_smooth": 1.0, "max_delta_step": 0.5},
        {"colsample_bytree": 0.5, "subsample": 0.6, "subsample_freq": 2, "random_state": 5},
        {"extra_trees": True, "max_bin": 15, "zero_as_missing": True},
    ],
)
def test_training_from_the_models_text_gives_the_model_back(make_table, train_case, settings, tmp_path):
    X, y, _, _ = make_table("regression")
    model = lgb.LGBMRegressor(**{**train_case("regression").settings, **settings}).fit(X, y)
    before, again = trained_again(model, X, y)
    np.testing.assert_allclose(again, before, rtol=0, atol=1e-12)
    model.booster_.save_model(tmp_path / "model.txt")
    before, again = trained_again(tmp_path / "model.txt", X, y)
    np.testing.assert_allclose(again, before, rtol=1e-5)  # a file has six digits of the learning rate


def test_scores_of_a_random_forest_are_means_over_its_trees(make_table, train_case):
    X, y, _, _ = make_table("regression")
    settings = {"boosting_type": "rf", "subsample": 0.7, "subsample_freq": 1}
    model = lgb.LGBMRegressor(**{**train_case("regression").settings, **settings}).fit(X, y)
    before, again = trained_again(model, X, y)
    np.testing.assert_allclose(before[:, 0], model.predict(X), rtol=1e-12)
    np.testing.assert_allclose(again[:, 0], model.predict(X), rtol=1e-12)


def test_learning_rates_that_changed_between_rounds_are_followed(train_case):
    schedule = {"callbacks": [lgb.reset_parameter(learning_rate=lambda number: 0.3 * 0.8**number)]}
    for kind in ("regression", "binary", "multiclass"):
        case = train_case(kind, fit=schedule)
        before, again = trained_again(case.estimator, case.X, case.y)
        np.testing.assert_allclose(again, before, rtol=0, atol=1e-9)


def test_categories_of_a_data_frame_keep_their_codes(train_case):
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"a": rng.normal(size=80), "b": pd.Categorical(rng.choice(list("uvwxyz"), 80))})
    y = X["a"] + X["b"].isin(["u", "x"]) * 2.0
    model = lgb.LGBMRegressor(**{**train_case("regression").settings, "max_cat_to_onehot": 20}).fit(X, y)
    before, again = trained_again(model, X, y.to_numpy())
    np.testing.assert_array_equal(again, before)
    recipe = Recipe.read(model)
    rows = TrainingRows.read(recipe.ensemble, X, y.to_numpy())
    without = recipe.train(recipe.dataset(X, y.to_numpy(), rows, without=3))
    kept = X.drop(index=3)
    own = lgb.LGBMRegressor(**model.get_params()).fit(kept, y.drop(index=3))
    np.testing.assert_allclose(recipe.raw_scores(without, X)[:, 0], own.predict(X), atol=1e-12)


def test_losses_without_gradients_are_those_of_lightgbm(make_table, train_case):
    X, y, _, _ = make_table("regression")
    for objective, metric in (("l1", "l1"), ("quantile", "quantile"), ("mape", "mape")):
        model = lgb.LGBMRegressor(**{**train_case("regression").settings, "objective": objective, "alpha": 0.3})
        data = lgb.Dataset(X, y)
        result: dict = {}
        booster = lgb.train(
            {**model.get_params(), "metric": metric, "num_threads": 1},
            data,
            num_boost_round=3,
            valid_sets=[data],
            callbacks=[lgb.record_evaluation(result)],
        )
        loss = Recipe.read(booster).ensemble.objective.loss(booster.predict(X, raw_score=True)[:, None], y)
        assert loss.mean() == pytest.approx(next(iter(result["training"].values()))[-1], rel=1e-5)


def test_rankings_are_refused(make_table):
    X, y, _, _ = make_table("multiclass")
    ranker = lgb.LGBMRanker(n_estimators=2, min_child_samples=2, verbosity=-1).fit(X, y, group=[30, 30])
    with pytest.raises(InputError, match="lambdarank"):
        Recipe.read(ranker)
