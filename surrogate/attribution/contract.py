"""The contract of tree attribution: which training rows moved a test row's loss or score, and by how much.

    method = BoostIn(model).fit(X_train, y_train)          # the very rows, in the order of training
    method.attribute(X_test, y_test)                       # (n_train, n_test): loss each row took away
    method.attribute(X_test, of="prediction")              # score each row added; no label wanted
    method.attribute(X_test, y_test, top_k=10)             # the strongest rows only, in bounded memory
    method.self_influence()                                # (n_train,): of each row on its own loss

Sign: positive means that the training row lowers the test row's loss; with `of="prediction"`, that it raised the test
row's raw score. The loss of a test row is that of the objective, without sample weights. For several classes the score
is that of the class in `y_test`, or without it of the class that the model predicts.

A method is a class with `_prepare()`, called once the training rows are read and proven, and `_influence(test)`,
which returns (n_train, B) for a block of test rows. A row's influence never depends on the block it stands in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oracle.errors import InputError, check_at_least, check_choice
from surrogate.attribution.ensemble import TreeEnsemble, as_rows
from surrogate.attribution.leaf_check import LeafStatistics, check_leaf_values
from surrogate.attribution.objective_reading import ObjectiveFunction
from surrogate.attribution.objectives import Array
from surrogate.attribution.top_rows import TopRows
from surrogate.attribution.training_rows import TrainingRows, as_init_score

QUANTITIES = ("loss", "prediction")
BLOCK_BYTES = 64 * 2**20  # of influences and of test rows' leaves that are held at a time beside the result
BYTES_PER_LEAF = 64  # a test row's leaf as LightGBM gives it, as a number, its sensitivity, and the bounds of its list


@dataclass(frozen=True)
class TestRows:
    """A block of B test rows.

    Attributes:
        ensemble: The model, with the init score of training.
        leaves: (B, C) leaf of each row in each tree.
        of: "loss" or "prediction".
        y: (B,) encoded targets; of="prediction": the classes whose score is explained, or None.
        init_score: (B, K) or None.
    """

    ensemble: TreeEnsemble
    leaves: NDArray[np.int32]
    of: str
    y: Array | None
    init_score: Array | None

    @property
    def final_scores(self) -> Array:
        """LightGBM's raw predictions (B, K), init scores included."""
        return self.ensemble.final_scores(self.leaves, self.init_score)

    def chosen_output(self) -> NDArray[np.intp]:
        """Return the output (B,) whose score is explained."""
        if self.ensemble.num_outputs == 1:
            return np.zeros(len(self.leaves), dtype=np.intp)
        return self.final_scores.argmax(axis=1) if self.y is None else self.y.astype(np.intp)

    def final_sensitivity(self) -> Array:
        """Return the derivative (B, K) of the quantity that falls, by the final scores: the loss, or minus the score."""
        if self.of == "loss":
            return self.ensemble.objective.gradients(self.final_scores, self._targets())[0]
        return -(self.chosen_output()[:, None] == np.arange(self.ensemble.num_outputs)).astype(np.float64)

    def sensitivity_by_tree(self) -> Array:
        """Return the derivative (B, C) of the quantity that falls, by the scores before each tree's round."""
        sensitivity = np.empty(self.leaves.shape, order="F")
        num_outputs = self.ensemble.num_outputs
        if self.of == "prediction":
            sensitivity[:] = np.tile(self.final_sensitivity(), (1, self.ensemble.num_rounds))
            return sensitivity
        all_scores = self.ensemble.raw_scores_by_round(self.leaves, self.init_score)
        for number, scores in zip(range(self.ensemble.num_rounds), all_scores, strict=False):
            columns = slice(number * num_outputs, (number + 1) * num_outputs)
            sensitivity[:, columns] = self.ensemble.objective.gradients(scores, self._targets())[0]
        return sensitivity

    def _targets(self) -> Array:
        assert self.y is not None
        return self.y


