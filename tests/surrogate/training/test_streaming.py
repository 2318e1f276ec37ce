"""A pool that is a stream: windows of it are pools, also in workers; a resume is exact as far as the stream repeats itself."""

from __future__ import annotations

import warnings

import datasets
import pytest
import torch
from transformers import Trainer, TrainingArguments

import oracle
from oracle.errors import InputError, MismatchError, MissingFileError
from surrogate.training import InfluenceCallback, Rounds, StreamRefresher, held_files
from surrogate.training.streaming import StreamResumeWarning

ROWS = [{"input_ids": [3 + number % 200, 3 + number // 200, 5 + number % 7]} for number in range(100)]
OPTIONS = {"window": 20, "rounds_per_window": 2, "strategy": "random"}
QUIET = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}


def stream():
    return datasets.Dataset.from_list(ROWS).to_iterable_dataset()


def rounds_of(make_module, workdir, *, source=None, max_steps=10, **options):
    module = make_module("gpt2")
    lm = oracle.LanguageModel(module, optimizer=torch.optim.SGD(module.parameters(), lr=1e-2), max_tokens=64, device="cpu")
    refresher = StreamRefresher(stream() if source is None else source, workdir=workdir, **OPTIONS)
    return Rounds(refresher, lm, every=2, batch_size=4, max_steps=max_steps, **options)


def shown(batches):
    """Numbers of the texts in batches."""
    return [[int(row[0]) - 3 + 200 * (int(row[1]) - 3) for row in batch["input_ids"]] for batch in batches]


@pytest.mark.parametrize("loader", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["main", "kept"])
def test_each_round_trains_on_texts_of_its_window(loader, make_module, tmp_path):
    rounds = rounds_of(make_module, tmp_path, loader_options=loader)
    numbers = shown(list(rounds))
    assert len(numbers) == 10
    for step, batch in enumerate(numbers):
        number = step // 4  # two rounds of two steps
        assert all(20 * number <= text < 20 * number + 20 for text in batch)
    assert len({text for batch in numbers for text in batch}) == 40  # none of them twice
    table = rounds.feed.refresher.table()
    assert [(record["index"], record["window"]) for record in table] == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)]
    assert rounds.metrics()["influence/round"] == 4.0
    assert rounds.state_dict()["feed"]["tokens_before"] == 4 * 8 * 3  # of the four rounds before the last one


def test_a_resumed_training_goes_on_in_the_stream_and_says_that_this_is_approximate(make_module, tmp_path):
    whole = shown(list(rounds_of(make_module, tmp_path / "whole")))
    for stop in (3, 4, 6):  # within a round, at the border of a window, at that of a round
        first = rounds_of(make_module, tmp_path / f"run{stop}")
        batches = [batch for _, batch in zip(range(stop), first, strict=False)]
        resumed = rounds_of(make_module, tmp_path / f"run{stop}")
        resumed.load_state_dict(first.state_dict())
        with pytest.warns(StreamResumeWarning, match="passed over"):
            batches += list(resumed)
        assert shown(batches) == whole, stop


def test_a_resume_with_windows_of_another_size_is_refused(make_module, tmp_path):
    first = rounds_of(make_module, tmp_path)
    next(iter(first))
    for name, value in (("window", 10), ("rounds_per_window", 1)):
        refresher = StreamRefresher(stream(), workdir=tmp_path, **{**OPTIONS, name: value})
        with pytest.raises(MismatchError, match=f"{name}={OPTIONS[name]}, and now {name}={value}"):
            refresher.load_state_dict(first.state_dict()["feed"]["refresher"])


def test_one_window_at_a_time_is_held_and_none_after_training(make_module, tmp_path):
    number = len(held_files._held)
    for _ in rounds_of(make_module, tmp_path):
        assert len(held_files._held) == number + 1
    assert len(held_files._held) == number


def test_a_stream_that_ends_begins_again(make_module, tmp_path):
    numbers = shown(list(rounds_of(make_module, tmp_path, source=ROWS[:30], max_steps=8)))
    assert {text for batch in numbers[4:] for text in batch} <= {*range(20, 30), *range(10)}


@pytest.mark.parametrize("row_tokens", [None, 8])
def test_a_stream_under_the_trainer(row_tokens, make_module, tmp_path):
    def train(resume=None):
        callback = InfluenceCallback(
            stream(), every=2, workdir=tmp_path / "work", tokenizer=None, max_tokens=64, row_tokens=row_tokens, **OPTIONS
        )
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=4, save_steps=3, **QUIET
        )
        trainer = Trainer(
            make_module("gpt2"), args, train_dataset=callback.train_dataset, data_collator=callback.data_collator,
            callbacks=[callback],
        )  # fmt: skip
        seen = []
        trainer.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
        callback.attach(trainer).train(resume_from_checkpoint=resume)
        return callback, [batch["input_ids"].tolist() for batch in seen]

    callback, whole = train()
    assert [record["window"] for record in callback.table()] == [0, 0, 1] and len(whole) == 6
    assert callback.pool.num_rows == 20
    _, again = train(str(tmp_path / "out/checkpoint-3"))
    assert again == whole[3:]


def test_what_a_stream_cannot_have_is_refused(make_module, tmp_path):
    with pytest.raises(InputError, match=r"base=\.\.\., and a stream"):
        rounds_of(make_module, tmp_path / "base", base=ROWS)
    for options, given in (
        ({"max_overhead": 0.1}, "max_overhead"),
        ({"warmup_fraction": 0.1}, "warmup_fraction"),
        ({"window": 0}, "window"),
        ({"strategy": "refesh"}, "did you mean 'refresh'"),
        ({"strategy": "refresh"}, "without target sets"),
        ({"strategy": "dsir", "targets": {"goal": "nowhere.jsonl"}}, "there is no file"),
        ({"refresh_evry": 2}, "did you mean 'refresh_every'"),
    ):
        with pytest.raises(InputError, match=given):
            StreamRefresher(stream(), workdir=tmp_path, **{**OPTIONS, **options})
    with pytest.raises(InputError, match="read only once"):
        StreamRefresher(iter(ROWS), workdir=tmp_path, **OPTIONS)
    for name in ("pool/*.parquet", tmp_path):
        with pytest.raises(InputError, match=r"(?s)a stream, window=20, that is a .*load_dataset"):  # its letters are no texts
            StreamRefresher(name, workdir=tmp_path, **OPTIONS)
    with pytest.raises(InputError, match=r"(?s)no window was read yet.*SFTTrainer"):
        len(StreamRefresher(stream(), workdir=tmp_path, **OPTIONS).pool)
    with pytest.raises(InputError, match="without texts"):
        list(rounds_of(make_module, tmp_path / "empty", source=[]))
    state = rounds_of(make_module, tmp_path / "run")
    list(state)
    with pytest.raises(MissingFileError, match="training has come to it"):
        rounds_of(make_module, tmp_path / "elsewhere").load_state_dict(state.state_dict())
    with pytest.raises(MismatchError, match="texts of the stream from 0 to 20"):
        list(rounds_of(make_module, tmp_path / "run", source=ROWS[1:]))
    with pytest.raises(MismatchError, match="texts of the stream from 20 to 40"):
        list(rounds_of(make_module, tmp_path / "run", source=[*ROWS[:20], *ROWS[40:]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(rounds_of(make_module, tmp_path / "run"))  # the same stream from the start
