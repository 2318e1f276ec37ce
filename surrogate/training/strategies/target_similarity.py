"""Texts that are most like the target texts, by their embeddings: no model that is trained, no gradients, no labels.

The ranks of BETR, as `oracle.methods.target_similarity` measures them, over all candidates in place of a sample. BETR
itself embeds a sample and lets a classifier score the pool: that is the strategy `static` with this method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from oracle import plugins
from oracle.plugins import option
from oracle.texts import list_text_ids
from surrogate.scores import Scores
from surrogate.training.ranking_costs import label_costs
from surrogate.training.strategies import Ranking, RankingContext

METHOD = "target_similarity"


@dataclass(kw_only=True)
class TargetSimilarity:
    """Rank of each candidate among all by cosine similarity to the target texts, the best one counting.

    Paper:
        BETR, Mizrahi et al. 2025, arXiv 2507.12466.
    Cost:
        Embedding pool and targets once, and all their products. 'hashed' runs no model at all, a sentence-transformers
        model takes one forward pass of its own.
    Limit:
        With one target text it is the order of the similarity itself.
    """

    plugin_name: ClassVar[str] = METHOD
    needs_model: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = True
    adapts: ClassVar[bool] = False
    redraws: ClassVar[bool] = False

    model: str = option(
        "hashed", "'hashed' (pieces of words, no model), 'minilm' (packaged), a sentence-transformers folder, or a hub name."
    )
    over: str = option("max", "A text's value over the target texts of a set: 'max', its best rank, or the 'mean' of all.")
    rank_value: str = option("log2", "What a rank is worth: 'log2' for log2(1 / rank), 'inverse' for 1 / rank.")

    def __post_init__(self) -> None:
        plugins.create("oracle.methods", METHOD, plugins.options_of(self))

    def rank(self, context: RankingContext) -> Ranking:
        """Rank the candidates for every target text; the model, where there is one, only decodes token ids."""
        from oracle.measure import label

        texts = context.candidate_texts()
        ranked = label(
            context.lm,
            texts,
            list(context.targets),
            method=METHOD,
            workdir=context.folder / "similarity",
            seed=context.seed,
            halves=False,
            **plugins.options_of(self),
        ).take(list_text_ids(texts))
        costs = label_costs(ranked, num_processes=context.num_processes).values()
        spent = {unit: sum(cost[unit] for cost in costs) for unit in ("seconds", "flops")}
        return Ranking(
            scores=Scores(ranked.values, text_ids=ranked.text_ids, target_names=ranked.target_names),
            costs={"score": spent},
        )
