"""The account of boosted trees: leaf contributions of the labelled texts, and Shapley values of the columns.

Leaf contributions add up to the score. BoostIn's amounts, where they are asked for instead, say what more weight of a text
would do to the score, and add up to nothing; all the difference then stands in the remainder.

Paper: Lundberg et al. 2020, From Local Explanations to Global Understanding with Explainable AI for Trees (Nature Machine
Intelligence 2), as LightGBM's `pred_contrib` computes it; it adds up to the score exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray

from surrogate.amounts import CONTRIBUTIONS, Amounts, earlier_part
from surrogate.attribution.boostin import BoostIn
from surrogate.attribution.contract import LeafAttribution
from surrogate.attribution.leaf_contributions import LeafContributions

if TYPE_CHECKING:
    from surrogate.continuation import Continuation
    from surrogate.models import TrainingData

METHODS: dict[str, type[LeafAttribution]] = {CONTRIBUTIONS: LeafContributions, "boostin": BoostIn}


@dataclass(frozen=True)
class BoosterTable:
    """A booster of a surrogate with the S rows that it was trained on, in the order of training, as LightGBM took them.

    Shapes: features (S, D); targets (S,) on the fitted scale, less the part of earlier surrogates; weights (S,) or None;
    rows (S,) where each stood among the rows that were given.
    """

    booster: lgb.Booster
    features: NDArray[np.float32]
    targets: NDArray[np.float64]
    weights: NDArray[np.float64] | None
    rows: NDArray[np.int64]

    @classmethod
    def of(
        cls, booster: lgb.Booster, parameters: dict[str, Any], data: TrainingData, targets: NDArray[np.float64]
    ) -> BoosterTable:
        """Take a booster that was trained with `parameters` for targets (S,)."""
        read = lgb.Booster(model_str=booster.model_to_string())
        read.params = dict(parameters)  # all the digits, which the text cuts off
        weights = None if data.weights is None else _as_lightgbm_stores(data.weights)
        return cls(read, data.features, _as_lightgbm_stores(targets), weights, data.rows)


@dataclass(frozen=True)
class TreeAmounts:
    """Per target a booster and its fitted attribution."""

    attributions: Sequence[LeafAttribution]
    earlier: Continuation | None
    num_threads: int

    @classmethod
    def of(cls, tables: Sequence[BoosterTable], earlier: Continuation | None, *, method: str, num_threads: int) -> TreeAmounts:
        """Prove the boosters against the rows that they were trained on.

        Raises:
            InputError: These are not the rows.
        """
        fitted = [METHODS[method](table.booster).fit(table.features, table.targets, table.weights) for table in tables]
        return cls(fitted, earlier, num_threads)

    def amounts(self, features: NDArray[np.float32]) -> Amounts:
        """Account for the scores of features (B, D)."""
        offset, earlier = earlier_part(self.earlier, features, num_targets=len(self.attributions))
        boosters = [attribution.model for attribution in self.attributions]
        own = np.stack([booster.predict(features, num_threads=self.num_threads) for booster in boosters], axis=1)
        columns = np.stack(
            [booster.predict(features, pred_contrib=True, num_threads=self.num_threads) for booster in boosters]
        )  # (C, B, D + 1)
        init_scores = np.array([attribution.rows_.ensemble.init_scores[0] for attribution in self.attributions])
        return Amounts(
            scores=own + offset + earlier,
            earlier=earlier,
            bias=init_scores + offset,
            rows=np.stack([attribution.attribute(features, of="prediction") for attribution in self.attributions]),
            column_bias=columns[:, 0, -1] + offset,
            columns=columns[:, :, :-1],
        )


def _as_lightgbm_stores(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values.astype(np.float32).astype(np.float64)
