"""The callback under the stock Trainer: rounds are epochs, resume is exact, labels are right, training is left alone."""

from __future__ import annotations

import copy
import json
import random
import warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

import oracle
from oracle.errors import InputError, MismatchError, MissingFileError, NotFiniteError
from surrogate.training import InfluenceCallback
from surrogate.training.callback import InexactDropoutWarning, UnreportedWarning
from surrogate.training.pool_texts import PoolTexts
from surrogate.training.resume_check import ResumeUncheckedWarning
from surrogate.training.round_reports import OverheadWarning, RefreshFailedWarning
from surrogate.training.trainer_checks import LongItemsWarning, tell_of_other_masks
from tests.surrogate.training.conftest import ByFingerprint

QUIET = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
EVERY = 3


class Recorder(TrainerCallback):
    """Keeps what the model is trained on and what is logged; stands before the callback, as reporting callbacks do."""

    def __init__(self, module):
        self.batches, self.logs = [], []
        module.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, module, args, kwargs):
        if module.training:
            self.batches.append(kwargs["input_ids"].tolist())

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


class Setting:
    """Makes trainers of one run folder; the pool and the model are the same for all."""

    def __init__(self, make_module, make_token_texts, folder):
        self.make_module, self.folder = make_module, folder
        self.pool, self.targets = make_token_texts(80, seed=5), {"goal": make_token_texts(6, seed=6)}

    def callback(self, workdir="influence", **options):
        return InfluenceCallback(
            self.pool,
            self.targets,
            workdir=self.folder / workdir,
            **{"every": EVERY, "strategy": ByFingerprint(), "max_tokens": 64, **options},
        )

    def trainer(self, callback, *, module=None, dropout=0.2, is_attached=True, output="out", trainer_class=Trainer, **options):
        torch.manual_seed(0)
        module = module or self.make_module("llama", attention_dropout=dropout)
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 8, "learning_rate": 1e-2}
        args = TrainingArguments(output_dir=str(self.folder / output), **{**QUIET, **settings, **options})
        recorder = Recorder(module)
        trainer = trainer_class(
            module,
            args,
            train_dataset=callback.train_dataset,
            data_collator=callback.data_collator,
            callbacks=[recorder, callback],
        )
        trainer.recorder = recorder
        return callback.attach(trainer) if is_attached else trainer

    def checkpoint(self, step, output="out"):
        return str(self.folder / output / f"checkpoint-{step}")


@pytest.fixture
def setting(make_module, make_token_texts, tmp_path):
    return Setting(make_module, make_token_texts, tmp_path)


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def chosen(callback):
    return [callback.refresher.round_at(index).text_ids for index in range(callback.refresher.num_rounds_done)]


@pytest.mark.parametrize("workers", [0, 1, "kept"])
def test_a_resumed_training_is_the_uninterrupted_one_batch_for_batch(workers, setting):
    """Also with other workers than before; with dropout only where they are not kept alive (see below)."""
    callback = setting.callback()
    dropout = 0.0 if workers == "kept" else 0.2
    loader = {"dataloader_num_workers": int(workers != 0), "dataloader_persistent_workers": workers == "kept"}
    whole = setting.trainer(callback, dropout=dropout, save_strategy="steps", save_steps=1)
    whole.train()
    rounds = chosen(callback)
    assert len(rounds) == 3 and len(whole.recorder.batches) == 16
    for step in (2, 3, 7):  # within a round, at its border, within the last one
        again_callback = setting.callback()
        options = {"resume_from_checkpoint": setting.checkpoint(step), "output": f"again{step}", **loader}
        again = setting.trainer(again_callback, dropout=dropout, **options)
        with pytest.warns(InexactDropoutWarning) if workers == "kept" else nullcontext():
            again.train(resume_from_checkpoint=setting.checkpoint(step))
        assert again.recorder.batches == whole.recorder.batches[2 * step :], step
        assert same(weights(again), weights(whole)) and chosen(again_callback) == rounds, step


