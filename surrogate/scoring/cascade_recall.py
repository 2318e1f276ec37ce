"""What a cheap first pass loses, measured on the labelled sample before it is used.

A cascade scores every text with a cheap predictor and only the best share of them with the full one. A good text that the
cheap predictor ranks low is lost for good. How many are is known beforehand: both predictors have held-out scores of the
labelled texts, made by surrogates that saw neither these texts nor near-duplicates of them.

Limits: a text is lost to the noise of its label, too, so the recall is that of what the labels call best. Held-out scores
are of surrogates that were fitted on a part of the labels, so the recall of the final ones is rather better. The
interval is that of a share of so many texts (Wilson 1927); neither doubt about the border of the share nor
near-duplicates in the sample are in it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle.errors import InputError, MismatchError
from oracle.tables import aligned, figure
from surrogate.aggregation import combine

if TYPE_CHECKING:
    from oracle.labels import Labels
    from surrogate.predictor import InfluencePredictor

COMBINED = "(combined)"
MIN_BEST_TEXTS = 10  # the recall of fewer says nothing
WILSON_Z = 1.96


@dataclass(frozen=True, kw_only=True)
class TargetRecall:
    """What one share lets through, for one target.

    Attributes:
        target: Name of the target, or "(combined)" for all of them as the first pass combines them.
        share: Share of the texts that the full predictor gets to see, the best by the cheap scores.
        top: Share of the texts that "best" means.
        recall: Of the texts with the best labels, the share that is let through.
        interval: 95 % interval of it.
        recall_of_full: Of the texts with the best full scores, the share that is let through.
        found: Of the texts with the best labels, the share among the best of the cascade.
        found_by_full: The same for the full predictor on all texts.
        found_by_first: The same for the cheap predictor alone.
        num_best: How many texts are the best.
        num_texts: How many labelled texts there are.
    """

    target: str
    share: float
    top: float
    recall: float
    interval: tuple[float, float]
    recall_of_full: float
    found: float
    found_by_full: float
    found_by_first: float
    num_best: int
    num_texts: int

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return {**dataclasses.asdict(self), "interval": list(self.interval)}


def measure_recall(
    first: InfluencePredictor,
    full: InfluencePredictor,
    labels: Labels,
    *,
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.5),
    top: float = 0.05,
    how: str = "sum_z",
    weights: Mapping[str, float] | None = None,
) -> list[TargetRecall]:
    """Measure what a cheap predictor before a full one loses.

    Args:
        first: The cheap predictor, fitted.
        full: The full predictor, fitted on labels of the same targets.
        labels: The labels; texts with held-out scores of both predictors count.
        shares: Shares of the texts that might be let through.
        top: The share that will be selected at last: what "best" means.
        how: How the first pass makes one number of several targets; see `surrogate.aggregation.combine`.
        weights: Weight of each target.

    Returns:
        For each share, a row for all targets combined and, where there are several, one for each.

    Raises:
        InputError: A share or `top` is out of range, or there are too few labelled texts for `top`.
        MismatchError: Predictors or labels are of other targets or other texts.
    """
    for name, value in [("top", top), *(("share", share) for share in shares)]:
        if not 0 < value <= 1:
            raise InputError(f"{name}={value!r}.", "a share above 0 and at most 1", "pass 0.05 for the best 5 %.")
    names = list(labels.target_names)
    of_first, of_full, measured = _common(first, full, labels)  # (S, C) each
    num_texts = len(measured)
    num_best = round(top * num_texts)
    if num_best < MIN_BEST_TEXTS:
        raise InputError(
            f"the best {top:g} of {num_texts} labelled texts are {num_best}.",
            f"at least {MIN_BEST_TEXTS} texts among the best",
            f"raise top to {MIN_BEST_TEXTS / max(1, num_texts):.2f}, or label more texts.",
        )
    columns = {COMBINED: [combine(values, how, target_names=names, weights=weights) for values in (of_first, of_full, measured)]}
    if len(names) > 1:
        columns |= {name: [values[:, column] for values in (of_first, of_full, measured)] for column, name in enumerate(names)}
    passing = columns[COMBINED][0]  # one order decides what goes on, whatever the target
    return [
        _row(name, share, top, passing=passing, scores=scores, num_best=num_best)
        for share in shares
        for name, scores in columns.items()
    ]


def recall_table(rows: Sequence[TargetRecall]) -> str:
    """Return rows as an aligned plain-text table."""
    lines = [
        ["target", "first pass keeps", "best", "recall", "95 % interval", "of full's best", "found", "full alone", "first alone"]
    ]
    for row in rows:
        low, high = row.interval
        figures = [figure(value) for value in (row.recall_of_full, row.found, row.found_by_full, row.found_by_first)]
        lines.append([row.target, f"{row.share:g}", f"{row.top:g}", figure(row.recall), f"{low:.3f} to {high:.3f}", *figures])
    return aligned(lines)


def _common(first: InfluencePredictor, full: InfluencePredictor, labels: Labels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return held-out scores of both and labels of the texts that have all three, in the order of the text_ids."""
    names = list(labels.target_names)
    for what, predictor in (("first", first), ("full", full)):
        if not hasattr(predictor, "held_out_"):
            raise InputError(f"the {what} predictor has not been fitted.", "a fitted predictor", "call fit first.")
        if sorted(predictor.target_names_) != sorted(names):
            raise MismatchError(
                f"the {what} predictor is of {', '.join(predictor.target_names_)}, the labels are of {', '.join(names)}.",
                "predictors and labels of the same targets",
                "fit both predictors on these labels.",
            )
    tables = [(first.held_out_.text_ids, np.asarray(first.held_out_), first.held_out_.target_names)]
    tables.append((full.held_out_.text_ids, np.asarray(full.held_out_), full.held_out_.target_names))
    tables.append((list(labels.text_ids), np.asarray(labels.values), names))
    rows_of = [{text_id: row for row, text_id in enumerate(ids)} for ids, _, _ in tables]
    common = sorted(set(rows_of[0]) & set(rows_of[1]) & set(rows_of[2]))
    if not common:
        raise MismatchError(
            "no labelled text has held-out scores of both predictors.",
            "labels that both predictors were fitted on",
            "pass the labels of the fit.",
        )
    values = []
    for rows, (_, table, own_names) in zip(rows_of, tables, strict=True):
        columns = [list(own_names).index(name) for name in names]
        values.append(table[np.ix_([rows[text_id] for text_id in common], columns)].astype(np.float64))
    return values[0], values[1], values[2]


