"""The sum over shared leaves: sum over trees of 1[i and e share a leaf] a(i, tree) b(e, tree), for all pairs (i, e).

Only pairs that share a leaf cost anything, and there are far fewer of them than pairs times trees. Their number is the
floor of the work, and two kernels divide it by which leaf it falls into:

- A leaf that holds a good part of the rows is a dense outer product; all such leaves together are one matrix product.
- For the others, each test row adds up one short list per tree: the rows of its leaf, with their values.

The lists stand one after the other in one array, as the columns of a CSC matrix. A test row's lists are scattered over
it; scipy's product of a CSC matrix and a vector adds exactly those columns whose bounds it is given, so it is given the
bounds of this test row's lists, last list first. Between two such columns lies one that ends before it starts, hence is
empty. Nothing is copied and nothing else is read. Rows that share no leaf get exactly 0.

Training rows are taken in chunks whose sums stay in a processor's cache.

Shapes: n training rows, B test rows, C trees, L leaves in all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array

from surrogate.attribution.objectives import Array

ROWS_PER_CHUNK = 16_384  # 128 KiB of sums
DENSE_SHARE = 0.2  # of a chunk's rows in one leaf, from which on a matrix product is as fast as lists


@dataclass(frozen=True)
class LeafJoin:
    """Training rows with one value per tree, laid out for sums over shared leaves."""

    chunks: list[_Chunk]

    @classmethod
    def of(cls, leaves: NDArray[np.int32], values: Iterable[Array], leaf_offsets: NDArray[np.int64]) -> LeafJoin:
        """Lay out values of rows in leaves (n, C).

        Args:
            leaves: (n, C).
            values: Per tree (n,); taken one after the other, so that they need not be in memory together.
            leaf_offsets: (C + 1,) where each tree's leaves start.
        """
        num_chunks = max(1, -(-len(leaves) // ROWS_PER_CHUNK))
        ends = np.linspace(0, len(leaves), num_chunks + 1).astype(int)
        places = [slice(start, stop) for start, stop in pairwise(ends)]
        orders = [_rows_by_leaf(leaves[place], leaf_offsets) for place in places]
        listed = [np.empty(rows.shape) for rows, _ in orders]
        for tree, column in enumerate(values):
            for place, (rows, _), of_chunk in zip(places, orders, listed, strict=True):
                of_chunk[tree] = column[place][rows[tree]]
        chunks = zip(orders, listed, strict=True)
        return cls([_Chunk.of(rows, of_chunk, bounds, leaf_offsets) for (rows, bounds), of_chunk in chunks])

    def sums(self, leaves: NDArray[np.int32], values: Array) -> Array:
        """Return the sums (n, B) for test rows with values (B, C) in leaves (B, C); columns are contiguous."""
        if len(self.chunks) == 1:
            return self.chunks[0].sums(leaves, values).T
        ends = np.cumsum([chunk.num_rows for chunk in self.chunks])
        sums = np.empty((len(leaves), int(ends[-1])))
        for end, chunk in zip(ends, self.chunks, strict=True):
            sums[:, end - chunk.num_rows : end] = chunk.sums(leaves, values)
        return sums.T

    def num_pairs(self, leaves: NDArray[np.int32]) -> int:
        """Return how many (training row, test row, tree) share a leaf: the terms that have to be added up."""
        return sum(int(np.diff(chunk.bounds)[leaves + chunk.leaf_offsets[:-1]].sum()) for chunk in self.chunks)


@dataclass(frozen=True)
class _Chunk:
    """The lists of a chunk of n rows.

    Shapes: rows, values (n C,) leaf by leaf; bounds (L + 1,) of each leaf's list; dense_leaves (H,) numbers of the leaves
    that are summed by a matrix product, dense_trees (H,) their trees, dense_values (H, n).
    """

    rows: NDArray
    values: Array
    bounds: NDArray
    dense_leaves: NDArray[np.int64]
    dense_trees: NDArray[np.int64]
    dense_values: Array
    leaf_offsets: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        return self.dense_values.shape[1]

    @classmethod
    def of(cls, rows: NDArray, values: Array, bounds: NDArray, leaf_offsets: NDArray[np.int64]) -> _Chunk:
        """Take lists of rows and their values (C, n), leaf by leaf, with the leaves' bounds (L + 1,)."""
        num_rows = rows.shape[1]
        rows, values = rows.ravel(), values.ravel()
        dense = np.flatnonzero(np.diff(bounds) > DENSE_SHARE * num_rows)
        dense_values = np.zeros((len(dense), num_rows))
        for place, leaf in enumerate(dense):
            of_leaf = slice(bounds[leaf], bounds[leaf + 1])
            dense_values[place, rows[of_leaf]] = values[of_leaf]
        trees = np.searchsorted(leaf_offsets, dense, side="right") - 1
        return cls(rows, values, bounds, dense, trees, dense_values, leaf_offsets)

    def sums(self, leaves: NDArray[np.int32], values: Array) -> Array:
        """Return the sums (B, n)."""
        num_trees = leaves.shape[1]
        numbers = leaves + self.leaf_offsets[:-1]  # (B, C)
        in_dense = numbers[:, self.dense_trees] == self.dense_leaves  # (B, H)
        sums = np.where(in_dense, values[:, self.dense_trees], 0.0) @ self.dense_values  # (B, n)
        starts, ends = self.bounds[:-1].copy(), self.bounds[1:]
        starts[self.dense_leaves] = ends[self.dense_leaves]  # their lists are empty here
        bounds = np.empty((len(leaves), 2 * num_trees), self.bounds.dtype)
        bounds[:, 0::2], bounds[:, 1::2] = starts[numbers[:, ::-1]], ends[numbers[:, ::-1]]
        factors = np.zeros((len(leaves), 2 * num_trees - 1))
        factors[:, 0::2] = values[:, ::-1]
        lists = csc_array((self.num_rows, 2 * num_trees - 1))
        lists.data, lists.indices = self.values, self.rows
        for row in range(len(leaves)):
            lists.indptr = bounds[row]
            sums[row] += lists @ factors[row]
        return sums


def _rows_by_leaf(leaves: NDArray[np.int32], leaf_offsets: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
    """Return per tree the rows leaf by leaf, (C, n), and the bounds (L + 1,) of all leaves' lists, one after the other."""
    num_rows, num_trees = leaves.shape
    kind = np.int32 if leaves.size < np.iinfo(np.int32).max else np.int64
    rows, counts = np.empty((num_trees, num_rows), kind), []
    for tree in range(num_trees):
        num_leaves = int(leaf_offsets[tree + 1] - leaf_offsets[tree])
        column = leaves[:, tree]
        if num_leaves <= np.iinfo(np.uint16).max:
            column = column.astype(np.uint8 if num_leaves <= np.iinfo(np.uint8).max else np.uint16)  # numpy sorts by radix
        rows[tree] = np.argsort(column, kind="stable")
        counts.append(np.bincount(column, minlength=num_leaves))
    return rows, np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(kind)
