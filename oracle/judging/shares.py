"""What the top and the bottom share of a sample by label are worth, beside a random share of the same size.

By removal: train on the sample without them, and without as many random texts. By addition: train on them alone, and on
as many random texts alone. Removal asks how much a share is missed among all others; addition is what selection does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from oracle.judging.retraining import Retrained, Subset, hash_order

REMOVAL, ADDITION = JUDGES = ("removal", "addition")
TOP, BOTTOM, RANDOM = "top", "bottom", "random"


@dataclass(frozen=True)
class Worth:
    """By how much a share of texts lowers the target's loss more than a random share does.

    Attributes:
        by_seed: The difference for each seed, in nats per target token; each seed has its own random share.
    """

    by_seed: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.by_seed))

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None with one seed."""
        return float(np.std(self.by_seed, ddof=1)) if len(self.by_seed) > 1 else None


@dataclass(frozen=True)
class SharePlan:
    """Which texts are left out or taken alone.

    Attributes:
        text_ids: The sample.
        size: Texts in a share.
        num_seeds: Random shares, and models per share.
        seed: Where the seeds begin.
    """

    text_ids: Sequence[str]
    size: int
    num_seeds: int
    seed: int

    def share(self, values: np.ndarray, side: str) -> list[str]:
        """Return the top or bottom share by `values` (S,); equal values go by text_id."""
        sign = -1.0 if side == TOP else 1.0
        order = sorted(zip(sign * values, self.text_ids, strict=True), key=lambda pair: (pair[0], pair[1]))
        return [text_id for _, text_id in order[: self.size]]

    def subsets(self, judge: str, values: np.ndarray | None, side: str) -> list[Subset]:
        """Return what is trained on, one subset per seed; `values` may be None for random shares."""
        found = []
        for number in range(self.seed, self.seed + self.num_seeds):
            if side == RANDOM:
                share = hash_order(self.text_ids, f"share:{number}")[: self.size]
            else:
                assert values is not None
                share = self.share(values, side)
            kept = share if judge == ADDITION else sorted(set(self.text_ids) - set(share))
            found.append(Subset(tuple(kept), number))
        return found


def share_worth(
    plan: SharePlan, values: np.ndarray, retrained: Mapping[str, Retrained], *, column: int
) -> dict[str, dict[str, Worth]]:
    """Compare the models trained with, or without, the shares by one method's labels on one target.

    Args:
        plan: Which texts.
        values: (S,) the labels.
        retrained: The models by `Subset.name`.
        column: The target.

    Returns:
        "removal" and "addition" -> "top" and "bottom" -> worth. Positive: the texts lower the loss more than random ones.
    """

    def effects(judge: str, side: str) -> np.ndarray:
        return np.array([retrained[subset.name].effects[column] for subset in plan.subsets(judge, values, side)])

    found: dict[str, dict[str, Worth]] = {}
    for judge in JUDGES:
        sign = 1.0 if judge == ADDITION else -1.0  # where good texts are left out, training helps less
        found[judge] = {
            side: Worth(tuple((sign * (effects(judge, side) - effects(judge, RANDOM))).tolist())) for side in (TOP, BOTTOM)
        }
    return found
