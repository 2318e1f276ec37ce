"""`rollout` against a plain loop over copies of model and optimiser, its limit, and what decides its draw."""

from __future__ import annotations

import copy
import hashlib

import numpy as np
import pytest
import torch
from torch.nn import functional

import oracle
from oracle.errors import InputError, MismatchError
from oracle.measure import UnlabelableTextWarning


@pytest.fixture
def lm(make_module, make_token_texts, make_adamw):
    module = make_module("gpt2").double()  # Llama norms go through float32, too coarse for differences this small
    return oracle.LanguageModel(module, optimizer=make_adamw(module, make_token_texts(4, seed=0)), max_tokens=64)


@pytest.fixture
def targets(make_token_texts):
    return {"a": make_token_texts(4, seed=21), "b": make_token_texts(1, seed=22)}


@pytest.fixture
def companions(make_token_texts):
    return make_token_texts(30, seed=33)


def _hash(key):
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def _ids(rows):
    return oracle.read_texts(rows)["text_id"]


def _draw(rows, *, seed, index, num_steps, batch_size):
    """The batches of a rollout and the step of the place, by hashes of the texts' contents."""
    salt = f"rollout:{seed}:{index}"
    order = sorted(zip(_ids(rows), rows, strict=True), key=lambda pair: _hash(f"{salt}:{pair[0]}"))
    drawn = [row for _, row in order[: num_steps * batch_size]]
    return [drawn[i : i + batch_size] for i in range(0, len(drawn), batch_size)], _hash(f"{salt}:place") % num_steps


def _loss(module, row):
    ids = torch.tensor([row["input_ids"]])  # transformers' own loss would go through float32
    return functional.cross_entropy(module(input_ids=ids).logits[0, :-1], ids[0, 1:]), ids.shape[1] - 1


def _train(lm, batches, *, text_loss, max_grad_norm):
    """Train a copy of model and optimiser on batches, one text at a time."""
    module, optimizer = copy.deepcopy((lm.module, lm.optimizer))  # together, so that they share the parameters
    for batch in batches:
        optimizer.zero_grad()
        total = sum(_loss(module, row)[1] for row in batch)
        for row in batch:
            loss, count = _loss(module, row)
            (loss / len(batch) if text_loss == "mean" else loss * count / total).backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
        optimizer.step()
    return module


def _target_loss(module, rows):
    with torch.no_grad():
        pairs = [_loss(module, row) for row in rows]
    return float(sum(loss * count for loss, count in pairs) / sum(count for _, count in pairs))


