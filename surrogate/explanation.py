"""Why a text has its score: the labelled texts that raised and lowered it, and the features that mattered.

Amounts add up. Per text and target, on the scale that the surrogate was fitted on,

    scaled_score = bias + earlier + raised + lowered + others + remainder

where `others` are the labelled texts that are not listed. `earlier` is what came from surrogates that a warm start went on
from; `remainder` is 0 up to rounding for ridge and trees, and for a network what its members do not owe to labels in a way
that can be told. Blocks of features add up as well, from a bias of their own. `score` is `scaled_score` brought back to
label units; with the scale `rank` by the table of the labels' ranks, so that amounts in label units would not add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oracle.errors import InputError, check_at_least, check_choice
from surrogate.amounts import CONTRIBUTIONS, Amounts
from surrogate.fitted_rows import ColumnGroup, FittedRows

TEXTS_PER_BLOCK = 64  # whose amounts, for all labelled texts and all columns, are in memory at the same time
SCALES = {
    "rank": "normal quantiles of the rank among the labels",
    "robust": "robust standard deviations from the median label",
    "none": "label units",
}


@dataclass(frozen=True)
class LabelShare:
    """What one labelled text added to a score; `label` is its own, in label units."""

    text_id: str
    amount: float
    label: float


@dataclass(frozen=True)
class FeatureShare:
    """What a group of columns of an encoder added to a score."""

    encoder: str
    name: str
    amount: float


@dataclass(frozen=True)
class TargetExplanation:
    """The account of one score; everything but `score` and the shares' labels is on the fitted scale.

    Attributes:
        target: Name of the target set.
        score: The score in label units, as `predict` returns it.
        scaled_score: The same on the fitted scale, where it is a sum.
        bias: What every text starts from.
        earlier: The part of the surrogates that a warm start went on from.
        raised: The texts that raised the score most, strongest first.
        lowered: The texts that lowered it most, strongest first.
        others: Sum over all other labelled texts, of which there are `num_others`.
        remainder: What the labelled texts do not account for.
        blocks: Sum over the columns of each encoder.
        features: The strongest named groups of columns, by size.
        block_bias: What the blocks start from.
        block_remainder: What the blocks do not account for.
    """

    target: str
    score: float
    scaled_score: float
    bias: float
    earlier: float
    raised: Sequence[LabelShare]
    lowered: Sequence[LabelShare]
    others: float
    num_others: int
    remainder: float
    blocks: Mapping[str, float]
    features: Sequence[FeatureShare]
    block_bias: float
    block_remainder: float


@dataclass(frozen=True)
class TextExplanation:
    """Why a text has its scores.

    Attributes:
        text_id: The text.
        method: How amounts were found.
        scale: In what the amounts are.
        units: In what scores and labels are.
        targets: One account per target.
    """

    text_id: str
    method: str
    scale: str
    units: str
    targets: Sequence[TargetExplanation]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON takes it."""
        return asdict(self)


def explain(
    surrogate: Any,
    rows: FittedRows | None,
    features: NDArray[np.float32],
    *,
    text_ids: Sequence[str],
    target_names: Sequence[str],
    units: str,
    top_k: int = 5,
    method: str = CONTRIBUTIONS,
) -> list[TextExplanation]:
    """Account for the scores of texts with features (B, D); see `InfluencePredictor.explain`."""
    check_at_least("top_k", top_k, 1)
    if not hasattr(surrogate, "explainer"):
        raise InputError(
            f"the surrogate {surrogate.plugin_name!r} does not explain its scores.",
            "a surrogate with `explainer` and `explanations`, such as ridge, trees and network",
            "fit one of these, or give the class these two.",
        )
    check_choice("method", method, surrogate.explanations)
    if rows is None:
        raise InputError(
            "this predictor was saved without the texts that it was fitted on.",
            "a predictor that keeps them, as all do that this version fits",
            "fit it again; features in the cache are used.",
        )
    data = rows.training_data()
    explainer = surrogate.explainer(data, method)
    places = rows.places[data.rows]  # (S,) the text of each row of the training data
    account = _Account(rows, places, list(target_names), surrogate, top_k)
    found = []
    for start in range(0, len(features), TEXTS_PER_BLOCK):
        block = slice(start, start + TEXTS_PER_BLOCK)
        for text_id, targets in zip(text_ids[block], account.of(explainer.amounts(features[block])), strict=True):
            found.append(TextExplanation(text_id, method, SCALES[surrogate.label_scale], units, targets))
    return found


@dataclass(frozen=True)
class _Account:
    rows: FittedRows
    places: NDArray[np.int64]
    target_names: Sequence[str]
    surrogate: Any
    top_k: int

    def of(self, amounts: Amounts) -> Iterator[list[TargetExplanation]]:
        """Yield the accounts of each text, one per target."""
        scores = self.surrogate.from_label_scale(amounts.scores)
        remainder, column_remainder = amounts.remainder, amounts.column_remainder
        labels = self.rows.label_of_texts()  # (T, C)
        for text in range(len(amounts.scores)):
            targets = []
            for column, name in enumerate(self.target_names):
                of_texts = np.zeros(len(labels))
                np.add.at(of_texts, self.places, amounts.rows[column, :, text])  # (T,)
                raised = self._strongest(of_texts, labels[:, column], sign=1.0)
                lowered = self._strongest(of_texts, labels[:, column], sign=-1.0)
                listed = sum(share.amount for share in (*raised, *lowered))
                blocks, features = _feature_shares(amounts.columns[column, text], self.rows.columns, self.top_k)
                targets.append(
                    TargetExplanation(
                        target=name,
                        score=float(scores[text, column]),
                        scaled_score=float(amounts.scores[text, column]),
                        bias=float(amounts.bias[column]),
                        earlier=float(amounts.earlier[text, column]),
                        raised=raised,
                        lowered=lowered,
                        others=float(of_texts.sum() - listed),
                        num_others=len(of_texts) - len(raised) - len(lowered),
                        remainder=float(remainder[text, column]),
                        blocks=blocks,
                        features=features,
                        block_bias=float(amounts.column_bias[column]),
                        block_remainder=float(column_remainder[text, column]),
                    )
                )
            yield targets

    def _strongest(self, amounts: NDArray[np.float64], labels: NDArray[np.float32], *, sign: float) -> list[LabelShare]:
        """Return the texts with the largest amounts of one sign, equal ones by text_id."""
        ids = self.rows.text_ids
        candidates = np.flatnonzero(sign * amounts > 0).tolist()
        order = sorted(candidates, key=lambda place: (-sign * amounts[place], ids[place]))[: self.top_k]
        return [LabelShare(ids[place], float(amounts[place]), float(labels[place])) for place in order]


def _feature_shares(
    amounts: NDArray[np.float64], columns: Sequence[ColumnGroup], top_k: int
) -> tuple[dict[str, float], list[FeatureShare]]:
    """Return the sums over each encoder's columns, and the strongest groups that have a name."""
    starts = np.cumsum([0, *(group.width for group in columns)])[:-1]
    sums = np.add.reduceat(amounts, starts)
    blocks: dict[str, float] = {}
    for group, total in zip(columns, sums, strict=True):
        blocks[group.encoder] = blocks.get(group.encoder, 0.0) + float(total)
    named = [FeatureShare(g.encoder, g.name, float(total)) for g, total in zip(columns, sums, strict=True) if g.name and total]
    return blocks, sorted(named, key=lambda share: (-abs(share.amount), share.encoder, share.name))[:top_k]
