"""The running average of the weights: its arithmetic, exact return of the live weights, and rounds that measure there."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

import oracle
from oracle.errors import InputError, MismatchError, MissingFileError
from surrogate.scores import Scores
from surrogate.training import InfluenceCallback, Refresher, Rounds, WeightAverage
from surrogate.training.strategies import Ranking

DECAY = 0.75  # the plain mean of four weights, and then an exponential one


def _trained(steps, *, decay=DECAY):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    average = WeightAverage(module, decay=decay)
    watch, seen = average.watch(optimizer), []
    for _ in range(steps):
        module(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(module.weight.detach().clone())
    return module, optimizer, average, watch, seen


def test_plain_mean_at_first_then_exponential():
    for steps in (1, 3, 7):
        _, _, average, _, seen = _trained(steps)
        wanted = torch.stack(seen[:4]).mean(0)
        for weight in seen[4:]:
            wanted = DECAY * wanted + (1 - DECAY) * weight
        torch.testing.assert_close(average.state_dict()["mean"]["weight"], wanted)


def test_live_weights_come_back_bit_for_bit_also_after_an_error():
    module, _, average, _, _ = _trained(5)
    before, mean = module.weight.detach().clone(), average.state_dict()["mean"]["weight"]
    with pytest.raises(ZeroDivisionError), average.applied():
        assert torch.equal(module.weight, mean) and not torch.equal(module.weight, before)
        raise ZeroDivisionError
    assert torch.equal(module.weight, before)


def test_before_the_first_step_it_is_the_live_weights():
    module, _, average, _, _ = _trained(0)
    with torch.no_grad():
        module.weight.add_(1)  # a checkpoint that was loaded after the average was made
    live = module.weight.detach().clone()
    with average.applied():
        assert torch.equal(module.weight, live)


def test_a_watch_ends():
    module, optimizer, average, watch, _ = _trained(2)
    watch.remove()
    module(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert average.num_updates == 2


def test_goes_on_from_a_folder(tmp_path):
    module, _, average, _, _ = _trained(5)
    average.save(tmp_path)
    again = WeightAverage(module, decay=DECAY)
    again.load(tmp_path)
    for one in (average, again):
        one.update()
    assert again.num_updates == 6
    assert torch.equal(again.state_dict()["mean"]["weight"], average.state_dict()["mean"]["weight"])
    with pytest.raises(MismatchError, match="decay"):
        WeightAverage(module, decay=0.5).load(tmp_path)
    with pytest.raises(MissingFileError, match="influence_average"):
        again.load(tmp_path / "elsewhere")


@pytest.mark.parametrize("decay", [1.0, -0.1, "half"])
def test_refuses_a_decay(decay):
    with pytest.raises(InputError, match="decay"):
        WeightAverage(torch.nn.Linear(1, 1), decay=decay)


def test_refuses_a_frozen_module():
    with pytest.raises(InputError, match="trainable"):
        WeightAverage(torch.nn.Linear(1, 1).requires_grad_(False))


@dataclass(kw_only=True)
class SeesWeights:
    """Remembers the weights that it was asked at."""

    seen: list = field(default_factory=list, repr=False)
    plugin_name: ClassVar[str] = "sees_weights"
    needs_model: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = False
    adapts: ClassVar[bool] = True
    redraws: ClassVar[bool] = False

    def rank(self, context):

        self.seen.append(next(context.lm.module.parameters()).detach().clone())
        ids = [context.pool["text_id"][row] for row in context.candidates]
        return Ranking(scores=Scores(np.zeros((len(ids), 1), np.float32), text_ids=ids, target_names=["none"]))


def test_rounds_measure_at_the_average_and_train_on_from_the_live_weights(make_module, make_token_texts, tmp_path):
    pool, found = make_token_texts(64, seed=5), {}
    for name in ("live", "average"):
        torch.manual_seed(0)
        module, strategy = make_module("llama"), SeesWeights()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        average = WeightAverage(module, decay=0.9)
        average.watch(optimizer)
        lm = oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64, device="cpu")
        refresher = Refresher(pool, workdir=tmp_path / name, strategy=strategy)
        options = {"every": 2, "batch_size": 2, "max_steps": 4}
        means = []
        for batch in Rounds(refresher, lm, average=average if name == "average" else None, **options):
            means.append(next(iter(average.state_dict()["mean"].values())))
            module(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found[name] = strategy.seen, next(module.parameters()).detach().clone(), means
    assert torch.equal(found["average"][1], found["live"][1])  # the same texts, so the same training
    assert torch.equal(found["average"][0][1], found["average"][2][2])
    assert not torch.equal(found["average"][0][1], found["live"][0][1])


@dataclass(kw_only=True)
class ByWeights:
    """Ranks by a hash of text and weights, so that one bit of difference changes the selection."""

    plugin_name: ClassVar[str] = "by_weights"
    needs_model: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = False
    adapts: ClassVar[bool] = True
    redraws: ClassVar[bool] = False

    def rank(self, context):
        ids = [context.pool["text_id"][row] for row in context.candidates]
        told = [hashlib.sha256((context.lm.fingerprint() + text_id).encode()).hexdigest()[:8] for text_id in ids]
        values = np.array([int(digits, 16) for digits in told], dtype=np.float32)
        return Ranking(scores=Scores(values[:, None], text_ids=ids, target_names=["hash"]))


def test_a_resumed_trainer_has_the_average_of_its_checkpoint(make_module, make_token_texts, tmp_path):
    def selections(name, *, decay, resume=None):
        torch.manual_seed(0)
        callback = InfluenceCallback(
            make_token_texts(64, seed=5), every=2, workdir=tmp_path / name / "w", strategy=ByWeights(), average_decay=decay
        )
        options = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
        trainer = Trainer(
            make_module("llama"),
            TrainingArguments(str(tmp_path / name / "o"), report_to=[], use_cpu=True, disable_tqdm=True, **options),
            train_dataset=callback.train_dataset,
            data_collator=callback.data_collator,
            callbacks=[callback],
        )
        callback.attach(trainer).train(resume_from_checkpoint=resume)
        return [callback.refresher.round_at(index).text_ids for index in range(3)]

    whole = selections("average", decay=0.9)
    assert whole[2] != selections("live", decay=None)[2]
    shutil.rmtree(tmp_path / "average" / "w" / "round-00002")  # it is made again, and not read
    assert selections("average", decay=0.9, resume=str(tmp_path / "average" / "o" / "checkpoint-3")) == whole