@pytest.mark.parametrize(("text_loss", "max_grad_norm"), [("mean", None), ("sum", 0.5)])
def test_the_value_is_what_plain_training_runs_with_and_without_the_text_differ_by(
    text_loss, max_grad_norm, lm, targets, companions, make_token_texts
):
    sample = make_token_texts(3, seed=1)
    shape = {"num_steps": 3, "batch_size": 2}
    labels = oracle.label(
        lm,
        sample,
        targets,
        method="rollout",
        companions=companions,
        num_rollouts=2,
        rollout_seed=5,
        text_loss=text_loss,
        max_grad_norm=max_grad_norm,
        **shape,
    )
    gains, steps = np.zeros((2, 3, 2)), []
    for index in range(2):
        batches, place = _draw(companions, seed=5, index=index, **shape)
        steps.append(place)
        settings = {"text_loss": text_loss, "max_grad_norm": max_grad_norm}
        base = _train(lm, batches, **settings)
        for row, text in enumerate(sample):
            changed = [list(batch) for batch in batches]
            changed[place][-1] = text
            module = _train(lm, changed, **settings)
            gains[index, row] = [_target_loss(base, rows) - _target_loss(module, rows) for rows in targets.values()]
    assert labels.meta["facts"]["steps_of_places"] == steps
    scale = np.abs(gains).max()
    np.testing.assert_allclose(labels.values, gains.mean(0), rtol=1e-4, atol=1e-5 * scale)
    spread = np.stack([labels.columns[f"spread.{name}"] for name in targets], axis=1)
    np.testing.assert_allclose(spread, gains.std(0), rtol=1e-4, atol=1e-5 * scale)
    assert labels.units == "nats per target token"


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_one_small_sgd_step_on_a_batch_that_is_clipped_together_tends_to_grad_dots_share_of_it(
    max_grad_norm, lm, targets, companions, make_token_texts
):
    """The share is (clip factor / B) * the sum over the batch; unclipped, that is 1 / B * (text - companion)."""
    sample, size, errors = make_token_texts(5, seed=1), 4, []
    batch = _draw(companions, seed=0, index=0, num_steps=1, batch_size=size)[0][0]
    for rate in (1e-3, 1e-4):
        lm.optimizer = torch.optim.SGD(lm.module.parameters(), lr=rate)
        options = {"companions": companions, "num_steps": 1, "batch_size": size, "max_grad_norm": max_grad_norm}
        labels = oracle.label(lm, sample, targets, method="rollout", **options)
        slopes = oracle.label(lm, [*batch, *sample], targets, method="grad_dot").take([*_ids(batch), *_ids(sample)]).values

        def step(row, slope, slopes=slopes):
            """First order of a step on the batch with this text in the place: (C,)."""
            lm.module.zero_grad()
            for text in [*batch[:-1], row]:
                (_loss(lm.module, text)[0] / size).backward()
            norm = float(torch.nn.utils.clip_grad_norm_(lm.module.parameters(), float("inf")))
            factor = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / norm)
            return factor * (slopes[: size - 1].sum(0) + slope) / size

        base = step(batch[-1], slopes[size - 1])
        expected = np.array([step(row, slope) for row, slope in zip(sample, slopes[size:], strict=True)]) - base
        errors.append(np.abs(labels.values - expected).max() / np.abs(expected).max())
        if max_grad_norm is None:
            np.testing.assert_allclose(expected, (slopes[size:] - slopes[size - 1]) / size, atol=1e-6 * np.abs(expected).max())
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("text_loss", ["mean", "sum"])
def test_one_step_of_one_text_is_one_step_minus_that_of_the_companion(text_loss, lm, targets, companions, make_token_texts):
    sample = make_token_texts(4, seed=1)
    labels = oracle.label(
        lm, sample, targets, method="rollout", companions=companions, num_steps=1, batch_size=1, text_loss=text_loss
    )
    companion = labels.meta["facts"]["replaced_companions"][0]
    replaced = [row for text_id, row in zip(_ids(companions), companions, strict=True) if text_id == companion]
    step = oracle.label(lm, sample + replaced, targets, method="one_step")
    np.testing.assert_allclose(labels.values, step.values[:-1] - step.values[-1], rtol=1e-4, atol=1e-7)
    losses = oracle.label(lm, sample, targets, method="one_step", text_loss=text_loss).columns["text_loss"]
    np.testing.assert_allclose(labels.columns["text_loss"], losses, rtol=1e-6)
    np.testing.assert_allclose(labels.halves, step.halves[:, :-1] - step.halves[:, -1:], rtol=1e-4, atol=1e-7)


def test_neither_the_order_of_the_sample_nor_of_the_companions_matters_but_the_seed_does(
    lm, targets, companions, make_token_texts
):
    sample = make_token_texts(5, seed=1)
    settings = {"method": "rollout", "num_steps": 2, "batch_size": 3, "num_rollouts": 2}
    first = oracle.label(lm, sample, targets, companions=companions, **settings)
    again = oracle.label(lm, sample, targets, companions=companions, **settings)
    assert again.values.tobytes() == first.values.tobytes()
    other = oracle.label(lm, sample[::-1], targets, companions=companions[::-1], block_size=2, **settings)
    assert other.take(first.text_ids).values.tobytes() == first.values.tobytes()
    seeded = oracle.label(lm, sample, targets, companions=companions, rollout_seed=1, **settings)
    assert np.abs(seeded.values - first.values).max() > 1e-3 * np.abs(first.values).max()


def test_the_companion_that_is_replaced_has_no_effect_and_an_empty_place_is_told(lm, targets, companions):
    settings = {"method": "rollout", "companions": companions, "num_steps": 3, "batch_size": 2}
    with pytest.warns(UnlabelableTextWarning):
        labels = oracle.label(lm, [*companions, {"input_ids": [5]}], targets, **settings)
    replaced = labels.text_ids.index(labels.meta["facts"]["replaced_companions"][0])
    assert (labels.values[replaced] == 0).all()
    assert (np.delete(labels.values, replaced, axis=0) != 0).all()
    np.testing.assert_allclose(labels.values[-1], labels.meta["facts"]["shared_part"], atol=1e-7)


