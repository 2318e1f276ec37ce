from __future__ import annotations

import numpy as np
import pytest

from surrogate.attribution.top_rows import TopRows


@pytest.mark.parametrize("k", [1, 4, 30])
def test_the_strongest_rows_come_first_and_ties_by_row_number(k):
    influence = np.random.default_rng(0).integers(-3, 4, size=(30, 8)).astype(float)
    found = TopRows.of(influence, k)
    for column in range(8):
        order = sorted(range(30), key=lambda row: (-influence[row, column], row))[:k]
        assert found.positive_indices[column].tolist() == order
        np.testing.assert_array_equal(found.positive_values[column], influence[order, column])
        order = sorted(range(30), key=lambda row: (influence[row, column], row))[:k]
        assert found.negative_indices[column].tolist() == order
        np.testing.assert_array_equal(found.negative_values[column], influence[order, column])


def test_blocks_are_joined_in_order_and_none_give_empty_tables():
    influence = np.random.default_rng(0).normal(size=(12, 5))
    whole, parts = TopRows.of(influence, 3), [TopRows.of(influence[:, :2], 3), TopRows.of(influence[:, 2:], 3)]
    joined, empty = TopRows.joined(parts, 3), TopRows.joined([], 3)
    for name in ("positive_indices", "positive_values", "negative_indices", "negative_values"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
        assert getattr(empty, name).shape == (0, 3) and getattr(empty, name).dtype == getattr(whole, name).dtype
