"""A random order that belongs to the texts and the seed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from oracle.texts import list_text_ids
from surrogate.training.chance import uniform
from surrogate.training.strategies.random import Random

TEXTS = [f"text {number}" for number in range(2000)]


@pytest.fixture
def order(make_context):
    def order(**changes):
        scores = Random().rank(make_context(TEXTS, **changes)).scores
        return [scores.text_ids[row] for row in np.argsort(-np.asarray(scores)[:, 0], kind="stable")]

    return order


def test_numbers_are_even_and_independent_between_seeds(make_context):
    first, second = (np.asarray(Random().rank(make_context(TEXTS, seed=seed)).scores)[:, 0] for seed in (0, 1))
    assert kstest(first, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.08
    assert first.min() > 0 and first.max() < 1


def test_taking_texts_away_leaves_the_others_in_their_order(order, make_context):
    whole, part = order(), order(candidates=np.arange(0, 2000, 3))
    kept = set(part)
    assert part == [text_id for text_id in whole if text_id in kept]
    assert order(refresh=4) == whole


def test_no_place_of_the_pool_is_preferred(order, make_context):
    place_of = {text_id: place for place, text_id in enumerate(list_text_ids(make_context(TEXTS).pool))}
    chosen = np.mean([np.mean([place_of[text_id] for text_id in order(seed=seed)[:200]]) for seed in range(20)])
    assert chosen == pytest.approx(999.5, abs=4 * 2000 / np.sqrt(12 * 200 * 20))


def test_drawn_numbers_are_those_of_a_plain_hash():
    import hashlib

    expected = [int.from_bytes(hashlib.blake2b(f"salt:{name}".encode(), digest_size=8).digest(), "little") for name in "abc"]
    np.testing.assert_allclose(uniform(list("abc"), salt="salt"), np.array(expected) / 2**64, rtol=1e-12)
