"""Which labels look wrong: training rows that the other rows' labels speak against, most suspicious first.

A row is judged by its loss under the model without the row's own part: every leaf value on its path is computed again
from the other rows of the leaf. A wrong label then has only its neighbours to stand on, and they say something else. The
gradients of the other rows are kept as they were, so that all rows are judged in one replay of boosting, without
training anything again.

For classes the loss is the mean over the rounds: late rounds of a model that fits its training rows perfectly have
learned the wrong labels too, by splits made for them, and early ones have not. For regression it is that of the last
round: before it, large losses mostly say that a target is far from the mean.

Chosen by planting 5 % wrong labels (benchmarks/attribution_noise.py). Mean average precision on nine real tables of up
to 1500 rows, two models each: 0.65; self-influence by LeafRefit 0.62, by BoostIn 0.60; plain training loss 0.61. On
scikit-learn's bundled sets, where the models over-fit less, it is no better than the training loss or LeafInfluence's
self-influence (0.70 each). Self-influence asks how much a row bends the model, which rare but right rows do as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from surrogate.attribution.ensemble import TreeEnsemble
from surrogate.attribution.leaf_check import LeafStatistics, check_leaf_values
from surrogate.attribution.leaf_refit import leaf_values
from surrogate.attribution.objective_reading import ObjectiveFunction
from surrogate.attribution.objectives import Array
from surrogate.attribution.training_rows import Round, TrainingRows


@dataclass(frozen=True)
class LabelSuspects:
    """Training rows ranked by how strongly the other rows' labels speak against theirs.

    Attributes:
        order: (n,) row numbers, most suspicious first; equal ones by row number.
        losses: (n,) in the order of the rows: loss without the row's own part in the leaves, for classes its mean over
            the rounds.
        training_losses: (n,) loss of the model as it is, in the order of the rows.
    """

    order: NDArray[np.int64]
    losses: Array
    training_losses: Array


def label_suspects(
    model: Any,
    X_train: Any,
    y_train: ArrayLike,
    *,
    sample_weight: ArrayLike | None = None,
    init_score: ArrayLike | None = None,
    objective: ObjectiveFunction | None = None,
) -> LabelSuspects:
    """Rank the rows that a model was trained on by how suspicious their labels are.

    Args:
        model: A fitted LGBMRegressor or LGBMClassifier, a `lightgbm.Booster`, or a file that LightGBM saved.
        X_train: Features (n, D) of training.
        y_train: Labels or values (n,) of training.
        sample_weight: Weights (n,) of training.
        init_score: Scores (n,) or (n, K) that training started from.
        objective: The function of a model that was trained with a custom objective; it has no loss, and is refused.

    Returns:
        All rows, ranked. How many of them are wrong is not estimated.

    Raises:
        InputError: The model cannot be attributed, or these are not its training rows.

    Example:
        >>> suspects = label_suspects(model, X, y)
        >>> suspects.order[:20]  # look at these labels first
    """
    ensemble = TreeEnsemble.read(model, objective=objective)
    rows = TrainingRows.read(ensemble, X_train, y_train, sample_weight=sample_weight, init_score=init_score)
    losses = losses_without_own_part(rows, check_leaf_values(rows, X_train))
    training_losses = rows.ensemble.objective.loss(rows.ensemble.final_scores(rows.leaves, rows.init_score), rows.y)
    return LabelSuspects(np.argsort(-losses, kind="stable"), losses, training_losses)


def losses_without_own_part(rows: TrainingRows, statistics: LeafStatistics) -> Array:
    """Return losses (n,) of the training rows, each from leaf values of which its own gradients are taken off."""
    ensemble, num_outputs = rows.ensemble, rows.ensemble.num_outputs
    scores = np.tile(ensemble.init_scores, (rows.num_rows, 1))
    if rows.init_score is not None:
        scores += rows.init_score
    total = np.zeros(rows.num_rows)
    for this in rows.rounds():
        for output in range(num_outputs):
            tree = this.number * num_outputs + output
            if not ensemble.text.trees[tree].is_constant:
                scores[:, output] += _steps_without_own_part(rows, statistics, this, tree)
        if ensemble.objective.is_classification:
            total += ensemble.objective.loss(scores, rows.y) / ensemble.num_rounds
    return total if ensemble.objective.is_classification else ensemble.objective.loss(scores, rows.y)


def _steps_without_own_part(rows: TrainingRows, statistics: LeafStatistics, this: Round, tree: int) -> Array:
    """Return what the tree adds to each row (n,), from the other rows of its leaf; 0 where it is alone."""
    leaves, output = rows.leaves[:, tree], tree % rows.ensemble.num_outputs
    gradients, hessians = this.gradients[:, output], this.hessians[:, output]
    num_leaves = len(rows.ensemble.leaf_values[tree])
    penalties = statistics.denominators[tree] - statistics.hessians[tree]
    others = np.bincount(leaves, gradients, num_leaves)[leaves] - gradients
    return leaf_values(
        others,
        np.maximum(np.bincount(leaves, hessians, num_leaves)[leaves] - hessians, 0.0),
        penalties=penalties[leaves],
        rate=float(statistics.learning_rates[this.number]),
        reg_alpha=rows.ensemble.reg_alpha,
    )
