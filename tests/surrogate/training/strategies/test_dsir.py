"""Importance weights by explicit counts, and drawing in proportion to them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
from scipy.stats import kstest
from sklearn.utils import murmurhash3_32

from oracle.errors import InputError
from surrogate.training.strategies import dsir
from surrogate.training.strategies.dsir import Dsir

NUM_BUCKETS = 97  # few enough for collisions


def count(text):
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    grams = words + [f"{first} {second}" for first, second in itertools.pairwise(words)]
    return Counter(abs(murmurhash3_32(gram, seed=0)) % NUM_BUCKETS for gram in grams)


def slow_log_weights(pool, candidates, target, *, smoothing, length):
    pool_counts, target_counts = (sum(map(count, texts), Counter()) for texts in (pool, target))
    num_pool, num_target = pool_counts.total(), target_counts.total()
    weights = []
    for text in candidates:
        own, weight = count(text), 0.0
        for bucket, number in own.items():
            p_pool = pool_counts[bucket] / num_pool
            p_target = (target_counts[bucket] + smoothing * p_pool) / (num_target + smoothing)
            weight += number * math.log(p_target / p_pool)
        weights.append(weight / own.total() * num_pool / len(pool) if length == "mean" else weight)
    return np.array(weights)


@pytest.mark.parametrize("length", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.5, 100.0])
def test_log_weights_are_explicit_sums_over_counts(make_context, monkeypatch, length, smoothing):
    monkeypatch.setattr(dsir, "BLOCK_TEXTS", 5)
    context = make_context(candidates=np.array([0, 2, 3, 5, 6, 8, 11]))
    strategy = Dsir(num_buckets=NUM_BUCKETS, smoothing=smoothing, length=length, noise=False)
    scores = np.asarray(strategy.rank(context).scores)
    for column, target in enumerate(context.targets):
        expected = slow_log_weights(
            context.pool["text"], context.candidate_texts()["text"], target.texts["text"], smoothing=smoothing, length=length
        )
        np.testing.assert_allclose(scores[:, column], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"smoothing": 10.0, "length": "sum"}])
def test_copies_of_target_texts_come_first(make_context, options):
    plain = make_context()
    for column, target in enumerate(plain.targets):
        planted = list(target.texts["text"])
        context = make_context([*plain.pool["text"], *planted])
        scores = np.asarray(Dsir(noise=False, **options).rank(context).scores)[:, column]
        places = set(range(len(plain.pool), len(context.pool)))
        assert set(np.argsort(-scores)[: len(planted)]) == places


def test_noise_draws_in_proportion_to_the_weights(make_context, monkeypatch):
    context = make_context(["cat dog cat", "sum of two", "a b c d"], {"t": ["cat sum"]})
    strategy, num_draws = Dsir(smoothing=20.0), 3000
    log_weights = strategy._log_weights(context)
    monkeypatch.setattr(Dsir, "_log_weights", lambda self, context: log_weights)
    draws = Counter(
        int(np.argmax(np.asarray(strategy.rank(dataclasses.replace(context, seed=seed)).scores)[:, 0]))
        for seed in range(num_draws)
    )
    shares = np.exp(log_weights[:, 0]) / np.exp(log_weights[:, 0]).sum()
    assert np.ptp(shares) > 0.1
    for row, share in enumerate(shares):
        assert draws[row] / num_draws == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / num_draws))


def test_noise_is_gumbel_of_its_own_for_each_target(make_context):
    texts = [f"word {number}" for number in range(500)]
    context = make_context(texts, {"a": ["word"], "b": ["word"]})
    noise = np.asarray(Dsir().rank(context).scores, dtype=float) - np.asarray(Dsir(noise=False).rank(context).scores, dtype=float)
    assert all(kstest(column, "gumbel_r").pvalue > 0.01 for column in noise.T)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.15


def test_weights_tend_to_one_as_smoothing_grows(make_context):
    weights = [np.asarray(Dsir(smoothing=s, noise=False).rank(make_context()).scores) for s in (1e3, 1e9)]
    assert np.abs(weights[0]).max() > 0.01
    assert np.abs(weights[1]).max() < 1e-5


def test_an_n_gram_that_the_target_lacks_costs_the_same_however_rare_it_is(make_context):
    texts = ["common common common rare", "common common common", *[f"common {number}" for number in range(30)]]
    scores = np.asarray(Dsir(noise=False).rank(make_context(texts, {"t": ["something else entirely"]})).scores)[:, 0]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-5)
    assert scores[0] < 0


def test_the_length_of_a_text_does_not_raise_its_mean_weight(make_context):
    texts = ["cat dog", "cat dog " * 10, "sun moon star"]
    mean, total = (
        np.asarray(Dsir(length=length, noise=False).rank(make_context(texts, {"t": ["cat dog cat dog"]})).scores)[:, 0]
        for length in ("mean", "sum")
    )
    assert mean[1] < 2 * mean[0] and total[1] > 5 * total[0] > 0


def test_token_ids_are_words_and_a_mixture_needs_a_tokenizer(make_context, lm):
    ids = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}, {"input_ids": [6, 7, 9]}]
    scores = Dsir(noise=False).rank(make_context(ids, {"t": [{"input_ids": [6, 7]}]}, lm=None)).scores
    assert np.asarray(scores)[1, 0] == np.asarray(scores).min()
    with pytest.raises(InputError, match="formats text, tokens"):
        Dsir().rank(make_context(ids, lm=None))
    plain = make_context()
    encoded = [{"input_ids": lm.tokenizer(text)["input_ids"]} for text in plain.pool["text"]]
    decoded = Dsir(noise=False).rank(make_context(encoded)).scores
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(Dsir(noise=False).rank(plain).scores))


def test_impossible_options_are_refused():
    for options, message in (
        ({"smoothing": 0.0}, "smoothing"),
        ({"num_buckets": 0}, "num_buckets"),
        ({"length": "max"}, "length"),
    ):
        with pytest.raises(InputError, match=message):
            Dsir(**options)