def test_rounds_after_the_checkpoint_are_made_again_in_the_same_way(setting):
    callback = setting.callback()
    whole = setting.trainer(callback, save_strategy="steps", save_steps=2)
    whole.train()
    rounds = chosen(callback)
    for index in (1, 2):
        (setting.folder / f"influence/round-{index:05d}/round.json").unlink()
    again_callback = setting.callback()
    again = setting.trainer(again_callback)
    again.train(resume_from_checkpoint=setting.checkpoint(2))
    assert chosen(again_callback) == rounds and same(weights(again), weights(whole))


def test_workers_change_nothing(setting):
    workers = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4}
    alone = setting.trainer(setting.callback("alone"), dropout=0.0)
    alone.train()
    other = setting.trainer(setting.callback("other"), dropout=0.0, dataloader_persistent_workers=True, **workers)
    other.train()
    assert other.recorder.batches == alone.recorder.batches and same(weights(other), weights(alone))


@pytest.mark.slow
def test_spawned_workers_change_nothing(setting):
    alone = setting.trainer(setting.callback("alone", strategy="random"), max_steps=4)
    alone.train()
    workers = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn", "dataloader_persistent_workers": True}
    other = setting.trainer(setting.callback("other", strategy="random"), max_steps=4, **workers)
    other.train()
    assert other.recorder.batches == alone.recorder.batches


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_every_round_trains_on_its_texts_each_of_them_once(strategy, setting):
    callback = setting.callback()
    trainer = setting.trainer(callback, train_sampling_strategy=strategy, dataloader_drop_last=True)
    trainer.train()
    ids = {text_id: row["input_ids"] for text_id, row in zip(callback.refresher.text_ids, setting.pool, strict=True)}
    rows = [[token for token in row if token] for batch in trainer.recorder.batches for row in batch]  # 0 is the padding
    for index, text_ids in enumerate(chosen(callback)):
        shown, expected = rows[12 * index : 12 * index + 12], [ids[text_id] for text_id in text_ids]
        if strategy == "sequential":
            assert shown == expected[: len(shown)]
        else:
            assert all(row in expected for row in shown) and len({tuple(row) for row in shown}) == len(shown)
    assert len({tuple(row) for row in rows}) == 8 * 4  # and no text twice in the pass over the pool


def test_packed_rows_reach_the_trainer(setting):
    callback = setting.callback(row_tokens=16)
    trainer = setting.trainer(callback, max_steps=3, train_sampling_strategy="sequential")
    trainer.train()
    lm = oracle.LanguageModel(setting.make_module("llama"), max_tokens=64, device="cpu")
    encoded = {text.text_id: text for text in lm.encode(setting.pool)}
    stream = [token for text_id in chosen(callback)[0] for token in encoded[text_id].input_ids]
    rows = [row for batch in trainer.recorder.batches for row in batch]
    assert [len(row) for row in rows] == [16] * 12
    assert [token for row in rows for token in row] == (stream * 2)[: 12 * 16]


def test_a_round_leaves_everything_of_the_training_as_it_was(setting, monkeypatch):
    callback, states = setting.callback(strategy="oracle", method="one_step", rule="top"), []
    trainer = setting.trainer(callback, max_steps=4, bf16=True)
    original = callback.on_epoch_begin

    def state(kwargs):
        return {
            "weights": copy.deepcopy(kwargs["model"].state_dict()),
            "optimizer": copy.deepcopy(kwargs["optimizer"].state_dict()),
            "scheduler": copy.deepcopy(kwargs["lr_scheduler"].state_dict()),
            "random": [torch.get_rng_state(), np.random.get_state()[1].tolist(), str(random.getstate())],
            "modes": [child.training for child in kwargs["model"].modules()],
            "hooks": [[*child._forward_hooks, *child._forward_pre_hooks] for child in kwargs["model"].modules()],
            "forward": id(vars(kwargs["model"])["forward"]),
        }

    def watched(args, state_, control, **kwargs):
        states.append([state(kwargs)])
        original(args, state_, control, **kwargs)
        states[-1].append(state(kwargs))

    monkeypatch.setattr(callback, "on_epoch_begin", watched)
    trainer.train()
    assert [record["refreshed"] for record in callback.table()] == [True, True]
    for before, after in states:
        flat = [dict(torch.utils._pytree.tree_leaves_with_path(side)) for side in (before, after)]
        assert flat[0].keys() == flat[1].keys()
        for path, value in flat[0].items():
            other = flat[1][path]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, path


