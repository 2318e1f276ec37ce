"""Combined numbers do not depend on where a row stands or on the blocks that it comes in."""

import numpy as np
import pytest

from surrogate import aggregation
from surrogate.aggregation import WAYS, Combination, combine, moments, standardise

NAMES = ["a", "b", "c"]


@pytest.mark.parametrize("how", [*WAYS, "b"])
def test_a_stream_of_blocks_gives_the_bits_of_an_array(how, monkeypatch):
    monkeypatch.setattr(aggregation, "BLOCK_ROWS", 100)
    scores = (np.random.default_rng(0).normal(size=(1050, 3)) * [1, 30, 1e-4] + [0, 5, 0]).astype(np.float32)
    values = scores.astype(np.float64)

    def blocks():
        return (values[start : start + 100].copy() for start in range(0, 1050, 100))

    way = Combination.of(how, target_names=NAMES, weights=None)
    measured = moments(blocks) if way.uses_moments else None
    streamed = np.concatenate([way.rows(block, measured) for block in blocks()])
    np.testing.assert_array_equal(streamed, combine(scores, how, target_names=NAMES))


@pytest.mark.parametrize("how", WAYS)
def test_equal_rows_get_equal_numbers_wherever_they_stand(how):
    row = np.array([0.1, 0.2, 0.7], dtype=np.float32)
    scores = np.random.default_rng(1).normal(size=(1001, 3)).astype(np.float32)
    scores[::7] = row
    weights = {"a": 0.3, "b": 0.3, "c": 0.1} if how in ("sum_z", "mean") else None
    assert len(np.unique(combine(scores, how, target_names=NAMES, weights=weights)[::7])) == 1


def test_z_scores_have_mean_0_and_deviation_1_and_are_0_without_spread():
    values = np.random.default_rng(2).normal(size=(5000, 2)) * [3, 1e-8] + [1e3, 1]
    values[:, 1] = 0.1 + 0.2  # rounding of the mean is no spread
    found = standardise(values)
    assert found[:, 0].mean() == pytest.approx(0, abs=1e-9) and found[:, 0].std() == pytest.approx(1)
    assert not found[:, 1].any()
