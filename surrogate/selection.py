"""Selection: a rule orders the pool, a budget says how far down the order to go.

Texts with a label are ranked by it and not by their score: the measurement is paid for, and better than its
prediction. (Labels spread wider than scores, which are drawn towards the mean; so the very top of a
selection often consists of labelled texts.) The pool is sorted by text_id first, so the order of its rows
changes nothing.

Contract of a rule (a keyword-only dataclass in `surrogate/rules`, its file's name as `plugin_name`):
`order(scores (N, C), *, target_names, seed) -> (N,) int64` returns row numbers, best first, of rows sorted by
text_id; `uses_scores` is False for a rule that does not look at them; a rule that reduces targets to one number
has the options `combine` and `weights` of `surrogate.aggregation`.

Left out: diversity and near-duplicates (remove those before), quotas per source.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from oracle import plugins
from oracle.artifacts import atomic_path, provenance, read_json, write_json
from oracle.errors import InputError, InputTypeError, LowFidelityError, MismatchError, MissingFileError
from surrogate.aggregation import combine, targets_used
from surrogate.budget import Budget, fill, limit_of
from surrogate.pool import LabelsLike, Pool, read_pool
from surrogate.scores import Scores

if TYPE_CHECKING:
    from surrogate.fidelity import Fidelity

__all__ = ["Budget", "Rule", "Scores", "Selection", "select"]

RULES = "surrogate.rules"


class Rule(Protocol):
    """What `select` needs of a rule."""

    def order(self, scores: np.ndarray, *, target_names: Sequence[str], seed: int) -> np.ndarray:
        """Return (N,) row numbers, best first."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Selection:
    """What was kept, best first.

    Attributes:
        text_ids: K text_ids.
        reasons: K times "label", "score", or the name of a rule that looks at neither.
        ranks: K places in the rule's order, from 1; a token budget may skip texts that do not fit.
        values: (K, C) float32, the label or score by which each text was ranked.
        combined: (K,) float64, the same as one number per text, as the rule combines targets.
        target_names: C names.
        tokens_per_text: K token counts, or None where they are not known.
        counts: Numbers of texts: pool, duplicates, excluded, candidates, labelled, labels_not_in_pool, selected,
            and by_<reason>.
        meta: Rule, options, budget, seed, fingerprint of the pool, fidelity, package version.
    """

    text_ids: list[str]
    reasons: list[str]
    ranks: list[int]
    values: np.ndarray
    combined: np.ndarray
    target_names: list[str]
    tokens_per_text: list[int] | None
    counts: dict[str, int]
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.text_ids)

    def __repr__(self) -> str:
        rule = self.meta.get("rule")
        return f"Selection({self.num_texts} of {self.counts['pool']} texts, {self.num_tokens} tokens, rule={rule!r})"

    @property
    def num_texts(self) -> int:
        """How many texts were kept."""
        return len(self.text_ids)

    @property
    def num_tokens(self) -> int | None:
        """How many tokens they have, or None where that is not known."""
        return None if self.tokens_per_text is None else sum(self.tokens_per_text)

    def save(self, folder: str | Path) -> None:
        """Write selection.jsonl (one line per text, best first) and then meta.json, whose existence means complete."""
        folder = Path(folder)
        (folder / "meta.json").unlink(missing_ok=True)
        with atomic_path(folder / "selection.jsonl") as partial, partial.open("w", encoding="utf-8") as file:
            for row in range(len(self)):
                values = {name: float(value) for name, value in zip(self.target_names, self.values[row], strict=True)}
                line = {
                    "rank": self.ranks[row],
                    "text_id": self.text_ids[row],
                    "reason": self.reasons[row],
                    "combined": float(self.combined[row]),
                    "values": values,
                    "num_tokens": None if self.tokens_per_text is None else self.tokens_per_text[row],
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        write_json(
            folder / "meta.json",
            {
                "target_names": self.target_names,
                "num_texts": self.num_texts,
                "num_tokens": self.num_tokens,
                "counts": self.counts,
                "meta": self.meta,
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> Selection:
        """Read what `save` wrote.

        Raises:
            MissingFileError: There is no complete selection in `folder`.
        """
        folder = Path(folder)
        if not (folder / "selection.jsonl").exists():
            raise MissingFileError(
                f"there is no selection in {folder}.", "a folder that Selection.save wrote", "check the path, or select first."
            )
        meta = read_json(folder / "meta.json")
        names = meta["target_names"]
        with (folder / "selection.jsonl").open(encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        values = np.array([[line["values"][name] for name in names] for line in lines], dtype=np.float32)
        return cls(
            text_ids=[line["text_id"] for line in lines],
            reasons=[line["reason"] for line in lines],
            ranks=[line["rank"] for line in lines],
            values=values,
            combined=np.array([line["combined"] for line in lines]),
            target_names=names,
            counts=meta["counts"],
            meta=meta["meta"],
            tokens_per_text=None if meta["num_tokens"] is None else [line["num_tokens"] for line in lines],
        )


def select(
    scores: np.ndarray,
    *,
    budget: Budget,
    rule: str | Rule = "top",
    text_ids: Sequence[str] | None = None,
    num_tokens: Sequence[int] | np.ndarray | None = None,
    target_names: Sequence[str] | None = None,
    labels: LabelsLike | None = None,
    fidelity: Fidelity | None = None,
    allow_low_fidelity: bool = False,
    exclude: Iterable[str] = (),
    seed: int = 0,
    **options: Any,
) -> Selection:
    """Choose texts from a pool.

    Args:
        scores: (N, C), more is better. `Scores` carry the next three; for a plain array the first and third
            must be given. A text that occurs more than once counts once.
        budget: What may be kept.
        rule: Name of a rule, or a rule object.
        text_ids: N text_ids.
        num_tokens: N token counts; needed for a budget of tokens.
        target_names: C names.
        labels: Measured influence of some of the texts, for the same targets in any order. A labelled text is
            ranked by its label.
        fidelity: Held-out fidelity of the surrogate behind `scores`; makes the check under LowFidelityError possible.
        allow_low_fidelity: Go on where that check fails.
        exclude: text_ids that must not be chosen (trained on already, say). They may be absent from the pool.
        seed: Seed of rules with chance.
        options: Options of the rule, if it is given by name.

    Returns:
        The chosen texts, best first, with the reason for each and counts.

    Raises:
        InputError: An unknown rule or option, names that do not fit, a budget above the pool or below any text.
        MismatchError: Labels or fidelity of other targets, labels of other texts.
        NotFiniteError: Scores or labels are NaN or infinite.
        LowFidelityError: The surrogate does not beat chance on a target that the rule looks at.

    Example:
        >>> scores = Scores(np.array([[0.1], [0.3]]), text_ids=["a", "b"], target_names=["math"])
        >>> select(scores, budget=Budget(texts=1)).text_ids
        ['b']
    """
    if not isinstance(budget, Budget):
        raise InputTypeError(f"budget={budget!r} is not a Budget.", "a surrogate.Budget", "write Budget(fraction=0.2), say.")
    rule_object = make_rule(rule, options)
    pool, num_duplicates = read_pool(scores, text_ids=text_ids, num_tokens=num_tokens, target_names=target_names)
    at_chance = check_fidelity(rule_object, pool.target_names, fidelity, allow=allow_low_fidelity)
    counts = {"pool": len(pool.text_ids), "duplicates": num_duplicates}
    num_unknown = 0
    if labels is not None:
        pool, num_unknown = pool.with_labels(labels)
    excluded = set(exclude)
    pool = pool.take(np.array([row for row, text_id in enumerate(pool.text_ids) if text_id not in excluded], dtype=np.int64))
    counts |= {"excluded": counts["pool"] - len(pool.text_ids), "labels_not_in_pool": num_unknown}
    limit = limit_of(budget, pool, num_pool=counts["pool"])
    order = _checked_order(rule_object, pool, seed)
    ranks = np.arange(limit) if budget.tokens is None else fill(order, pool, limit)
    meta = {
        "rule": rule_name(rule_object),
        "options": plugins.options_of(rule_object),
        "budget": budget.as_dict(),
        "seed": seed,
        "pool_fingerprint": pool.fingerprint(),
        "targets_at_chance": at_chance,
        "allow_low_fidelity": allow_low_fidelity,
        **provenance(),
    }
    return _chosen(rule_object, pool, order, ranks=ranks, counts=counts, meta=meta)


def _chosen(
    rule: Rule, pool: Pool, order: np.ndarray, *, ranks: np.ndarray, counts: dict[str, int], meta: dict[str, Any]
) -> Selection:
    """Put together what was kept: the texts at these places of the order, why, and by which number."""
    kept = order[ranks]
    how, weights = getattr(rule, "combine", "sum_z"), getattr(rule, "weights", None)
    combined = combine(pool.values, how, target_names=pool.target_names, weights=weights)
    blind_reason = None if getattr(rule, "uses_scores", True) else rule_name(rule)
    reasons = [blind_reason or ("label" if pool.is_label[row] else "score") for row in kept]
    chosen = pool.take(kept)
    return Selection(
        text_ids=chosen.text_ids,
        reasons=reasons,
        ranks=[int(rank) + 1 for rank in ranks],
        values=chosen.values,
        combined=combined[kept],
        target_names=chosen.target_names,
        counts={**counts, **_count(pool, reasons)},
        meta=meta,
        tokens_per_text=None if chosen.num_tokens is None else chosen.num_tokens.tolist(),
    )


def _count(pool: Pool, reasons: list[str]) -> dict[str, int]:
    """Numbers of texts that could be chosen and of those that were, by reason."""
    by_reason = {"label": 0, "score": 0} | Counter(reasons)
    return {
        "candidates": len(pool.text_ids),
        "labelled": int(pool.is_label.sum()),
        "selected": len(reasons),
        **{f"by_{reason}": count for reason, count in sorted(by_reason.items())},
    }


def make_rule(rule: str | Rule, options: Mapping[str, Any]) -> Rule:
    """Return the rule of that name, or the object as it is."""
    if isinstance(rule, str):
        return plugins.create(RULES, rule, dict(options))
    if not hasattr(rule, "order") or not is_dataclass(rule):
        raise InputTypeError(
            f"rule={rule!r} is not a dataclass with a method order.",
            ", ".join(plugins.names(RULES)) + ", or a rule object",
            "choose a rule by name.",
        )
    if options:
        raise InputError(
            f"options {', '.join(options)} beside a rule object.", "options only with a rule's name", "set them on the object."
        )
    return rule


def rule_name(rule: Rule) -> str:
    """Return the rule's plug-in name, or the name of its class."""
    return getattr(rule, "plugin_name", type(rule).__name__)


def check_fidelity(rule: Rule, target_names: list[str], fidelity: Fidelity | None, *, allow: bool) -> list[str]:
    """Return the targets at chance that the rule looks at; refuse them unless `allow`."""
    used = list(target_names)
    if not getattr(rule, "uses_scores", True):
        used = []
    elif hasattr(rule, "combine"):
        used = targets_used(rule.combine, target_names=target_names, weights=getattr(rule, "weights", None))
    if fidelity is None:
        return []
    measured = [row.target for row in fidelity.surrogate]
    if not set(used) <= set(measured):
        raise MismatchError(
            f"fidelity of the targets {', '.join(measured)}, scores of {', '.join(target_names)}.",
            "fidelity of the predictor that made the scores",
            "pass that predictor's fidelity_.",
        )
    at_chance = [name for name in used if name in fidelity.targets_at_chance()]
    if at_chance and not allow:
        raise LowFidelityError(
            f"the surrogate's held-out agreement with the labels is not above chance for {', '.join(at_chance)}.",
            "scores that rank texts better than chance for every target that the rule looks at",
            "label more texts, use richer features, or use a cheaper oracle and so afford more labels; "
            "leave the target out (combine, weights); or pass allow_low_fidelity=True to go on all the same.",
        )
    return at_chance


def _checked_order(rule: Rule, pool: Pool, seed: int) -> np.ndarray:
    num_texts = len(pool.text_ids)
    order = np.asarray(rule.order(pool.values, target_names=pool.target_names, seed=seed))
    if order.shape != (num_texts,) or not np.array_equal(np.sort(order), np.arange(num_texts)):
        raise InputError(
            f"rule {rule_name(rule)!r} returned no order of the {num_texts} texts.", "each row number once", "correct the rule."
        )
    return order
