from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, rankdata

from oracle.comparison import average_ranks
from oracle.errors import InputError, NotFiniteError
from surrogate.scaling import LABEL_SCALES, MAX_KNOTS, FeatureScaler, LabelScaler, robust_location_scale


def heavy_tailed(num_texts=300, seed=0):
    return np.random.default_rng(seed).standard_t(2, size=(num_texts, 2)) * [1e-3, 5.0]


def test_average_ranks_agree_with_scipy_also_on_ties():
    values = np.random.default_rng(0).integers(0, 20, size=100).astype(float)
    np.testing.assert_array_equal(average_ranks(values), rankdata(values))


def test_rank_gives_normal_quantiles_of_ranks_with_ties_averaged():
    y = np.array([[5.0], [1.0], [1.0], [100.0]])
    expected = norm.ppf((np.array([3.0, 1.5, 1.5, 4.0]) - 0.5) / 4)
    np.testing.assert_allclose(LabelScaler("rank").fit(y).transform(y)[:, 0], expected)


def test_rank_does_not_see_a_monotone_change_of_labels():
    y = heavy_tailed()
    changed = np.arcsinh(y)
    np.testing.assert_allclose(LabelScaler().fit(y).transform(y), LabelScaler().fit(changed).transform(changed), atol=1e-12)


@pytest.mark.parametrize("method", ["rank", "none"])
@pytest.mark.parametrize("num_texts", [300, 3000])
def test_labels_come_back(method, num_texts):
    y = heavy_tailed(num_texts)
    scaler = LabelScaler(method).fit(y)
    np.testing.assert_allclose(scaler.inverse(scaler.transform(y)), y, rtol=1e-9, atol=1e-12)


def test_robust_is_median_and_mad_and_clips_outliers_only():
    y = heavy_tailed()
    scaler = LabelScaler("robust").fit(y)
    center = np.median(y, axis=0)
    scale = 1.4826 * np.median(np.abs(y - center), axis=0)
    np.testing.assert_allclose(scaler.transform(y), np.clip((y - center) / scale, -5, 5))
    assert np.abs(scaler.transform(y)).max() == 5.0
    np.testing.assert_allclose(scaler.inverse(np.full((1, 2), 7.0))[0], center + 7 * scale)


def test_robust_falls_back_to_the_standard_deviation():
    y = np.zeros((10, 1))
    y[0] = 1.0
    np.testing.assert_allclose(LabelScaler("robust").fit(y).inverse([[1.0]]), [[y.std()]])


def test_rank_goes_on_beyond_the_table_with_the_end_slopes():
    y = np.arange(100.0)[:, None]
    scaler = LabelScaler("rank").fit(y)
    z = scaler.transform(y)[:, 0]
    slope = 1.0 / (z[-1] - z[-2])
    np.testing.assert_allclose(scaler.inverse([[z[-1] + 0.5], [z[0] - 0.5]])[:, 0], [99 + 0.5 * slope, -0.5 * slope])
    grid = np.linspace(-8, 8, 1000)[:, None]
    assert (np.diff(scaler.inverse(grid)[:, 0]) > 0).all()
    np.testing.assert_allclose(scaler.transform(scaler.inverse(grid)), grid, atol=1e-9)


def test_the_rank_table_stays_small():
    arrays = LabelScaler("rank").fit(heavy_tailed(5000)).arrays()
    assert arrays["knot_counts"].max() <= MAX_KNOTS


@pytest.mark.parametrize("method", LABEL_SCALES)
def test_a_constant_column_becomes_zero_and_comes_back_exactly(method):
    y = np.stack([np.full(20, 0.1), np.arange(20.0)], axis=1)
    scaler = LabelScaler(method).fit(y)
    np.testing.assert_array_equal(scaler.transform(y)[:, 0], 0.0)
    np.testing.assert_array_equal(scaler.inverse(np.zeros((3, 2)))[:, 0], 0.1)


@pytest.mark.parametrize("method", LABEL_SCALES)
def test_arrays_hold_everything(method):
    y = heavy_tailed(700)
    y[:, 1] = 3.0
    scaler = LabelScaler(method).fit(y)
    copy = LabelScaler.from_arrays(scaler.arrays())
    z = np.random.default_rng(1).normal(size=(50, 2))
    assert copy.method == method
    np.testing.assert_array_equal(copy.inverse(z), scaler.inverse(z))
    np.testing.assert_array_equal(copy.transform(y), scaler.transform(y))


