"""TREX: representer points of a linear surrogate on the leaves of the trees.

The surrogate predicts F(x) = offset + phi(x) W from the leaves that x reaches. At its regularised minimum W is a sum over
training rows, W = Phi^T alpha, so each prediction is a sum of shares alpha_i phi(x_i) . phi(x), one per training row. A
row's influence is the change of the surrogate's loss when its share is taken away. The minimum is exact
(`surrogate.attribution.trex_solvers`).

How strongly the surrogate is regularised follows from the model. With features of one over the leaf's count, similarities
shrink with the square of the leaves' sizes, while the ridge counts as ridge times N: with 40,000 rows the same ridge
holds the surrogate far nearer to its offset than with 4,000. The published ridge of 0.003 is deep in that regime, and
ranks best there; a weaker one predicts the targets better and ranks training rows worse. There W hardly matters and
alpha_i is nearly proportional to what is left of the target beyond the offset. So the offset decides: without one,
regression targets far from 0 make all rows equally important, and the ranking is worthless.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from oracle.errors import InputError, check_at_least, check_choice
from surrogate.attribution.contract import LeafAttribution, TestRows
from surrogate.attribution.leaf_join import LeafJoin
from surrogate.attribution.objective_reading import SUPPORTED, Custom
from surrogate.attribution.objectives import Array, Multiclass, OneVersusAll
from surrogate.attribution.tree_kernels import KERNELS, TreeKernel
from surrogate.attribution.trex_solvers import Representer, ScoreLoss, SeparateOutputs, SoftmaxLoss, fit_representer

OFFSETS = ("auto", "bias", "zero")
TARGETS = ("labels", "predictions")
SMALLEST_RIDGE = 1e-12
TEST_ROWS_PER_PRODUCT = 64  # whose features are held densely, for kernels that are not of leaves


@dataclass(eq=False)
class TREX(LeafAttribution):
    """What the loss of a surrogate on the leaves would be without the row's share in its prediction.

    A smooth relative of LeafSimilarity: rows that share small leaves, weighed by how far the surrogate misses their
    target. It asks nothing of the model but its leaves, so it also suits models whose denominators vanish.

    Args:
        model: Estimator, Booster or file; see `TreeEnsemble.read`.
        objective: The function of a model that was trained with a custom objective; the surrogate needs one of LightGBM's.
        kernel: One of `KERNELS`, the published default first: one over its count for each leaf. "node_path_by_count" ranked
            a little better on four small models (0.25 to 0.57 against 0.24 to 0.53) and takes many times as long.
        ridge: The published lambda, the weight of |W|^2 beside the mean loss; its effect depends on the number of rows,
            see above.
        offset: The score that the surrogate adds to. "bias" is the score that the labels lead boosting to start from
            (their mean, for regression), "zero" none, as published; "auto" is the bias for regression, zero for classes.
        target: "labels", or "predictions" of the model.
        halve: Halve the row weights of regression, as the published code does by mistake.

    Paper:
        TREX: Brophy, Hammoudeh and Lowd 2023 (JMLR 24), after Yeh et al. 2018, Representer Point Selection, arXiv
        1811.09720. The published code (tree_influence 0.1.7) has offset="zero", halve=True for regression and clips
        probabilities at 1e-5.
    Cost:
        A few tens of products with the sparse features, n T each, and then one addition per shared leaf.
    Limit:
        As the ridge grows, alpha tends to minus the loss's gradient at the offset over 2 ridge N: for regression, the
        similarity times the target's distance from its mean.
    """

    kernel: str = field(default="leaf_path_by_count", kw_only=True)
    ridge: float = field(default=0.003, kw_only=True)
    offset: str = field(default="auto", kw_only=True)
    target: str = field(default="labels", kw_only=True)
    halve: bool = field(default=False, kw_only=True)
    alphas_: Array = field(init=False, repr=False)
    representer_: Representer = field(init=False, repr=False)
    _offset: Array = field(init=False, repr=False)
    _kernel: TreeKernel = field(init=False, repr=False)
    _weights: Array = field(init=False, repr=False)
    _join: LeafJoin | None = field(init=False, repr=False)
    _held: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("kernel", self.kernel, KERNELS)
        check_choice("offset", self.offset, OFFSETS)
        check_choice("target", self.target, TARGETS)
        check_at_least("ridge", self.ridge, SMALLEST_RIDGE)

    def use_alphas(self, alphas: ArrayLike) -> Self:
        """Replace the row weights `alphas_` (n,) or (n, K) by those of another solver."""
        self._require_fitted()
        given = np.asarray(alphas, dtype=np.float64)
        if given.size != self.alphas_.size or len(given) != len(self.alphas_):
            raise InputError(
                f"alphas of shape {given.shape} were given.", f"row weights of shape {self.alphas_.shape}", "pass one per row."
            )
        self.alphas_ = given.reshape(self.alphas_.shape)
        self._weights = self._features().T @ self.alphas_  # (M, K)
        return self

    def surrogate_scores(self, X: Any, init_score: ArrayLike | None = None) -> Array:
        """Return what the surrogate predicts for rows X (n, D): raw scores (n, K), to hold beside the model's own."""
        self._require_fitted()
        blocks = self._blocks(X, None, of="prediction", init_score=init_score, bytes_per_row=0)
        scores = [self._surrogate_scores(test.leaves, test.init_score) for _, test in blocks]
        return np.concatenate(scores) if scores else np.zeros((0, self.rows_.ensemble.num_outputs))

    def self_influence(self) -> Array:
        """Return the influence (n_train,) of each training row on its own, unweighted loss."""
        self._require_fitted()
        rows = self.rows_
        features = self._features()
        similarity = features.multiply(features).sum(axis=1)  # (n,)
        scores = self._surrogate_scores(rows.leaves, rows.init_score)
        loss = rows.ensemble.objective.loss
        return loss(scores - self.alphas_ * similarity[:, None], rows.y) - loss(scores, rows.y)

    def _prepare(self) -> None:
        rows, objective = self.rows_, self.rows_.ensemble.objective
        if isinstance(objective, Custom):
            raise InputError(
                "TREX fits a surrogate by the model's loss, and a custom objective gives only its gradients.",
                f"one of LightGBM's own objectives: {', '.join(SUPPORTED)}",
                "use BoostIn or LeafSimilarity.",
            )
        is_squared = objective.name.startswith("regression")
        if self.halve and not is_squared:
            raise InputError(
                f"halve=True has no effect on the objective {objective.name!r}.",
                "halve=True only for squared error",
                "leave halve out.",
            )
        weights = np.ones(rows.num_rows) if rows.row_weights is None else _row_weights(rows.row_weights)
        self._kernel = TreeKernel(self.kernel, rows.ensemble, rows.leaves, weights)
        features = self._kernel.features(rows.leaves)
        loss, self._offset = self._surrogate_loss(weights)
        starts = self._offset if rows.init_score is None else self._offset + rows.init_score
        self.representer_ = fit_representer(features, loss, weights=weights, offset=starts, ridge=self.ridge)
        self.alphas_ = self.representer_.alphas * (0.5 if self.halve else 1.0)
        self._weights = features.T @ self.alphas_  # (M, K)
        self._join = self._held = None
        if not self._kernel.is_leaf_kernel:
            self._held = features
        else:
            del features
            self._join = LeafJoin.of(rows.leaves, self._kernel.leaf_columns(rows.leaves), rows.ensemble.leaf_offsets)

    def _features(self) -> Any:
        """Return the training rows' features (n, M); those of leaves are quickly made, and not held beside their join."""
        return self._kernel.features(self.rows_.leaves) if self._held is None else self._held

    def _influence(self, test: TestRows) -> Array:
        influence = self._similarities(test)  # (n, B), turned into influences column by column
        if test.of == "prediction":
            for column, output in enumerate(test.chosen_output()):
                influence[:, column] *= self.alphas_[:, output]
            return influence
        assert test.y is not None
        scores, objective = self._surrogate_scores(test.leaves, test.init_score), test.ensemble.objective
        if objective.name.startswith("regression"):
            for column, residual in enumerate(scores[:, 0] - test.y):
                share = influence[:, column] * self.alphas_[:, 0]
                np.multiply(share, 0.5 * share - residual, out=influence[:, column])
            return influence
        losses = objective.loss(scores, test.y)
        for column, target in enumerate(test.y):
            without = scores[column] - self.alphas_ * influence[:, column, None]  # (n, K)
            influence[:, column] = objective.loss(without, np.full(len(without), target)) - losses[column]
        return influence

    def _similarities(self, test: TestRows) -> Array:
        """Return the products of features (n, B); columns are contiguous."""
        features = self._kernel.features(test.leaves)
        if self._join is not None:
            return self._join.sums(test.leaves, features.data.reshape(test.leaves.shape))
        products = np.empty((len(test.leaves), self.rows_.num_rows)).T
        for start in range(0, len(test.leaves), TEST_ROWS_PER_PRODUCT):
            block = slice(start, start + TEST_ROWS_PER_PRODUCT)
            products[:, block] = self._features() @ features[block].toarray().T
        return products

    def _surrogate_scores(self, leaves: Any, init_score: Array | None) -> Array:
        scores = self._offset + self._kernel.features(leaves) @ self._weights
        return scores if init_score is None else scores + init_score

    def _surrogate_loss(self, weights: Array) -> tuple[ScoreLoss, Array]:
        """Return the loss that the surrogate minimises, and the offset (K,) of its scores."""
        rows, objective = self.rows_, self.rows_.ensemble.objective
        is_squared, targets = objective.name.startswith("regression"), rows.y
        if isinstance(objective, OneVersusAll) and (rows.row_weights is not None or self.target == "predictions"):
            raise InputError(
                "TREX was asked for a one-versus-all model with weights, or for its predictions as targets.",
                "multiclassova without weights of rows or classes and with target='labels'",
                "train with objective='multiclass', or use BoostIn.",
            )
        if self.target == "predictions":
            targets = objective.predict(rows.ensemble.final_scores(rows.leaves, rows.init_score))
        offset = np.zeros(objective.num_outputs)
        if self.offset == "bias" or (self.offset == "auto" and not objective.is_classification):
            if rows.init_score is None:
                offset = objective.bias(rows.y if targets.ndim > 1 else targets, weights)
            elif is_squared:
                offset = objective.bias(targets - rows.init_score[:, 0], weights)
        if isinstance(objective, Multiclass) and not isinstance(objective, OneVersusAll):
            classes = np.arange(objective.num_outputs)
            shares = targets if targets.ndim > 1 else (targets[:, None] == classes).astype(np.float64)
            return SoftmaxLoss(shares), offset
        return SeparateOutputs(objective, targets, scale=2.0 if is_squared else 1.0), offset


def _row_weights(weights: Array) -> Array:
    """Return weights (n,) relative to their mean: a common factor changes nothing."""
    of_rows = weights.mean(axis=1)
    mean = of_rows.mean()
    if mean == 0:
        raise InputError("all sample weights are 0.", "weights with a mean above 0", "pass the weights of training.")
    return of_rows / mean