def test_under_mixed_precision_labels_are_those_of_the_weights_in_full_precision(setting):
    values = {}
    for name, options, extra in (
        ("full", {}, {}),
        ("mixed", {"bf16": True}, {}),
        ("kept", {"bf16": True}, {"keep_autocast": True}),
    ):
        callback = setting.callback(name, strategy="oracle", method="one_step", **extra)
        setting.trainer(callback, max_steps=1, **options).train()
        values[name] = oracle.Labels.load(setting.folder / name / "round-00000/ranking/labels").values
    np.testing.assert_array_equal(values["mixed"], values["full"])
    assert not np.array_equal(values["kept"], values["full"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"torch_compile": True, "torch_compile_backend": "eager"}],
    ids=["checkpointing", "compile"],
)
def test_how_training_is_run_changes_no_selection(options, setting):
    callbacks = [setting.callback(name, strategy="oracle") for name in ("plain", "other")]
    for callback, settings in zip(callbacks, ({}, options), strict=True):
        module = setting.make_module("llama")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about the name gradient_checkpointing
            setting.trainer(callback, module=module, max_steps=4, **settings).train()
    assert chosen(callbacks[0]) == chosen(callbacks[1])


def test_evaluating_saving_and_logging_at_the_border_of_a_round_are_no_training(setting, monkeypatch):
    callback, clock = setting.callback(), SimpleNamespace(seconds=0.0)
    clock.perf_counter = lambda: clock.seconds
    monkeypatch.setattr("surrogate.training.callback.time", clock)
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3, "logging_steps": 3}
    held_out = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
    with_evaluation = partial(Trainer, eval_dataset=held_out)
    trainer = setting.trainer(callback, dropout=0.0, logging_strategy="steps", trainer_class=with_evaluation, **steps)
    for name, seconds in (("evaluate", 100), ("save_model", 1000), ("training_step", 1)):
        original = getattr(trainer, name)

        def slow(*args, original=original, seconds=seconds, **kwargs):
            clock.seconds += seconds
            return original(*args, **kwargs)

        monkeypatch.setattr(trainer, name, slow)
    trainer.train()
    assert [step for step, logs in trainer.recorder.logs if "eval_loss" in logs] == [2, 4, 6, 8]
    assert clock.seconds == 3000 + 400 + 16 and callback.state()["attributes"]["feed"]["seconds"] == 16
    plain_callback = setting.callback("plain")
    plain = setting.trainer(plain_callback, dropout=0.0, output="plain")
    plain.train()
    assert chosen(plain_callback) == chosen(callback) and same(weights(plain), weights(trainer))


def test_each_round_is_reported_once_through_the_trainers_own_log(setting):
    callback = setting.callback(strategy="oracle")
    trainer = setting.trainer(callback, save_strategy="steps", save_steps=4)
    trainer.train()
    told = [(step, logs) for step, logs in trainer.recorder.logs if "influence/round" in logs]
    assert [step for step, _ in told] == [0, 3, 6]
    expected = {"round", "refreshed", "failed", "left_out", "texts", "labels", "seconds", "selected/goal", "candidates/goal"}
    shares = {"overhead/flops", "overhead/seconds", "overhead_planned/flops", "overhead_planned/seconds"}
    assert set(told[1][1]) == {"epoch"} | {f"influence/{name}" for name in expected | shares}
    assert told[1][1]["influence/labels"] == 80 - 12
    assert told[1][1]["influence/selected/goal"] > told[1][1]["influence/candidates/goal"]
    assert sum("influence/round" in entry for entry in trainer.state.log_history) == 3
    again = setting.trainer(setting.callback(strategy="oracle"), output="again", resume_from_checkpoint=setting.checkpoint(4))
    again.train(resume_from_checkpoint=setting.checkpoint(4))
    assert [step for step, logs in again.recorder.logs if "influence/round" in logs] == [6]


