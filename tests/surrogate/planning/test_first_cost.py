"""The first refresh is expected to cost what it then does cost."""

from __future__ import annotations

import pytest

import oracle
from oracle.targets import read_targets
from oracle.texts import read_texts
from surrogate.features.model_state import ModelState
from surrogate.planning.first_cost import expected_first
from surrogate.planning.overhead import Overhead
from surrogate.training.strategies.loss import Loss
from surrogate.training.strategies.oracle import Oracle
from surrogate.training.strategies.random import Random
from surrogate.training.strategies.refresh import Refresh


@pytest.fixture(scope="module")
def world(make_module, make_token_texts):
    lm = oracle.LanguageModel(make_module("llama"))
    pool = read_texts(make_token_texts(30, seed=0))
    return lm, pool, read_targets({"a": make_token_texts(4, seed=1), "b": make_token_texts(3, seed=2)})


def test_labels_of_the_whole_pool_cost_what_is_expected_of_them(world):
    lm, pool, targets = world
    cost = oracle.label(lm, pool, targets, method="grad_dot").meta["cost"]
    expected = expected_first(Refresh(sample_size=30, num_probe=0), pool, targets, lm=lm)
    assert expected.sampled.flops == pytest.approx(cost["label_flops"]) and expected.once.flops == 0.0
    assert expected.fixed.flops == pytest.approx(cost["prepare_flops"])
    shared = expected_first(Refresh(sample_size=30, num_probe=0), pool, targets, lm=lm, num_processes=3)
    assert shared.fixed.flops == pytest.approx(3 * cost["prepare_flops"]) and shared.sampled == expected.sampled
    everything = expected_first(Oracle(method="grad_dot"), pool, targets, lm=lm)
    assert everything.fixed.flops == pytest.approx(cost["label_flops"] + cost["prepare_flops"]) and not everything.sampled.flops
    assert expected_first(Oracle(method="target_similarity"), pool, targets, lm=lm).total().flops == 0.0


def test_the_probe_is_paid_whatever_the_sample(world):
    lm, pool, targets = world
    without, beside = (expected_first(Refresh(sample_size=10, num_probe=number), pool, targets, lm=lm) for number in (0, 5))
    assert beside.sampled == without.sampled
    assert beside.fixed.flops - without.fixed.flops == pytest.approx(without.sampled.flops / 2)


def test_features_of_the_live_model_cost_what_the_encoder_counts(world):
    lm, pool, targets = world
    own = ModelState(model=lm, targets=targets).flops(pool)
    for encoder in ("model_state", ModelState(model=lm, targets=targets)):
        assert expected_first(Refresh(encoder=[encoder]), pool, targets, lm=lm).once.flops == pytest.approx(own)
    cascade = Refresh(second_encoder=["model_state"], second_share=0.2, sample_size=3, num_folds=3, num_probe=0)
    assert expected_first(cascade, pool, targets, lm=lm).once.flops == pytest.approx(own * 9 / 30)


def test_strategies_without_labels_cost_their_passes(world):
    lm, pool, targets = world
    tokens = sum(len(text.input_ids) for text in lm.encode(pool))
    assert expected_first(Loss(), pool, targets, lm=lm).fixed.flops == pytest.approx(lm.forward_flops_per_token * tokens)
    assert expected_first(Random(), pool, []).total().flops == 0.0


def test_a_first_refresh_that_is_too_dear_is_shrunk_or_refused(world):
    lm, pool, targets = world
    expected = expected_first(Refresh(sample_size=20, num_probe=0), pool, targets, lm=lm)
    account = Overhead(0.1, planned_flops=10 * (expected.fixed.flops + expected.sampled.flops / 2))
    assert account.decide(expected).sample_factor == pytest.approx(0.5)
    assert not account.decide(expected, min_factor=0.6).is_allowed


def test_counting_runs_no_model(world, monkeypatch):
    lm, pool, targets = world

    def refuse(*arguments, **options):
        raise AssertionError("a model ran")

    monkeypatch.setattr(type(lm.module), "forward", refuse)
    expected_first(Refresh(encoder=["hashed_ngrams", "model_state"]), pool, targets, lm=lm)
