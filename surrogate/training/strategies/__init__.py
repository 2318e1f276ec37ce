"""Strategies, one file each: how a round of training gets its texts; the file name is what `Refresher(strategy=...)` takes.

A strategy is a keyword-only dataclass whose fields are its options, with

- `plugin_name`: its name; `needs_model` and `needs_targets`: whether `rank` looks at the live model, at the target sets;
- `adapts`: whether a ranking at a later checkpoint may differ. One that does not adapt is asked once;
- `redraws`: whether each round draws anew from the whole pool, whatever was trained on before;
- `rank(context) -> Ranking`: a score for each of the candidates.

and may have `is_blind = True`: its order is one at random; `reserved(text_ids, seed=)`: rows of the pool that are
never trained on; `agreement_now(context, folder)`: how far an earlier ranking still holds; `sample_size`: the labels
of a refresh, which the overhead may make fewer.

The order and the budget are the refresher's: it selects the texts with the highest scores by its rule. What a strategy
wants to find again (labels, a fitted predictor) it keeps in files of `context.folder`; later refreshes find the folders
of earlier ones in `context.earlier`. Killed and asked again, it continues there and returns the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

    from oracle.labels import Labels
    from oracle.language_model import LanguageModel
    from oracle.targets import TargetSet
    from surrogate.feature_cache import FeatureCache
    from surrogate.fidelity import Fidelity
    from surrogate.scores import Scores


@dataclass(frozen=True, kw_only=True)
class RankingContext:
    """What a strategy may look at.

    Attributes:
        pool: The N texts of the pool, with `text_id`.
        candidates: (M,) row numbers of the texts to rank, ascending: those that may be chosen, or, for a strategy that is
            asked once, all that ever may.
        targets: The target sets; empty where there are none.
        lm: The live model with its optimiser; None where there is none.
        cache: Features of frozen encoders, shared by all refreshes.
        folder: Where this refresh keeps its files.
        earlier: Folders of earlier refreshes, oldest first, also of those whose scores turned out to be at chance.
        refresh: Number of this refresh, from 0.
        num_texts: How many texts the coming rounds will take of this ranking, as far as is known.
        seed: Seed of everything random; the same for all refreshes.
        sample_factor: Share of the strategy's usual number of labels that the overhead allows, up to 1.
        num_processes: How many processes work together; what one does while the others wait costs the time of all.
    """

    pool: Dataset
    candidates: np.ndarray
    targets: Sequence[TargetSet]
    lm: LanguageModel | None
    cache: FeatureCache
    folder: Path
    earlier: Sequence[Path] = ()
    refresh: int = 0
    num_texts: int = 1
    seed: int = 0
    sample_factor: float = 1.0
    num_processes: int = 1

    def candidate_texts(self) -> Dataset:
        """Return the candidates as texts."""
        return self.pool if len(self.candidates) == len(self.pool) else self.pool.select(self.candidates)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What a strategy says of the candidates.

    Attributes:
        scores: (M, C) scores with text_ids; higher is better.
        labels: Measured influence of some of them, by which those are ranked; None where nothing was measured.
        fidelity: Held-out fidelity of the scores; None where they are no predictions.
        costs: Stage -> `seconds`, summed over all processes, and counted `flops`.
        facts: Further numbers for the table of rounds, as JSON values.
    """

    scores: Scores
    labels: Labels | None = None
    fidelity: Fidelity | None = None
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Strategy(Protocol):
    """What every file of this folder provides."""

    plugin_name: ClassVar[str]
    needs_model: ClassVar[bool]
    needs_targets: ClassVar[bool]
    adapts: ClassVar[bool]
    redraws: ClassVar[bool]

    def rank(self, context: RankingContext) -> Ranking:
        """Score the candidates."""
