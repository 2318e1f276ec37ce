"""Features of a row from the path that it takes through the trees, on which TREX fits its linear surrogate.

A kernel's name says which nodes of the path make a feature (leaf, or every node), what value they carry (1 for a
path, the leaf's own value for an output) and whether it is divided by the number of training rows that reach the node.
The products of two rows' features are their similarity. Internal nodes carry 1 under every kernel.

The letters are those of the released code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from surrogate.attribution.ensemble import TreeEnsemble
from surrogate.attribution.objectives import Array

KERNELS = {
    "leaf_path_by_count": "lpw",
    "leaf_path": "lp_",
    "leaf_output": "lo_",
    "leaf_output_by_count": "low",
    "node_path_by_count": "fpw",
    "node_path": "fp_",
    "node_output": "fo_",
    "node_output_by_count": "fow",
    "tree_output": "to_",
}


class TreeKernel:
    """The feature map of one kernel, made from the training rows.

    Args:
        name: One of `KERNELS`.
        ensemble: The model.
        leaves: Leaves (n, C) of the training rows.
        weights: (n,) how much each training row counts.

    Attributes:
        map: (L, M) sparse or, per leaf, what it adds to each of M features; M = L for leaf kernels, C for tree outputs.
    """

    def __init__(self, name: str, ensemble: TreeEnsemble, leaves: NDArray[np.int32], weights: Array) -> None:
        self.offsets = ensemble.leaf_offsets
        outputs = np.concatenate(ensemble.steps())  # (L,)
        num_leaves = len(outputs)
        counts = np.zeros(num_leaves)
        for tree in range(leaves.shape[1]):
            part = slice(self.offsets[tree], self.offsets[tree + 1])
            counts[part] = np.bincount(leaves[:, tree], weights, part.stop - part.start)
        of_leaf = outputs if "output" in name else np.ones(num_leaves)
        if name == "tree_output":
            trees = np.repeat(np.arange(leaves.shape[1]), np.diff(self.offsets))
            self.map = csr_array((of_leaf, trees, np.arange(num_leaves + 1)), shape=(num_leaves, leaves.shape[1]))
            return
        self.map = csr_array((of_leaf, np.arange(num_leaves), np.arange(num_leaves + 1)), shape=(num_leaves, num_leaves))
        if name.startswith("node"):
            above = _nodes_above(ensemble, self.offsets)  # (L, inner nodes)
            inner_counts = above.T @ counts
            if name.endswith("by_count"):
                above = above.multiply(_reciprocal(inner_counts)[None, :]).tocsr()
        if name.endswith("by_count"):
            self.map.data *= _reciprocal(counts)
        if name.startswith("node"):
            from scipy.sparse import hstack

            self.map = hstack([self.map, above], format="csr")
        self.map.sort_indices()

    @property
    def is_leaf_kernel(self) -> bool:
        """Whether each leaf has a feature of its own and no other."""
        return self.map.shape[0] == self.map.shape[1] and self.map.nnz == self.map.shape[0]

    def leaf_columns(self, leaves: NDArray[np.int32]) -> Iterator[Array]:
        """Yield per tree the one feature of each row (n,) that is not 0; for leaf kernels only."""
        for tree in range(leaves.shape[1]):
            yield self.map.data[self.offsets[tree] : self.offsets[tree + 1]][leaves[:, tree]]

    def features(self, leaves: NDArray[np.int32]) -> Any:
        """Return the features (B, M) of rows in these leaves (B, C), a CSR array."""
        num_rows, num_trees = leaves.shape
        places = (leaves + self.offsets[:-1].astype(np.int32)).ravel()
        starts = np.arange(0, num_rows * num_trees + 1, num_trees, dtype=np.int32 if places.size < 2**31 else np.int64)
        if self.is_leaf_kernel:
            return csr_array((self.map.data[places], places, starts), shape=(num_rows, self.map.shape[1]))
        return csr_array((np.ones(places.size), places, starts), shape=(num_rows, len(self.map.indptr) - 1)) @ self.map


def _reciprocal(counts: Array) -> Array:
    """Return 1 / counts, and 0 where no training row counts."""
    return np.divide(1.0, counts, out=np.zeros_like(counts), where=counts > 0)


def _nodes_above(ensemble: TreeEnsemble, offsets: NDArray[np.int64]) -> Any:
    """Return which inner nodes lie above each leaf, ones (L, inner nodes of all trees)."""
    rows: list[int] = []
    columns: list[int] = []
    num_nodes = 0
    blocks = ensemble.booster.model_to_string(num_iteration=ensemble.num_rounds).split("\nTree=")[1:]
    for tree, block in enumerate(blocks):
        children = [_integers(block, side) for side in ("left_child", "right_child")]
        if not children[0]:  # a tree without a split
            continue
        stack: list[tuple[int, tuple[int, ...]]] = [(0, ())]
        while stack:
            node, path = stack.pop()
            if node < 0:  # ~node is a leaf
                rows += [int(offsets[tree]) + ~node] * len(path)
                columns += [num_nodes + inner for inner in path]
            else:
                stack += [(side[node], (*path, node)) for side in children]
        num_nodes += len(children[0])
    return csr_array((np.ones(len(rows)), (rows, columns)), shape=(int(offsets[-1]), num_nodes))


def _integers(block: str, name: str) -> list[int]:
    found = re.search(rf"^{name}=(.*)$", block, flags=re.MULTILINE)
    return [int(value) for value in found.group(1).split()] if found else []
