"""Take texts at random: the baseline that a selection has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(kw_only=True)
class Random:
    """A seeded random order, blind to the scores.

    Paper:
        None; the baseline of every selection paper.
    Cost:
        One random number per text.
    Limit:
        What `softmax` tends to as its temperature grows.
    """

    plugin_name: ClassVar[str] = "random"
    uses_scores: ClassVar[bool] = False

    def order(self, scores: np.ndarray, *, target_names: Sequence[str], seed: int) -> np.ndarray:
        """Order the pool.

        Args:
            scores: (N, C), rows sorted by text_id; only their number matters.
            target_names: Not used.
            seed: Seed of the order.

        Returns:
            (N,) int64, row numbers.
        """
        return np.random.default_rng(seed).permutation(len(scores)).astype(np.int64)
