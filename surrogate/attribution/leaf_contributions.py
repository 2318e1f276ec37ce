"""Leaf contributions: what each training row put into the leaves that a test row falls into; the only exact account."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from surrogate.attribution.contract import LeafAttribution, TestRows
from surrogate.attribution.leaf_check import leaf_totals
from surrogate.attribution.leaf_join import LeafJoin
from surrogate.attribution.objectives import Array


@dataclass(eq=False)
class LeafContributions(LeafAttribution):
    """Split every leaf value among the rows that it was made of, and add up the shares in the test row's leaves.

    A leaf's value is -eta G / (H + lambda), and G is the sum of its rows' gradients, so row i's share is
    -eta g / (H + lambda). With `of="prediction"` the amounts of all rows add up to the raw score without the init score,
    exactly up to LightGBM's float32 gradients. Rows outside the bag of a round put nothing into its trees, and trees without
    a split add nothing. Prefer it to tell how a score came about; for what would change without a row, `LeafInfluence`,
    `LeafRefit` or `LeaveOneOut`. With `of="loss"` a share counts by the test row's gradient before the round.

    A row's gradient is its residual in that round, which the rounds before have made smaller: amounts say what a row put in
    when its turn came, not what its label as such is worth.

    Args:
        model: Estimator, Booster or file; see `TreeEnsemble.read`.
        objective: The function of a model that was trained with a custom objective.

    Cost:
        As `BoostIn`: one replay of boosting over the training rows, then one addition per shared leaf.
    Limit:
        `BoostIn` without its Newton term; with one round that starts from the optimum the two are equal.
    """

    _join: LeafJoin = field(init=False, repr=False)

    def _prepare(self) -> None:
        self._join = LeafJoin.of(self.rows_.leaves, self._shares(), self.rows_.ensemble.leaf_offsets)

    def _shares(self) -> Iterator[Array]:
        """Yield per tree what each row (n,) took from its leaf's value."""
        rows, ensemble, statistics = self.rows_, self.rows_.ensemble, self.statistics_
        for this in rows.rounds():
            for output in range(ensemble.num_outputs):
                tree = this.number * ensemble.num_outputs + output
                if ensemble.text.trees[tree].is_constant:
                    yield np.zeros(rows.num_rows)
                    continue
                leaves, gradients = rows.leaves[:, tree], this.gradients[:, output]
                totals = leaf_totals(leaves, gradients, len(ensemble.leaf_values[tree]))
                factor = _shares_of_leaves(totals, statistics.denominators[tree], reg_alpha=ensemble.reg_alpha)
                yield statistics.learning_rates[this.number] * factor[leaves] * gradients

    def _influence(self, test: TestRows) -> Array:
        return self._join.sums(test.leaves, test.sensitivity_by_tree())


def _shares_of_leaves(totals: Array, denominators: Array, *, reg_alpha: float) -> Array:
    """Return what a gradient is multiplied with, per leaf (L,): the part that reg_alpha lets through over H + lambda."""
    passed = np.maximum(np.abs(totals) - reg_alpha, 0.0)
    through = np.divide(passed, np.abs(totals), out=np.zeros_like(totals), where=totals != 0) if reg_alpha else 1.0
    inverse = np.divide(1.0, denominators, out=np.zeros_like(totals), where=denominators != 0)
    return through * inverse
