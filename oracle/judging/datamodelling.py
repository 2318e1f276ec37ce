"""The linear datamodelling score: do sums of labels order random subsets as training on them does?

Many random subsets of the sample are drawn, the checkpoint is trained on each, and the sum of a subset's labels is held
against the measured effect (loss before minus after) by Spearman's correlation over the subsets. Random labels get 0.

Paper: Park et al. 2023 (TRAK), arXiv 2303.14186, after Ilyas et al. 2022 (datamodels), arXiv 2202.00622. There the
score is taken for single target texts and averaged; here labels are of target sets, so there is one per set.

How high a score can be is limited by the noise of the order in which texts are trained on. Models trained on the same
subset with other seeds show it: with r the mean rank correlation of two seeds over the subsets, the mean of R seeds
agrees with another such mean by R r / (1 + (R - 1) r) (Spearman and Brown), and labels without any error would reach
about its root. With one seed the two halves of a target set stand in for two seeds. That is the noise of the target
set, which labels of the same target set share, so they can rise above that ceiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from oracle.comparison import spearman
from oracle.judging.retraining import hash_order

INTERVAL = (2.5, 97.5)  # percentiles of the bootstrap


@dataclass(frozen=True)
class Score:
    """A rank correlation over M subsets, with its 95 % interval from a bootstrap over the subsets.

    Attributes:
        value: The correlation, or a difference of two.
        low: Lower end of the interval.
        high: Upper end of the interval.
        resampled: (draws,) its values in the bootstrap.
    """

    value: float
    low: float
    high: float
    resampled: np.ndarray = field(repr=False, compare=False)

    def minus(self, other: Score) -> Score:
        """Return the difference to another method's score on the same subsets.

        Both were resampled in the same draws, so its interval is narrower than the two intervals side by side suggest.
        """
        return _score(self.value - other.value, self.resampled - other.resampled)


@dataclass(frozen=True)
class Ceiling:
    """What limits the score on one target.

    Attributes:
        reliability: Rank correlation of the measured effects with another measurement of as many seeds.
        ceiling: About what labels without error would reach: the root of `reliability`.
        source: "seeds" or "target halves".
    """

    reliability: float
    ceiling: float
    source: str


def draw_subsets(text_ids: Sequence[str], *, alpha: float, num_subsets: int, seed: int) -> list[tuple[str, ...]]:
    """Draw `num_subsets` random subsets of a share `alpha`, by content and seed; each has the same number of texts."""
    size = round(alpha * len(text_ids))
    return [tuple(hash_order(text_ids, f"subset:{seed}:{index}")[:size]) for index in range(num_subsets)]


def predicted_effects(values: np.ndarray, text_ids: Sequence[str], subsets: Sequence[Sequence[str]]) -> np.ndarray:
    """Sum labels (S, C) over each of M subsets: (M, C) float64."""
    row_of = {text_id: row for row, text_id in enumerate(text_ids)}
    rows = [sorted(row_of[text_id] for text_id in subset) for subset in subsets]
    return np.stack([values[own].astype(np.float64).sum(0) for own in rows])


def datamodelling_scores(
    predicted: np.ndarray, measured: np.ndarray, *, num_bootstrap: int, seed: int = 0
) -> tuple[list[Score], Score]:
    """Correlate predicted with measured effects over the subsets.

    Args:
        predicted: (M, C), from `predicted_effects`.
        measured: (M, C) loss before minus after.
        num_bootstrap: Draws of M subsets with replacement, the same for all methods and targets.
        seed: Decides these draws.

    Returns:
        The score of each target, and their mean. The interval tells the luck of the subsets, not that of the target
        texts nor of the seeds of the retrained models.
    """
    num_subsets, num_targets = measured.shape
    rng = np.random.default_rng(seed)
    draws = rng.integers(num_subsets, size=(num_bootstrap, num_subsets))

    def correlations(rows: np.ndarray) -> list[float]:
        return [spearman(predicted[rows, column], measured[rows, column]) for column in range(num_targets)]

    found = np.array(correlations(np.arange(num_subsets)))  # (C,)
    resampled = np.array([correlations(rows) for rows in draws])  # (draws, C)
    scores = [_score(found[column], resampled[:, column]) for column in range(num_targets)]
    return scores, _score(found.mean(), resampled.mean(1))


def score_ceilings(effects: np.ndarray, half_effects: np.ndarray) -> list[Ceiling | None]:
    """Estimate for each target how high a score can be.

    Args:
        effects: (R, M, C) measured effects of M subsets with R seeds.
        half_effects: (R, 2, M, C) the same on either half of each target set; NaN without halves.

    Returns:
        C ceilings; None with one seed and no halves.
    """
    num_seeds, _, num_targets = effects.shape
    found: list[Ceiling | None] = []
    for column in range(num_targets):
        repeats, source = effects[:, :, column], "seeds"
        if num_seeds == 1:
            repeats, source = half_effects[0, :, :, column], "target halves"
        if not np.isfinite(repeats).all():
            found.append(None)
            continue
        single = max(float(np.mean([spearman(a, b) for a, b in combinations(repeats, 2)])), 0.0)
        reliability = len(repeats) * single / (1 + (len(repeats) - 1) * single)
        found.append(Ceiling(reliability, float(np.sqrt(reliability)), source))
    return found


def _score(value: float, resampled: np.ndarray) -> Score:
    low, high = np.percentile(resampled, INTERVAL)
    return Score(float(value), float(low), float(high), resampled)
