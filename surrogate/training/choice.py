"""From a ranking of the pool to the texts of one round."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from oracle.artifacts import fingerprint
from surrogate.scores import Scores
from surrogate.selection import Budget, Selection, select
from surrogate.training.pool_state import Candidates
from surrogate.training.round_store import HeldRanking, mean_by_target
from surrogate.training.sampling import draw_order

RANDOM = "random"  # the target name of an order that looks at nothing


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How texts are taken from a ranking.

    Attributes:
        text_ids: N ids of the pool.
        rule: Selection rule.
        rule_options: Its options.
        allow_low_fidelity: Whether to select by scores at chance.
        seed: Seed of the rule and of orders at random.
    """

    text_ids: Sequence[str]
    rule: str
    rule_options: Mapping[str, Any]
    allow_low_fidelity: bool
    seed: int

    def at_random(self, candidates: np.ndarray, *, index: int) -> HeldRanking:
        """Rank candidates (M,) by hashes of their ids, in another order in each round `index`."""
        ids = [self.text_ids[row] for row in candidates]
        values = np.empty((len(ids), 1), dtype=np.float32)
        values[draw_order(ids, f"{self.seed}:order:{index}"), 0] = -np.arange(len(ids))
        return HeldRanking(-1, Scores(values, text_ids=ids, target_names=[RANDOM]))

    def select(
        self,
        held: HeldRanking,
        candidates: Candidates,
        *,
        index: int,
        size: Mapping[str, int],
        token_counts: np.ndarray | None,
    ) -> Selection:
        """Take what the pass before has left, and then the best of the other candidates, all of which the ranking knows.

        Args:
            held: The ranking.
            candidates: Rows of the pool.
            index: The round; a rule with chance draws anew in each.
            size: `num_texts` or `num_tokens`; less is taken where there is less.
            token_counts: (N,) tokens of the pool's texts, for `num_tokens`.

        Raises:
            LowFidelityError: The scores are at chance for a target that the rule looks at.
        """
        if not len(candidates.leftover):
            return self._best(held, candidates.rows, index=index, size=size, token_counts=token_counts)
        first = self._best(held, candidates.leftover, index=index, size=size, token_counts=token_counts)
        taken = len(first) if token_counts is None else int(token_counts[candidates.leftover].sum())
        others = np.setdiff1d(candidates.rows, candidates.leftover)
        room = {unit: asked - taken for unit, asked in size.items()}
        if token_counts is not None and token_counts[others].min() > room["num_tokens"]:
            return first
        rest = self._best(held, others, index=index, size=room, token_counts=token_counts)
        counts = None if rest.tokens_per_text is None else [*(first.tokens_per_text or ()), *rest.tokens_per_text]
        return replace(
            rest,
            text_ids=[*first.text_ids, *rest.text_ids],
            reasons=[*first.reasons, *rest.reasons],
            ranks=[*first.ranks, *rest.ranks],
            values=np.concatenate([first.values, rest.values]),
            combined=np.concatenate([first.combined, rest.combined]),
            tokens_per_text=counts,
        )

    def _best(
        self, held: HeldRanking, candidates: np.ndarray, *, index: int, size: Mapping[str, int], token_counts: np.ndarray | None
    ) -> Selection:
        rows = {self.text_ids[row]: row for row in candidates}
        known = held.scores.text_ids
        places = [place for place, text_id in enumerate(known) if text_id in rows]
        ids = [known[place] for place in places]
        counts, budget = None, Budget(texts=min(size.get("num_texts", len(ids)), len(ids)))
        if token_counts is not None:
            counts = token_counts[[rows[text_id] for text_id in ids]]
            budget = Budget(tokens=min(size["num_tokens"], int(counts.sum())))
        labels, is_random = held.labels, held.round < 0
        if labels is not None:
            labels = labels.take([text_id for text_id in labels.text_ids if text_id in rows])
        return select(
            Scores(np.asarray(held.scores)[places], text_ids=ids, target_names=held.scores.target_names, num_tokens=counts),
            budget=budget,
            rule="top" if is_random else self.rule,
            labels=labels if labels is not None and len(labels) else None,
            fidelity=held.fidelity,
            allow_low_fidelity=self.allow_low_fidelity,
            seed=int(fingerprint([self.seed, index])[:8], 16),
            **({} if is_random else self.rule_options),
        )


def describe(held: HeldRanking, selection: Selection, *, candidate_ids: Collection[str]) -> dict[str, Any]:
    """What the table of rounds says of a selection from some candidates; influence is in label units, the mean over texts."""
    fidelity, is_random = held.fidelity, held.round < 0
    places = [place for place, text_id in enumerate(held.scores.text_ids) if text_id in candidate_ids]
    of_candidates = np.asarray(held.scores)[places]
    return {
        "ranked_in_round": held.round,
        "num_texts": len(selection),
        "num_candidates": len(candidate_ids),
        "by_label": selection.reasons.count("label"),
        "influence_selected": {} if is_random else mean_by_target(selection.values, selection.target_names),
        "influence_candidates": {} if is_random else mean_by_target(of_candidates, held.scores.target_names),
        "fidelity": {} if fidelity is None else {row.target: row.spearman for row in fidelity.surrogate},
        "noise_ceiling": {} if fidelity is None else dict(fidelity.noise_ceiling),
    }
