"""The best share in random order: who is drawn first is chance, who may be drawn is not."""

from __future__ import annotations

import numpy as np
import pytest

from oracle.errors import InputError
from surrogate.rules.top import Top
from surrogate.rules.top_share import TopShare

SCORES = np.random.default_rng(0).normal(size=(200, 1)).astype(np.float32)


def order(rule, *, seed: int = 0) -> np.ndarray:
    return rule.order(SCORES, target_names=["a"], seed=seed)


def test_the_best_share_comes_first_in_another_order_for_every_seed():
    top = order(Top())
    first, second = order(TopShare(share=0.2)), order(TopShare(share=0.2), seed=1)
    assert set(first[:40]) == set(second[:40]) == set(top[:40])
    assert not np.array_equal(first[:40], second[:40])
    assert not np.array_equal(first[:40], top[:40])
    assert np.array_equal(first[40:], top[40:])


def test_the_draw_is_even_over_the_share():
    counts = np.zeros(200)
    for seed in range(2000):
        counts[order(TopShare(share=0.1), seed=seed)[:5]] += 1
    drawn = counts[order(Top())[:20]]
    assert drawn.sum() == 10_000 and abs(drawn / 500 - 1).max() < 0.2


def test_its_limits_are_top_and_random():
    assert np.array_equal(order(TopShare(share=0.0)), order(Top()))
    assert np.array_equal(np.sort(order(TopShare(share=1.0))), np.arange(200))


def test_a_share_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"share=1\.2"):
        TopShare(share=1.2)
