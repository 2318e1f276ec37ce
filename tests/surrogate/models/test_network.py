from __future__ import annotations

import numpy as np
import pytest
import torch

from oracle.errors import InputError, NotFiniteError
from surrogate.fidelity import spearman
from surrogate.models import training_data
from surrogate.models.network import InfluenceNetwork
from surrogate.models.ridge import RidgeSurrogate
from surrogate.scaling import FeatureScaler, LabelScaler
from surrogate.splits import grouped_holdout


def data(kind, num_texts=400, num_features=100, seed=0):
    """Embedding-like features: 10 hidden directions and noise; heavy-tailed labels of the first texts, truth of all."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(num_texts + 500, 10))
    X = hidden @ rng.normal(size=(10, num_features)) / np.sqrt(10) + 0.3 * rng.normal(size=(num_texts + 500, num_features))
    truth = hidden @ rng.normal(size=10) if kind == "linear" else hidden[:, 0] * hidden[:, 1] + np.abs(hidden[:, 2])
    truth = (truth - truth.mean()) / truth.std()
    return X, np.sinh(truth + 0.5 * rng.normal(size=len(truth)))[:num_texts], truth


def held_out_spearman(surrogate, kind):
    X, y, truth = data(kind)
    return spearman(surrogate.fit(X[: len(y)], y).predict(X[len(y) :])[:, 0], truth[len(y) :])


def test_it_beats_ridge_on_a_nonlinear_function_and_equals_it_on_a_linear_one():
    assert held_out_spearman(InfluenceNetwork(), "nonlinear") > held_out_spearman(RidgeSurrogate(), "nonlinear") + 0.2
    assert held_out_spearman(InfluenceNetwork(), "linear") > held_out_spearman(RidgeSurrogate(), "linear") - 0.01


def test_limit_with_the_gate_at_zero_it_equals_ridge():
    X, y, _ = data("linear", 60)
    network = InfluenceNetwork(ensemble=1, max_epochs=1).fit(X[:60], y)
    network.gate_ = torch.zeros(1)
    np.testing.assert_allclose(network.predict(X), RidgeSurrogate().fit(X[:60], y).predict(X), rtol=1e-3, atol=1e-3)


def test_members_that_learned_nothing_are_gated_out():
    X, y, _ = data("linear", 200)
    network = InfluenceNetwork(ensemble=2, max_epochs=1, learning_rate=1e-9).fit(X[:200], y)
    assert network.gate_[0] < 0.2
    assert spearman(network.predict(X)[:, 0], RidgeSurrogate().fit(X[:200], y).predict(X)[:, 0]) > 0.999


def test_each_member_weighs_features_by_its_own_training_texts_alone():
    X, y, _ = data("linear", 60)
    network = InfluenceNetwork(ensemble=3, max_epochs=2).fit(X[:60], y)
    checked = training_data(X[:60], y, None)
    labels = LabelScaler("rank").fit(checked.labels).transform(checked.labels)
    for number, member in enumerate(network.members_):
        mask = grouped_holdout(checked.groups, fraction=0.2, seed=number, keys=checked.keys)
        expected = FeatureScaler().fit(checked.features[~mask], labels[~mask])
        for name, array in expected.arrays().items():
            np.testing.assert_allclose(member.scaler.arrays()[name], array, rtol=1e-9)


def test_on_noise_the_members_do_not_pass_for_learned_and_scores_stay_near_the_middle():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(300, 1000)), rng.normal(size=(300, 2))
    scores = InfluenceNetwork(ensemble=2, max_epochs=20, label_scale="none").fit(X, y).predict(X)
    assert (scores.std(axis=0) < 0.5).all()


@pytest.mark.parametrize("options", [{"linear_path": False}, {"weigh_features": False}, {"ensemble": 1}])
def test_every_kind_of_network_is_saved_and_loaded(options, tmp_path):
    X, y, _ = data("linear", 60)
    network = InfluenceNetwork(**{"ensemble": 2, "max_epochs": 2, **options}).fit(X[:60], y)
    network.save(tmp_path)
    assert InfluenceNetwork.load(tmp_path).predict(X).tobytes() == network.predict(X).tobytes()


@pytest.mark.parametrize("label_scale", ["rank", "robust", "none"])
def test_a_constant_target_is_exact_without_the_linear_path_too(label_scale):
    X, y, _ = data("linear", 60)
    labels = np.stack([y, np.full(60, 0.1)], axis=1)
    network = InfluenceNetwork(ensemble=1, max_epochs=5, linear_path=False, label_scale=label_scale).fit(X[:60], labels)
    np.testing.assert_array_equal(network.predict(X)[:, 1], np.float32(0.1))


def test_the_spread_is_the_standard_deviation_of_members_in_label_units():
    X, y, _ = data("nonlinear", 100)
    network = InfluenceNetwork(ensemble=3, max_epochs=5, label_scale="none", linear_path=False).fit(X[:100], y)
    mean, spread = network.predict(X, return_spread=True)
    np.testing.assert_array_equal(mean, network.predict(X))
    members, alone = network.members_, []
    for member in members:
        network.members_ = [member]
        alone.append(network.predict(X))
    np.testing.assert_allclose(mean, np.mean(alone, axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(spread, np.std(alone, axis=0), rtol=1e-3, atol=1e-5)
    assert (spread > 0).all()


def test_one_member_has_no_spread():
    X, y, _ = data("linear", 60)
    _, spread = InfluenceNetwork(ensemble=1, max_epochs=2).fit(X[:60], y).predict(X, return_spread=True)
    np.testing.assert_array_equal(spread, np.zeros_like(spread))


def test_a_callers_torch_settings_do_not_reach_in():
    X, y, _ = data("linear", 60)
    options = {"ensemble": 1, "max_epochs": 3, "hidden": (8, 4)}
    expected = InfluenceNetwork(**options).fit(X[:60], y).predict(X)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            scores = InfluenceNetwork(**options).fit(X[:60], y).predict(X)
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(scores, expected)


def test_hidden_takes_text_or_numbers():
    X, y, _ = data("linear", 40)
    scores = [
        InfluenceNetwork(hidden=hidden, ensemble=1, max_epochs=2).fit(X[:40], y).predict(X) for hidden in ("8,4", (8, 4), [8, 4])
    ]
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_array_equal(scores[0], scores[2])


@pytest.mark.parametrize(
    "options",
    [
        {"hidden": ""},
        {"hidden": "8,x"},
        {"hidden": (0,)},
        {"dropout": 1.0},
        {"ensemble": 0},
        {"validation_fraction": 0.0},
        {"learning_rate": float("nan")},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        InfluenceNetwork(**options)


def test_diverging_training_is_an_error_and_not_a_prediction():
    X, y, _ = data("linear", 60)
    with pytest.raises(NotFiniteError, match="diverged"):
        InfluenceNetwork(label_scale="none", ensemble=1).fit(X[:60], 1e25 * y)