def _row(
    name: str, share: float, top: float, *, passing: np.ndarray, scores: Sequence[np.ndarray], num_best: int
) -> TargetRecall:
    of_first, of_full, measured = scores
    num_texts = len(measured)
    passed = _best(passing, max(1, round(share * num_texts)))
    best = _best(measured, num_best)
    best_of_full = _best(of_full, num_best)
    chosen = _best(np.where(passed, of_full, -np.inf), min(num_best, int(passed.sum())))
    recall = float((passed & best).sum()) / num_best
    return TargetRecall(
        target=name,
        share=share,
        top=top,
        recall=recall,
        interval=_wilson(recall, num_best),
        recall_of_full=float((passed & best_of_full).sum()) / num_best,
        found=float((chosen & best).sum()) / num_best,
        found_by_full=float((best_of_full & best).sum()) / num_best,
        found_by_first=float((_best(of_first, num_best) & best).sum()) / num_best,
        num_best=num_best,
        num_texts=num_texts,
    )


def _best(values: np.ndarray, number: int) -> np.ndarray:
    """Return which values are the largest; ties go by row, as in selecting."""
    mask = np.zeros(len(values), dtype=bool)
    mask[np.argsort(-values, kind="stable")[:number]] = True
    return mask


def _wilson(share: float, num_texts: int) -> tuple[float, float]:
    """Return the score interval of a share of `num_texts`."""
    square = WILSON_Z * WILSON_Z / num_texts
    centre = (share + square / 2) / (1 + square)
    half = WILSON_Z * math.sqrt(share * (1 - share) / num_texts + square / (4 * num_texts)) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)
