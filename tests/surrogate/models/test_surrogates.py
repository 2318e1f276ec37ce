"""The contract of every surrogate found on disk."""

from __future__ import annotations

import json

import numpy as np
import pytest

from oracle import plugins
from oracle.errors import InputError, MismatchError, NotFiniteError

PACKAGE = "surrogate.models"
NAMES = plugins.names(PACKAGE)
QUICK = {"network": {"ensemble": 2, "max_epochs": 10, "hidden": "16"}, "trees": {"num_trees": 30, "min_trees": 5}}


def make(name, **options):
    return plugins.create(PACKAGE, name, {**QUICK.get(name, {}), **options})


def linear_data(num_texts=120, num_features=20, seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(num_texts, num_features)).astype(np.float32)
    y = np.stack([X[:, 0] - X[:, 1], 0.01 * (X[:, 2] + X[:, 0])], axis=1)
    return X, y + noise * y.std(axis=0) * rng.normal(size=y.shape)


def rank_correlation(a, b):
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return np.corrcoef(*ranks)[0, 1]


def test_the_three_surrogates_are_found():
    assert {"ridge", "network", "trees"} <= set(NAMES)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def fitted():
    X, y = linear_data()
    return {name: make(name).fit(X, y) for name in NAMES}


def test_scores_have_one_float32_column_per_target_and_order_new_texts(name, fitted):
    X, y = linear_data(seed=1, noise=0.0)
    scores = fitted[name].predict(X)
    assert scores.shape == y.shape and scores.dtype == np.float32 and np.isfinite(scores).all()
    for column in range(2):
        assert rank_correlation(scores[:, column], y[:, column]) > 0.5


def test_scores_are_in_label_units(name):
    X, y = linear_data(noise=0.0)
    shifted = 1e-4 * y + 7.0
    scores = make(name).fit(X, shifted).predict(X)
    assert np.abs(scores - shifted).max() < 1e-3
    assert np.corrcoef(scores[:, 0], shifted[:, 0])[0, 1] > 0.5


def test_labels_without_a_column_axis_are_one_target(name):
    X, y = linear_data()
    flat, column = make(name).fit(X, y[:, 0]), make(name).fit(X, y[:, :1])
    assert flat.predict(X).shape == (len(X), 1)
    np.testing.assert_array_equal(flat.predict(X), column.predict(X))


@pytest.mark.parametrize("label_scale", ["rank", "robust", "none"])
def test_a_constant_target_is_predicted_exactly_and_harms_no_other(name, label_scale):
    X, y = linear_data()
    y[:, 1] = 0.1
    scores = make(name, label_scale=label_scale).fit(X, y).predict(X)
    np.testing.assert_array_equal(scores[:, 1], np.float32(0.1))
    assert rank_correlation(scores[:, 0], y[:, 0]) > 0.5


def test_constant_features_do_not_break_it(name):
    X, y = linear_data()
    X[:, 3:] = 0.7
    assert np.isfinite(make(name).fit(X, y).predict(X)).all()
    scores = make(name).fit(np.ones_like(X), y).predict(X)
    assert np.isfinite(scores).all()


def test_same_seed_same_bytes_and_row_order_does_not_matter(name):
    X, y = linear_data()
    X_new, _ = linear_data(seed=2)
    groups = np.arange(len(X)) // 2
    order = np.random.default_rng(0).permutation(len(X))
    first = make(name).fit(X, y, groups=groups).predict(X_new)
    assert first.tobytes() == make(name).fit(X, y, groups=groups).predict(X_new).tobytes()
    assert first.tobytes() == make(name).fit(X[order], y[order], groups=groups[order]).predict(X_new).tobytes()


def test_a_seed_changes_random_surrogates(name):
    if "seed" not in plugins.options_of(make(name)):
        pytest.skip("not random")
    X, y = linear_data()
    assert not np.array_equal(make(name, seed=0).fit(X, y).predict(X), make(name, seed=1).fit(X, y).predict(X))


