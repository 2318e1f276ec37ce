"""The callback with PEFT's adapters and TRL's trainer, where these are installed."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments

from oracle.errors import InputError
from surrogate.training import InfluenceCallback
from surrogate.training.trainer_checks import OtherMaskWarning

QUIET = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "bf16": False}
STEPS = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_adapters_are_measured_trained_and_resumed(adapter, make_module, make_token_texts, tmp_path):
    peft = pytest.importorskip("peft")
    pool, targets = make_token_texts(60, seed=5), {"goal": make_token_texts(6, seed=6)}

    def train(output, resume=None):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, modules_to_save=["lm_head"])
        module = peft.get_peft_model(make_module("llama"), config, adapter_name=adapter)
        callback = InfluenceCallback(pool, targets, every=3, workdir=tmp_path / "work", strategy="oracle", max_tokens=64)
        args = TrainingArguments(output_dir=str(tmp_path / output), **{**QUIET, **STEPS})
        trainer = Trainer(
            module, args, train_dataset=callback.train_dataset, data_collator=callback.data_collator, callbacks=[callback]
        )
        callback.attach(trainer).train(resume_from_checkpoint=resume)
        return trainer, callback

    whole, callback = train("whole")
    assert [record["num_labels"] for record in callback.table()] == [60, 54]
    changed = [name for name, parameter in whole.model.named_parameters() if parameter.requires_grad]
    assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)
    again, again_callback = train("whole", str(tmp_path / "whole/checkpoint-4"))
    assert same(weights(again), weights(whole)) and again_callback.table() == callback.table()


def test_trl_trains_on_what_the_callback_shows_of_its_own_items(make_module, make_tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    pool = [{"prompt": f"say {number}:", "completion": f" number {number} it is"} for number in range(40)]
    targets = {"goal": [{"prompt": "say 7:", "completion": " number 7 it is, and no other"}]}
    tokenizer = make_tokenizer([row["prompt"] + row["completion"] for row in pool])
    tokenizer.pad_token = tokenizer.eos_token

    def train(resume=None, **options):
        torch.manual_seed(0)
        module = make_module("llama", vocab_size=len(tokenizer))
        module.config.pad_token_id = tokenizer.pad_token_id
        callback = InfluenceCallback(pool, targets, every=3, workdir=tmp_path / "work", strategy="oracle", tokenizer=tokenizer)
        args = trl.SFTConfig(output_dir=str(tmp_path / "out"), max_length=32, **{**QUIET, **STEPS, **options})
        trainer = trl.SFTTrainer(module, args=args, train_dataset=callback.pool, processing_class=tokenizer, callbacks=[callback])
        seen = []
        module.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs) if module.training else None, with_kwargs=True
        )
        callback.attach(trainer).train(resume_from_checkpoint=resume)
        return trainer, callback, seen

    whole, callback, seen = train()
    assert whole.state.global_step == 6 and [record["num_labels"] for record in callback.table()] == [40, 34]
    chosen = {pool[row]["completion"] for row in callback.refresher.round_at(0).rows}
    for kwargs in seen[:3]:
        for ids, labels in zip(kwargs["input_ids"], kwargs["labels"], strict=True):
            assert tokenizer.decode(labels[labels >= 0], skip_special_tokens=True) in chosen  # only the completion is predicted
            assert len(ids) == len(labels)
    again, again_callback, _ = train(str(tmp_path / "out/checkpoint-4"))
    assert same(weights(again), weights(whole)) and again_callback.table() == callback.table()
    with pytest.raises(InputError, match="nothing says that they are the 40 texts"):
        train(packing=True)


@pytest.mark.parametrize("is_assistant_only", [False, True])
def test_trl_that_trains_on_other_turns_than_are_measured_is_told(is_assistant_only, make_module, make_tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    pool = [
        {
            "messages": [
                {"role": "user", "content": f"what is {number} and {number}"},
                {"role": "assistant", "content": f"{number}"},
            ]
        }
        for number in range(24)
    ]
    tokenizer = make_tokenizer([message["content"] for row in pool for message in row["messages"]])
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
        "{% endgeneration %}{% else %}{{ message.content }}{% endif %}\n{% endfor %}"
    )
    callback = InfluenceCallback(pool, every=3, workdir=tmp_path / "work", strategy="random")
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_length=32, assistant_only_loss=is_assistant_only, **QUIET, max_steps=3
    )
    module = make_module("llama", vocab_size=len(tokenizer))
    trainer = trl.SFTTrainer(module, args=args, train_dataset=callback.pool, processing_class=tokenizer, callbacks=[callback])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback.attach(trainer)
    told = [str(warning.message) for warning in caught if warning.category is OtherMaskWarning]
    assert ["assistant_only_loss=True" in text for text in told] == ([] if is_assistant_only else [True])
