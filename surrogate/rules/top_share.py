"""Take texts at random from the best share of the pool: what training on a selection does when it is not used up.

A round of training takes a small part of the pool. With the very best texts first, each round is narrow: the model learns
one kind of text until another one helps most, and labels of one round say little about the next. From the best fifth at random
every round is as varied as the whole selection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from oracle.errors import InputError
from oracle.plugins import option
from surrogate.aggregation import COMBINE_HELP, WEIGHTS_HELP, combine


@dataclass(kw_only=True)
class TopShare:
    """The best share of the pool in random order, then the rest by score.

    Paper:
        The 20 % of MATES, Yu et al. 2024, arXiv 2406.06046, of which a stage trains on a part.
    Cost:
        One sort of the pool.
    Limit:
        `top` as the share goes to 0, `random` at a share of 1.
    """

    plugin_name: ClassVar[str] = "top_share"
    uses_scores: ClassVar[bool] = True

    share: float = option(0.2, "Share of the texts that may be chosen, best first, that is drawn from at random.")
    combine: str = option("sum_z", COMBINE_HELP)
    weights: Mapping[str, float] | None = option(None, WEIGHTS_HELP)

    def __post_init__(self) -> None:
        if not (isinstance(self.share, (int, float)) and 0 <= self.share <= 1):
            raise InputError(f"share={self.share!r}.", "a share from 0 to 1", "pass for example share=0.2.")

    def order(self, scores: np.ndarray, *, target_names: Sequence[str], seed: int) -> np.ndarray:
        """Order the pool.

        Args:
            scores: (N, C), rows sorted by text_id.
            target_names: Names of the C columns.
            seed: Seed of the order within the best share.

        Returns:
            (N,) int64, row numbers.
        """
        order = np.argsort(-combine(scores, self.combine, target_names=target_names, weights=self.weights), kind="stable")
        num_best = round(self.share * len(order))
        best = np.sort(order[:num_best])
        return np.concatenate([np.random.default_rng(seed).permutation(best), order[num_best:]]).astype(np.int64)
