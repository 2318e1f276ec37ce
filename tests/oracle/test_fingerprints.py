"""What a config's fingerprint knows apart, and what it overlooks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from oracle.fingerprints import config_fingerprint


@pytest.mark.parametrize(
    "change",
    [{"rms_norm_eps": 1e-3}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"hidden_act": "gelu"}],
    ids=str,
)
def test_what_only_the_config_knows_of_the_computation_counts(change, make_module):
    module, other = make_module("llama"), make_module("llama", **change)
    assert torch.equal(*(torch.cat([p.flatten() for p in each.parameters()]) for each in (module, other)))
    assert len(config_fingerprint(module)) == 16 and config_fingerprint(other) != config_fingerprint(module)


def test_a_saved_and_loaded_model_has_the_config_of_the_first_in_any_precision_and_attention(make_module, tmp_path):
    from transformers import AutoModelForCausalLM

    module = make_module("gpt_oss")
    first = config_fingerprint(module)
    module.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert config_fingerprint(loaded) == config_fingerprint(module) == first
    loaded.config.use_cache, loaded.config.eos_token_id = True, 7  # as trainers do
    assert config_fingerprint(loaded) == first


def test_an_adapters_scale_counts_and_the_order_of_its_sets_does_not():
    def with_adapter(**options):
        return SimpleNamespace(peft_config={"default": SimpleNamespace(to_dict=lambda: options)})

    first = config_fingerprint(with_adapter(lora_alpha=8, target_modules={"q", "v"}, inference_mode=False))
    assert config_fingerprint(with_adapter(lora_alpha=8, target_modules=["q", "v"], inference_mode=True)) == first
    assert config_fingerprint(with_adapter(lora_alpha=16, target_modules={"q", "v"}, inference_mode=False)) != first
    assert config_fingerprint(torch.nn.Linear(1, 1)) == ""
