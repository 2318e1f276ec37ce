"""A label for every candidate: the ranking that surrogates try to reach, at the price that they are there to avoid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from oracle import plugins
from oracle.methods import needs_of
from oracle.plugins import option
from oracle.texts import list_text_ids
from surrogate.scores import Scores
from surrogate.training.ranking_costs import label_costs
from surrogate.training.strategies import Ranking, RankingContext

METHODS = "oracle.methods"


@dataclass(kw_only=True)
class Oracle:
    """Measured influence of every candidate, again at every refresh, without a surrogate.

    Paper:
        That of the oracle method; with 'less' and one refresh it is the selection of Xia et al. 2024, LESS.
    Cost:
        Labels of all candidates per refresh: with 'grad_dot', as much as training on all of them. An allowance that is too
        small for that makes no smaller sample of it.
    Limit:
        What `refresh` tends to as its sample grows to all candidates.

    What it needs follows from the method: one that looks at no model is asked once, one that looks at no targets gives
    one column, named like the method. Interrupted, it goes on after the last finished block of labels.
    """

    plugin_name: ClassVar[str] = "oracle"
    redraws: ClassVar[bool] = False

    method: str = option("grad_dot", "Oracle method of the labels.")
    method_options: Mapping[str, Any] | None = option(None, "Its options.")
    max_target_texts: int | None = option(None, "Measure on at most this many texts of each target set.")

    def __post_init__(self) -> None:
        self._needs = needs_of(plugins.create(METHODS, self.method, dict(self.method_options or {})))

    @property
    def needs_model(self) -> bool:
        """Whether the method looks at the live model."""
        return self._needs.model

    @property
    def needs_targets(self) -> bool:
        """Whether the method looks at target sets."""
        return self._needs.targets

    @property
    def adapts(self) -> bool:
        """Whether labels at a later checkpoint may differ."""
        return self._needs.model

    def rank(self, context: RankingContext) -> Ranking:
        """Label every candidate; the halves of the target sets, which a noise ceiling would need, are not measured."""
        from oracle.measure import label

        texts = context.candidate_texts()
        labels = label(
            context.lm,
            texts,
            list(context.targets) if self.needs_targets else None,
            method=self.method,
            workdir=context.folder / "labels",
            seed=context.seed,
            max_target_texts=self.max_target_texts,
            halves=False,
            **dict(self.method_options or {}),
        ).take(list_text_ids(texts))
        costs = label_costs(labels, num_processes=context.num_processes)
        return Ranking(
            scores=Scores(labels.values, text_ids=labels.text_ids, target_names=labels.target_names),
            labels=labels,
            costs=costs,
            facts={"num_labelled": len(labels)},
        )
