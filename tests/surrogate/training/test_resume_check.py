"""A resumed model is compared with its checkpoint, under whatever names the weights are saved."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from oracle.errors import MismatchError
from surrogate.training.resume_check import ResumeUncheckedWarning, check_resumed, find_checkpoint

STEP = 4


def save(module, folder, **options):
    """Write a checkpoint as the Trainer does, and return the arguments of a training that resumes it."""
    path = folder / f"checkpoint-{STEP}"
    module.save_pretrained(path, **options)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": STEP}))
    return SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=None)


@pytest.mark.parametrize("kind", ["llama", "neox", "gpt2", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["whole", "shards"])
def test_a_model_with_the_weights_of_its_checkpoint_passes(kind, options, make_module, tmp_path):
    module = make_module(kind)
    args = save(module, tmp_path, **options)
    check_resumed(module, args, STEP)
    check_resumed(torch.compile(module), args, STEP)
    check_resumed(module.bfloat16(), save(module, tmp_path / "bf16"), STEP)


@pytest.mark.parametrize("kind", ["llama", "neox", "gpt2", "mixtral"])
def test_one_weight_that_differs_is_named(kind, make_module, tmp_path):
    module = make_module(kind)
    args = save(module, tmp_path)
    name, parameter = list(module.named_parameters())[3]
    with torch.no_grad():
        parameter.view(-1)[0] += 1e-3
    with pytest.raises(MismatchError, match=f"{name} is not that of .*checkpoint-4"):
        check_resumed(module, args, STEP)


def test_a_weight_that_was_saved_under_another_name_is_found_by_its_values(make_module, tmp_path):
    module = make_module("llama")
    args = save(module, tmp_path)
    path = tmp_path / f"checkpoint-{STEP}/model.safetensors"
    tensors = load_file(path)
    tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    check_resumed(module, args, STEP)
    with torch.no_grad():
        module.lm_head.weight.view(-1)[0] += 1e-3
    with pytest.raises(MismatchError, match=r"lm_head\.weight is not that"):
        check_resumed(module, args, STEP)


def test_the_checkpoint_is_looked_for_where_the_arguments_say(make_module, tmp_path):
    args = save(make_module("llama"), tmp_path)
    assert find_checkpoint(args, STEP) == tmp_path / f"checkpoint-{STEP}"
    elsewhere = SimpleNamespace(output_dir=str(tmp_path / "new"), resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEP}"))
    assert find_checkpoint(elsewhere, STEP) == tmp_path / f"checkpoint-{STEP}"
    assert find_checkpoint(elsewhere, STEP + 1) is None
    nowhere = SimpleNamespace(output_dir=str(tmp_path / "new"), resume_from_checkpoint=None)
    with pytest.warns(ResumeUncheckedWarning, match="not compared.*resume_from_checkpoint="):
        check_resumed(make_module("llama"), nowhere, STEP)