def test_a_trainer_that_is_not_attached_gets_the_rounds_into_its_history_and_a_warning(setting):
    callback = setting.callback(strategy="random")
    trainer = setting.trainer(callback, is_attached=False, max_steps=4)
    trainer.args.report_to = ["tensorboard"]
    with pytest.warns(UnreportedWarning, match="not reported to tensorboard.*attach"):
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "influence/round" in entry]
    assert [entry["step"] for entry in history] == [0, 3] and not trainer.recorder.logs[0][1].get("influence/round")


def test_a_refresh_that_fails_is_told_and_training_goes_on_or_stops(setting):
    callback = setting.callback(strategy=ByFingerprint(fails_in=1))
    trainer = setting.trainer(callback)
    with pytest.warns(RefreshFailedWarning, match="refresh at step 3 failed.*NaN"):
        trainer.train()
    assert trainer.state.global_step == 8
    assert [logs["influence/failed"] for _, logs in trainer.recorder.logs if "influence/failed" in logs] == [0, 1, 0]
    stopping = setting.trainer(setting.callback("stop", strategy=ByFingerprint(fails_in=1), on_failure="stop"))
    with pytest.raises(NotFiniteError):
        stopping.train()
    assert stopping.state.global_step == 3


def test_a_second_training_begins_with_the_first_round(setting):
    callback = setting.callback(strategy="random")
    trainer = setting.trainer(callback, max_steps=4)
    trainer.train()
    first = list(trainer.recorder.batches)
    trainer.train()
    assert trainer.recorder.batches == first * 2


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"max_steps": -1}, "max_steps=-1"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"restore_callback_states_from_checkpoint": True}, "restore_callback_states"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_arguments_that_break_rounds_are_refused_when_the_trainer_is_made(options, given, setting):
    with pytest.raises(InputError, match=given):
        setting.trainer(setting.callback(strategy="random"), **options)


def test_a_loader_that_does_not_fit_is_refused_before_the_first_step(setting):
    trainer = setting.trainer(setting.callback(strategy="random"))
    trainer.args.gradient_accumulation_steps = 4
    with pytest.raises(InputError, match="has 6 batches of a SelectedDataset, and a round 12"):
        trainer.train()
    changed = setting.trainer(setting.callback(strategy="random"))
    changed.args.ignore_data_skip = True
    with pytest.raises(InputError, match="ignore_data_skip"):
        changed.train()
    other = setting.trainer(setting.callback(strategy="random"))
    other.train_dataset = [{"input_ids": [5, 6], "labels": [5, 6]}] * 12
    with pytest.raises(InputError, match="6 batches of a list"):
        other.train()


def test_texts_need_a_tokenizer_which_may_be_the_trainers(setting, make_tokenizer):
    setting.pool = [f"text number {number}" for number in range(40)]
    tokenizer = make_tokenizer(setting.pool)
    module = setting.make_module("llama", vocab_size=len(tokenizer))
    with pytest.raises(InputError, match="neither the callback nor the Trainer has a tokenizer"):
        setting.trainer(setting.callback(strategy="random"), module=module)
    callback = setting.callback("own", strategy="random", row_tokens=8, max_tokens=None)

    with_tokenizer = partial(Trainer, processing_class=tokenizer)
    trainer = setting.trainer(callback, module=module, trainer_class=with_tokenizer, max_steps=2)
    trainer.train()
    assert callback.train_dataset.separator == tokenizer.eos_token_id
    assert any(tokenizer.eos_token_id in row for batch in trainer.recorder.batches for row in batch)


