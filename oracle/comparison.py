"""Do two measurements of influence agree, and how much of one is noise of its target set?

Ranks are what selection uses, so agreement is Spearman's correlation and the overlap of the top shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oracle.errors import InputError, InputTypeError, MismatchError, check_at_least
from oracle.labels import Labels

MIN_GROUP = 8  # a rank correlation over fewer texts is mostly noise


@dataclass(frozen=True)
class TargetAgreement:
    """How far two label sets agree on one target.

    Attributes:
        spearman: Rank correlation over the texts that both have.
        top_overlap: Share of the top `top_fraction` of one that is in the top of the other; chance is `top_fraction`.
        num_texts: How many texts both have.
        spearman_within: Mean rank correlation inside groups of at least 8 texts, weighted by their size; None without groups.
        noise_ceilings: How well two independent measurements of each of the two would agree (see `noise_ceiling`); None
            for one that has no halves.
        signal_kept: Share of the first one's signal that the second keeps: their rank correlation across different
            halves of the target set, over the first one's own between its halves. The noise of the target texts is
            shared where the same texts are measured, and this leaves it out. None without halves of both, or where the
            first one's halves do not agree at all.
    """

    spearman: float
    top_overlap: float
    num_texts: int
    spearman_within: float | None = None
    noise_ceilings: tuple[float | None, float | None] = (None, None)
    signal_kept: float | None = None


def agreement(
    labels_a: Labels, labels_b: Labels, *, top_fraction: float = 0.2, groups: Sequence[str] | None = None
) -> dict[str, TargetAgreement]:
    """Compare two label sets on the texts and targets they share.

    Args:
        labels_a: One measurement; the reference of `signal_kept`.
        labels_b: Another one, of the same texts or some of them, in any order.
        top_fraction: The share of the texts whose overlap is reported.
        groups: A group (source) for each text of `labels_a`, for the agreement inside groups.

    Raises:
        MismatchError: No common target, or fewer than 3 common texts.
        InputError: `top_fraction` is no share, or there are more or fewer groups than texts.
        InputTypeError: One of the two is no Labels.
    """
    for labels in (labels_a, labels_b):
        if not isinstance(labels, Labels):
            raise InputTypeError(
                f"a {type(labels).__name__} was given for labels.",
                "two oracle.Labels, which are compared text by text",
                "for values measured elsewhere use oracle.Labels.from_values(values, text_ids, target_names).",
            )
    check_at_least("top_fraction", top_fraction, 0)
    if not 0 < top_fraction <= 1:
        raise InputError(
            f"top_fraction={top_fraction!r} is no share of the texts.",
            "a number above 0 and at most 1",
            "pass 0.2 for the top fifth.",
        )
    if groups is not None and len(groups) != len(labels_a):
        raise InputError(
            f"there are {len(groups)} groups for the {len(labels_a)} texts of the first label set.",
            "one group per text, in the order of labels_a.text_ids",
            "look the group up by text_id, or leave groups out.",
        )
    names = [name for name in labels_a.target_names if name in labels_b.target_names]
    in_b = set(labels_b.text_ids)
    rows = [row for row, text_id in enumerate(labels_a.text_ids) if text_id in in_b]
    if not names or len(rows) < 3:
        raise MismatchError(
            f"the label sets share {len(rows)} texts and the targets {names}.",
            "at least 3 common texts and one common target",
            "measure the same sample on the same targets with both methods.",
        )
    common = [labels_a.text_ids[row] for row in rows]
    first, second = labels_a.take(common), labels_b.take(common)
    kept_groups = None if groups is None else [groups[row] for row in rows]
    return {
        name: TargetAgreement(
            spearman(first.target(name), second.target(name)),
            top_overlap(first.target(name), second.target(name), fraction=top_fraction),
            len(common),
            None if kept_groups is None else spearman_within(first.target(name), second.target(name), kept_groups),
            (_ceiling(_halves_of(first, name)), _ceiling(_halves_of(second, name))),
            _signal_kept(_halves_of(first, name), _halves_of(second, name)),
        )
        for name in names
    }


def noise_ceiling(labels: Labels) -> dict[str, float | None]:
    """Estimate how well two independent measurements of the same labels would agree.

    Each label was also measured on either half of its target set. Their rank correlation r is that of two
    independent measurements of half the size; Spearman and Brown's 2r / (1 + r) lifts it to the full size.
    A surrogate can rise above it where the halves' disagreement is itself a function of the text, because it is
    judged against the same target set that it learnt from; it is a scale for the eye and not a strict bound.

    Returns:
        Target name -> ceiling, None where the target set has no halves.
    """
    return {name: _ceiling(_halves_of(labels, name)) for name in labels.target_names}


def _halves_of(labels: Labels, name: str) -> np.ndarray | None:
    """(2, S) the halves of one target; None where they were not measured or are too few to rank."""
    halves = labels.halves[:, :, labels.target_names.index(name)]
    return halves if halves.shape[1] >= 3 and np.isfinite(halves).all() else None


def _ceiling(halves: np.ndarray | None) -> float | None:
    if halves is None:
        return None
    half = spearman(halves[0], halves[1])
    return 2 * half / (1 + half) if half > 0 else 0.0


def _signal_kept(first: np.ndarray | None, second: np.ndarray | None) -> float | None:
    if first is None or second is None or (own := spearman(first[0], first[1])) <= 0:
        return None
    return (spearman(first[0], second[1]) + spearman(first[1], second[0])) / 2 / own


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation of two (S,) arrays, ties averaged; 0.0 where one of them is constant."""
    ranks_a, ranks_b = average_ranks(a), average_ranks(b)
    ranks_a, ranks_b = ranks_a - ranks_a.mean(), ranks_b - ranks_b.mean()
    norm = np.sqrt((ranks_a @ ranks_a) * (ranks_b @ ranks_b))
    return float(np.clip(ranks_a @ ranks_b / norm, -1.0, 1.0)) if norm > 0 else 0.0


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks 1..S of an (S,) array, equal values sharing the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last_ranks = np.cumsum(counts)
    return (last_ranks - (counts - 1) / 2.0)[inverse]


def spearman_within(a: np.ndarray, b: np.ndarray, groups: Sequence[str]) -> float | None:
    """Return the mean rank correlation inside groups of at least `MIN_GROUP` texts, weighted by size; None if there is none."""
    groups_array = np.asarray(groups)
    total, weight = 0.0, 0
    for group in sorted(set(groups)):
        rows = np.flatnonzero(groups_array == group)
        if len(rows) >= MIN_GROUP:
            total += len(rows) * spearman(a[rows], b[rows])
            weight += len(rows)
    return total / weight if weight else None


def top_overlap(a: np.ndarray, b: np.ndarray, *, fraction: float) -> float:
    """Return the share of the top `fraction` of `a` that is also in the top of `b`; ties go by position."""
    count = max(1, round(fraction * len(a)))
    top_a, top_b = (set(np.argsort(-values, kind="stable")[:count].tolist()) for values in (a, b))
    return len(top_a & top_b) / count
