from __future__ import annotations

import numpy as np
import pytest

from surrogate.linear import fit_ridge, fit_scaled_ridge


def data(num_texts, num_features, seed=0):
    """Features, labels, whole weights, groups of near-duplicates, and row numbers as often as their weight says."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(num_texts, num_features)).astype(np.float32)
    y = X[:, :2] + rng.normal(size=(num_texts, 2))
    weights = rng.integers(1, 4, size=num_texts)
    groups = np.arange(num_texts) // 2
    return X, y, weights, groups, np.repeat(np.arange(num_texts), weights)


@pytest.mark.parametrize("shape", [(60, 10), (30, 50)])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_a_text_of_weight_two_is_that_text_twice_in_one_group(shape, alpha):
    X, y, weights, groups, repeats = data(*shape)
    found = fit_ridge(X, y, groups=groups, alpha=alpha, sample_weight=weights.astype(float))
    expected = fit_ridge(X[repeats], y[repeats], groups=groups[repeats], alpha=alpha)
    np.testing.assert_allclose(found.alphas, expected.alphas)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(found.intercept, expected.intercept, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(found.held_out[repeats], expected.held_out, rtol=1e-6, atol=1e-8)


def test_weighted_held_out_predictions_equal_refitting_without_the_group():
    X, y, _, groups, _ = data(40, 8)
    weights = np.random.default_rng(3).random(40) + 0.1
    fit = fit_ridge(X, y, groups=groups, alpha=2.0, sample_weight=weights)
    for group in np.unique(groups):
        out = groups == group
        kept, w = X[~out].astype(np.float64), weights[~out]
        mean, label_mean = w @ kept / w.sum(), w @ y[~out] / w.sum()
        centred = kept - mean
        beta = np.linalg.solve(
            centred.T @ (w[:, None] * centred) + 2.0 * np.eye(8), centred.T @ (w[:, None] * (y[~out] - label_mean))
        )
        np.testing.assert_allclose(fit.held_out[out], label_mean + (X[out] - mean) @ beta, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weigh_features", [True, False])
def test_texts_of_little_weight_do_not_spoil_the_others(weigh_features):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 20)).astype(np.float32)
    truth = X[:, :1].astype(np.float64)
    y, weights = truth.copy(), np.ones(300)
    y[150:], weights[150:] = -truth[150:], 1e-3
    options = {"groups": np.arange(300), "keys": [str(n) for n in range(300)], "weigh_features": weigh_features}
    scaler, fit = fit_scaled_ridge(X, y, sample_weight=weights, **options)
    assert np.corrcoef((scaler.transform(X) @ fit.weights)[:, 0], truth[:, 0])[0, 1] > 0.99
    scaler, fit = fit_scaled_ridge(X, y, **options)
    assert np.corrcoef((scaler.transform(X) @ fit.weights)[:, 0], truth[:, 0])[0, 1] < 0.9
