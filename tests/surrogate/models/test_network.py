from __future__ import annotations

import numpy as np
import pytest
import torch

from oracle.errors import InputError, NotFiniteError
from surrogate.fidelity import spearman
from surrogate.models import training_data
from surrogate.models.network import InfluenceNetwork, _gate
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
        expected = FeatureScaler().fit(checked.features).weighed_by(checked.features[~mask], labels[~mask])
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


def test_the_gate_counts_a_text_by_its_weight():
    rng = np.random.default_rng(0)
    targets, linear = rng.normal(size=(2, 30, 2))
    outputs = torch.from_numpy(2.0 * targets - linear + 0.5 * rng.normal(size=(30, 2))).float()
    counts = rng.integers(1, 4, size=30)
    repeats = np.repeat(np.arange(30), counts)
    expected = _gate(targets[repeats], linear=linear[repeats], outputs=outputs[repeats], counts=np.ones(len(repeats)))
    found = _gate(targets, linear=linear, outputs=outputs, counts=counts.astype(float))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert (found > 0).all() and (found < 1).all()


def test_the_size_of_all_weights_means_nothing_to_the_members():
    X, y, _ = data("nonlinear", 100)
    options = {"ensemble": 1, "max_epochs": 5, "linear_path": False}
    weights = np.random.default_rng(1).integers(1, 5, size=100) / 4
    one, eight = (InfluenceNetwork(**options).fit(X[:100], y, sample_weight=size * weights).predict(X) for size in (1, 8))
    np.testing.assert_array_equal(one, eight)


def test_members_go_on_from_the_weights_and_the_scaler_of_earlier_ones():
    X, y, _ = data("nonlinear", 200)
    options = {"ensemble": 2, "max_epochs": 3, "hidden": "8"}
    earlier = InfluenceNetwork(**options).fit(X[:100], y[:100])
    frozen = InfluenceNetwork(**{**options, "learning_rate": 1e-12}).fit(X[100:200], y[100:], warm_start=earlier)
    moved = InfluenceNetwork(**{**options, "max_epochs": 30}).fit(X[100:200], y[100:], warm_start=earlier)
    for member, still, changed in zip(earlier.members_, frozen.members_, moved.members_, strict=True):
        for name, array in member.arrays().items():
            np.testing.assert_allclose(still.arrays()[name], array, atol=1e-8)
            assert np.array_equal(changed.arrays()[name], array) or not name.startswith("features.")
    assert any(
        not np.array_equal(changed.weights[0], member.weights[0])
        for member, changed in zip(earlier.members_, moved.members_, strict=True)
    )


def test_an_earlier_member_that_training_does_not_improve_is_kept():
    X, y, _ = data("linear", 200)
    options = {"ensemble": 1, "max_epochs": 3, "hidden": "8", "dropout": 0.0}
    earlier = InfluenceNetwork(**options).fit(X[:200], y)
    spoiling = InfluenceNetwork(**{**options, "learning_rate": 0.9}).fit(X[:200], y, warm_start=earlier)
    for kept, member in zip(spoiling.members_, earlier.members_, strict=True):
        np.testing.assert_array_equal(kept.weights[0], member.weights[0])


def test_a_warm_start_of_another_shape_is_refused():
    X, y, _ = data("linear", 60)
    earlier = InfluenceNetwork(ensemble=1, max_epochs=1, hidden="8").fit(X[:60], y)
    InfluenceNetwork(ensemble=1, max_epochs=1, hidden=(8,)).fit(X[:60], y, warm_start=earlier)
    with pytest.raises(InputError, match=r"widths=\[8\]"):
        InfluenceNetwork(ensemble=1, max_epochs=1, hidden="8,4").fit(X[:60], y, warm_start=earlier)
    with pytest.raises(InputError, match="ensemble=1"):
        InfluenceNetwork(ensemble=2, max_epochs=1, hidden="8").fit(X[:60], y, warm_start=earlier)


def test_a_constant_target_is_exact_from_a_warm_start_without_the_linear_path():
    X, y, _ = data("linear", 60)
    options = {"ensemble": 1, "max_epochs": 5, "linear_path": False, "label_scale": "none"}
    earlier = InfluenceNetwork(**options).fit(X[:60], np.stack([y, -y], axis=1))
    network = InfluenceNetwork(**options).fit(X[:60], np.stack([y, np.full(60, 0.1)], axis=1), warm_start=earlier)
    np.testing.assert_array_equal(network.predict(X)[:, 1], np.float32(0.1))
