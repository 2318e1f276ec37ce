"""Shares are taken by label, and what they are worth has the sign of the labels."""

from __future__ import annotations

import numpy as np
import pytest

from oracle.judging.retraining import Retrained
from oracle.judging.shares import ADDITION, BOTTOM, RANDOM, REMOVAL, TOP, SharePlan, Worth, share_worth

IDS = [f"id{number:02d}" for number in range(20)]
VALUES = np.arange(20.0)


@pytest.fixture
def plan():
    return SharePlan(IDS, 5, 3, 0)


def _additive(plan, truth):
    """Retrained models of a world in which every text lowers the loss by its own true value."""
    value = dict(zip(IDS, truth, strict=True))
    subsets = [s for judge in (REMOVAL, ADDITION) for side in (TOP, BOTTOM, RANDOM) for s in plan.subsets(judge, VALUES, side)]
    return {
        s.name: Retrained(np.array([9.0]), np.array([9.0 - sum(value[i] for i in s.text_ids)]), np.full((2, 1), np.nan), 1, 1)
        for s in subsets
    }


def test_top_and_bottom_are_by_label_and_equal_labels_go_by_content(plan):
    assert set(plan.share(VALUES, TOP)) == set(IDS[15:]) and set(plan.share(VALUES, BOTTOM)) == set(IDS[:5])
    assert plan.share(np.zeros(20), TOP) == plan.share(np.zeros(20), BOTTOM) == IDS[:5]
    backwards = SharePlan(IDS[::-1], 5, 3, 0)
    assert backwards.share(np.zeros(20), TOP) == IDS[:5]
    assert set(backwards.share(VALUES[::-1], TOP)) == set(IDS[15:])


def test_removal_trains_on_the_rest_and_addition_on_the_share(plan):
    for side in (TOP, BOTTOM, RANDOM):
        without, alone = plan.subsets(REMOVAL, VALUES, side), plan.subsets(ADDITION, VALUES, side)
        assert [subset.seed for subset in without] == [0, 1, 2]
        for left, taken in zip(without, alone, strict=True):
            assert len(taken.text_ids) == 5 and sorted(left.text_ids + taken.text_ids) == IDS


def test_random_shares_differ_by_seed_and_follow_content(plan):
    shares = [subset.text_ids for subset in plan.subsets(ADDITION, None, RANDOM)]
    assert len(set(shares)) == 3
    assert [subset.text_ids for subset in SharePlan(IDS[::-1], 5, 3, 0).subsets(ADDITION, None, RANDOM)] == shares


def test_worth_is_the_difference_to_random_texts_and_positive_for_good_ones(plan):
    truth = VALUES / 100
    found = share_worth(plan, VALUES, _additive(plan, truth), column=0)
    random = [sum(truth[IDS.index(i)] for i in s.text_ids) for s in plan.subsets(ADDITION, None, RANDOM)]
    for judge in (REMOVAL, ADDITION):  # in an additive world both ask the same
        np.testing.assert_allclose(found[judge][TOP].by_seed, truth[15:].sum() - np.array(random), atol=1e-12)
        np.testing.assert_allclose(found[judge][BOTTOM].by_seed, truth[:5].sum() - np.array(random), atol=1e-12)
        assert found[judge][TOP].mean > 0 > found[judge][BOTTOM].mean
    wrong = share_worth(plan, VALUES, _additive(plan, truth[::-1]), column=0)
    assert wrong[REMOVAL][TOP].mean < 0 and wrong[ADDITION][TOP].mean < 0


def test_the_spread_is_the_sample_standard_deviation_over_seeds():
    assert Worth((1.0, 2.0, 3.0)).spread == pytest.approx(1.0) and Worth((1.0, 2.0, 3.0)).mean == 2.0
    assert Worth((1.0,)).spread is None
