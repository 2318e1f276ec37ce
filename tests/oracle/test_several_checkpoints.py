"""Labels over several checkpoints are the weighted mean of the labels at each, and resume."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from oracle import plugins
from oracle.errors import InputError, InputTypeError, MismatchError
from oracle.several_checkpoints import label_checkpoints

RATES = (3e-3, 1e-3, 2e-3)


@pytest.fixture
def checkpoints(make_module, make_token_texts, make_adamw):
    """Three checkpoints of one run, with another learning rate each."""
    found = []
    for number, rate in enumerate(RATES):
        module = make_module("gpt2")
        optimizer = make_adamw(module, make_token_texts(9, seed=0), num_steps=2 + 2 * number)
        optimizer.param_groups[0]["lr"] = rate
        found.append(oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64))
    return found


@pytest.fixture
def sample(make_token_texts):
    return make_token_texts(5, seed=1)


@pytest.fixture
def targets(make_token_texts):
    return {"a": make_token_texts(4, seed=21), "b": make_token_texts(1, seed=22)}


def _alone(checkpoints, sample, targets, **options):
    return [oracle.label(lm, sample, targets, **{"method": "less", **options}) for lm in checkpoints]


@pytest.mark.parametrize(
    ("weights", "numbers"), [("learning_rate", RATES), ("equal", (1, 1, 1)), ([0.5, 4.0, 0.5], (0.5, 4.0, 0.5))]
)
def test_values_and_halves_are_the_weighted_mean(weights, numbers, checkpoints, sample, targets):
    labels = label_checkpoints(checkpoints, sample, targets, weights=weights)
    parts = _alone(checkpoints, sample, targets)
    shares = np.array(numbers) / sum(numbers)
    expected = sum(share * part.values.astype(np.float64) for share, part in zip(shares, parts, strict=True))
    np.testing.assert_allclose(labels.values, expected, rtol=1e-6, atol=1e-8)
    halves = sum(share * part.halves.astype(np.float64) for share, part in zip(shares, parts, strict=True))
    np.testing.assert_allclose(labels.halves, halves, rtol=1e-6, atol=1e-8)
    assert labels.values.dtype == np.float32 and labels.text_ids == parts[0].text_ids
    assert labels.units == "cosine"
    assert labels.meta["weights"] == pytest.approx(shares.tolist())
    assert labels.meta["checkpoints"] == [lm.fingerprint(optimizer=True) for lm in checkpoints]
    assert labels.meta["model"]["weights"] == checkpoints[-1].fingerprint()
    assert labels.meta["cost"]["label_flops"] == sum(part.meta["cost"]["label_flops"] for part in parts)


def test_columns_say_how_far_the_checkpoints_differ(checkpoints, sample, targets):
    labels = label_checkpoints(checkpoints, sample, targets)
    parts = _alone(checkpoints, sample, targets)
    values, norms = (
        np.stack([get(part) for part in parts]) for get in (lambda p: p.values, lambda p: p.columns["gradient_norm"])
    )
    np.testing.assert_allclose(labels.columns["spread.a"], values[:, :, 0].std(0), rtol=1e-4)
    np.testing.assert_allclose(labels.columns["spread.b"], values[:, :, 1].std(0), rtol=1e-4)
    np.testing.assert_allclose(labels.columns["gradient_norm"], norms.mean(0), rtol=1e-6)
    np.testing.assert_allclose(labels.columns["gradient_norm_variance"], norms.astype(np.float64).var(0), rtol=1e-4)
    assert (labels.columns["spread.a"] > 0).all()
    without = label_checkpoints(checkpoints, sample, targets, method="grad_dot", weights="equal")
    assert "gradient_norm" not in without.columns and "gradient_norm_variance" not in without.columns


def test_folders_are_loaded_and_give_what_the_models_give(checkpoints, sample, targets, tmp_path):
    for number, lm in enumerate(checkpoints):
        lm.save(tmp_path / str(number))
    paths = [tmp_path / "0", str(tmp_path / "1"), tmp_path / "2"]
    loaded = label_checkpoints(paths, sample, targets, model_options={"max_tokens": 64, "device": "cpu"})
    expected = label_checkpoints(checkpoints, sample, targets)
    assert loaded.values.tobytes() == expected.values.tobytes()
    assert loaded.meta["learning_rates"] == pytest.approx(RATES)
    with pytest.raises(InputError, match="no effect"):
        label_checkpoints(checkpoints, sample, targets, model_options={"max_tokens": 64})


def test_finished_checkpoints_are_read_and_one_more_costs_only_itself(checkpoints, sample, targets, tmp_path, monkeypatch):
    plugin, prepared = plugins.load("oracle.methods", "less"), []
    original = plugin.prepare
    monkeypatch.setattr(plugin, "prepare", lambda self, *args: (prepared.append(1), original(self, *args)))
    two = label_checkpoints(checkpoints[:2], sample, targets, workdir=tmp_path)
    assert len(prepared) == 2
    again = label_checkpoints(checkpoints[:2], sample, targets, workdir=tmp_path)
    assert len(prepared) == 2 and again.values.tobytes() == two.values.tobytes()
    three = label_checkpoints(checkpoints, sample, targets, workdir=tmp_path)
    assert len(prepared) == 3
    assert three.values.tobytes() == label_checkpoints(checkpoints, sample, targets).values.tobytes()
    stored = oracle.Labels.load(tmp_path)
    assert stored.values.tobytes() == three.values.tobytes() and stored.meta["weights"] == three.meta["weights"]
    np.testing.assert_array_equal(stored.columns["gradient_norm_variance"], three.columns["gradient_norm_variance"])


def test_a_kill_between_checkpoints_keeps_the_first(checkpoints, sample, targets, tmp_path, monkeypatch):
    plugin = plugins.load("oracle.methods", "less")
    original, seen = plugin.measure, []

    def dies_at_the_second(self, encoded):
        seen.append(self.lm_)
        if self.lm_ is checkpoints[1]:
            raise KeyboardInterrupt
        return original(self, encoded)

    with monkeypatch.context() as patch:
        patch.setattr(plugin, "measure", dies_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            label_checkpoints(checkpoints, sample, targets, workdir=tmp_path)
    assert not (tmp_path / "labels.parquet").exists()
    resumed = label_checkpoints(checkpoints, sample, targets, workdir=tmp_path)
    assert resumed.values.tobytes() == label_checkpoints(checkpoints, sample, targets).values.tobytes()


def test_labels_of_an_earlier_sample_stay_in_the_folder(checkpoints, sample, targets, tmp_path):
    first = label_checkpoints(checkpoints, sample[:3], targets, workdir=tmp_path)
    second = label_checkpoints(checkpoints, sample[2:], targets, workdir=tmp_path)
    assert len(second) == 3
    stored = oracle.Labels.load(tmp_path)
    assert len(stored) == 5
    np.testing.assert_array_equal(stored.take(first.text_ids).values, first.values)


def test_a_folder_holds_labels_of_one_kind(checkpoints, sample, targets, tmp_path):
    label_checkpoints(checkpoints[:2], sample, targets, workdir=tmp_path / "several")
    stored = (tmp_path / "several/labels.parquet").read_bytes()
    with pytest.raises(MismatchError, match="similarity"):
        label_checkpoints(checkpoints[2:], sample, targets, similarity="dot", workdir=tmp_path / "several")
    with pytest.raises(MismatchError, match="several checkpoints"):
        oracle.label(checkpoints[0], sample, targets, method="less", workdir=tmp_path / "several")
    assert (tmp_path / "several/labels.parquet").read_bytes() == stored
    oracle.label(checkpoints[0], sample, targets, method="less", workdir=tmp_path / "single")
    with pytest.raises(MismatchError, match="one checkpoint"):
        label_checkpoints(checkpoints, sample, targets, workdir=tmp_path / "single")


def test_checkpoints_that_do_not_belong_together_are_refused(
    checkpoints, sample, targets, make_module, make_token_texts, make_adamw
):
    other = make_module("llama", vocab_size=230)
    wider = oracle.LanguageModel(other, optimizer=make_adamw(other, make_token_texts(4, seed=0)), max_tokens=64)
    with pytest.raises(MismatchError, match="vocabulary_size 230 and not 211"):
        label_checkpoints([checkpoints[0], wider], sample, targets)
    checkpoints[1].max_tokens = 32
    with pytest.raises(MismatchError, match="max_tokens 32 and not 64"):
        label_checkpoints(checkpoints, sample, targets)
    with pytest.raises(InputError, match="same as an earlier one"):
        label_checkpoints([checkpoints[0], checkpoints[0]], sample, targets)
    bare = oracle.LanguageModel(checkpoints[2].module, max_tokens=64)
    with pytest.raises(MismatchError, match="per unit of learning rate"):
        label_checkpoints([checkpoints[0], bare], sample, targets, method="grad_dot", weights="equal")


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 0.0, 1.0], [1.0, float("nan"), 1.0], "learning_rates"])
def test_weights_that_do_not_fit_are_refused(weights, checkpoints, sample, targets):
    with pytest.raises(InputError, match="weights"):
        label_checkpoints(checkpoints, sample, targets, weights=weights)


def test_a_learning_rate_that_cannot_weigh_is_refused(checkpoints, sample, targets):
    with pytest.raises(InputError, match="count the learning rate twice"):
        label_checkpoints(checkpoints, sample, targets, method="one_step")
    checkpoints[0].optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(InputError, match=r"number 0 has the learning rates \[0.0\]"):
        label_checkpoints(checkpoints, sample, targets)
    bare = oracle.LanguageModel(checkpoints[1].module, max_tokens=64)
    with pytest.raises(InputError, match="no optimiser"):
        label_checkpoints([bare], sample, targets, method="grad_dot")


def test_what_is_no_list_of_checkpoints_is_refused(checkpoints, sample, targets):
    with pytest.raises(InputError, match="there is no checkpoint"):
        label_checkpoints([], sample, targets)
    with pytest.raises(InputTypeError, match="checkpoints is a LanguageModel"):
        label_checkpoints(checkpoints[0], sample, targets)
    with pytest.raises(InputTypeError, match="among the checkpoints is a Linear"):
        label_checkpoints([torch.nn.Linear(2, 2)], sample, targets)


@pytest.mark.parametrize("weights", [["a", "b", "c"], [1.0, None, 1.0], 3, [1.0, float("nan"), 1.0]], ids=str)
def test_weights_that_are_no_positive_numbers_are_refused(weights, checkpoints, sample, targets):
    with pytest.raises(InputError, match="weights are"):
        label_checkpoints(checkpoints, sample, targets, weights=weights)


def test_a_second_call_says_that_it_measured_nothing(checkpoints, sample, targets, tmp_path):
    label_checkpoints(checkpoints[:2], sample, targets, weights="equal", workdir=tmp_path)
    part = label_checkpoints(checkpoints[:2], sample[:3], targets, weights="equal", workdir=tmp_path)
    assert part.meta["num_texts"] == 3 and part.meta["cost"]["num_measured_now"] == 0
