"""Texts at random: the baseline that every other strategy has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from oracle.artifacts import timed
from oracle.texts import list_text_ids
from surrogate.scores import Scores
from surrogate.training.chance import uniform
from surrogate.training.strategies import Ranking, RankingContext


@dataclass(kw_only=True)
class Random:
    """One seeded random order of the pool, walked through once and then again.

    Paper:
        None; the baseline of every selection paper.
    Cost:
        One hash per text.
    Limit:
        Over one round it is `rs2`.

    The order follows from the texts and the seed alone: taking texts out of the pool leaves the others in their order.
    """

    plugin_name: ClassVar[str] = "random"
    needs_model: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = False
    is_blind: ClassVar[bool] = True
    adapts: ClassVar[bool] = False
    redraws: ClassVar[bool] = False

    def rank(self, context: RankingContext) -> Ranking:
        """Draw a number for each candidate."""
        seconds: list[float] = []
        with timed(seconds.append):
            text_ids = list_text_ids(context.candidate_texts())
            drawn = uniform(text_ids, salt=f"random:{context.seed}")
            scores = Scores(drawn[:, None], text_ids=text_ids, target_names=[self.plugin_name])
        return Ranking(scores=scores, costs={"score": {"seconds": seconds[0], "flops": 0.0}})
