from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, rankdata

from oracle.errors import InputError, NotFiniteError
from surrogate.scaling import LABEL_SCALES, MAX_KNOTS, FeatureScaler, LabelScaler, average_ranks


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
