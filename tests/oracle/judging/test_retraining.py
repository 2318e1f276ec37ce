"""Retraining is what a plain loop does, leaves the model as it was, and trains each subset once."""

from __future__ import annotations

import copy
import hashlib
import json

import numpy as np
import pytest
import torch

import oracle
from oracle.errors import InputError, MismatchError, NotFiniteError
from oracle.judging.retraining import Retraining, RetrainingPlan, Subset, hash_order
from oracle.target_columns import prepare_targets
from oracle.targets import read_targets


@pytest.fixture
def lm(make_module, make_token_texts, make_adamw):
    module = make_module("llama")
    return oracle.LanguageModel(module, optimizer=make_adamw(module, make_token_texts(4, seed=0)), max_tokens=64)


@pytest.fixture
def pool(make_token_texts):
    return oracle.read_texts(make_token_texts(10, seed=1, longest=12))


@pytest.fixture
def targets(make_token_texts):
    return {"a": make_token_texts(4, seed=21, longest=12), "b": make_token_texts(3, seed=22, longest=12)}


@pytest.fixture
def columns(lm, targets):
    return prepare_targets(lm, read_targets(targets))


def _plain_loss(module, rows):
    """Summed loss and number of target tokens of texts, one at a time."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = module(input_ids=ids).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        count += ids.shape[1] - 1
    return total, count


def _plain_retraining(lm, rows_by_id, *, plan, num_steps, seed):
    """Train a copy text by text, in the order of `sha256(order:seed:pass:id)`; return it."""
    module = copy.deepcopy(lm.module).train()
    optimizer = type(lm.optimizer)(module.parameters(), lr=lm.optimizer.param_groups[0]["lr"])
    optimizer.load_state_dict(copy.deepcopy(lm.optimizer.state_dict()))
    per_pass = -(-len(rows_by_id) // plan.batch_size)
    for step in range(num_steps):
        salt = f"order:{seed}:{step // per_pass}"
        ids = sorted(rows_by_id, key=lambda text_id: hashlib.sha256(f"{salt}:{text_id}".encode()).digest())
        rows = [rows_by_id[text_id] for text_id in np.array_split(np.array(ids), per_pass)[step % per_pass]]
        optimizer.zero_grad()
        if plan.text_loss == "mean":
            for row in rows:
                total, count = _plain_loss(module, [row])
                (total / count / len(rows)).backward()
        else:
            total, count = _plain_loss(module, rows)
            (total / count).backward()
        if plan.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), plan.max_grad_norm)
        optimizer.step()
    return module.eval()


@pytest.mark.parametrize(
    ("options", "num_steps"),
    [
        ({}, 4),
        ({"text_loss": "sum", "max_grad_norm": None}, 4),
        ({"num_steps": 6, "max_grad_norm": 0.1}, 6),
        ({"num_steps": 2}, 2),
    ],
    ids=str,
)
def test_a_retrained_model_is_what_a_plain_loop_over_the_texts_gives(options, num_steps, lm, pool, targets):
    plan = RetrainingPlan(batch_size=3, **options)
    found = oracle.retrain(lm, pool, targets, plan=plan, seed=5)
    rows = dict(zip(pool["text_id"], pool.select_columns(["input_ids"]).to_list(), strict=True))
    module = _plain_retraining(lm, rows, plan=plan, num_steps=num_steps, seed=5)
    with torch.no_grad():
        for column, name in enumerate(targets):
            for module_then, losses in ((lm.module, found.before), (module, found.after)):
                total, count = _plain_loss(module_then, targets[name])
                assert losses[column] == pytest.approx(float(total) / count, abs=2e-5)
    assert found.num_steps == num_steps
    assert np.abs(found.effects).min() > 1e-4  # training did something


def test_batches_split_for_memory_change_nothing_but_rounding(lm, pool, targets, monkeypatch):
    whole = oracle.retrain(lm, pool, targets)
    monkeypatch.setattr(type(lm), "default_batch_tokens", property(lambda self: 1))
    np.testing.assert_allclose(oracle.retrain(lm, pool, targets).after, whole.after, rtol=1e-4)


def test_the_seed_decides_the_order_and_row_order_does_not(lm, pool, columns):
    ids = tuple(pool["text_id"])
    first, other = Retraining(lm, pool, columns).run([Subset(ids, 1), Subset(ids, 2)])
    again = Retraining(lm, pool.select(range(len(pool) - 1, -1, -1)), columns).run([Subset(ids[::-1], 1)])[0]
    np.testing.assert_array_equal(again.after, first.after)
    assert np.abs(other.after - first.after).max() > 1e-4


def test_subsets_see_shared_texts_in_the_same_order():
    ids = [f"id{number}" for number in range(50)]
    whole = hash_order(ids, "salt")
    assert hash_order(ids[::-1], "salt") == whole != hash_order(ids, "other")
    some = ids[:20]
    assert hash_order(some, "salt") == [text_id for text_id in whole if text_id in some]


def test_dropout_is_on_and_follows_the_seed(make_module, make_token_texts, make_adamw, pool, targets):
    module = make_module("gpt2")
    for child in module.modules():
        if isinstance(child, torch.nn.Dropout):
            child.p = 0.3
    lm = oracle.LanguageModel(module, optimizer=make_adamw(module, make_token_texts(4, seed=0)), max_tokens=64)
    first = oracle.retrain(lm, pool, targets)
    torch.manual_seed(99)
    np.testing.assert_array_equal(oracle.retrain(lm, pool, targets).after, first.after)
    for child in module.modules():
        if isinstance(child, torch.nn.Dropout):
            child.p = 0.0
    assert not np.array_equal(oracle.retrain(lm, pool, targets).after, first.after)


def test_the_model_is_bit_identical_afterwards_also_when_training_raises(lm, pool, targets, monkeypatch):
    lm.module.train()
    before, random_state = lm.fingerprint(optimizer=True), torch.get_rng_state()
    oracle.retrain(lm, pool, targets)
    calls = []
    original = lm.optimizer.step

    def fails_at_the_second_step():
        if calls:
            raise RuntimeError("out of memory")
        calls.append(1)
        original()

    monkeypatch.setattr(lm.optimizer, "step", fails_at_the_second_step)
    with pytest.raises(RuntimeError, match="out of memory"):
        oracle.retrain(lm, pool, targets, plan=RetrainingPlan(batch_size=2))
    assert lm.fingerprint(optimizer=True) == before
    assert torch.equal(random_state, torch.get_rng_state())
    assert lm.module.training and all(p.grad is None for p in lm.module.parameters())


def test_models_of_one_run_do_not_depend_on_those_before_them(lm, pool, columns):
    ids = pool["text_id"][:]
    first, second = Subset(tuple(ids[:6])), Subset(tuple(ids[4:]))
    together = Retraining(lm, pool, columns).run([first, second])
    alone = Retraining(lm, pool, columns).run([second])
    np.testing.assert_array_equal(together[1].after, alone[0].after)


def test_finished_models_are_read_and_not_trained_again(lm, pool, columns, tmp_path):
    ids = pool["text_id"][:]
    asked = [Subset(tuple(ids[:6])), Subset(tuple(ids[4:])), Subset(tuple(ids[5::-1]))]  # the last is the first again
    first = Retraining(lm, pool, columns, workdir=tmp_path)
    results = first.run(asked)
    files = {path.name: path.read_bytes() for path in (tmp_path / "models").glob("*.json")}
    assert len(files) == 2 and first.cost()["num_models"] == first.cost()["num_trained_now"] == 2
    again = Retraining(lm, pool, columns, workdir=tmp_path)
    for one, other in zip(again.run([*asked, Subset(tuple(ids), 3)])[:3], results, strict=True):
        np.testing.assert_array_equal(one.after, other.after)
        np.testing.assert_array_equal(one.half_effects, other.half_effects)
    assert again.cost()["num_trained_now"] == 1 and again.cost()["num_models"] == 3
    assert again.cost()["seconds"] >= first.cost()["seconds"]
    assert all((tmp_path / "models" / name).read_bytes() == content for name, content in files.items())


def test_effects_of_the_halves_add_up_to_the_whole(lm, pool, targets, columns):
    found = Retraining(lm, pool, columns).run([Subset(tuple(pool["text_id"]))])[0]
    for target in range(2):
        tokens = [columns.part_tokens[part] for part, owner in enumerate(columns.parts) if owner == target]
        assert found.half_effects[:, target] @ tokens / np.sum(tokens) == pytest.approx(found.effects[target])


def test_results_of_another_plan_checkpoint_or_target_are_refused(lm, pool, targets, make_token_texts, tmp_path):
    oracle.retrain(lm, pool, targets, workdir=tmp_path)
    with pytest.raises(MismatchError, match=r"plan.*batch_size"):
        oracle.retrain(lm, pool, targets, plan=RetrainingPlan(batch_size=2), workdir=tmp_path)
    with pytest.raises(MismatchError, match="target_ids"):
        oracle.retrain(lm, pool, {**targets, "b": make_token_texts(3, seed=5)}, workdir=tmp_path)
    lm.optimizer.param_groups[0]["lr"] *= 2
    with pytest.raises(MismatchError, match="checkpoint"):
        oracle.retrain(lm, pool, targets, workdir=tmp_path)


def test_flops_count_training_and_evaluation(lm, pool, columns):
    retraining = Retraining(lm, pool, columns)
    retraining.run([Subset(tuple(pool["text_id"]))])
    num_tokens = sum(len(ids) for ids in pool["input_ids"])
    assert retraining.cost()["flops"] == lm.forward_flops_per_token * (3 * num_tokens + columns.num_tokens)


def test_a_diverging_model_is_an_error_and_keeps_the_finished_ones(lm, pool, columns, tmp_path, monkeypatch):
    ids = pool["text_id"][:]
    retraining = Retraining(lm, pool, columns, workdir=tmp_path)
    original, calls = lm.text_losses, []

    def is_nan_later(batch, **options):
        calls.append(1)
        return original(batch, **options) * (float("nan") if len(calls) > 2 else 1.0)

    monkeypatch.setattr(lm, "text_losses", is_nan_later)
    with pytest.raises(NotFiniteError, match="training loss at step 1"):
        retraining.run([Subset(tuple(ids[:6])), Subset(tuple(ids))])
    stored = list((tmp_path / "models").glob("*.json"))
    assert len(stored) == 1 and json.loads(stored[0].read_text())["num_texts"] == 6


def test_what_cannot_be_trained_is_refused_with_the_reason(lm, pool, targets, columns):
    with pytest.raises(MismatchError, match="1 of the 2 texts to train on are unknown"):
        Retraining(lm, pool, columns).run([Subset((pool["text_id"][0], "nothing"))])
    with pytest.raises(InputError, match="none of the 1 texts"):
        oracle.retrain(lm, [{"input_ids": [5]}], targets)
    for option, value in (
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("num_steps", 0),
        ("num_steps", 2.5),
        ("max_grad_norm", 0.0),
        ("text_loss", "median"),
    ):
        with pytest.raises(InputError, match=option):
            RetrainingPlan(**{option: value})
    lm.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(InputError, match="learning rate is 0"):
        oracle.retrain(lm, pool, targets)
    lm.optimizer = None
    with pytest.raises(InputError, match="needs the optimiser"):
        oracle.retrain(lm, pool, targets)


def test_training_packs_nothing_and_stored_models_serve_however_targets_are_batched(lm, make_token_texts, tmp_path, monkeypatch):
    pool = [*make_token_texts(9, seed=1, longest=6), *make_token_texts(3, seed=4, longest=40)]
    targets = {"a": [*make_token_texts(9, seed=2, longest=6), *make_token_texts(3, seed=3, longest=40)]}
    first = oracle.retrain(lm, pool, targets, workdir=tmp_path)
    original, packed = lm.text_losses, []

    def watched(batch, **options):
        packed.append(batch.packed is not None)
        return original(batch, **options)

    monkeypatch.setattr(lm, "text_losses", watched)
    lm.packing = True
    for texts in (pool, targets["a"]):
        assert any(batch.packed is not None for batch in lm.batches(lm.encode(texts)))
    np.testing.assert_allclose(oracle.retrain(lm, pool, targets).after, first.after, rtol=1e-5)
    assert packed and not any(packed)
    packed.clear()
    np.testing.assert_array_equal(oracle.retrain(lm, pool, targets, workdir=tmp_path).after, first.after)
    lm.packing, lm.batch_tokens = False, 50
    np.testing.assert_array_equal(oracle.retrain(lm, pool, targets, workdir=tmp_path).after, first.after)
    assert not packed


def test_training_and_evaluation_run_outside_the_callers_autocast(lm, pool, targets):
    expected = oracle.retrain(lm, pool, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = oracle.retrain(lm, pool, targets)
    np.testing.assert_array_equal(found.after, expected.after)


def test_a_folder_without_a_finished_model_takes_another_plan(lm, pool, columns, tmp_path):
    Retraining(lm, pool, columns, workdir=tmp_path)
    plan = RetrainingPlan(batch_size=2)
    Retraining(lm, pool, columns, plan=plan, workdir=tmp_path).run([Subset(tuple(pool["text_id"]))])
    with pytest.raises(MismatchError, match=r"plan.*batch_size"):
        Retraining(lm, pool, columns, workdir=tmp_path)
