"""Modules that are wrapped, sharded or spread out are refused, with the way out."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import oracle
from oracle.errors import InputError
from oracle.wrappers import check_whole, devices_of_map, entrance

LONG = {"llama": {"max_position_embeddings": 512}, "gpt2": {"n_positions": 512}}
PLACES = {  # the second block and what follows on disk
    "llama": {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "disk",
        "lm_head": "disk",
    },
    "gpt2": {
        "transformer.wte": "disk",
        "transformer.wpe": "cpu",
        "transformer.drop": "cpu",
        "transformer.h.0": "cpu",
        "transformer.h.1": "disk",
        "transformer.ln_f": "disk",
        "lm_head": "disk",
    },
}


@pytest.fixture
def alone(tmp_path):
    """A process group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_module_wrapped_for_data_parallel_training_names_the_module_inside(alone, make_module, make_tokenizer):
    wrapped = torch.nn.parallel.DistributedDataParallel(make_module("gpt2"))
    with pytest.raises(InputError, match=r"pass module\.module"):
        oracle.LanguageModel(wrapped, make_tokenizer(["a text"]))
    oracle.LanguageModel(wrapped.module)


def test_a_module_sharded_by_fsdp_is_refused(alone, make_module):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inside = torch.nn.Sequential(FullyShardedDataParallel(make_module("gpt2"), device_id=torch.device("cpu")))
    with pytest.raises(InputError, match="sharded over processes by FSDP"):
        check_whole(inside)


def test_a_module_sharded_in_place_after_it_was_given_is_refused(alone, make_module, make_token_texts):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = make_module("gpt2")
    lm = oracle.LanguageModel(module)
    fully_shard(module.transformer.h[0], mesh=init_device_mesh("cpu", (1,)))
    for method in ("grad_dot", "in_context"):
        with pytest.raises(InputError, match="sharded over processes by FSDP"):
            oracle.label(lm, make_token_texts(2, seed=1), {"t": make_token_texts(2, seed=2)}, method=method)


def test_distributed_weights_are_refused_by_name(alone, make_module):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    module = make_module("llama")
    weight = distribute_tensor(module.lm_head.weight.detach(), init_device_mesh("cpu", (1,)))
    module.lm_head.weight = torch.nn.Parameter(weight)
    with pytest.raises(InputError, match=r"lm_head\.weight is a DTensor"):
        check_whole(module)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # gpt2's output layer is tied to its embeddings
def test_a_model_spread_over_memory_and_disk_serves_methods_that_only_read(kind, tmp_path, make_module, make_tokenizer):
    from transformers import AutoModelForCausalLM

    sentences = ["the first text", "a second one, which is longer", "1 2 3 4 5"]
    tokenizer = make_tokenizer([*sentences, "Mark:"])
    whole = oracle.LanguageModel(make_module(kind, vocab_size=len(tokenizer), **LONG[kind]), tokenizer)
    whole.module.save_pretrained(tmp_path / "model")
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, device_map=PLACES[kind], offload_folder=tmp_path / "offloaded"
    )
    assert any(parameter.is_meta for parameter in spread.parameters())
    lm = oracle.LanguageModel(spread, tokenizer, device="cpu")

    assert lm.fingerprint() == whole.fingerprint()
    np.testing.assert_array_equal(lm.losses(sentences), whole.losses(sentences))
    for method, targets in (("in_context", {"t": sentences[1:]}), ("self_rating", None)):
        labels = oracle.label(lm, sentences, targets, method=method)
        np.testing.assert_array_equal(labels.values, oracle.label(whole, sentences, targets, method=method).values)
    lm.save(tmp_path / "saved")
    assert oracle.LanguageModel.from_pretrained(tmp_path / "saved").fingerprint() == whole.fingerprint()
    for method in ("grad_dot", "two_forward"):
        with pytest.raises(InputError, match=rf"{method} needs gradients, and the .* spread over .* (cpu, disk|disk, cpu)"):
            oracle.label(lm, sentences, {"t": sentences}, method=method)


def test_a_device_map_of_one_device_is_no_hindrance(make_module):
    module = make_module("llama")
    module.hf_device_map = {"": 0}
    assert devices_of_map(module) == []
    module.hf_device_map = {"model.layers.0": "cuda:1", "model.layers.1": "cuda:1", "lm_head": "cpu"}
    assert devices_of_map(module) == ["cuda:1", "cpu"]
    assert entrance(module) == torch.device("cuda", 1)
