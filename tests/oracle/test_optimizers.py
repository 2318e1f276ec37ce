"""Refusals of a model that cannot be stepped: one for everything that steps."""

from __future__ import annotations

import pytest
import torch

import oracle
from oracle.errors import InputError
from oracle.optimizers import require_optimizer


def test_a_missing_optimiser_and_a_rate_of_0_are_refused_by_the_name_of_what_needs_it(make_module):
    module = make_module("llama")
    with pytest.raises(InputError, match="this needs the optimiser that trains the model, and there is none") as raised:
        require_optimizer(oracle.LanguageModel(module, max_tokens=64), needed_by="this", otherwise="use that")
    assert raised.value.remedy.endswith("or use that.") and "checkpoint folder" in raised.value.accepted
    first, *others = module.parameters()
    groups = [{"params": [first], "lr": 0.0}, {"params": others, "lr": 0.0}]
    lm = oracle.LanguageModel(module, optimizer=torch.optim.SGD(groups), max_tokens=64)
    with pytest.raises(InputError, match=r"this steps .* learning rate is 0") as raised:
        require_optimizer(lm, needed_by="this")
    assert raised.value.remedy.endswith("(schedules end at 0).")
    lm.optimizer.param_groups[0]["lr"] = 0.1  # one group that steps is enough
    require_optimizer(lm, needed_by="this")
