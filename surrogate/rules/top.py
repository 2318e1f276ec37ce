"""Take the texts with the highest scores first.

The greedy rule of most selection papers. It is the best one for a single step if scores are right, and the
one that suffers most where they are wrong or the chosen texts repeat each other; `softmax` trades some score
for variety.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from oracle.plugins import option
from surrogate.aggregation import COMBINE_HELP, WEIGHTS_HELP, combine


@dataclass(kw_only=True)
class Top:
    """Highest combined score first.

    Paper:
        Xia et al. 2024, LESS (top-k by influence, the maximum over targets: combine='max_z').
    Cost:
        One sort of the pool.
    Limit:
        What `softmax` tends to as its temperature goes to 0.
    """

    plugin_name: ClassVar[str] = "top"
    uses_scores: ClassVar[bool] = True

    combine: str = option("sum_z", COMBINE_HELP)
    weights: Mapping[str, float] | None = option(None, WEIGHTS_HELP)

    def order(self, scores: np.ndarray, *, target_names: Sequence[str], seed: int) -> np.ndarray:
        """Order the pool.

        Args:
            scores: (N, C), rows sorted by text_id, which also breaks ties.
            target_names: Names of the C columns.
            seed: Not used; nothing here is random.

        Returns:
            (N,) int64, row numbers, best first.
        """
        combined = combine(scores, self.combine, target_names=target_names, weights=self.weights)
        return np.argsort(-combined, kind="stable")
