"""Which parameters a pattern finds."""

from __future__ import annotations

import pytest
import torch

from oracle.errors import InputError
from oracle.gradients.coverage import holders, match_parameters, only_trainable


def test_a_pattern_is_searched_for_in_the_names_of_trainable_parameters(make_module):
    module = make_module("llama")
    names = [name for name, _ in module.named_parameters()]
    assert match_parameters(module, None) == names
    assert match_parameters(module, r"layers\.1\.") == [name for name in names if "layers.1." in name]
    module.lm_head.requires_grad_(False)
    assert "lm_head.weight" not in match_parameters(module, r".")
    with pytest.raises(InputError, match="finds none of the"):
        match_parameters(module, "lm_head")


def test_a_pattern_that_finds_nothing_names_close_ones(make_module):
    module = make_module("llama")
    with pytest.raises(InputError, match=r"did you mean 'model.embed_tokens.weight'(.|\n)*lm_head.weight"):
        match_parameters(module, "embed_token.weight")
    with pytest.raises(InputError, match="not a regular expression"):
        match_parameters(module, "layers.(1")


def test_what_was_trainable_is_so_again_also_after_an_error(make_module):
    module = make_module("llama")
    module.model.norm.weight.requires_grad_(False)
    before = [p.requires_grad for p in module.parameters()]
    with pytest.raises(RuntimeError), only_trainable(module, ["lm_head.weight", "model.norm.weight"]):
        assert [name for name, p in module.named_parameters() if p.requires_grad] == ["lm_head.weight"]
        raise RuntimeError
    assert [p.requires_grad for p in module.parameters()] == before


def test_a_tied_parameter_has_two_holders(make_module):
    found = holders(make_module("llama", tie_word_embeddings=True))
    assert found["model.embed_tokens.weight"] == [("model.embed_tokens", "weight"), ("lm_head", "weight")]
    assert found["model.layers.0.self_attn.q_proj.weight"] == [("model.layers.0.self_attn.q_proj", "weight")]
    plain = torch.nn.Linear(2, 3)
    assert holders(plain) == {"weight": [("", "weight")], "bias": [("", "bias")]}
