"""A fresh random subset of the whole pool in every round.

Repeated sampling beat more than thirty ways of choosing one fixed subset in its paper, and at no cost. So a selection
that is chosen anew has to beat this, and not only one random subset. Left out: the paper's variant without replacement,
which walks through a shuffled pool; that is `random`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from oracle.artifacts import timed
from oracle.texts import list_text_ids
from surrogate.scores import Scores
from surrogate.training.chance import uniform
from surrogate.training.strategies import Ranking, RankingContext


@dataclass(kw_only=True)
class Rs2:
    """A fresh random subset in every round, whatever was trained on before and however often others refresh.

    Paper:
        Okanovic et al. 2024, Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning, arXiv 2305.18424.
    Cost:
        One hash per text and refresh.
    Limit:
        Over one round it is `random`.
    """

    plugin_name: ClassVar[str] = "rs2"
    needs_model: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = False
    is_blind: ClassVar[bool] = True
    adapts: ClassVar[bool] = True
    redraws: ClassVar[bool] = True

    def rank(self, context: RankingContext) -> Ranking:
        """Draw a number for each candidate, another one at every refresh."""
        seconds: list[float] = []
        with timed(seconds.append):
            text_ids = list_text_ids(context.candidate_texts())
            drawn = uniform(text_ids, salt=f"rs2:{context.seed}:{context.refresh}")
            scores = Scores(drawn[:, None], text_ids=text_ids, target_names=[self.plugin_name])
        return Ranking(scores=scores, costs={"score": {"seconds": seconds[0], "flops": 0.0}})
