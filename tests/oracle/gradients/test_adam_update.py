"""Adam's update of a text's gradient against a real step of torch's optimiser."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from oracle.errors import InputError
from oracle.gradients import adam_update
from oracle.gradients.adam_update import AdamUpdateProducts, adam_steps

OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adam with decay": (torch.optim.Adam, {"weight_decay": 0.1}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "maximize": (torch.optim.Adam, {"maximize": True, "betas": (0.8, 0.95), "eps": 1e-4}),
}


def _trained(name, num_steps, make_module, make_token_texts, lr=1e-3):
    kind, options = OPTIMIZERS[name]
    module = make_module("gpt2").double()
    optimizer = kind(module.parameters(), lr=lr, **options)
    for row in make_token_texts(num_steps, seed=4):
        ids = torch.tensor([row["input_ids"]])
        module(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64)


@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_is_what_a_real_step_subtracts(name, num_steps, make_module, make_token_texts):
    """Decoupled weight decay, which is the same for all texts, is left out: it is added back here."""
    lm = _trained(name, num_steps, make_module, make_token_texts)
    before = {key: p.detach().clone() for key, p in lm.module.named_parameters()}
    steps = adam_steps(lm, before)
    ids = torch.tensor([make_token_texts(1, seed=9)[0]["input_ids"]])
    lm.module(input_ids=ids, labels=ids).loss.backward()
    gradients = {key: p.grad.clone() for key, p in lm.module.named_parameters()}
    updates = {key: steps[key].update(gradients[key].reshape(-1), 0) for key in before}
    lm.optimizer.step()
    for key, p in lm.module.named_parameters():
        group = lm.optimizer.param_groups[0]
        decayed = before[key] * (1 - group["lr"] * group["weight_decay"]) if group["decoupled_weight_decay"] else before[key]
        torch.testing.assert_close(decayed - updates[key].view_as(p), p.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_tends_to_it_as_the_learning_rate_tends_to_0(name, max_grad_norm, make_module, make_token_texts):
    sample, targets, errors = make_token_texts(6, seed=2), {"t": make_token_texts(6, seed=5)}, []
    for lr in (1e-4, 1e-5):
        lm = _trained(name, 3, make_module, make_token_texts, lr=lr)
        step = oracle.label(lm, sample, targets, method="one_step", subtract_shared=True, max_grad_norm=max_grad_norm)
        slope = oracle.label(lm, sample, targets, method="grad_dot", update="adam", max_grad_norm=max_grad_norm)
        assert slope.units == step.units == "nats per target token"
        errors.append(np.abs(step.values - slope.values).max() / np.abs(step.values).max())
    assert errors[1] < 2e-3
    assert errors[1] < errors[0] / 5  # the gap shrinks with the step
    np.testing.assert_allclose(slope.columns["gradient_norm"], step.columns["gradient_norm"], rtol=1e-5)


def _with_an_expert(module):
    """Add a parameter that only texts with token 7 reach."""
    module.expert = torch.nn.Parameter(torch.linspace(-1, 1, 211, dtype=torch.float64))

    def add(module, args, kwargs, output):
        if bool((kwargs["input_ids"] == 7).any()):
            output.logits = output.logits + module.expert

    module.register_forward_hook(add, with_kwargs=True)
    return module


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_that_the_text_does_not_reach_is_not_stepped(name, make_module, make_token_texts):
    kind, options = OPTIMIZERS[name]
    if "weight_decay" in options:
        options = {**options, "weight_decay": 1.0}
    without = [{"input_ids": [token for token in row["input_ids"] if token != 7]} for row in make_token_texts(4, seed=2)]
    sample, errors = [*without, *({"input_ids": [5, 7, *row["input_ids"]]} for row in without)], []
    targets = {"t": [{"input_ids": [7, *row["input_ids"]]} for row in make_token_texts(6, seed=5)]}
    for lr in (1e-4, 1e-5):
        module = _with_an_expert(make_module("gpt2").double())
        optimizer = kind(module.parameters(), lr=lr, **options)
        for row in sample[-3:]:
            ids = torch.tensor([row["input_ids"]])
            module(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        lm = oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64)
        step = oracle.label(lm, sample, targets, method="one_step", subtract_shared=True)
        slope = oracle.label(lm, sample, targets, method="grad_dot", update="adam")
        errors.append(np.abs(step.values - slope.values).max() / np.abs(step.values).max())
    assert errors[1] < 2e-3 and errors[1] < errors[0] / 5, errors


def test_the_linear_part_is_another_one_where_moments_are_small(make_module, make_token_texts):
    lm = _trained("adamw", 3, make_module, make_token_texts, lr=1e-5)
    sample, targets = make_token_texts(6, seed=2), {"t": make_token_texts(6, seed=5)}
    whole = oracle.label(lm, sample, targets, method="grad_dot", update="adam").values
    linear = oracle.label(lm, sample, targets, method="grad_dot").values
    assert np.abs(whole - linear).max() > 0.1 * np.abs(whole).max()


def test_a_text_without_gradient_has_no_influence(make_module, make_token_texts):
    lm = _trained("adam with decay", 3, make_module, make_token_texts)
    rows = [{"input_ids": [4, 5, 6], "labels": [4, -100, -100]}, {"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}]
    labels = oracle.label(lm, rows, {"t": make_token_texts(6, seed=5)}, method="grad_dot", update="adam")
    assert labels.values[0, 0] == 0.0 and labels.values[1, 0] != 0.0
    assert max(map(abs, labels.meta["facts"]["shared_part_of_target_parts"])) > 1e-6  # momentum alone does something


def test_small_blocks_change_nothing(make_module, make_token_texts, monkeypatch):
    lm = _trained("amsgrad", 3, make_module, make_token_texts)
    targets = {name: torch.randn(2, *p.shape) for name, p in lm.module.named_parameters()}
    encoded = lm.encode(make_token_texts(3, seed=2))
    whole = AdamUpdateProducts(lm, targets, losses=lm.text_losses).measure(encoded).products
    monkeypatch.setattr(adam_update, "BLOCK_ELEMENTS", 17)
    blocked = AdamUpdateProducts(lm, targets, losses=lm.text_losses).measure(encoded).products
    np.testing.assert_allclose(blocked, whole, rtol=1e-9)


def test_parameters_that_the_optimiser_does_not_hold_do_not_count(make_module, make_token_texts):
    module = make_module("gpt2").double()
    own = [p for name, p in module.named_parameters() if ".h.1." in name]
    lm = oracle.LanguageModel(module, optimizer=torch.optim.AdamW(own, lr=1e-5), max_tokens=64)
    sample, targets = make_token_texts(3, seed=2), {"t": make_token_texts(6, seed=5)}
    all_names = oracle.label(lm, sample, targets, method="grad_dot", update="adam")
    held = oracle.label(lm, sample, targets, method="grad_dot", update="adam", layers=r"\.h\.1\.")
    np.testing.assert_allclose(all_names.values, held.values, rtol=1e-6)
    with pytest.raises(InputError, match="holds none of the parameters"):
        oracle.label(lm, sample, targets, method="grad_dot", update="adam", layers=r"\.h\.0\.")


def test_other_optimisers_and_a_rate_of_0_are_refused(make_module, make_token_texts):
    module = make_module("gpt2")
    sample, targets = make_token_texts(2, seed=2), {"t": make_token_texts(3, seed=5)}
    for optimizer in (None, torch.optim.SGD(module.parameters(), lr=0.1), torch.optim.RAdam(module.parameters())):
        lm = oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64)
        with pytest.raises(InputError, match="Adam or AdamW"):
            oracle.label(lm, sample, targets, method="grad_dot", update="adam")
    lm = oracle.LanguageModel(module, optimizer=torch.optim.AdamW(module.parameters(), lr=0.0), max_tokens=64)
    with pytest.raises(InputError, match="learning rate is 0"):
        oracle.label(lm, sample, targets, method="grad_dot", update="adam")
