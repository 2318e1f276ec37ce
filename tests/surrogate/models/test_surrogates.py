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