def test_the_state_is_bit_identical_afterwards_also_when_a_step_raises(lm, targets, companions, make_token_texts, monkeypatch):
    before, random_state = lm.fingerprint(optimizer=True), torch.get_rng_state()
    settings = {"method": "rollout", "companions": companions, "num_steps": 3, "batch_size": 2, "num_rollouts": 2}
    oracle.label(lm, make_token_texts(3, seed=1), targets, **settings)
    assert lm.fingerprint(optimizer=True) == before
    original, calls = lm.optimizer.step, []

    def fails_later():
        calls.append(1)
        if len(calls) == 20:
            raise RuntimeError("out of memory")
        original()

    monkeypatch.setattr(lm.optimizer, "step", fails_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        oracle.label(lm, make_token_texts(3, seed=1), targets, **settings)
    assert lm.fingerprint(optimizer=True) == before
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(p.grad is None for p in lm.module.parameters())


def test_the_steps_before_the_place_are_taken_once_for_all_texts(lm, targets, companions, make_token_texts, monkeypatch):
    settings = {"method": "rollout", "companions": companions, "num_steps": 4, "batch_size": 2}
    seed = next(seed for seed in range(20) if _hash(f"rollout:{seed}:0:place") % 4 == 3)
    original, calls = lm.optimizer.step, []
    monkeypatch.setattr(lm.optimizer, "step", lambda: (calls.append(1), original()))
    labels = oracle.label(lm, make_token_texts(5, seed=1), targets, rollout_seed=seed, **settings)
    assert len(calls) == 3 + 1 + 1 + 5  # before the place; with the companion, with nothing, with each of five texts
    batches, place = _draw(companions, seed=seed, index=0, num_steps=4, batch_size=2)
    own, other = labels.columns["num_tokens"].sum(), len(batches[place][0]["input_ids"])
    padded = sum(len(row["input_ids"]) for rows in targets.values() for row in rows)
    cost, per_token = labels.meta["cost"], lm.forward_flops_per_token
    assert cost["label_flops"] / per_token >= 3 * (own + 5 * other) + 5 * padded
    assert cost["label_flops"] / per_token <= 3 * (own + 5 * other) + 5 * 2 * padded  # the target batches are padded


def test_stored_labels_know_their_companions_by_content(lm, targets, companions, make_token_texts, tmp_path):
    settings = {"method": "rollout", "num_steps": 1, "batch_size": 2, "workdir": tmp_path}
    sample = make_token_texts(2, seed=1)
    first = oracle.label(lm, sample, targets, companions=companions, **settings)
    again = oracle.label(lm, sample, targets, companions=companions[::-1], **settings)
    assert again.values.tobytes() == first.values.tobytes()
    with pytest.raises(MismatchError, match="companions"):
        oracle.label(lm, sample, targets, companions=companions[1:], **settings)
    assert "input_ids" not in (tmp_path / "identity.json").read_text()


def test_what_cannot_be_rolled_out_is_refused(lm, targets, companions, make_token_texts):
    sample = make_token_texts(2, seed=1)
    with pytest.raises(InputError, match="no companions") as raised:
        oracle.label(lm, sample, targets, method="rollout")
    assert "read_texts" in raised.value.accepted and "one_step" in raised.value.remedy
    with pytest.raises(InputError, match="takes 32 companions, and 30 of the 31"):
        oracle.label(lm, sample, targets, method="rollout", companions=[*companions, {"input_ids": [3]}])
    for wrong in (0, 2.5):
        with pytest.raises(InputError, match=f"num_steps={wrong}"):
            oracle.label(lm, sample, targets, method="rollout", companions=companions, num_steps=wrong)
    bare = oracle.LanguageModel(lm.module, max_tokens=64)
    with pytest.raises(InputError, match="there is none"):
        oracle.label(bare, sample, targets, method="rollout", companions=companions, num_steps=1)
    lm.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(InputError, match="learning rate is 0"):
        oracle.label(lm, sample, targets, method="rollout", companions=companions, num_steps=1)