def test_a_dataset_of_ones_own_is_adopted_if_it_is_made_of_the_pool(setting):
    rows = [{"input_ids": [3 + number] * 3, "labels": [3 + number] * 3} for number in range(80)]
    own = datasets.Dataset.from_list(rows)
    for how in ("base", "attach"):
        callback = setting.callback(how, strategy="random", **({"base": own} if how == "base" else {}))
        trainer = setting.trainer(callback, max_steps=3, is_attached=how == "base")
        if how == "attach":
            trainer.train_dataset = own.add_column("text_id", callback.pool["text_id"][:])
            callback.attach(trainer)
        trainer.train()
        seen = sorted(row[0] - 3 for batch in trainer.recorder.batches for row in batch)
        assert seen == sorted(callback.refresher.round_at(0).rows.tolist())


def test_items_longer_than_what_is_measured_are_told(setting):
    callback = setting.callback(strategy="random", max_tokens=8)
    trainer = setting.trainer(callback, is_attached=False)
    trainer.train_dataset = datasets.Dataset.from_list(setting.pool)
    with pytest.warns(LongItemsWarning, match="up to 40 tokens, and texts are measured up to 8"):
        callback.attach(trainer)
    of_trl = setting.callback("trl", strategy="random", max_tokens=None)
    args = trainer.args
    args.max_length = 24  # as SFTConfig has it
    of_trl.on_init_end(args, None, None, model=trainer.model)
    assert of_trl.train_dataset.base.max_tokens == 24


def test_a_dataset_that_does_not_say_whose_items_it_has_is_refused(setting):
    """A trainer that packs or shuffles makes as many items as the pool has texts, and of other texts."""
    callback = setting.callback(strategy="random")
    trainer = setting.trainer(callback, is_attached=False)
    own = datasets.Dataset.from_list([{"input_ids": [3 + number] * 3, "labels": [3 + number] * 3} for number in range(80)])
    pool = datasets.Dataset.from_list(setting.pool)
    for wrong in (
        own,
        own.select(range(70)),
        own.add_column("text_id", callback.pool["text_id"][::-1]),
        pool.select(range(79, -1, -1)),
        [{"input_ids": [5, 6]}] * 80,
    ):
        trainer.train_dataset = wrong
        with pytest.raises(InputError, match="nothing says that they are the 80 texts"):
            callback.attach(trainer)
    trainer.train_dataset = pool  # the texts themselves tell
    assert callback.attach(trainer).train_dataset is callback.train_dataset and callback.train_dataset.base is pool
    packed = setting.callback("packed", strategy="random", row_tokens=8)
    trainer = setting.trainer(packed, is_attached=False)
    trainer.train_dataset = pool
    with pytest.raises(InputError, match="items have no labels"):
        packed.attach(trainer)


def test_texts_that_the_trainer_dropped_are_not_chosen(setting):
    rows = [{"input_ids": [3 + number] * 3, "labels": [3 + number] * 3} for number in range(80)]
    callback = setting.callback(strategy="random")
    trainer = setting.trainer(callback, max_steps=8, is_attached=False)
    kept = [number for number in range(80) if number % 3]
    trainer.train_dataset = datasets.Dataset.from_list(rows).add_column("text_id", callback.pool["text_id"][:]).select(kept)
    callback.attach(trainer)
    trainer.train()
    assert callback.pool.num_rows == len(kept) == 53
    seen = [row[0] - 3 for batch in trainer.recorder.batches for row in batch]
    assert set(seen) <= set(kept) and len(set(seen)) == 32