def test_scores_do_not_depend_on_the_batch(name, fitted):
    X, _ = linear_data(seed=3)
    whole = fitted[name].predict(X)
    single = np.concatenate([fitted[name].predict(row[None]) for row in X[:20]])
    np.testing.assert_allclose(single, whole[:20], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(fitted[name].predict(X[::-1])[::-1], whole, rtol=1e-4, atol=1e-6)
    assert fitted[name].predict(X[:0]).shape == (0, 2)


def test_a_loaded_surrogate_predicts_the_same_bytes(name, fitted, tmp_path):
    X, _ = linear_data(seed=4)
    fitted[name].save(tmp_path / "model")
    loaded = type(fitted[name]).load(tmp_path / "model")
    assert loaded.predict(X).tobytes() == fitted[name].predict(X).tobytes()
    assert plugins.options_of(loaded) == plugins.options_of(fitted[name])
    assert not [path for path in (tmp_path / "model").iterdir() if path.suffix not in {".json", ".safetensors", ".txt"}]


def test_a_folder_of_another_surrogate_is_refused(name, fitted, tmp_path):
    fitted[name].save(tmp_path)
    stored = json.loads((tmp_path / "surrogate.json").read_text())
    (tmp_path / "surrogate.json").write_text(json.dumps({**stored, "plugin": "another"}))
    with pytest.raises(MismatchError):
        type(fitted[name]).load(tmp_path)


def test_bad_input_is_refused_in_three_parts(name, fitted, tmp_path):
    X, y = linear_data()
    with_nan, with_inf = X.copy(), y.copy()
    with_nan[3, 2], with_inf[5, 1] = np.nan, np.inf
    for bad_X, bad_y, groups, error in [
        (with_nan, y, None, NotFiniteError),
        (X, with_inf, None, NotFiniteError),
        (X[:9], y[:9], None, InputError),
        (X, y[:-1], None, InputError),
        (X[:, 0], y, None, InputError),
        (X, y, np.zeros(len(X), dtype=int), InputError),
        (X, y, np.arange(3), InputError),
        (X.astype(np.float64) * 1e300, y, None, NotFiniteError),
    ]:
        with pytest.raises(error) as caught:
            make(name).fit(bad_X, bad_y, groups=groups)
        assert caught.value.given and caught.value.accepted and caught.value.remedy
    with pytest.raises(NotFiniteError, match="labels y"):
        make(name).fit(X, with_inf)
    with pytest.raises(InputError, match="not been fitted"):
        make(name).predict(X)
    with pytest.raises(InputError, match="not been fitted"):
        make(name).save(tmp_path)
    with pytest.raises(InputError, match="19 columns"):
        fitted[name].predict(X[:, 1:])
    with pytest.raises(NotFiniteError):
        fitted[name].predict(with_nan)
    with pytest.raises(InputError, match="label_scale"):
        make(name, label_scale="ranks")


def test_weights_of_one_change_no_byte(name):
    X, y = linear_data()
    plain, ones = (make(name).fit(X, y, sample_weight=weights).predict(X) for weights in (None, np.ones(len(X))))
    assert plain.tobytes() == ones.tobytes()


@pytest.mark.parametrize("little", [0.0, 1e-12])
def test_rows_of_weight_zero_are_absent(name, little):
    X, y = linear_data()
    rng = np.random.default_rng(0)
    weights = np.where(rng.random(len(X)) < 0.3, little, rng.integers(1, 3, size=len(X)) / 2)
    used, groups = weights > little, np.arange(len(X)) // 2
    y[~used] += 100.0
    all_rows = make(name).fit(X, y, groups=groups, sample_weight=weights).predict(X)
    alone = make(name).fit(X[used], y[used], groups=groups[used], sample_weight=weights[used]).predict(X)
    assert all_rows.tobytes() == alone.tobytes()


def test_texts_of_little_weight_are_outvoted(name):
    X, y = linear_data(240, 8, noise=0.1)
    X_new, truth = linear_data(100, 8, seed=1, noise=0.0)
    y[::2] *= -1.0
    for even, sign in ((0.05, 1), (20.0, -1)):
        scores = make(name).fit(X, y, sample_weight=np.where(np.arange(240) % 2, 1.0, even)).predict(X_new)
        assert all(sign * rank_correlation(scores[:, column], truth[:, column]) > 0.5 for column in range(2))


def test_row_order_does_not_matter_where_equal_rows_have_unequal_weights(name):
    X, y = linear_data(60)
    X, y, weights = np.concatenate([X, X]), np.concatenate([y, y]), np.linspace(0.5, 2.0, 120)
    groups, order = np.tile(np.arange(60), 2), np.random.default_rng(0).permutation(120)
    first = make(name).fit(X, y, groups=groups, sample_weight=weights).predict(X)
    again = make(name).fit(X[order], y[order], groups=groups[order], sample_weight=weights[order]).predict(X)
    assert first.tobytes() == again.tobytes()


def test_weights_that_cannot_be_used_are_refused(name):
    X, y = linear_data(30)
    weights = np.ones(30)
    for bad in (np.ones(29), np.ones((30, 1)), np.where(np.arange(30), 1.0, np.nan), np.where(np.arange(30), 1.0, -1.0)):
        with pytest.raises(InputError, match="sample_weight"):
            make(name).fit(X, y, sample_weight=bad)
    weights[9:] = 0.0
    with pytest.raises(InputError, match="9 labelled texts of positive weight"):
        make(name).fit(X, y, sample_weight=weights)
    with pytest.raises(InputError, match="0 labelled texts of positive weight"):
        make(name).fit(X, y, sample_weight=0 * weights)


def drifted(num_texts, seed, *, kept=0.7):
    """Features, noisy labels of two times whose truths correlate by `kept`, and the later truth."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(num_texts, 60)).astype(np.float32)
    then = X[:, :20].sum(axis=1, dtype=np.float64) / np.sqrt(20)
    now = kept * then + np.sqrt(1 - kept**2) * X[:, 20:40].sum(axis=1) / np.sqrt(20)
    noise = rng.normal(size=(2, num_texts))
    return X, (then + noise[0])[:, None], (5.0 + 0.01 * (now + noise[1]))[:, None], now


def test_a_warm_start_helps_where_influence_has_drifted_and_harms_little_where_it_is_new(name):
    X, then, _, _ = drifted(400, 0)
    earlier = make(name).fit(X, then)
    for kept, least in ((0.95, 0.05), (0.0, -0.1)):
        X_now, _, labels, _ = drifted(60, 1, kept=kept)
        X_test, _, _, truth = drifted(600, 2, kept=kept)
        cold, warm = (
            rank_correlation(make(name).fit(X_now, labels, warm_start=start).predict(X_test)[:, 0], truth)
            for start in (None, earlier)
        )
        assert warm > cold + least


def test_a_warm_start_is_repeatable_whatever_the_row_order_and_is_saved(name, tmp_path):
    X, then, now, _ = drifted(160, 0)
    earlier = make(name).fit(X[:80], then[:80])
    order = 80 + np.random.default_rng(0).permutation(80)
    weights = np.random.default_rng(1).random(160)
    first = make(name).fit(X[80:], now[80:], sample_weight=weights[80:], warm_start=earlier)
    again = make(name).fit(X[order], now[order], sample_weight=weights[order], warm_start=earlier)
    assert first.predict(X).tobytes() == again.predict(X).tobytes()
    first.save(tmp_path)
    loaded = type(first).load(tmp_path)
    assert loaded.predict(X).tobytes() == first.predict(X).tobytes()
    further, same = (make(name).fit(X[:80], now[:80], warm_start=start) for start in (first, loaded))
    assert further.predict(X).tobytes() == same.predict(X).tobytes()


@pytest.mark.parametrize("label_scale", ["rank", "robust", "none"])
def test_a_warm_start_keeps_a_constant_target_exact(name, label_scale):
    X, y = linear_data()
    earlier = make(name, label_scale=label_scale).fit(X, y)
    X_now, y_now = linear_data(seed=5)
    y_now[:, 1] = 0.1
    scores = make(name, label_scale=label_scale).fit(X_now, y_now, warm_start=earlier).predict(X_now)
    assert rank_correlation(scores[:, 0], y_now[:, 0]) > 0.5
    np.testing.assert_array_equal(scores[:, 1], np.float32(0.1))


def test_a_warm_start_from_something_else_is_refused(name, fitted):
    X, y = linear_data()
    other = next(surrogate for other, surrogate in fitted.items() if other != name)
    for start, bad_X, bad_y, match in [
        (other, X, y, "warm_start is a"),
        (make(name), X, y, "not been fitted"),
        (fitted[name], X[:, 1:], y, "features=20"),
        (fitted[name], X, y[:, :1], "targets=2"),
    ]:
        with pytest.raises(InputError, match=match):
            make(name).fit(bad_X, bad_y, warm_start=start)
    with pytest.raises(InputError, match="label_scale"):
        make(name, label_scale="none").fit(X, y, warm_start=fitted[name])


def test_ten_texts_and_more_features_than_texts_are_enough(name):
    X, y = linear_data(num_texts=10, num_features=40)
    assert np.isfinite(make(name).fit(X, y).predict(X)).all()


def test_global_random_states_are_neither_read_nor_changed(name):
    import random

    import torch

    X, y = linear_data()
    scores = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        scores.append(make(name).fit(X, y).predict(X))
        assert torch.equal(before[0], torch.get_rng_state())
        np.testing.assert_array_equal(before[1], np.random.get_state()[1])
        assert before[2] == random.getstate()
    np.testing.assert_array_equal(*scores)


def test_inputs_are_left_as_they_were(name):
    X, y = linear_data()
    X_before, y_before = X.copy(), y.copy()
    make(name).fit(X, y).predict(X)
    np.testing.assert_array_equal(X, X_before)
    np.testing.assert_array_equal(y, y_before)


def test_every_option_has_a_sentence_of_help(name):
    described = plugins.describe(PACKAGE, name)
    assert described["summary"] and described["cost"] and described["limit"] and described["paper"]
    assert all(option["help"].endswith(".") for option in described["options"])