def test_label_scaler_refuses_bad_input():
    with pytest.raises(InputError, match="label_scale"):
        LabelScaler("ranks")
    with pytest.raises(NotFiniteError):
        LabelScaler().fit([[1.0], [np.nan]])
    with pytest.raises(InputError):
        LabelScaler().fit([1.0, 2.0])
    for method in LABEL_SCALES:
        with pytest.raises(InputError, match="not been fitted"):
            LabelScaler(method).transform([[1.0]])
        with pytest.raises(InputError, match="2 target columns"):
            LabelScaler(method).fit(heavy_tailed()).inverse(np.zeros((3, 1)))


def test_features_are_standardised_constant_ones_zero_and_outliers_clipped():
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(200, 3))
    x[:, 1] = 0.1
    x[0, 2] = 1e6
    scaler = FeatureScaler().fit(x)
    scaled = scaler.transform(x)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled[:, 0], (x[:, 0] - x[:, 0].mean()) / x[:, 0].std(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scaled[:, 1], 0.0)
    assert scaled[0, 2] == 10.0
    new = np.full((1, 3), 99.0)
    assert scaler.transform(new)[0, 1] == 0.0
    np.testing.assert_array_equal(FeatureScaler.from_arrays(scaler.arrays()).transform(x), scaled)


def test_feature_scaler_refuses_bad_input():
    with pytest.raises(InputError, match="not been fitted"):
        FeatureScaler().transform([[1.0]])
    with pytest.raises(InputError, match="2 columns"):
        FeatureScaler().fit(np.eye(2)).transform(np.zeros((1, 3)))
    with pytest.raises(NotFiniteError):
        FeatureScaler().fit([[np.inf]])


def weighted(num_texts=60, seed=0):
    """Values with ties, whole weights, and the same with each row as often as its weight says."""
    rng = np.random.default_rng(seed)
    values = np.round(rng.standard_t(3, size=(num_texts, 3)), 1)
    values[:, 2] = 0.1
    weights = rng.integers(1, 4, size=num_texts).astype(float)
    return values, weights, np.repeat(values, weights.astype(int), axis=0)


@pytest.mark.parametrize("method", LABEL_SCALES)
def test_a_label_of_weight_two_is_a_label_twice(method):
    y, weights, repeated = weighted()
    np.testing.assert_allclose(
        LabelScaler(method).fit(y, weights).transform(y), LabelScaler(method).fit(repeated).transform(y), atol=1e-12
    )
    assert method == "none" or not np.allclose(
        LabelScaler(method).fit(y, weights).transform(y), LabelScaler(method).fit(y).transform(y)
    )


@pytest.mark.parametrize("num_texts", [4, 5, 60])
def test_weighted_location_and_scale_are_those_of_repeated_rows(num_texts):
    y, weights, repeated = weighted(num_texts)
    for found, expected in zip(robust_location_scale(y, weights), robust_location_scale(repeated), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12)
    assert robust_location_scale(y, weights)[1][2] == 0.0


def test_a_feature_row_of_weight_two_is_that_row_twice():
    x, weights, repeated = weighted()
    np.testing.assert_allclose(
        FeatureScaler().fit(x, weights=weights).transform(x), FeatureScaler().fit(repeated).transform(x), rtol=1e-5, atol=1e-6
    )


def test_relevance_takes_weighted_correlations_less_one_over_the_effective_number():
    rng = np.random.default_rng(1)
    x, weights = rng.normal(size=(200, 5)), rng.random(200) + 0.1
    y = x[:, :2] + rng.normal(size=(200, 2))
    share = weights / weights.sum()
    centred_x, centred_y = x - share @ x, y - share @ y
    spread = np.sqrt(np.outer(share @ centred_x**2, share @ centred_y**2))
    squared = ((centred_x.T @ (share[:, None] * centred_y) / spread) ** 2).mean(axis=1)
    relevance = np.sqrt(np.maximum(squared - (share**2).sum(), 0) + 1e-4)
    found = FeatureScaler().fit(x, y, weights=weights).arrays()["relevance"]
    np.testing.assert_allclose(found, relevance / np.sqrt((relevance**2).mean()), rtol=1e-9)


@pytest.mark.parametrize("weights", [None, np.ones(60)])
def test_many_tiny_weights_leave_the_table_finite_and_increasing(weights):
    y, _, _ = weighted()
    weights = None if weights is None else np.where(np.arange(60) % 2, 1.0, 1e-9)
    arrays = LabelScaler("rank").fit(y[:, :1], weights).arrays()
    assert np.isfinite(arrays["knot_quantiles"]).all() and (np.diff(arrays["knot_quantiles"]) > 0).all()