@pytest.mark.parametrize("kind, part", [("neox", "lm_head"), ("mixtral", "experts")])
def test_weights_that_a_resume_leaves_as_they_were_are_found_out(kind, part, setting):
    """In transformers 5.23 GPT-NeoX's output head and a mixture's experts; a version that mends that resumes exactly."""
    make = partial(setting.make_module, kind)
    trainers = {}
    for name, module in (("whole", None), ("resumed", None), ("loaded", "checkpoint")):
        callback = setting.callback(strategy="random")
        module = make() if module is None else AutoModelForCausalLM.from_pretrained(setting.checkpoint(4))
        trainer = trainers[name] = setting.trainer(callback, module=module, save_strategy="steps", save_steps=4)
        if name == "whole":
            trainer.train()
            trainers["whole_weights"] = weights(trainer)
        elif name == "loaded":
            trainer.train(resume_from_checkpoint=setting.checkpoint(4))
            assert same(weights(trainer), trainers["whole_weights"])
        else:
            try:
                trainer.train(resume_from_checkpoint=setting.checkpoint(4))
            except MismatchError as error:
                assert part in str(error) and "from_pretrained" in str(error)
            else:
                assert same(weights(trainer), trainers["whole_weights"])


def test_a_resume_without_what_it_needs_is_refused(setting):
    trainer = setting.trainer(setting.callback(strategy="random"), save_strategy="steps", save_steps=4)
    trainer.train()
    elsewhere = setting.trainer(setting.callback("elsewhere", strategy="random"))
    with pytest.raises(MissingFileError, match="training has come to round 2"):
        elsewhere.train(resume_from_checkpoint=setting.checkpoint(4))
    for options, arguments, difference in (
        ({}, {"per_device_train_batch_size": 4}, "num_items=12, and now num_items=24"),
        (
            {},
            {"train_sampling_strategy": "sequential"},
            "train_sampling_strategy='random', and now train_sampling_strategy='sequential'",
        ),
        ({}, {"data_seed": 5}, "data_seed=None, and now data_seed=5"),
        ({"max_tokens": 32}, {}, "max_tokens=64, and now max_tokens=32"),
        ({"row_tokens": 8}, {}, "row_tokens=None, and now row_tokens=8"),
    ):
        other = setting.trainer(setting.callback(**{"strategy": "random", **options}), **arguments)
        with pytest.raises(MismatchError, match=difference):
            other.train(resume_from_checkpoint=setting.checkpoint(4))
    averaged = setting.trainer(
        setting.callback("averaged", strategy="random", average_decay=0.9), output="first", save_strategy="steps", save_steps=4
    )
    averaged.train()
    other = setting.trainer(setting.callback("averaged", strategy="random", average_decay=0.9), output="second")
    with (
        pytest.raises(MissingFileError, match=r"average of the weights, is not in .*second"),
        pytest.warns(ResumeUncheckedWarning),
    ):
        other.train(resume_from_checkpoint=setting.checkpoint(4, "first"))
    plain = Trainer(
        setting.make_module("llama"),
        TrainingArguments(
            output_dir=str(setting.folder / "plain"), max_steps=2, **{**QUIET, "save_strategy": "steps", "save_steps": 2}
        ),
        train_dataset=[{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 48,
    )
    plain.train()
    late = setting.trainer(setting.callback("late", strategy="random"))
    with pytest.raises(InputError, match="saved without this callback"):
        late.train(resume_from_checkpoint=setting.checkpoint(2, "plain"))


def test_what_a_user_forgets_or_gives_twice_is_told_before_the_first_round(setting):
    def without_collator(*args, data_collator, **given):
        return Trainer(*args, **given)

    def twice(*args, callbacks, **given):
        return Trainer(*args, callbacks=[*callbacks, callbacks[-1]], **given)

    for name, trainer_class, told in (
        ("collator", without_collator, "data_collator=callback.data_collator"),
        ("twice", twice, "has this callback twice"),
    ):
        callback = setting.callback(name, strategy="random")
        with pytest.raises(InputError, match=told):
            setting.trainer(callback, trainer_class=trainer_class).train()
        assert not (setting.folder / name).exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"targets": {"goal": "nowhere.jsonl"}}, "there is no file"),
        ({"targets": None, "strategy": "refresh"}, "without target sets"),
        ({"strategy": "refesh"}, "did you mean 'refresh'"),
        ({"strategy": "refresh", "refresh_evry": 2}, "did you mean 'refresh_every'"),
        ({"strategy": "refresh", "sample_sise": 2}, "did you mean 'sample_size'"),
        ({"strategy": "refresh", "method": "graddot"}, "did you mean 'grad_dot'"),
        ({"strategy": "refresh", "method_options": {"max_norm": 1.0}}, "'max_norm' is no option"),
        ({"strategy": "refresh", "encoder": "sentences"}, "did you mean 'sentence'"),
        ({"strategy": "refresh", "sample_size": 30.5}, "sample_size=30.5"),
        ({"strategy": "refresh", "num_probe": 8.5}, "num_probe=8.5"),
        ({"strategy": "refresh", "max_target_texts": 2.5}, "max_target_texts=2.5"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"strategy": "random", "row_tokens": 32.5}, "row_tokens=32.5"),
        ({"window": 10.5}, "window=10.5"),
        ({"tokenizer": "gpt2"}, "AutoTokenizer"),
        ({"workdir": None}, "workdir=None"),
        ({"drift_threshold": "0.8"}, "drift_threshold='0.8'"),
        ({"warmup_fraction": 1.5}, "warmup_fraction=1.5"),
        ({"max_overhead": -0.1}, "max_overhead=-0.1"),
        ({"rule": "tops"}, "did you mean 'top'"),
        ({"on_failure": "ignore"}, "on_failure='ignore'"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"consume_once": "no"}, "consume_once='no'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistaken_options_are_told_when_the_callback_is_made(options, told, setting):
    targets = options.get("targets", setting.targets)
    rest = {name: value for name, value in options.items() if name != "targets"}
    with pytest.raises(InputError, match=told):
        InfluenceCallback(setting.pool, targets, every=EVERY, **{"workdir": setting.folder / "influence", **rest})
    assert not (setting.folder / "influence").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"row_tokens": 1024}, "row_tokens=1024, and the model's context is"),
        ({"row_tokens": 128, "module": "llama"}, None),
        ({"warmup_fraction": 0.5}, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_depend_on_model_or_steps_are_checked_when_the_trainer_is_made(options, told, setting):
    options = dict(options)
    module = setting.make_module(options.pop("module", "gpt2"))
    callback = InfluenceCallback(setting.pool, every=EVERY, **{"strategy": "random", "workdir": setting.folder, **options})
    with nullcontext() if told is None else pytest.raises(InputError, match=told):
        setting.trainer(callback, module=module)


def test_masks_are_compared_by_what_is_predicted_and_not_by_padding_or_one_token_more(setting):
    def told(items, pool):
        texts = PoolTexts(oracle.read_texts(pool), max_tokens=64)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tell_of_other_masks(items, SimpleNamespace(), texts)
        return bool(caught)

    ids = [[5, 6, 7, 8 + number] for number in range(8)]
    plain = [{"input_ids": row} for row in ids]
    assert not told(plain, plain)
    padded = [{"input_ids": [*row, 0, 0, 0, 0], "attention_mask": [1] * 4 + [0] * 4} for row in ids]
    assert not told(padded, plain) and not told(
        [{**item, "labels": [*item["input_ids"][:4], *[-100] * 4]} for item in padded], plain
    )
    ended = [{"input_ids": [*row, 2], "completion_mask": [0, 1, 1, 1, 1]} for row in ids]
    assert not told(ended, plain)
    assert told([{"input_ids": row, "completion_mask": [0, 0, 0, 1]} for row in ids], plain)


def test_collators_that_make_other_labels_or_need_other_items_are_refused(setting, make_tokenizer):
    tokenizer = make_tokenizer(["one two"])
    tokenizer.pad_token = tokenizer.eos_token
    causal = setting.trainer(setting.callback("causal", strategy="random"))
    causal.data_collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with pytest.raises(InputError, match="DataCollatorForLanguageModeling"):
        causal.train()
    callback = setting.callback("text", strategy="random")
    trainer = setting.trainer(callback, is_attached=False)
    trainer.train_dataset = datasets.Dataset.from_dict({"text_id": callback.pool["text_id"]})
    with pytest.raises(InputError, match=r"no input_ids \(text_id\)"):
        callback.attach(trainer).train()
    assert not list(setting.folder.glob("*/round-*"))


def test_an_epoch_that_another_callback_ends_is_refused(setting):
    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 2

    trainer = setting.trainer(setting.callback(strategy="random"))
    trainer.add_callback(Ends())
    with pytest.raises(InputError, match="ended at step 2, within a round of 3 steps"):
        trainer.train()


def test_a_callback_that_is_added_later_is_attached_and_told_otherwise(setting):
    def without_callbacks(*args, callbacks, **given):
        return Trainer(*args, callbacks=callbacks[:1], **given)

    callback = setting.callback(strategy="random")
    trainer = setting.trainer(callback, max_steps=4, is_attached=False, trainer_class=without_callbacks)
    trainer.add_callback(callback)
    with pytest.raises(InputError, match=r"callback\.attach\(trainer\) after add_callback"):
        trainer.train()
    callback.attach(trainer).train()
    assert len(callback.table()) == 2 and len(trainer.recorder.batches) == 8


def test_a_callback_in_a_second_trainer_reports_there(setting):
    callback = setting.callback(strategy="random")
    trainers = []
    for _ in range(2):
        trainers.append(setting.trainer(callback, max_steps=1, is_attached=not trainers))
        trainers[-1].train()
    told = [sum("influence/round" in entry for entry in trainer.state.log_history) for trainer in trainers]
    assert told == [1, 1] and not any("influence/round" in logs for _, logs in trainers[1].recorder.logs)


def test_a_promise_that_cannot_be_kept_is_told_and_the_account_is_closed(setting):
    callback = setting.callback(strategy="oracle", max_overhead=1e-6)
    trainer = setting.trainer(callback, max_steps=2 * EVERY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(warning.message) for warning in caught if warning.category is OverheadWarning]
    assert len(told) == 2  # once for both rounds, and at the end
    assert "refresh at step 0 is left out, and training goes on with random texts: refused" in told[0]
    assert "more than max_overhead=1e-06" in told[1] and "by seconds" in told[1]
    assert [logs["influence/left_out"] for _, logs in trainer.recorder.logs if "influence/left_out" in logs] == [1, 1]
    account = json.loads((setting.folder / "influence/overhead.json").read_text())
    assert account["is_kept"] is False and account["spent"]["flops"] == 0.0
    assert account["trained"]["seconds"] == callback.state()["attributes"]["feed"]["seconds"]
    num_tokens = sum(token != 0 for batch in trainer.recorder.batches for row in batch for token in row)  # 0 is the padding
    lm = oracle.LanguageModel(setting.make_module("llama"), device="cpu")
    assert account["trained"]["flops"] == 3 * lm.forward_flops_per_token * num_tokens


def test_a_callback_belongs_to_the_trainer_that_it_was_made_with(setting):
    callback = setting.callback(strategy="random")
    with pytest.raises(InputError, match="belongs to no Trainer"):
        callback.table()
    assert callback.state() == {"args": {}, "attributes": {}}
    trainers = [setting.trainer(one) for one in (callback, setting.callback("other", strategy="random"))]
    with pytest.raises(InputError, match="has not got this callback"):
        callback.attach(trainers[1])
