"""Refusals of a model that cannot be stepped: one for everything that steps."""

from __future__ import annotations

import warnings

import pytest
import torch

import oracle
from oracle.errors import InputError
from oracle.optimizers import FreshOptimizerWarning, require_optimizer, warn_of_fresh_adam


def test_a_missing_optimiser_and_a_rate_of_0_are_refused_by_the_name_of_what_needs_it(make_module):
    module = make_module("llama")
    with pytest.raises(InputError, match="this needs the optimiser that trains the model, and there is none") as raised:
        require_optimizer(oracle.LanguageModel(module, max_tokens=64), needed_by="this", otherwise="use that")
    assert "the run's optimiser, with its state" in raised.value.remedy
    assert raised.value.remedy.endswith("or use that.") and "checkpoint folder" in raised.value.accepted
    first, *others = module.parameters()
    groups = [{"params": [first], "lr": 0.0}, {"params": others, "lr": 0.0}]
    lm = oracle.LanguageModel(module, optimizer=torch.optim.SGD(groups), max_tokens=64)
    with pytest.raises(InputError, match=r"this steps .* learning rate is 0") as raised:
        require_optimizer(lm, needed_by="this")
    assert raised.value.remedy.endswith("(schedules end at 0).")
    lm.optimizer.param_groups[0]["lr"] = 0.1  # one group that steps is enough
    require_optimizer(lm, needed_by="this")


def test_adam_is_fresh_until_a_trainable_parameter_has_state(make_module):
    module = make_module("llama")
    first = next(module.parameters())
    for optimizer in (None, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_fresh_adam(oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64))
    lm = oracle.LanguageModel(module, optimizer=torch.optim.Adam([first], lr=0.1), max_tokens=64)
    with pytest.warns(FreshOptimizerWarning, match="Adam has no state"):
        warn_of_fresh_adam(lm)
    first.grad = torch.ones_like(first)
    lm.optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_fresh_adam(lm)
    first.requires_grad_(False)
    with pytest.warns(FreshOptimizerWarning):
        warn_of_fresh_adam(lm)
