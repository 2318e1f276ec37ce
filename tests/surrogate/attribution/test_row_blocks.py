from __future__ import annotations

import numpy as np
import pytest

from surrogate.attribution.row_blocks import strongest_rows, whole_matrix
from surrogate.attribution.top_rows import TopRows


def cut(matrix, size):
    for start in range(0, len(matrix), size):
        yield slice(start, min(start + size, len(matrix))), matrix[start : start + size]


@pytest.mark.parametrize("size", [1, 4, 50])
@pytest.mark.parametrize("k", [1, 3, 30])
def test_the_strongest_of_blocks_are_the_strongest_of_all(size, k):
    matrix = np.random.default_rng(0).integers(-3, 4, (30, 5)).astype(float)  # with many ties, ordered by row number
    found, truth = strongest_rows(cut(matrix, size), num_test=5, k=k), TopRows.of(matrix, k)
    for name in ("positive_indices", "positive_values", "negative_indices", "negative_values"):
        np.testing.assert_array_equal(getattr(found, name), getattr(truth, name))


def test_blocks_of_rows_become_the_matrix_again():
    matrix = np.random.default_rng(0).normal(size=(10, 3))
    found = whole_matrix(cut(matrix, 4), num_train=10, num_test=3)
    np.testing.assert_array_equal(found, matrix)
    assert found[:, 0].flags.c_contiguous
