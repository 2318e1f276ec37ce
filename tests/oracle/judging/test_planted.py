"""Planted texts are what they are called, in every format, and labels that rank them rightly are found out."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

import oracle
from oracle.errors import InputError, MismatchError
from oracle.judging.planted import recovery
from oracle.labels import Labels
from oracle.texts import text_format

TEXTS = [f"number {n} is  followed by\nnumber {n + 1} and not by {n + 2}" for n in range(20)]
DEV = [f"a target text says that {n} comes after {n - 1}" for n in range(100, 112)]
PAIRS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1} of course"} for n in range(20)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"what comes after {n}?"},
            {"role": "assistant", "content": f"{n + 1} comes after {n}"},
            {"role": "user", "content": "thanks"},
        ]
    }
    for n in range(20)
]
TOKENS = [{"input_ids": [1, 2, *range(10 + n, 22 + n)], "labels": [-100, -100, *range(10 + n, 22 + n)]} for n in range(20)]


def _by_id(texts):
    return dict(zip(texts["text_id"], texts.to_list(), strict=True))


def test_copies_are_the_first_two_thirds_of_target_texts_of_every_set():
    targets = {"a": DEV[:6], "b": DEV[6:]}
    planted = oracle.plant(TEXTS, targets, kinds=["copies"], num_per_kind=4)
    assert Counter(row.target for row in planted.table) == {"a": 4, "b": 4}
    rows = _by_id(planted.texts)
    for item in planted.table:
        origin = _by_id(oracle.read_texts(targets[item.target]))[item.origin]["text"]
        copy = rows[item.text_id]["text"]
        assert origin.startswith(copy) and len(copy.split()) == 6 and len(origin.split()) == 9


def test_shuffled_texts_have_the_words_and_the_white_space_of_their_originals():
    planted = oracle.plant(TEXTS, {"a": DEV}, kinds=["shuffled"], num_per_kind=8)
    rows = _by_id(planted.texts)
    for item in planted.table:
        text, origin = rows[item.text_id]["text"], rows[item.origin]["text"]
        assert text != origin and Counter(text.split()) == Counter(origin.split())
        assert re.findall(r"\s+", text) == re.findall(r"\s+", origin)


def test_wrong_answers_keep_the_prompt_and_have_the_completion_of_another():
    planted = oracle.plant(PAIRS, {"a": PAIRS[:3]}, kinds=["wrong_answers"], num_per_kind=8)
    rows = _by_id(planted.texts)
    completions = {row["completion"] for row in PAIRS}
    for item in planted.table:
        wrong, right = rows[item.text_id], rows[item.origin]
        assert wrong["prompt"] == right["prompt"] and wrong["completion"] != right["completion"]
        assert wrong["completion"] in completions
    assert len({rows[item.text_id]["completion"] for item in planted.table}) > 2


@pytest.mark.parametrize(
    ("sample", "targets", "kinds"),
    [
        (TEXTS, DEV, {"copies", "shuffled"}),
        (PAIRS, [{"prompt": "say", "completion": text} for text in DEV], {"copies", "shuffled", "wrong_answers"}),
        (CHATS, CHATS[:8], {"copies", "shuffled", "wrong_answers"}),
        (TOKENS, TOKENS[:8], {"copies", "shuffled"}),
        ([{"input_ids": row["input_ids"]} for row in TOKENS], TOKENS[:8], {"copies", "shuffled"}),
        (TOKENS, [{"input_ids": row["input_ids"]} for row in TOKENS[:8]], {"copies", "shuffled"}),
        (TEXTS, PAIRS, {"copies", "shuffled"}),
        (TEXTS, CHATS, {"copies", "shuffled"}),
    ],
    ids=["text", "completion", "chat", "labelled tokens", "tokens", "mixed tokens", "text for completions", "text for chats"],
)
def test_every_format_gets_the_kinds_it_allows_and_keeps_its_own_texts(sample, targets, kinds):
    if isinstance(sample[0], dict) and "completion" in sample[0]:
        sample = [{**row, "completion": row["completion"] + " and no other"} for row in sample]
    planted = oracle.plant(sample, {"t": targets}, num_per_kind=3)
    original = oracle.read_texts(sample)
    assert planted.texts["text_id"][: len(sample)] == original["text_id"][:]
    assert text_format(planted.texts) == text_format(original)
    assert Counter(row.kind for row in planted.table) == dict.fromkeys(kinds, 3)
    assert {row.text_id for row in planted.table} == set(planted.texts["text_id"][len(sample) :])


def test_tokens_without_loss_stay_where_they_are():
    planted = oracle.plant(TOKENS, {"t": TOKENS[:8]}, num_per_kind=4)
    for item in planted.table:
        row = _by_id(planted.texts)[item.text_id]
        assert row["input_ids"][:2] == [1, 2] and row["labels"][:2] == [-100, -100]
        assert row["input_ids"][2:] == row["labels"][2:]
        assert len(row["input_ids"]) == (10 if item.kind == "copies" else 14)


def test_of_a_chat_only_the_assistants_last_turn_changes():
    planted = oracle.plant(CHATS, {"t": CHATS[:8]}, kinds=["wrong_answers"], num_per_kind=4)
    rows = _by_id(planted.texts)
    for item in planted.table:
        wrong, right = rows[item.text_id]["messages"], rows[item.origin]["messages"]
        assert [wrong[0], wrong[2]] == [right[0], right[2]] and wrong[1] != right[1]


def test_what_is_planted_follows_content_and_seed_and_not_row_order():
    first = oracle.plant(TEXTS, {"a": DEV}, num_per_kind=5, seed=1)
    assert oracle.plant(TEXTS[::-1], {"a": DEV[::-1]}, num_per_kind=5, seed=1).table == first.table
    assert oracle.plant(TEXTS, {"a": DEV}, num_per_kind=5, seed=2).table != first.table


def test_what_cannot_be_planted_is_refused_with_the_reason():
    with pytest.raises(InputError, match=r"0 of the 2 texts .*target set 't'"):
        oracle.plant(TEXTS, {"t": ["two words", "no more"]}, num_per_kind=2)
    with pytest.raises(InputError, match=r"20 of the 20 texts of the sample.*not num_per_kind=30"):
        oracle.plant(TEXTS, {"t": DEV}, kinds=["shuffled"], num_per_kind=30)
    with pytest.raises(InputError, match=r"'wrong_answers' cannot be planted .*'text'"):
        oracle.plant(TEXTS, {"t": DEV}, kinds=["wrong_answers"])
    with pytest.raises(InputError, match="did you mean 'copies'"):
        oracle.plant(TEXTS, {"t": DEV}, kinds=["copy"])
    with pytest.raises(InputError, match="format 'tokens', the sample in 'text'"):
        oracle.plant(TEXTS, {"t": TOKENS}, num_per_kind=2)
    same = [{"prompt": f"{n}?", "completion": "yes"} for n in range(5)]
    with pytest.raises(InputError, match="0 of the 5 texts of the sample can be planted as 'wrong_answers'"):
        oracle.plant(same, {"t": same}, kinds=["wrong_answers"], num_per_kind=2)
    with pytest.raises(InputError, match="kinds is empty"):
        oracle.plant(TEXTS, {"t": DEV}, kinds=[])


def _labels(planted, value_of):
    ids = planted.texts["text_id"][:]
    return Labels.from_values(np.array([[value_of(i)] for i in ids]), ids, ["t"])


def test_recovery_is_the_area_under_the_curve_and_recall_of_that_kind_alone():
    from sklearn.metrics import roc_auc_score

    planted = oracle.plant(TEXTS, {"t": DEV}, num_per_kind=6)
    rng = np.random.default_rng(0)
    draws = {i: float(rng.integers(0, 6)) for i in planted.texts["text_id"]}  # with ties
    found = recovery(_labels(planted, draws.get), planted)
    for kind, sign in (("copies", 1), ("shuffled", -1)):
        own = [row.text_id for row in planted.table if row.kind == kind]
        others = [i for i in draws if i not in planted.text_ids]
        scores = [sign * draws[i] for i in [*own, *others]]
        assert found[kind]["t"].auc == pytest.approx(roc_auc_score([1] * len(own) + [0] * len(others), scores))
        assert found[kind]["t"].num_planted == 6
    pairs = [(draws[row.text_id], draws[row.origin]) for row in planted.table if row.kind == "shuffled"]
    assert found["shuffled"]["t"].below_origin == pytest.approx(np.mean([(a < b) + 0.5 * (a == b) for a, b in pairs]))


def test_labels_that_know_what_was_planted_find_all_of_it_and_the_opposite_none():
    targets = {"t": [{"prompt": "say", "completion": text} for text in DEV]}
    planted = oracle.plant(PAIRS, targets, kinds=["copies", "wrong_answers"], num_per_kind=8)
    worth = {row.text_id: 1.0 if row.kind == "copies" else -1.0 for row in planted.table}
    rng = np.random.default_rng(0)
    noise = {i: 0.1 * rng.normal() for i in planted.texts["text_id"]}
    right = recovery(_labels(planted, lambda i: worth.get(i, 0.0) + noise[i]), planted)
    for found in (right["copies"]["t"], right["wrong_answers"]["t"]):
        assert found.auc == found.recall == 1.0
    assert right["wrong_answers"]["t"].below_origin == 1.0 and right["copies"]["t"].below_origin is None
    wrong = recovery(_labels(planted, lambda i: noise[i] - worth.get(i, 0.0)), planted)
    assert wrong["copies"]["t"].auc == wrong["wrong_answers"]["t"].below_origin == 0.0
    constant = recovery(_labels(planted, lambda i: 1.0), planted)
    assert constant["copies"]["t"].auc == constant["wrong_answers"]["t"].below_origin == 0.5


def test_copies_count_for_their_own_target_set_only():
    planted = oracle.plant(TEXTS, {"a": DEV[:6], "b": DEV[6:]}, kinds=["copies"], num_per_kind=4)
    ids = planted.texts["text_id"][:]
    target_of = {row.text_id: row.target for row in planted.table}
    values = np.array([[float(target_of.get(i) == "a"), float(target_of.get(i) == "b")] for i in ids])
    found = recovery(Labels.from_values(values, ids, ["a", "b"]), planted)["copies"]
    assert found["a"].auc == found["b"].auc == 1.0 and found["a"].num_planted == 4


def test_labels_without_the_planted_texts_are_refused():
    planted = oracle.plant(TEXTS, {"t": DEV}, num_per_kind=4)
    ids = oracle.read_texts(TEXTS)["text_id"][:]
    with pytest.raises(MismatchError, match="8 of 28 texts have no label"):
        recovery(Labels.from_values(np.zeros((20, 1)), ids, ["t"]), planted)
