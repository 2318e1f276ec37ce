"""The state is sacred: everything is bit-identical after a snapshot is restored."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from oracle.language_model import LanguageModel


def _everything(lm):
    state = [p.detach().clone() for p in lm.module.state_dict().values()]
    slots = [torch.as_tensor(v).clone() for s in lm.optimizer.state.values() for v in s.values()]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in lm.optimizer.param_groups]
    grads = [None if p.grad is None else p.grad.clone() for p in lm.module.parameters()]
    return {
        "weights": state,
        "slots": slots,
        "groups": groups,
        "grads": grads,
        "modes": [m.training for m in lm.module.modules()],
        "requires_grad": [p.requires_grad for p in lm.module.parameters()],
        "hooks": [list(m._forward_hooks) for m in lm.module.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),
        "python": random.getstate(),
    }


def _assert_same(before, after):
    for key in ("weights", "slots", "grads"):
        assert len(before[key]) == len(after[key])
        for a, b in zip(before[key], after[key], strict=True):
            assert (a is None and b is None) or torch.equal(a, b), key
    for key in ("groups", "modes", "requires_grad", "hooks", "python"):
        assert before[key] == after[key], key
    assert torch.equal(before["torch"], after["torch"])
    assert np.array_equal(before["numpy"], after["numpy"])


def _disturb(lm):
    ids = torch.tensor([[5, 6, 7, 8]])
    for _ in range(2):
        lm.module(input_ids=ids, labels=ids).loss.backward()
        lm.optimizer.step()
    lm.optimizer.param_groups[0]["lr"] = 7.0
    lm.module.train()
    next(lm.module.modules()).register_forward_hook(lambda *a: None)
    next(lm.module.parameters()).requires_grad_(False)
    torch.rand(3), np.random.rand(3), random.random()


@pytest.mark.parametrize("has_state", [True, False], ids=["after some steps", "fresh optimiser"])
@pytest.mark.parametrize("raises", [True, False])
def test_everything_is_bit_identical_after_a_disturbed_block(has_state, raises, make_module, make_token_texts, make_adamw):
    module = make_module("neox")
    optimizer = make_adamw(module, make_token_texts(4, seed=0)) if has_state else torch.optim.AdamW(module.parameters())
    lm = LanguageModel(module, optimizer=optimizer, max_tokens=64)
    ids = torch.tensor([[9, 8, 7]])
    module.train()
    module(input_ids=ids, labels=ids).loss.backward()  # leaves gradients behind, as an accumulating trainer does
    before = _everything(lm)
    try:
        with lm.preserved():
            _disturb(lm)
            if raises:
                raise KeyError("in the middle")
    except KeyError:
        pass
    _assert_same(before, _everything(lm))


def test_references_to_weights_and_moments_stay_valid(make_module, make_token_texts, make_adamw):
    module = make_module("llama")
    lm = LanguageModel(module, optimizer=make_adamw(module, make_token_texts(4, seed=0)), max_tokens=64)
    parameter = next(module.parameters())
    moment = lm.optimizer.state[parameter]["exp_avg"]
    with lm.preserved():
        _disturb(lm)
    assert lm.optimizer.state[parameter]["exp_avg"] is moment
    assert next(module.parameters()) is parameter


def test_a_snapshot_is_not_changed_by_later_steps(make_module, make_token_texts, make_adamw):
    module = make_module("llama")
    lm = LanguageModel(module, optimizer=make_adamw(module, make_token_texts(4, seed=0)), max_tokens=64)
    snapshot = lm.snapshot()
    prints = []
    for _ in range(3):
        _disturb(lm)
        lm.restore(snapshot)
        prints.append(lm.fingerprint(optimizer=True))
    assert len(set(prints)) == 1
