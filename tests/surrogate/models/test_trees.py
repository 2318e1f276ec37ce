from __future__ import annotations

import lightgbm as lgb
import numpy as np
import pytest

from oracle.errors import InputError, MissingFileError
from surrogate.attribution import BoostIn, LeafContributions
from surrogate.models import training_data
from surrogate.models.ridge import RidgeSurrogate
from surrogate.models.trees import InfluenceTrees, _correlation


def data(num_texts=150, num_features=30, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(num_texts, num_features))
    truth = 2.0 * (X[:, 0] > 0.3) + (X[:, 1] > 0) * (X[:, 2] > 0)
    return X, np.stack([truth, -truth], axis=1) + 0.3 * rng.normal(size=(num_texts, 2)), truth


def test_a_hundred_texts_are_enough_to_find_thresholds_that_ridge_misses():
    X, y, _ = data(100)
    X_new, _, truth = data(500, seed=1)
    trees, ridge = (model.fit(X, y).predict(X_new) for model in (InfluenceTrees(), RidgeSurrogate()))
    assert np.corrcoef(trees[:, 0], truth)[0, 1] > np.corrcoef(ridge[:, 0], truth)[0, 1] + 0.05


def test_there_is_one_booster_per_target_and_the_scores_are_theirs():
    X, y, _ = data()
    model = InfluenceTrees(num_trees=20, min_trees=5, label_scale="none").fit(X, y)
    assert len(model.boosters_) == 2 and all(isinstance(booster, lgb.Booster) for booster in model.boosters_)
    assert model.num_trees_ == [booster.num_trees() for booster in model.boosters_]
    expected = np.stack([booster.predict(X.astype(np.float32)) for booster in model.boosters_], axis=1)
    np.testing.assert_allclose(model.predict(X), expected, rtol=1e-6)


def test_the_final_boosters_saw_every_labelled_text():
    X, y, _ = data(80)
    model = InfluenceTrees(num_trees=3, min_trees=1, bagging=1.0, min_leaf_size=1).fit(X, y)
    for booster in model.boosters_:
        assert booster.dump_model()["tree_info"][0]["tree_structure"]["internal_count"] == 80


def test_the_number_of_trees_is_chosen_within_its_bounds():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(120, 10))
    noise = InfluenceTrees(num_trees=90, min_trees=20).fit(X, rng.normal(size=(120, 6)))
    assert min(noise.num_trees_) == 20 and len(set(noise.num_trees_)) > 1 and max(noise.num_trees_) <= 90
    assert InfluenceTrees(num_trees=25, min_trees=7, validation_folds=0).fit(X, X[:, 0]).num_trees_ == [25]


def test_near_duplicates_stay_on_one_side_of_every_fold():
    X, y, _ = data(90)
    groups = np.arange(90) // 3
    checked = training_data(X, y, groups)
    splits = InfluenceTrees()._splits(checked)
    assert len(splits) == 4
    for training, validation in splits:
        assert not set(checked.groups[training]) & set(checked.groups[validation])
        assert sorted([*training, *validation]) == list(range(90))


def test_results_do_not_depend_on_the_number_of_threads():
    X, y, _ = data(60, 10)
    scores = [
        InfluenceTrees(num_trees=3, min_trees=3, validation_folds=0, num_threads=count).fit(X, y).predict(X) for count in (1, 2)
    ]
    np.testing.assert_array_equal(*scores)


def test_limit_with_two_leaves_it_is_additive():
    X, y, _ = data()
    model = InfluenceTrees(num_leaves=2, num_trees=50, min_trees=5, label_scale="none").fit(X, y)
    corners = np.zeros((4, X.shape[1]))
    corners[1, 1] = corners[2, 2] = corners[3, 1] = corners[3, 2] = 1.0
    none, first, second, both = model.predict(corners)
    np.testing.assert_allclose(both + none, first + second, atol=1e-5)


def test_a_missing_booster_file_is_named(tmp_path):
    X, y, _ = data()
    InfluenceTrees(num_trees=5, min_trees=1).fit(X, y).save(tmp_path)
    (tmp_path / "target-0001.txt").unlink()
    with pytest.raises(MissingFileError, match="target-0001"):
        InfluenceTrees.load(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"num_trees": 50},
        {"num_leaves": 1},
        {"learning_rate": 0},
        {"bagging": 1.5},
        {"feature_fraction": 0.0},
        {"validation_folds": 1},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        InfluenceTrees(**options)


