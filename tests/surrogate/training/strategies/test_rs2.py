"""A fresh random subset at every refresh."""

from __future__ import annotations

import numpy as np
import pytest

from surrogate.training.strategies.rs2 import Rs2

TEXTS = [f"text {number}" for number in range(200)]
NUM_TAKEN, NUM_REFRESHES = 50, 200


def test_every_text_is_drawn_alike_and_refreshes_are_independent(make_context):
    taken = np.zeros((NUM_REFRESHES, len(TEXTS)), dtype=bool)
    for refresh in range(NUM_REFRESHES):
        scores = np.asarray(Rs2().rank(make_context(TEXTS, refresh=refresh)).scores)[:, 0]
        taken[refresh, np.argsort(-scores)[:NUM_TAKEN]] = True
    share = NUM_TAKEN / len(TEXTS)
    deviation = np.sqrt(share * (1 - share) / NUM_REFRESHES)
    assert np.abs(taken.mean(0) - share).max() < 4.5 * deviation  # the largest of 200
    assert taken.mean(0).std() == pytest.approx(deviation, rel=0.25)
    in_both = (taken[:-1] & taken[1:]).mean()
    assert in_both == pytest.approx(share**2, abs=0.005)


def test_another_seed_draws_other_subsets(make_context):
    first, second = (np.asarray(Rs2().rank(make_context(TEXTS, seed=seed)).scores)[:, 0] for seed in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.25


def test_it_says_that_it_draws_from_the_whole_pool():
    assert Rs2.redraws and Rs2.adapts
