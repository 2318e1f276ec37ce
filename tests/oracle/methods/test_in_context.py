"""The loss with a text in front: against a plain loop, with the right tokens counted and nothing of the target lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from oracle import plugins
from oracle.encoding import EncodedText
from oracle.errors import InputError
from oracle.target_columns import prepare_targets
from oracle.targets import read_targets, split_halves


@pytest.fixture
def lm(make_module):
    return oracle.LanguageModel(make_module("llama").double(), max_tokens=64)


@pytest.fixture
def targets(make_token_texts):
    prompted = [
        {"input_ids": row["input_ids"], "labels": [-100 if place < 2 else token for place, token in enumerate(row["input_ids"])]}
        for row in make_token_texts(5, seed=11, longest=30)
        if len(row["input_ids"]) > 3
    ]
    return {"plain": make_token_texts(4, seed=12, longest=30), "prompted": prompted, "single": make_token_texts(1, seed=13)}


def distance_of(lm, front, row, distance):
    """One target text's distance, token by token, each scored by the logits just before it."""
    ids = front + row["input_ids"]
    labels = row.get("labels", row["input_ids"])
    with torch.no_grad():
        logits = lm.module(input_ids=torch.tensor([ids])).logits[0]
    terms = []
    for place in range(1, len(labels)):
        if labels[place] != -100:
            probability = float(logits[len(front) + place - 1].softmax(0)[labels[place]])
            terms.append(-np.log(probability) if distance == "nats" else (1 - probability) ** 2)
    return np.mean(terms) if distance == "nats" else np.sqrt(np.mean(terms)), len(terms)


def value_of(lm, front, rows, distance):
    """The token-weighted mean of the target texts' gains."""
    gains, weights = [], []
    for row in rows:
        before, num_tokens = distance_of(lm, [], row, distance)
        gains.append(before - distance_of(lm, front, row, distance)[0])
        weights.append(num_tokens)
    return np.average(gains, weights=weights)


@pytest.mark.parametrize("distance", ["nats", "probability"])
def test_values_and_halves_equal_a_plain_loop(distance, lm, targets, make_token_texts):
    sample = make_token_texts(4, seed=2, longest=24)
    labels = oracle.label(lm, sample, targets, method="in_context", distance=distance)
    for target in read_targets(targets):
        rows = list(target.texts)
        in_first = split_halves(target)
        for number, text in enumerate(sample):
            expected = value_of(lm, text["input_ids"], rows, distance)
            assert labels.target(target.name)[number] == pytest.approx(expected, abs=1e-6)
            for half in range(2):
                own = [row for row, first in zip(rows, in_first, strict=True) if first == (half == 0)]
                found = labels.halves[half, number, labels.target_names.index(target.name)]
                if target.name == "single":
                    assert np.isnan(found)
                else:
                    assert found == pytest.approx(value_of(lm, text["input_ids"], own, distance), abs=1e-6)
    assert labels.units.startswith("nats per target token" if distance == "nats" else "distance")
    expected = [value_of(lm, [], rows, distance) for rows in targets.values()]
    np.testing.assert_allclose(expected, 0)


