from __future__ import annotations

import numpy as np
import pytest

from surrogate.attribution import leaf_join
from surrogate.attribution.leaf_join import LeafJoin


def problem(sizes, num_rows=70, num_test=11, seed=0, skew=3.0):
    """Leaves of rows in trees of given sizes, most rows in the first leaves, so that dense and listed leaves both occur."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(sizes)])

    def leaves(count):
        return np.stack([(size * rng.random(count) ** skew).astype(np.int32) for size in sizes], axis=1)

    return (
        leaves(num_rows),
        rng.normal(size=(num_rows, len(sizes))),
        leaves(num_test),
        rng.normal(size=(num_test, len(sizes))),
        offsets,
    )


def slow(train, a, test, b):
    return np.array(
        [
            [sum(a[i, c] * b[e, c] for c in range(a.shape[1]) if train[i, c] == test[e, c]) for e in range(len(test))]
            for i in range(len(train))
        ]
    )


@pytest.mark.parametrize("sizes", [[5], [1], [7, 3, 1, 12, 5], [40] * 6], ids=str)
@pytest.mark.parametrize("dense_share", [0.0, 0.25, 1.0])
def test_it_equals_the_loop_over_pairs_and_trees(sizes, dense_share, monkeypatch):
    monkeypatch.setattr(leaf_join, "DENSE_SHARE", dense_share)
    train, a, test, b, offsets = problem(sizes)
    found = LeafJoin.of(train, a.T, offsets).sums(test, b)
    np.testing.assert_allclose(found, slow(train, a, test, b), rtol=0, atol=1e-13)


def test_pairs_that_share_no_leaf_are_exactly_zero():
    train, a, test, b, offsets = problem([30, 25, 40], skew=1.5)
    shares = (train[:, None] == test[None]).any(axis=2)
    assert 0 < shares.mean() < 1
    np.testing.assert_array_equal(LeafJoin.of(train, a.T, offsets).sums(test, b) != 0, shares)


@pytest.mark.parametrize("rows_per_chunk", [1, 16, 69])
def test_chunks_of_training_rows_change_nothing(rows_per_chunk, monkeypatch):
    train, a, test, b, offsets = problem([7, 3, 12])
    whole = LeafJoin.of(train, a.T, offsets).sums(test, b)
    monkeypatch.setattr(leaf_join, "ROWS_PER_CHUNK", rows_per_chunk)
    np.testing.assert_allclose(LeafJoin.of(train, a.T, offsets).sums(test, b), whole, rtol=0, atol=1e-13)


def test_a_test_row_does_not_depend_on_the_others():
    train, a, test, b, offsets = problem([7, 3, 12])
    join = LeafJoin.of(train, a.T, offsets)
    whole = join.sums(test, b)
    for row in range(len(test)):
        np.testing.assert_allclose(join.sums(test[row : row + 1], b[row : row + 1])[:, 0], whole[:, row], rtol=0, atol=1e-14)


def test_the_number_of_pairs_is_counted():
    train, a, test, _, offsets = problem([7, 3, 12])
    assert LeafJoin.of(train, a.T, offsets).num_pairs(test) == int((train[:, None] == test[None]).sum())


def test_leaves_without_training_rows_add_nothing():
    train, test = np.zeros((4, 2), np.int32), np.array([[1, 0], [2, 2]], np.int32)
    join = LeafJoin.of(train, np.ones((2, 4)), np.array([0, 3, 6]))
    np.testing.assert_array_equal(join.sums(test, np.full((2, 2), 5.0)), np.repeat([[5.0, 0.0]], 4, axis=0))
