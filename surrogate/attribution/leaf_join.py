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

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array

from surrogate.attribution.objectives import Array

ROWS_PER_CHUNK = 16_384  # 128 KiB of sums
DENSE_SHARE = 0.25  # of a chunk's rows in one leaf, from which on a matrix product is faster than lists


@dataclass(frozen=True)
class LeafJoin:
    """Training rows with one value per tree, laid out for sums over shared leaves."""

    chunks: list[_Chunk]

    @classmethod
    def of(cls, leaves: NDArray[np.int32], values: Array, leaf_offsets: NDArray[np.int64]) -> LeafJoin:
        """Lay out values (n, C) of rows in leaves (n, C); `leaf_offsets` (C + 1,) is where each tree's leaves start."""
        num_chunks = max(1, -(-len(leaves) // ROWS_PER_CHUNK))
        bounds = np.linspace(0, len(leaves), num_chunks + 1).astype(int)
        return cls([_Chunk.of(leaves[start:stop], values[start:stop], leaf_offsets) for start, stop in pairwise(bounds)])

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
    def of(cls, leaves: NDArray[np.int32], values: Array, leaf_offsets: NDArray[np.int64]) -> _Chunk:
        num_rows, num_trees = leaves.shape
        kind = np.int32 if leaves.size < np.iinfo(np.int32).max else np.int64
        rows, listed = np.empty((num_trees, num_rows), kind), np.empty((num_trees, num_rows))
        counts = []
        for tree in range(num_trees):
            column = leaves[:, tree]
            num_leaves = int(leaf_offsets[tree + 1] - leaf_offsets[tree])
            short = column.astype(np.uint16) if num_leaves <= np.iinfo(np.uint16).max else column  # a radix sort in numpy
            rows[tree] = np.argsort(short, kind="stable")
            listed[tree] = values[rows[tree], tree]
            counts.append(np.bincount(column, minlength=num_leaves))
        sizes = np.concatenate(counts)
        dense = np.flatnonzero(sizes > DENSE_SHARE * num_rows)
        trees = np.searchsorted(leaf_offsets, dense, side="right") - 1
        dense_values = np.zeros((len(dense), num_rows))
        for place, (leaf, tree) in enumerate(zip(dense, trees, strict=True)):
            held = leaves[:, tree] == leaf - leaf_offsets[tree]
            dense_values[place, held] = values[held, tree]
        bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(kind)
        return cls(rows.ravel(), listed.ravel(), bounds, dense, trees, dense_values, leaf_offsets)

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
