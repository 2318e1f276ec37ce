"""Sample texts without replacement, in proportion to exp(score / temperature).

By the Gumbel top-k trick: adding independent Gumbel noise to score / temperature and taking the largest
values draws exactly the sequence that repeated softmax sampling without replacement would. Scores are
combined and brought to mean 0 and standard deviation 1 first, so a temperature means the same everywhere:
at 1, a text one standard deviation better is e times as likely to be drawn next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from oracle.errors import check_at_least
from oracle.plugins import option
from surrogate.aggregation import COMBINE_HELP, WEIGHTS_HELP, combine, standardise


@dataclass(kw_only=True)
class Softmax:
    """Seeded sampling without replacement in proportion to exp(z-score / temperature).

    MATES samples for the same reason, variety, by what its paper calls Gumbel top-k. Its released code keeps
    the SMALLEST of score (over tau) + Gumbel noise (its score is a loss) without turning the noise round: a
    Gumbel's lower tail is far lighter than its upper one, so that is another, sharper distribution.

    Paper:
        Kool et al. 2019, Stochastic Beams and Where to Find Them; Yu et al. 2024, MATES.
    Cost:
        One random number per text and one sort of the pool.
    Limit:
        Tends to `top` as the temperature goes to 0 (and equals it at 0), and to `random` as it grows.
    """

    plugin_name: ClassVar[str] = "softmax"
    uses_scores: ClassVar[bool] = True

    temperature: float = option(1.0, "In standard deviations of the combined score: 0 is top, large is random.")
    combine: str = option("sum_z", COMBINE_HELP)
    weights: Mapping[str, float] | None = option(None, WEIGHTS_HELP)

    def __post_init__(self) -> None:
        check_at_least("temperature", self.temperature, 0)

    def order(self, scores: np.ndarray, *, target_names: Sequence[str], seed: int) -> np.ndarray:
        """Order the pool.

        Args:
            scores: (N, C), rows sorted by text_id, so that noise belongs to a text and not to a position.
            target_names: Names of the C columns.
            seed: Seed of the noise.

        Returns:
            (N,) int64, row numbers in the order in which they were drawn.
        """
        combined = combine(scores, self.combine, target_names=target_names, weights=self.weights)
        noise = np.random.default_rng(seed).gumbel(size=len(combined))
        # temperature times (z / temperature + noise): the same order, and defined at 0
        return np.argsort(-(standardise(combined) + self.temperature * noise), kind="stable")
