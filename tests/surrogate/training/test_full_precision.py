"""Mixed precision is taken off a model and put back."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32

from surrogate.training.full_precision import MixedPrecisionWarning, without_autocast

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def prepared(make_module):
    module = make_module("llama")
    with torch.no_grad():
        plain = module(input_ids=IDS).logits
    function = type(module).forward  # as Accelerator.prepare does, which keeps a state of its own per process
    module.forward = MethodType(convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(function)), module)
    return module, plain


def logits(module):
    with torch.no_grad():
        return module(input_ids=IDS).logits


def test_the_block_runs_the_forward_of_the_class_and_no_other(prepared):
    module, plain = prepared
    own, mixed = vars(module)["forward"], logits(module)
    assert not torch.equal(mixed, plain)
    with without_autocast(module):
        assert torch.equal(logits(module), plain)
    assert vars(module)["forward"] is own and torch.equal(logits(module), mixed)


def test_inside_a_compiled_module_too(prepared, recwarn):
    module, plain = prepared
    compiled = torch.compile(module, backend="eager")
    own = vars(module)["forward"]
    with without_autocast(compiled):
        assert "forward" not in vars(module) and torch.equal(logits(module), plain)
    assert vars(module)["forward"] is own
    assert not [warning for warning in recwarn if warning.category is MixedPrecisionWarning]


def test_it_is_put_back_when_the_block_raises(prepared):
    module, _ = prepared
    own = vars(module)["forward"]
    with pytest.raises(KeyError), without_autocast(module):
        raise KeyError
    assert vars(module)["forward"] is own


def test_a_module_without_a_forward_of_its_own_is_left_alone(make_module):
    module = make_module("llama")
    with without_autocast(module):
        assert "forward" not in vars(module)
    assert "forward" not in vars(module)


def test_a_forward_that_is_something_else_is_used_and_told(make_module):
    module = make_module("llama")
    module.forward = lambda **inputs: "other"
    with pytest.warns(MixedPrecisionWarning, match="a forward of its own"), without_autocast(module):
        assert module(input_ids=IDS) == "other"
