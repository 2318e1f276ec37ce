"""Leave one out with the trees' structure kept: every leaf value computed again without the row, exactly.

Removing row r changes the value of the leaf that it is in, hence the scores of the rows there, hence their gradients
in the next round, hence other leaves' values, and so on to the last round. That is followed here without any
approximation. Splits, bins and the score that boosting starts from are kept. What remains is a smooth question with one
answer, where leave-one-out by retraining mostly shows which near-ties of splits a row decides.

The released code (tree_influence 0.1.7) evaluates the gradients of the changed scores after the round and compares
them with gradients before it, so that it sees a change in every leaf even where there is none; this moves all rows'
influence by about the same, which hides in rankings (Spearman 0.99 with the values here) but not in the values
(differences of up to 0.3 of the largest).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oracle.errors import check_at_least, check_choice
from oracle.progress import track
from surrogate.attribution.contract import QUANTITIES, LeafAttribution, TestRows
from surrogate.attribution.objective_reading import Custom
from surrogate.attribution.objectives import Array, Objective
from surrogate.attribution.row_blocks import strongest_rows, whole_matrix
from surrogate.attribution.training_rows import Round

BLOCK_CELLS = 4_000_000  # numbers in one array over training rows, or test rows, and removed rows
SMALLEST_HESSIAN = 1e-15  # LightGBM adds it to every leaf's sum; a leaf without rows then has the value 0


def leaf_values(gradients: Array, hessians: Array, *, penalties: Array, rate: float, reg_alpha: float) -> Array:
    """Return what leaves with these sums add to the score: -rate S(G) / (H + penalty), S the soft threshold."""
    shrunk = np.sign(gradients) * np.maximum(np.abs(gradients) - reg_alpha, 0.0) if reg_alpha else gradients
    return -rate * shrunk / (hessians + penalties + SMALLEST_HESSIAN)


@dataclass(eq=False)
class LeafRefit(LeafAttribution):
    """What the loss would be without the row, had the trees kept their splits.

    The deterministic judge of the faster methods: LeafInfluence is its linear part.

    Paper:
        Brophy, Hammoudeh and Lowd 2023, Adapting and Evaluating Influence-Estimation Methods for Gradient-Boosted
        Decision Trees, JMLR 24(154), after Sharchilev et al. 2018, arXiv 1802.06640.
    Cost:
        n removals times n rows times the trees, n^2 T K, at 5 to 40 ns each: seconds for a thousand rows, hours for
        a hundred thousand. Done once per call of `attribute`, for all its test rows together.
    Limit:
        With one round it is the exact change of one leaf. Without the row's consequences for later rounds and for
        small changes it is LeafInfluence with a single point.
    """

    def attribute(  # one body for both overloads
        self,
        X_test: Any,
        y_test: ArrayLike | None = None,
        *,
        of: str = "loss",
        top_k: int | None = None,
        init_score: ArrayLike | None = None,
    ) -> Any:
        """Return the influence (n_train, n_test) of each training row on each test row, or the strongest rows.

        Args, Raises: as `LeafAttribution.attribute`.
        """
        self._require_fitted()
        check_choice("of", of, QUANTITIES)
        if top_k is not None:
            check_at_least("top_k", top_k, 1)
        tests = [test for _, test in self._blocks(X_test, y_test, of=of, init_score=init_score, bytes_per_row=0)]
        num_test, num_train = sum(len(test.leaves) for test in tests), self.rows_.num_rows
        blocks = (
            (rows, np.concatenate([_change(test, changes) for test in tests], axis=1) if tests else np.zeros((len(changes), 0)))
            for rows, changes in self._removals(num_test)
        )
        if top_k is None:
            return whole_matrix(blocks, num_train=num_train, num_test=num_test)
        return strongest_rows(blocks, num_test=num_test, k=min(int(top_k), num_train))

    def self_influence(self) -> Array:
        """Return the influence (n_train,) of each training row on its own, unweighted loss."""
        self._require_fitted()
        influence = np.empty(self.rows_.num_rows)
        for rows, changes in self._removals(0):
            own = np.arange(rows.stop - rows.start)
            influence[rows] = _change(self._training_rows_as_test(rows), changes)[own, own]
        return influence

    def _prepare(self) -> None:
        ensemble, statistics = self.rows_.ensemble, self.statistics_
        self.offsets_ = ensemble.leaf_offsets
        self.penalties_ = [total - own for total, own in zip(statistics.denominators, statistics.hessians, strict=True)]

    def _influence(self, test: TestRows) -> Array:
        blocks = ((rows, _change(test, changes)) for rows, changes in self._removals(len(test.leaves)))
        return whole_matrix(blocks, num_train=self.rows_.num_rows, num_test=len(test.leaves))

    def _removals(self, num_test: int) -> Iterator[tuple[slice, Array]]:
        """Yield blocks of b training rows with what their removal adds to each leaf of the model, (b, L)."""
        num_train, num_outputs = self.rows_.num_rows, self.rows_.ensemble.num_outputs
        widest = max(num_train, num_test, int(self.offsets_[-1]) // num_outputs)
        step = max(1, BLOCK_CELLS // (widest * num_outputs))
        with track("refitting leaves", num_train, unit="rows") as progress:
            for start in range(0, num_train, step):
                rows = slice(start, min(start + step, num_train))
                yield rows, self._refitted(rows)
                progress.advance(rows.stop - rows.start)

    def _refitted(self, removed: slice) -> Array:
        """Follow the removal of each of b rows through all rounds; the last column removes none, for comparison."""
        ensemble, y = self.rows_.ensemble, self.rows_.y
        num_train, num_outputs, num_removed = len(y), ensemble.num_outputs, removed.stop - removed.start
        moved = np.zeros((num_train, num_removed + 1, num_outputs))  # scores without the row minus scores with it
        changes = np.zeros((num_removed, int(self.offsets_[-1])))
        for this in self.rows_.rounds():
            gradients, hessians = _weighted(ensemble.objective, this, moved, y)  # (n, b + 1, K)
            own = np.arange(num_removed)
            gradients[removed.start + own, own] = hessians[removed.start + own, own] = 0.0
            for output in range(num_outputs):
                tree = this.number * num_outputs + output
                if ensemble.text.trees[tree].is_constant:
                    continue
                change = self._changed_values(tree, gradients[:, :, output], hessians[:, :, output])  # (L, b + 1)
                changes[:, self.offsets_[tree] : self.offsets_[tree + 1]] = change[:, :-1].T
                moved[:, :, output] += change[self.rows_.leaves[:, tree]]
        return changes

    def _changed_values(self, tree: int, gradients: Array, hessians: Array) -> Array:
        """Return the values (L, b + 1) of a tree's leaves minus those of the last column."""
        ensemble = self.rows_.ensemble
        member = _members(self.rows_.leaves[:, tree], len(ensemble.leaf_values[tree]))  # (L, n)
        values = leaf_values(
            member @ np.ascontiguousarray(gradients),
            member @ np.ascontiguousarray(hessians),
            penalties=self.penalties_[tree][:, None],
            rate=float(self.statistics_.learning_rates[tree // ensemble.num_outputs]),
            reg_alpha=ensemble.reg_alpha,
        )
        return values - values[:, -1:]


def _members(leaves: NDArray[np.int32], num_leaves: int) -> Any:
    """Return which rows are in which leaf, as a sparse matrix (L, n) of ones."""
    from scipy.sparse import csr_array

    order = np.argsort(leaves, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(leaves, minlength=num_leaves))])
    return csr_array((np.ones(len(leaves)), order, starts), shape=(num_leaves, len(leaves)))