@dataclass(eq=False)
class LeafAttribution:
    """What the methods share: reading and proving the model, blocks of test rows, the strongest rows.

    Attributes (learned): `rows_` the training rows as the model saw them; `statistics_` what its leaves are made of.
    """

    model: Any
    objective: ObjectiveFunction | None = field(default=None, kw_only=True)
    rows_: TrainingRows = field(init=False, repr=False)
    statistics_: LeafStatistics = field(init=False, repr=False)

    def fit(
        self, X_train: Any, y_train: ArrayLike, sample_weight: ArrayLike | None = None, init_score: ArrayLike | None = None
    ) -> Self:
        """Read the model and the rows that it was trained on, and prove that its leaf values follow from them.

        Args:
            X_train: Features (n_train, D) in training order, in any form that LightGBM takes.
            y_train: Labels or values (n_train,) as they were given in training.
            sample_weight: Weights (n_train,) of training.
            init_score: Scores (n_train,) or (n_train, K) that training started from.

        Raises:
            InputError: The model cannot be attributed, or these are not its training rows; the message names the cause.
        """
        ensemble = TreeEnsemble.read(self.model, objective=self.objective)
        self.rows_ = TrainingRows.read(ensemble, X_train, y_train, sample_weight=sample_weight, init_score=init_score)
        self.statistics_ = check_leaf_values(self.rows_, X_train)
        self._prepare()
        return self

    @overload
    def attribute(
        self, X_test: Any, y_test: ArrayLike | None = None, *, of: str = "loss", top_k: None = None, init_score: Any = None
    ) -> Array: ...
    @overload
    def attribute(
        self, X_test: Any, y_test: ArrayLike | None = None, *, of: str = "loss", top_k: int, init_score: Any = None
    ) -> TopRows: ...
    def attribute(
        self,
        X_test: Any,
        y_test: ArrayLike | None = None,
        *,
        of: str = "loss",
        top_k: int | None = None,
        init_score: ArrayLike | None = None,
    ) -> Array | TopRows:
        """Return the influence (n_train, n_test) of each training row on each test row, or the strongest rows.

        Args:
            X_test: Features (n_test, D).
            y_test: Labels or values (n_test,); for of="prediction" only with several classes: the class explained.
            of: "loss": how much the row lowers the test row's loss; "prediction": how much it raised its raw score.
            top_k: Return per test row only so many most positive and most negative rows; memory stays bounded.
            init_score: (n_test,) or (n_test, K), required where training had one.

        Raises:
            InputError: Rows or labels do not fit the model, or an option has no effect.
        """
        self._require_fitted()
        check_choice("of", of, QUANTITIES)
        num_train = self.rows_.num_rows
        if top_k is None:
            num_test = as_rows(X_test, self._num_features).shape[0]
            result = np.empty((num_test, num_train)).T  # columns are contiguous; no memory is touched yet
            beside = 0 if num_test <= self._rows_per_block(0) else 8 * num_train  # a single block is itself the result
            for columns, test in self._blocks(X_test, y_test, of=of, init_score=init_score, bytes_per_row=beside):
                influence = self._influence(test)
                if influence.shape[1] == num_test:
                    return influence
                result[:, columns] = influence
            return result
        check_at_least("top_k", top_k, 1)
        k = min(int(top_k), num_train)
        blocks = self._blocks(X_test, y_test, of=of, init_score=init_score, bytes_per_row=8 * num_train)
        return TopRows.joined([TopRows.of(self._influence(test), k) for _, test in blocks], k)

    def self_influence(self) -> Array:
        """Return the influence (n_train,) of each training row on its own, unweighted loss."""
        self._require_fitted()
        influence = np.empty(self.rows_.num_rows)
        step = self._rows_per_block(8 * self.rows_.num_rows)
        for start in range(0, len(influence), step):
            block = slice(start, min(start + step, len(influence)))
            rows = np.arange(block.start, block.stop)
            influence[block] = self._influence(self._training_rows_as_test(block))[rows, rows - start]
        return influence

    def _prepare(self) -> None:
        """Compute what all test rows share."""
        raise NotImplementedError

    def _influence(self, test: TestRows) -> Array:
        """Return (n_train, B) for a block of test rows."""
        raise NotImplementedError

    def _blocks(
        self, X: Any, y: ArrayLike | None, *, of: str, init_score: ArrayLike | None, bytes_per_row: int
    ) -> Iterator[tuple[slice, TestRows]]:
        """Yield blocks of test rows with their places."""
        ensemble = self.rows_.ensemble
        X = as_rows(X, self._num_features)
        num_rows = X.shape[0]
        self._check_test_labels(y, of)
        targets = None if y is None else ensemble.encode_targets(y)
        if targets is not None and len(targets) != num_rows:
            raise InputError(
                f"{num_rows} test rows and {len(targets)} targets were given.", "one target per row", "pass both from one table."
            )
        starts = as_init_score(init_score, num_rows, ensemble.num_outputs)
        if (starts is None) != (self.rows_.init_score is None):
            raise InputError(
                f"init_score was {'not ' if starts is None else ''}given for the test rows.",
                "init scores for test rows exactly where training had them",
                "pass init_score to both fit and attribute, or to neither.",
            )
        step = self._rows_per_block(bytes_per_row)
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            yield (
                rows,
                TestRows(
                    ensemble,
                    ensemble.leaves(X.iloc[rows] if hasattr(X, "iloc") else X[rows]),
                    of,
                    None if targets is None else targets[rows],
                    None if starts is None else starts[rows],
                ),
            )

    def _training_rows_as_test(self, block: slice) -> TestRows:
        starts = self.rows_.init_score
        return TestRows(
            self.rows_.ensemble,
            self.rows_.leaves[block],
            "loss",
            self.rows_.y[block],
            None if starts is None else starts[block],
        )

    def _rows_per_block(self, bytes_per_row: int) -> int:
        num_trees = len(self.rows_.ensemble.leaf_values)
        return max(1, BLOCK_BYTES // (bytes_per_row + BYTES_PER_LEAF * num_trees))

    @property
    def _num_features(self) -> int:
        return self.rows_.ensemble.booster.num_feature()

    def _require_fitted(self) -> None:
        if not hasattr(self, "statistics_"):
            raise InputError(
                f"this {type(self).__name__} has not been fitted.",
                "a fitted attribution",
                "call fit(X_train, y_train) with the rows that the model was trained on.",
            )

    def _check_test_labels(self, y: ArrayLike | None, of: str) -> None:
        if of == "loss" and y is None:
            raise InputError(
                "no y_test was given for of='loss'.",
                "the labels of the test rows, whose loss is attributed",
                "pass y_test, or of='prediction', which needs no labels.",
            )
        if of == "prediction" and y is not None and self.rows_.ensemble.num_outputs == 1:
            raise InputError(
                "y_test was given for of='prediction', where it has no effect: the model has one score.",
                "y_test only for of='loss', or to name the class whose score is explained",
                "leave y_test out.",
            )
