from __future__ import annotations

import numpy as np
import pytest

from oracle.errors import InputError
from surrogate.linear import NUM_FOLDS, fit_ridge, fit_scaled_ridge
from surrogate.models import training_data
from surrogate.models.ridge import RidgeSurrogate
from surrogate.scaling import FeatureScaler
from surrogate.splits import grouped_folds


def data(num_texts, num_features, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(num_texts, num_features)) @ rng.normal(size=(num_features, num_features))
    y = X[:, :2] + rng.normal(size=(num_texts, 2)) * X[:, :2].std(axis=0)
    return X.astype(np.float32), y


@pytest.mark.parametrize("shape", [(60, 15), (30, 50)])
def test_it_solves_the_same_problem_as_scikit_learn(shape):
    from sklearn.linear_model import Ridge

    X, y = data(*shape)
    standardised = FeatureScaler().fit(X).transform(X)
    expected = Ridge(alpha=7.0).fit(standardised, y).predict(standardised)
    np.testing.assert_allclose(
        RidgeSurrogate(alpha=7.0, label_scale="none", weigh_features=False).fit(X, y).predict(X), expected, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("shape", [(40, 8), (25, 40)])
def test_held_out_predictions_equal_refitting_without_the_group(shape):
    X, y = data(*shape)
    groups = np.arange(len(X))
    groups[:6] = [0, 0, 0, 1, 1, 2]
    fit = fit_ridge(X, y, groups=groups, alpha=3.0)
    for group in np.unique(groups):
        out = groups == group
        kept = X[~out].astype(np.float64)
        centred = kept - kept.mean(axis=0)
        weights = np.linalg.solve(centred.T @ centred + 3.0 * np.eye(X.shape[1]), centred.T @ y[~out])
        expected = y[~out].mean(axis=0) + (X[out] - kept.mean(axis=0)) @ weights
        np.testing.assert_allclose(fit.held_out[out], expected, rtol=1e-5, atol=1e-6)


def test_the_penalty_is_chosen_per_target_by_held_out_error():
    X, y = data(80, 30)
    y[:, 0] = X[:, 0]  # no noise: a weak penalty; the other is all noise: a strong one
    y[:, 1] = np.random.default_rng(1).normal(size=80)
    model = RidgeSurrogate(label_scale="none").fit(X, y)
    assert model.alphas_[0] < 1e-2 * model.alphas_[1]


def test_copies_of_a_text_do_not_weaken_the_penalty():
    X, y = data(40, 60)
    y = np.random.default_rng(1).normal(size=(40, 1))
    twice_X, twice_y, groups = np.concatenate([X, X]), np.concatenate([y, y]), np.tile(np.arange(40), 2)
    grouped, separate = fit_ridge(twice_X, twice_y, groups=groups), fit_ridge(twice_X, twice_y, groups=np.arange(80))
    assert separate.alphas[0] < 1e-2 * grouped.alphas[0]


def test_limit_a_large_penalty_predicts_the_middle_label():
    X, y = data(50, 5)
    scores = RidgeSurrogate(alpha=1e12, label_scale="none").fit(X, y).predict(X)
    np.testing.assert_allclose(scores, np.broadcast_to(y.mean(axis=0), y.shape), atol=1e-5)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), "1"])
def test_a_penalty_that_is_not_positive_is_refused(alpha):
    with pytest.raises(InputError, match="alpha"):
        RidgeSurrogate(alpha=alpha)


def test_weighing_features_keeps_many_empty_columns_from_drowning_a_few_telling_ones():
    rng = np.random.default_rng(0)
    telling, empty = rng.normal(size=(400, 5)), rng.normal(size=(400, 1500))
    labels = telling @ rng.normal(size=(5, 1)) + 0.5 * rng.normal(size=(400, 1))
    X = np.concatenate([telling, empty], axis=1)
    found = {}
    for weigh in (False, True):
        scores = RidgeSurrogate(weigh_features=weigh).fit(X[:300], labels[:300]).predict(X[300:])
        found[weigh] = np.corrcoef(scores[:, 0], labels[300:, 0])[0, 1]
    assert found[True] > found[False] + 0.05


@pytest.mark.parametrize("weigh_features", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_on_noise_held_out_predictions_explain_nothing(weigh_features, seed):
    rng = np.random.default_rng(seed)
    checked = training_data(rng.normal(size=(300, 1000)), rng.normal(size=(300, 2)), None)
    _, fit = fit_scaled_ridge(
        checked.features, checked.labels, groups=checked.groups, keys=checked.keys, weigh_features=weigh_features
    )
    r2 = 1 - np.square(checked.labels - fit.held_out).mean(axis=0) / checked.labels.var(axis=0)
    assert (r2 < 0.03).all()  # the best of 33 penalties is a little lucky


@pytest.mark.parametrize("shape", [(90, 12), (60, 100)])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_held_out_predictions_of_weighed_features_equal_refitting_scaler_and_ridge_without_the_fold(shape, is_weighted):
    X, y = data(*shape)
    groups = np.arange(len(X)) // 3
    checked = training_data(X, y, groups, sample_weight=np.random.default_rng(2).random(len(X)) + 0.1 if is_weighted else None)
    options = {"weigh_features": True, "alpha": 3.0, "sample_weight": checked.weights}
    _, fit = fit_scaled_ridge(checked.features, checked.labels, groups=checked.groups, keys=checked.keys, **options)
    folds = grouped_folds(checked.groups, num_folds=NUM_FOLDS, seed=0, keys=checked.keys)
    for fold in range(NUM_FOLDS):
        out = folds == fold
        weights = checked.weights[~out] if is_weighted else None
        scaler = FeatureScaler().fit(checked.features[~out], checked.labels[~out], weights=weights)
        alone = fit_ridge(
            scaler.transform(checked.features[~out]),
            checked.labels[~out],
            groups=checked.groups[~out],
            alpha=3.0,
            sample_weight=weights,
        )
        expected = scaler.transform(checked.features[out]) @ alone.weights + alone.intercept
        np.testing.assert_allclose(fit.held_out[out], expected, rtol=1e-6, atol=1e-9)


def test_two_groups_are_enough_to_choose_a_penalty_for_weighed_features():
    X, y = data(20, 30)
    model = RidgeSurrogate().fit(X, y, groups=np.arange(20) // 19)
    assert np.isfinite(model.predict(X)).all() and (model.alphas_ > 0).all()


@pytest.mark.parametrize("label_scale", ["rank", "robust", "none"])
@pytest.mark.parametrize("shape", [(60, 15), (30, 50)])
def test_a_text_of_weight_two_is_that_text_twice(shape, label_scale):
    X, y = data(*shape)
    weights = 1 + np.arange(len(X)) % 2
    options = {"alpha": 7.0, "weigh_features": False, "label_scale": label_scale}
    repeats = np.repeat(np.arange(len(X)), weights)
    found = RidgeSurrogate(**options).fit(X, y, sample_weight=weights).predict(X)
    np.testing.assert_allclose(found, RidgeSurrogate(**options).fit(X[repeats], y[repeats]).predict(X), rtol=1e-4, atol=1e-4)
    assert np.abs(found - RidgeSurrogate(**options).fit(X, y).predict(X)).max() > 1e-2