def test_a_text_that_tells_the_answer_has_a_high_value(make_module):
    """A model that was trained to repeat: a text's second half is its first."""
    torch.manual_seed(0)
    module = make_module("gpt2").train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(150):
        half = torch.randint(3, 40, (32, 6))
        ids = torch.cat([half, half], dim=1)
        labels = ids.clone()
        labels[:, :6] = -100
        module(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lm = oracle.LanguageModel(module.eval(), max_tokens=32)
    answers = [[5, 9, 30, 12, 21, 8], [33, 7, 14, 3, 26, 11]]
    targets = {str(number): [{"input_ids": answer}] for number, answer in enumerate(answers)}
    labels = oracle.label(lm, [{"input_ids": answer} for answer in answers], targets, method="in_context")
    assert (labels.values[[0, 1], [0, 1]] > labels.values[[0, 1], [1, 0]] + 0.1).all()
    assert (labels.values[[0, 1], [0, 1]] > 0).all()


def measure(lm, targets, texts, **options):
    method = plugins.create("oracle.methods", "in_context", options)
    with lm.preserved(weights=False):
        method.prepare(lm, prepare_targets(lm, read_targets(targets)))
        return method.measure(texts), method


def test_an_empty_text_has_the_value_zero_also_with_a_separator(make_module, make_tokenizer, targets):
    lm = oracle.LanguageModel(make_module("llama", vocab_size=300), make_tokenizer(["a text"]), max_tokens=64)
    for separator in ("none", "eos"):
        measured, _ = measure(lm, targets, [EncodedText("empty", [], [])], separator=separator)
        np.testing.assert_array_equal(measured.values, 0.0)


def test_a_text_loses_its_end_and_the_target_nothing(lm, make_token_texts):
    long = list(range(3, 63))
    targets = {"t": [{"input_ids": list(range(70, 110))}, {"input_ids": list(range(110, 120))}]}
    first, second = ({"t": [row]} for row in targets["t"])
    labels = oracle.label(lm, [{"input_ids": long}], targets, method="in_context")
    assert labels.columns["share_of_targets_cut_for"][0] == 1.0
    shown = [
        oracle.label(lm, [{"input_ids": long[:room]}], own, method="in_context") for own, room in ((first, 24), (second, 54))
    ]
    assert all(part.columns["share_of_targets_cut_for"][0] == 0.0 for part in shown)
    expected = np.average([part.values[0, 0] for part in shown], weights=[39, 9])
    assert labels.values[0, 0] == pytest.approx(expected, abs=1e-6)


def test_where_the_target_fills_the_context_no_text_has_a_value(lm, make_token_texts):
    target = {"t": [{"input_ids": [3 + place % 200 for place in range(64)]}]}
    labels = oracle.label(lm, make_token_texts(3, seed=1), target, method="in_context")
    np.testing.assert_array_equal(labels.values, 0.0)
    assert labels.meta["cost"]["label_flops"] == 0


def test_the_separator_stands_between_text_and_target(make_module, make_tokenizer, make_token_texts):
    tokenizer = make_tokenizer(["a text"])
    lm = oracle.LanguageModel(make_module("llama", vocab_size=300).double(), tokenizer, max_tokens=64)
    text, targets = {"input_ids": [7, 8, 9]}, make_token_texts(3, seed=5)
    labels = oracle.label(lm, [text], {"t": targets}, method="in_context", separator="eos")
    expected = value_of(lm, [*text["input_ids"], tokenizer.eos_token_id], targets, "nats")
    assert labels.values[0, 0] == pytest.approx(expected, abs=1e-6)
    lm.tokenizer = None
    with pytest.raises(InputError, match="no tokenizer with an end-of-text token"):
        oracle.label(lm, [text], {"t": targets}, method="in_context", separator="eos")


def test_flops_are_those_of_reading_text_and_target_for_every_target(lm, targets, monkeypatch):
    text = {"input_ids": list(range(3, 53))}
    labels = oracle.label(lm, [text], targets, method="in_context")
    lengths = [len(row["input_ids"]) for rows in targets.values() for row in rows]
    read = sum(min(50, 64 - length) + length for length in lengths)
    assert labels.meta["cost"]["label_flops"] == lm.forward_flops_per_token * read
    assert labels.meta["facts"]["num_target_texts_read"] == len(lengths)


def test_a_text_is_measured_alike_beside_any_others(lm, targets, make_token_texts):
    encoded = lm.encode(make_token_texts(6, seed=4))
    whole, _ = measure(lm, targets, encoded)
    alone, _ = measure(lm, targets, encoded[3:4])
    np.testing.assert_allclose(whole.values[3:4], alone.values, rtol=1e-12)


def test_options_are_checked():
    with pytest.raises(InputError, match="distance='cosine'"):
        plugins.create("oracle.methods", "in_context", {"distance": "cosine"})
    with pytest.raises(InputError, match="separator='newline'"):
        plugins.create("oracle.methods", "in_context", {"separator": "newline"})
