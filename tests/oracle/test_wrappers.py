"""Modules that are wrapped, sharded or spread out are refused, with the way out."""

from __future__ import annotations

import warnings

import pytest
import torch

import oracle
from oracle.errors import InputError
from oracle.wrappers import check_whole


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


def test_only_a_device_map_over_several_devices_is_refused(make_module):
    module = make_module("llama")
    module.hf_device_map = {"": 0}
    check_whole(module)
    module.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    with pytest.raises(InputError, match="spread over the devices 0, cpu"):
        oracle.LanguageModel(module)
