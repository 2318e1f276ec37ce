"""Adapters are saved alone and come back trainable, with their optimiser; what could not come back is refused."""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import pytest
import torch

import oracle
from oracle.adapters import base_of, check_saveable
from oracle.artifacts import write_json
from oracle.errors import InputError, MissingFileError, MissingPackageError


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def base(make_module, make_tokenizer, tmp_path):
    """A folder with a whole model and its tokenizer."""
    oracle.LanguageModel(make_module("llama", vocab_size=300), make_tokenizer(["A text."]), max_tokens=64).save(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapted(peft, base, make_token_texts):
    """LoRA on the base model after three AdamW steps."""
    lm = oracle.LanguageModel.from_pretrained(base, max_tokens=64)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(0)
        module = peft.get_peft_model(lm.module, config).eval()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    for row in make_token_texts(3, seed=0):
        ids = torch.tensor([row["input_ids"]])
        module(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return oracle.LanguageModel(module, lm.tokenizer, optimizer, max_tokens=64)


def _trainable(lm):
    return [name for name, parameter in lm.module.named_parameters() if parameter.requires_grad]


def test_an_adapter_comes_back_trainable_with_its_optimiser_and_gives_the_same_labels(adapted, make_token_texts, tmp_path):
    adapted.save(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*"))
    loaded = oracle.LanguageModel.from_pretrained(tmp_path / "adapter", max_tokens=64)
    assert _trainable(loaded) == _trainable(adapted) and all("lora" in name for name in _trainable(loaded))
    assert loaded.fingerprint(optimizer=True) == adapted.fingerprint(optimizer=True)
    assert loaded.tokenizer_fingerprint() == adapted.tokenizer_fingerprint()
    sample, targets = make_token_texts(3, seed=1), make_token_texts(2, seed=2)
    for method in ("one_step", "grad_dot"):
        first, second = (oracle.label(lm, sample, targets, method=method).values for lm in (adapted, loaded))
        assert np.abs(first).max() > 0
        np.testing.assert_array_equal(first, second)
    half = oracle.LanguageModel.from_pretrained(tmp_path / "adapter", max_tokens=64, dtype="bfloat16")
    assert np.isfinite(oracle.label(half, sample, targets, method="one_step").values).all()


def test_a_folder_of_the_trainer_takes_the_tokenizer_of_the_base_and_the_optimisers_state(adapted, tmp_path):
    adapted.module.save_pretrained(tmp_path)
    torch.save(adapted.optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = oracle.LanguageModel.from_pretrained(tmp_path, max_tokens=64)
    assert loaded.fingerprint(optimizer=True) == adapted.fingerprint(optimizer=True)
    assert loaded.tokenizer_fingerprint() == adapted.tokenizer_fingerprint() != ""


def test_an_adapter_without_peft_names_the_package(tmp_path, monkeypatch):
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "somewhere"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install peft"):
        oracle.LanguageModel.from_pretrained(tmp_path)
    assert base_of(tmp_path / "nothing") is None


def test_an_adapter_that_has_lost_its_base_says_what_is_missing(adapted, base, tmp_path):
    adapted.save(tmp_path / "adapter")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"the adapter's base model is .*base"):
        oracle.LanguageModel.from_pretrained(tmp_path / "adapter")
    write_json(tmp_path / "adapter/adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(MissingFileError, match="does not say which model"):
        oracle.LanguageModel.from_pretrained(tmp_path / "adapter")


def test_adapters_that_could_not_be_loaded_again_are_not_saved(peft, adapted, make_module, base, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted.module.add_adapter("second", config)
    with pytest.raises(InputError, match="'default', 'second'"):
        adapted.save(tmp_path / "adapter")
    homeless = oracle.LanguageModel(peft.get_peft_model(make_module("llama"), config), max_tokens=64)
    with pytest.raises(InputError, match="not loaded from anywhere"):
        homeless.save(tmp_path / "adapter")
    inside = oracle.LanguageModel.from_pretrained(base, max_tokens=64).module
    inside.add_adapter(config)
    with pytest.raises(InputError, match="added to it by transformers"):
        check_saveable(inside)
    assert not (tmp_path / "adapter").exists()
