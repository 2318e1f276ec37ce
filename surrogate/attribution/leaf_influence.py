"""LeafInfluence: the derivative of a prediction by a training row's weight, trees' structure held fixed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from surrogate.attribution.boostin import divided
from surrogate.attribution.contract import LeafAttribution, TestRows
from surrogate.attribution.leaf_join import LeafJoin
from surrogate.attribution.objectives import Array

SWEEP_BYTES = 2**21  # of each of the arrays that a sweep moves through the cache


@dataclass(eq=False)
class LeafInfluence(LeafAttribution):
    """How the test row's final loss moves with each training row's weight, through all rounds of boosting.

    A row pulls its leaf's value; this moves the scores, hence the gradients, of all rows in the leaf, hence the values of
    their later leaves. Prefer it for regression and wherever lambda is above 0; with lambda 0 and classes that separate,
    denominators vanish and `BoostIn` ranks better.

    The published code follows every training row forward through all trees and rows. Here the derivative runs backward,
    from the test row: the chain passes leaf by leaf, so one sweep over the trees in reverse gives the influence of all
    training rows at once. A tree in which LightGBM found no split counts as one leaf of all rows, as in the published code.

    Args:
        model: Estimator, Booster or file; see `TreeEnsemble.read`.
        objective: Refused: a custom objective does not say how its gradients move.
        single_point: Follow only the row's own score, as if no other row's gradients moved.

    Paper:
        Sharchilev et al. 2018, Finding Influential Training Samples for Gradient Boosted Decision Trees (ICML); formulas as in
        tree_influence 0.1.7 (LeafInfluence, LeafInfluenceSP): several classes by the diagonal of the Hessian.
    Cost:
        Full: per test row and tree three passes over the training rows; fitting as for BoostIn. Single point: as BoostIn.
    Limit:
        With one round, full and single point are equal.
    """

    single_point: bool = field(default=False, kw_only=True)
    _join: LeafJoin = field(init=False, repr=False)
    _pulls: Array = field(init=False, repr=False)
    _responses: Array = field(init=False, repr=False)
    _leaf_sums: list[csr_array] = field(init=False, repr=False)

    def _prepare(self) -> None:
        rows = self.rows_
        if self.single_point:
            self._join = LeafJoin.of(rows.leaves, self._own_pulls(), rows.ensemble.leaf_offsets)
            return
        self._pulls, self._responses = np.empty(rows.leaves.shape, order="F"), np.empty(rows.leaves.shape, order="F")
        for number, terms in enumerate(self._terms()):
            trees = slice(number * rows.ensemble.num_outputs, (number + 1) * rows.ensemble.num_outputs)
            self._pulls[:, trees], self._responses[:, trees] = terms
        self._leaf_sums = _leaf_sums(rows.leaves, [len(values) for values in rows.ensemble.leaf_values])

    def _influence(self, test: TestRows) -> Array:
        sensitivity = test.final_sensitivity()  # (B, K)
        if self.single_point:
            return self._join.sums(test.leaves, np.tile(sensitivity, (1, test.ensemble.num_rounds)))
        influence = np.empty((len(test.leaves), self.rows_.num_rows)).T  # (n, B), columns are contiguous
        step = max(1, SWEEP_BYTES // (8 * self.rows_.num_rows))
        for start in range(0, len(test.leaves), step):
            block = slice(start, start + step)
            influence[:, block] = self._sweep(test.leaves[block], sensitivity[block])
        return influence

    def _terms(self) -> Iterator[tuple[Array, Array]]:
        """Yield per round each row's pull p (n, K) on its leaf, and the response q (n, K) to a move of its own score.

        A leaf's value moves by minus (the sum over its rows of q times the move of their scores, plus p of the row whose
        weight moves); eta / (H + lambda) is multiplied in.
        """
        rows, statistics, num_outputs = self.rows_, self.statistics_, self.rows_.ensemble.num_outputs
        for this in rows.rounds():
            of_gradient, of_hessian = rows.ensemble.objective.slopes(this.scores, rows.y)
            if this.weights is not None:
                of_gradient, of_hessian = of_gradient * this.weights, of_hessian * this.weights
            rate = statistics.learning_rates[this.number]
            pull, response = np.empty(this.scores.shape), np.empty(this.scores.shape)
            for output in range(num_outputs):
                tree = this.number * num_outputs + output
                leaves, step = rows.leaves[:, tree], statistics.steps[tree]
                full = np.full_like(step, rate)
                weight = divided(full, statistics.denominators[tree])  # (L,)
                first, second = (weight * statistics.passes[tree])[leaves], (weight * divided(step, full))[leaves]
                pull[:, output] = first * this.gradients[:, output] + second * this.hessians[:, output]
                response[:, output] = first * of_gradient[:, output] + second * of_hessian[:, output]
            yield pull, response

    def _own_pulls(self) -> Iterator[Array]:
        """Yield per tree how far minus a row's own leaf (n,) moves with its weight, its own score's move so far included."""
        moved = np.zeros((self.rows_.num_rows, self.rows_.ensemble.num_outputs))  # minus the row's own score
        for pull, response in self._terms():
            own = pull - response * moved
            yield from own.T
            moved += own

    def _sweep(self, leaves: NDArray[np.int32], sensitivity: Array) -> Array:
        """Return the influence (n, B) of all training rows, by one sweep backward over the trees of each output."""
        num_rows, num_outputs = self.rows_.num_rows, self.rows_.ensemble.num_outputs
        influence = np.zeros((num_rows, len(leaves)))
        columns = np.arange(len(leaves))
        for output in range(num_outputs):
            owed = np.zeros((num_rows, len(leaves)))  # how the loss moves with each training row's score, from later trees
            for tree in reversed(range(output, leaves.shape[1], num_outputs)):
                of_leaves = self._leaf_sums[tree] @ owed  # (L, B): how it moves with each leaf's value
                of_leaves[leaves[:, tree], columns] += sensitivity[:, output]
                of_rows = of_leaves[self.rows_.leaves[:, tree]]  # (n, B)
                influence += self._pulls[:, tree, None] * of_rows
                of_rows *= self._responses[:, tree, None]
                owed -= of_rows
        return influence


def _leaf_sums(leaves: NDArray[np.int32], num_leaves: list[int]) -> list[csr_array]:
    """Return per tree the matrix (L, n) that sums rows leaf by leaf."""
    ones = np.ones(len(leaves))
    sums = []
    for tree, size in enumerate(num_leaves):
        column = leaves[:, tree]
        bounds = np.concatenate([[0], np.cumsum(np.bincount(column, minlength=size))])
        rows = np.argsort(column, kind="stable").astype(np.int32)
        sums.append(csr_array((ones, rows, bounds.astype(np.int32)), shape=(size, len(leaves))))
    return sums
