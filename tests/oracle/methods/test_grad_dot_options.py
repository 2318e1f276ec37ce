"""Options of `grad_dot`: layers, statistics, and which of them exclude each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

import oracle
from oracle.errors import InputError


def _lm(make_module, kind="llama", optimizer=None, **options):
    return oracle.LanguageModel(make_module(kind, **options), optimizer=optimizer, max_tokens=64)


@pytest.fixture
def targets(make_token_texts):
    return {"first": make_token_texts(5, seed=11), "second": make_token_texts(4, seed=12)}


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.05}, {"similarity": "cosine"}, {"update": "adam"}], ids=str)
def test_layers_count_as_if_the_others_were_frozen(options, make_module, make_token_texts, make_adamw, targets):
    lm, sample = _lm(make_module), make_token_texts(7, seed=2)
    lm.optimizer = make_adamw(lm.module, make_token_texts(4, seed=0), lr=1e-4)
    some = oracle.label(lm, sample, targets, method="grad_dot", layers=r"layers\.1\.|lm_head", **options)
    assert all(p.requires_grad for p in lm.module.parameters())
    for name, parameter in lm.module.named_parameters():
        parameter.requires_grad_("layers.1." in name or "lm_head" in name)
    frozen = oracle.label(lm, sample, targets, method="grad_dot", **options)
    np.testing.assert_array_equal(some.values, frozen.values)
    assert some.units == frozen.units
    covered = sum(p.numel() for p in lm.module.parameters() if p.requires_grad)
    assert some.meta["facts"]["covered_parameters"] == covered
    assert some.meta["facts"]["covered_share"] == covered / lm.num_parameters


def test_labels_of_all_layers_are_those_of_their_parts_together(make_module, make_token_texts, targets):
    lm, sample = _lm(make_module), make_token_texts(7, seed=2)
    whole = oracle.label(lm, sample, targets, method="grad_dot").values
    parts = [r"embed|lm_head", r"layers\.0\.", r"layers\.1\.", r"^model\.norm"]
    together = sum(oracle.label(lm, sample, targets, method="grad_dot", layers=part).values for part in parts)
    np.testing.assert_allclose(together, whole, atol=1e-5 * np.abs(whole).max())
    linear_only = oracle.label(lm, sample, targets, method="grad_dot", layers="proj").values  # without embeddings and head
    assert np.abs(linear_only - whole).max() > 0.1 * np.abs(whole).max()


def test_a_pattern_that_finds_nothing_is_refused(make_module, make_token_texts, targets):
    with pytest.raises(InputError, match="finds none"):
        oracle.label(_lm(make_module), make_token_texts(2, seed=2), targets, method="grad_dot", layers="layer.7")


@pytest.mark.parametrize("options", [{}, {"per_text": True}, {"update": "adam"}, {"text_loss": "sum"}], ids=str)
def test_statistics_are_those_of_a_plain_loop(options, make_module, make_token_texts, make_adamw, targets):
    lm, sample = _lm(make_module), make_token_texts(9, seed=2)
    lm.optimizer = make_adamw(lm.module, make_token_texts(4, seed=0), lr=1e-4)
    labels = oracle.label(lm, sample, targets, method="grad_dot", statistics=True, **options)
    for row, text in enumerate(sample):
        ids = torch.tensor([text["input_ids"]])
        logits = lm.module(input_ids=ids).logits[0, :-1]
        losses = functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        loss = losses.sum() if options.get("text_loss") == "sum" else losses.mean()
        gradients = torch.autograd.grad(loss, list(lm.module.parameters()))
        p = torch.softmax(logits.detach(), dim=1)
        worst = losses.detach().sort(descending=True).values[: int(np.ceil(0.2 * len(losses)))]
        expected = {
            "mean_loss": losses.mean(),
            "text_loss": loss,
            "gradient_norm": sum(g.double().square().sum() for g in gradients).sqrt(),
            "error_norm": (p - functional.one_hot(ids[0, 1:], p.shape[1])).norm(dim=1).mean(),
            "min_k": -worst.mean(),
            "entropy": -(p * p.log()).sum(1).mean(),
        }
        assert set(expected) | {"num_tokens"} == set(labels.columns)
        for name, value in expected.items():
            assert labels.columns[name][row] == pytest.approx(float(value), rel=1e-4), name


def test_statistics_change_no_label_and_cost_no_forward_pass(make_module, make_token_texts, targets, monkeypatch):
    lm, sample = _lm(make_module), make_token_texts(9, seed=2)
    calls, forward = [], type(lm.module).forward
    monkeypatch.setattr(
        type(lm.module), "forward", lambda self, *args, **kwargs: calls.append(1) or forward(self, *args, **kwargs)
    )
    plain = oracle.label(lm, sample, targets, method="grad_dot")
    num_calls = len(calls)
    with_statistics = oracle.label(lm, sample, targets, method="grad_dot", statistics=True)
    assert len(calls) == 2 * num_calls
    assert np.abs(plain.values - with_statistics.values).max() < 1e-5 * np.abs(plain.values).max()
    assert set(plain.columns) == {"num_tokens", "text_loss"}
    assert not lm.module._forward_hooks


def test_a_text_without_target_token_has_statistics_of_zero(make_module, targets):
    rows = [{"input_ids": [4, 5, 6], "labels": [4, -100, -100]}, {"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}]
    labels = oracle.label(_lm(make_module), rows, targets, method="grad_dot", statistics=True)
    for name in ("mean_loss", "error_norm", "min_k", "entropy", "gradient_norm"):
        assert labels.columns[name][0] == 0.0 and labels.columns[name][1] != 0.0, name


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_norms_of_the_directions_are_taken_for_the_cosine_alone(similarity, make_module, make_token_texts, targets, monkeypatch):
    from oracle.methods import grad_dot

    calls, direction_norms = [], grad_dot.direction_norms
    monkeypatch.setattr(grad_dot, "direction_norms", lambda *args: calls.append(1) or direction_norms(*args))
    oracle.label(_lm(make_module), make_token_texts(2, seed=2), targets, method="grad_dot", similarity=similarity)
    assert len(calls) == (similarity == "cosine")


@pytest.mark.parametrize("option", [{"preconditioner": "none"}, {"similarity": "cosine"}, {"per_text": True}], ids=str)
def test_options_without_effect_on_adams_own_step_are_refused(option, make_module, make_token_texts, targets):
    with pytest.raises(InputError, match="no effect with update='adam'"):
        oracle.label(_lm(make_module), make_token_texts(2, seed=2), targets, method="grad_dot", update="adam", **option)
    with pytest.raises(InputError, match="update='adamw' is not known"):
        oracle.label(_lm(make_module), make_token_texts(2, seed=2), targets, method="grad_dot", update="adamw")


def test_labels_are_those_of_evaluation_mode_also_while_training(make_module, make_token_texts, targets):
    module = make_module("llama", attention_dropout=0.5)
    lm, sample = oracle.LanguageModel(module, max_tokens=64), make_token_texts(5, seed=2)
    expected = oracle.label(lm, sample, targets, method="grad_dot")
    module.train()
    found = oracle.label(lm, sample, targets, method="grad_dot")
    np.testing.assert_array_equal(found.values, expected.values)
    assert module.training and module.model.layers[0].training


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_labels_under_automatic_mixed_precision_are_close(kind, make_module, make_token_texts, targets):
    lm, sample = _lm(make_module, kind), make_token_texts(9, seed=2)
    expected = oracle.label(lm, sample, targets, method="grad_dot")
    with torch.autocast("cpu", torch.bfloat16):
        low = oracle.label(lm, sample, targets, method="grad_dot")
        slow = oracle.label(lm, sample, targets, method="grad_dot", per_text=True)
    assert low.meta["facts"]["route"] == "batched"
    assert np.abs(low.values - slow.values).max() < 5e-3 * np.abs(slow.values).max()
    assert 1e-6 < np.abs(low.values - expected.values).max() / np.abs(expected.values).max() < 0.1