def _weighted(objective: Objective, this: Round, moved: Array, y: Array) -> tuple[Array, Array]:
    """Return weighted gradients and Hessians (n, b, K) at the round's scores plus `moved`."""
    num_rows, width, num_outputs = moved.shape
    scores = this.scores[:, None, :] + moved
    if isinstance(objective, Custom):  # the function may know the rows by their place
        pairs = [objective.gradients(np.ascontiguousarray(scores[:, column]), y) for column in range(width)]
        gradients, hessians = (np.stack(side, axis=1) for side in zip(*pairs, strict=True))
    else:
        flat = objective.gradients(scores.reshape(-1, num_outputs), np.repeat(y, width))
        gradients, hessians = (side.reshape(num_rows, width, num_outputs) for side in flat)
    if this.weights is not None:
        gradients, hessians = gradients * this.weights[:, None, :], hessians * this.weights[:, None, :]
    return gradients, hessians


def _change(test: TestRows, changes: Array) -> Array:
    """Return the influence (b, B) on test rows of removals that add `changes` (b, L) to the leaves."""
    ensemble = test.ensemble
    places = test.leaves + ensemble.leaf_offsets[:-1]  # (B, C)
    num_removed, num_test, num_outputs = len(changes), len(test.leaves), ensemble.num_outputs
    moved = np.empty((num_removed, num_test, num_outputs))
    for output in range(num_outputs):
        moved[:, :, output] = (_one_hot(places[:, output::num_outputs], changes.shape[1]) @ changes.T).T
    if test.of == "prediction":
        chosen = test.chosen_output()
        return -moved[:, np.arange(num_test), chosen]
    assert test.y is not None
    before = test.final_scores
    scores = (before + moved).reshape(-1, num_outputs)
    losses = ensemble.objective.loss(scores, np.tile(test.y, num_removed)).reshape(num_removed, num_test)
    return losses - ensemble.objective.loss(before, test.y)


def _one_hot(places: NDArray[np.int64], num_leaves: int) -> Any:
    from scipy.sparse import csr_array

    num_rows, num_trees = places.shape
    starts = np.arange(0, num_rows * num_trees + 1, num_trees)
    return csr_array((np.ones(places.size), places.ravel(), starts), shape=(num_rows, num_leaves))
