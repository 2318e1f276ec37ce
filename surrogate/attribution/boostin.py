"""BoostIn: TracIn for boosted trees, with every round as a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from oracle.errors import check_choice
from surrogate.attribution.contract import LeafAttribution, TestRows
from surrogate.attribution.leaf_join import LeafJoin
from surrogate.attribution.objectives import Array
from surrogate.attribution.training_rows import Round

WEIGHTINGS = ("none", "count", "squared_count")
NEWTON_STEPS = ("shrunk", "full")


@dataclass(eq=False)
class BoostIn(LeafAttribution):
    """Sum over rounds of the test row's gradient times the training row's pull on the leaf that both share.

    The pull of row i is the derivative of its leaf's value by the row's weight, with everything before the round held
    fixed: eta (g + v h) / (H + lambda). Rows that share no leaf with the test row get exactly 0. Prefer it where classes
    separate well and lambda is 0, and wherever speed counts; `LeafInfluence` is better for regression and with a lambda.
    A tree in which LightGBM found no split counts as one leaf of all rows, as in the published code.

    Args:
        model: Estimator, Booster or file; see `TreeEnsemble.read`.
        objective: The function of a model that was trained with a custom objective.
        weighting: "none"; "count" and "squared_count" divide a row's pull by the number of rows in its leaf, or by the
            square of it, so that small leaves count more.
        newton_step: "shrunk" takes v as stored, as the published code does; "full" takes v / eta, the exact derivative,
            which vanishes in pure leaves and loses quality there when lambda is 0.

    Paper:
        Brophy, Hammoudeh and Lowd 2023, Adapting and Evaluating Influence-Estimation Methods for Gradient-Boosted
        Decision Trees (JMLR 24); code tree_influence 0.1.7.
    Cost:
        One replay of boosting over the training rows, then one addition per shared leaf.
    Limit:
        With one round of squared error from score 0 and lambda 0, a row's pull is eta times its residual over the leaf's
        count, up to the shrunk Newton term.
    """

    weighting: str = field(default="none", kw_only=True)
    newton_step: str = field(default="shrunk", kw_only=True)
    _join: LeafJoin = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_choice("newton_step", self.newton_step, NEWTON_STEPS)

    def self_influence(self) -> Array:
        """Return the influence (n_train,) of each training row on its own, unweighted loss."""
        self._require_fitted()
        rows, influence = self.rows_, np.zeros(self.rows_.num_rows)
        own = np.empty((0, 0))
        for this, output, pull in self._pulls():
            if output == 0:
                own = this.gradients if this.weights is None else rows.ensemble.objective.gradients(this.scores, rows.y)[0]
            influence += own[:, output] * pull
        return influence

    def _prepare(self) -> None:
        self._join = LeafJoin.of(self.rows_.leaves, (pull for _, _, pull in self._pulls()), self.rows_.ensemble.leaf_offsets)

    def _pulls(self) -> Iterator[tuple[Round, int, Array]]:
        """Yield per tree its round, its output, and the pull (n,) of each row on its leaf."""
        rows, num_outputs = self.rows_, self.rows_.ensemble.num_outputs
        for this in rows.rounds():
            for output in range(num_outputs):
                tree = this.number * num_outputs + output
                of_gradient, of_hessian = self._factors(tree, self.statistics_.learning_rates[this.number])
                leaves = rows.leaves[:, tree]
                yield (
                    this,
                    output,
                    of_gradient[leaves] * this.gradients[:, output] + of_hessian[leaves] * this.hessians[:, output],
                )

    def _influence(self, test: TestRows) -> Array:
        return self._join.sums(test.leaves, test.sensitivity_by_tree())

    def _factors(self, tree: int, rate: float) -> tuple[Array, Array]:
        """Return per leaf (L,) what a row's gradient and its Hessian are multiplied with."""
        statistics = self.statistics_
        step = statistics.steps[tree]
        if self.newton_step == "full":
            step = divided(step, np.full_like(step, rate))
        weight = divided(np.full_like(step, rate), statistics.denominators[tree])
        if self.weighting != "none":
            weight = divided(weight, statistics.counts[tree].astype(np.float64) ** (1 if self.weighting == "count" else 2))
        return weight * statistics.passes[tree], weight * step


def divided(numerator: Array, denominator: NDArray) -> Array:
    """Return numerator / denominator, 0 where the denominator is 0: leaves without rows move with none."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)