def test_a_text_of_weight_two_is_that_text_twice_in_a_tree():
    X, y, _ = data(60)
    X = np.round(2 * X) / 2  # fewer values than bins: bins are cut by counting rows
    weights = 1 + np.arange(60) % 2
    repeats = np.repeat(np.arange(60), weights)
    options = {"num_trees": 5, "min_trees": 5, "validation_folds": 0, "bagging": 1.0, "feature_fraction": 1.0, "min_leaf_size": 1}
    found = InfluenceTrees(**options).fit(X, y, sample_weight=weights).predict(X)
    np.testing.assert_allclose(found, InfluenceTrees(**options).fit(X[repeats], y[repeats]).predict(X), rtol=1e-4, atol=1e-5)
    assert np.abs(found - InfluenceTrees(**options).fit(X, y).predict(X)).max() > 1e-3


@pytest.mark.parametrize("label_scale", ["rank", "none"])
@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
def test_booster_tables_are_what_the_boosters_were_trained_on(is_warm, label_scale):
    (X, y, _), (X_new, y_new, _) = data(80), data(7, seed=2)
    options = {"num_trees": 12, "min_trees": 12, "validation_folds": 0, "num_threads": 1, "label_scale": label_scale}
    earlier = InfluenceTrees(**options).fit(*data(80, seed=5)[:2]) if is_warm else None
    weights = np.random.default_rng(0).choice([0.0, 0.5, 1.0], size=80)
    trees = InfluenceTrees(**options).fit(X, y, sample_weight=weights, warm_start=earlier)
    tables = trees.booster_tables(X, y, sample_weight=weights)
    assert len(tables) == 2 and sorted(tables[0].rows) == np.flatnonzero(weights).tolist()
    for column, table in enumerate(tables):
        np.testing.assert_array_equal(table.features, X[table.rows].astype(np.float32))
        made_of = LeafContributions(table.booster).fit(table.features, table.targets, table.weights)  # proves every leaf
        total = made_of.attribute(X_new, of="prediction").sum(axis=0) + made_of.rows_.ensemble.init_scores[0]
        np.testing.assert_allclose(total, trees.own_output(X_new.astype(np.float32))[:, column], atol=1e-6)
        boostin = BoostIn(table.booster).fit(table.features, table.targets, table.weights)
        assert boostin.attribute(X_new, trees.booster_targets(X_new, y_new)[:, column]).shape == (len(table.rows), 7)
        if is_warm:  # the labels alone are not what they were trained on
            with pytest.raises(InputError, match="leaf"):
                BoostIn(table.booster).fit(table.features, trees._label_scaler.transform(y)[table.rows, column], table.weights)
    with pytest.raises(InputError, match="not been fitted"):
        InfluenceTrees().booster_tables(X, y)


def test_booster_targets_are_residuals_of_the_scores():
    X, y, _ = data(80)
    options = {"num_trees": 12, "min_trees": 12, "validation_folds": 0, "num_threads": 1, "label_scale": "none"}
    trees = InfluenceTrees(**options).fit(X, y, warm_start=InfluenceTrees(**options).fit(*data(80, seed=5)[:2]))
    left = trees.booster_targets(X, y) - trees.own_output(X.astype(np.float32))
    np.testing.assert_allclose(left, y - trees.predict(X), rtol=0, atol=1e-5)


def test_the_validation_correlation_counts_a_text_by_its_weight():
    rng = np.random.default_rng(0)
    scores, labels, weights = rng.normal(size=40), rng.normal(size=40), rng.integers(1, 4, size=40)
    dataset = lgb.Dataset(rng.normal(size=(40, 2)), label=labels, weight=weights, params={"verbosity": -1}).construct()
    repeats = np.repeat(np.arange(40), weights)
    expected = np.corrcoef(scores[repeats], labels[repeats])[0, 1]
    _, found, higher_is_better = _correlation(scores, dataset)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert higher_is_better
