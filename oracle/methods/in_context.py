"""How much a text helps when it is read and not trained on: the target's loss with the text in front of it and without.

DELIFT (Agarwal et al. 2025, arXiv 2411.04425) takes this for the utility of one example to another. Only the target's
own tokens count, each scored by the prediction made just before it, and the same ones with and without the text; the
release of a follow-up scores every token by the prediction made after it. DELIFT's distance, between the probabilities
of the target's tokens and 1, is an option beside the loss in nats that the other methods measure. Left out: DELIFT's
min-max scaling, a choice of the rule, and sharing the text's pass between target texts by a key-value cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from oracle.encoding import IGNORED, Batch, EncodedText
from oracle.errors import InputError, NotFiniteError, check_choice
from oracle.language_model import LanguageModel
from oracle.methods import Measured
from oracle.plugins import option
from oracle.target_columns import TargetColumns

DISTANCES = {"nats": "nats per target token", "probability": "distance of the target tokens' probabilities from 1"}


@dataclass(kw_only=True)
class InContext:
    """Loss of each target text without the text in front of it, minus its loss with it.

    Paper:
        DELIFT, Agarwal et al. 2025, arXiv 2411.04425.
    Cost:
        One forward pass over text and target for every pair of them: as many passes per text as there are target texts.
        No gradients and no memory beyond a forward pass. Use `max_target_texts`.
    Limit:
        A text of which nothing fits in front of the target has the value 0.

    Text and target share the model's `max_tokens`: a text that is too long loses its end, the target nothing.
    Target texts of one set are weighted by their tokens.
    """

    plugin_name: ClassVar[str] = "in_context"
    needs_optimizer: ClassVar[bool] = False
    uses_optimizer: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False

    distance: str = option(
        "nats",
        "'nats' for the loss per target token; 'probability' for DELIFT's root mean square of 1 - p over a target text's tokens.",
    )
    separator: str = option(
        "none", "What stands between text and target: 'none', or 'eos' for the tokenizer's end-of-text token."
    )

    def __post_init__(self) -> None:
        check_choice("distance", self.distance, DISTANCES)
        check_choice("separator", self.separator, ("none", "eos"))

    @property
    def units(self) -> str:
        """Unit of the values."""
        return DISTANCES[self.distance]

    def prepare(self, lm: LanguageModel, columns: TargetColumns) -> None:
        """Take the target texts out of their batches and measure them alone."""
        self.lm_, self.columns_ = lm, columns
        self.separator_ = self._separator_ids(lm)
        self.rows_ = [row for batch in columns.batches for row in _rows(batch)]  # M target texts
        self.parts_ = np.array(
            [part for batch, part in zip(columns.batches, columns.batch_parts, strict=True) for _ in range(len(batch.positions))]
        )
        self.row_tokens_ = np.array([row.num_targets for row in self.rows_], dtype=np.float64)  # (M,)
        self.lengths_ = np.array([len(row.input_ids) for row in self.rows_])  # (M,)
        self.before_ = self._distances(self.rows_)  # (M,)
        if not np.isfinite(self.before_).all():
            bad = sorted({columns.names[columns.parts[self.parts_[row]]] for row in np.flatnonzero(~np.isfinite(self.before_))})
            raise NotFiniteError(
                f"the loss is NaN or infinite on the target sets {bad}.",
                "finite losses",
                "check the checkpoint (did training diverge?) or load it in float32.",
            )

    def measure(self, encoded: Sequence[EncodedText]) -> Measured:
        """Read every target text after every text."""
        values = np.zeros((len(encoded), len(self.columns_.parts)))  # (B, K)
        cut = np.zeros(len(encoded))
        for row, text in enumerate(encoded):
            shown = self._shown(len(text.input_ids))
            read = np.flatnonzero(shown)
            after = self.before_.copy()
            after[read] = self._distances([self._behind(text.input_ids[: shown[index]], self.rows_[index]) for index in read])
            values[row] = self._by_part(self.before_ - after)
            cut[row] = (shown < len(text.input_ids)).mean()
        return Measured(self.columns_.combine(values), self.columns_.halves(values), {"share_of_targets_cut_for": cut})

    def facts(self) -> dict[str, Any]:
        """Distances without a text, per target set, and the number of target texts."""
        before = self.columns_.combine(self._by_part(self.before_))
        return {"before": before.tolist(), "num_target_texts_read": len(self.rows_)}

    def prepare_flops(self, columns: TargetColumns) -> float:
        """Counted FLOPs of `prepare`: one evaluation of all target sets."""
        return self.lm_.forward_flops_per_token * columns.num_tokens

    def flops(self, num_tokens: int, columns: TargetColumns) -> float:
        """Counted FLOPs for one text of `num_tokens`: the part of it that is shown, and the target, for every target text."""
        shown = self._shown(num_tokens)
        read = (shown + len(self.separator_) + self.lengths_)[shown > 0]
        return float(self.lm_.forward_flops_per_token * read.sum())

    def _separator_ids(self, lm: LanguageModel) -> list[int]:
        if self.separator == "none":
            return []
        end = getattr(lm.tokenizer, "eos_token_id", None)
        if end is None:
            raise InputError(
                "separator='eos', and there is no tokenizer with an end-of-text token.",
                "a LanguageModel whose tokenizer has an eos_token, or separator='none'",
                "pass the tokenizer, or use separator='none'.",
            )
        return [int(end)]

    def _shown(self, num_tokens: int) -> np.ndarray:
        """How many tokens of a text fit in front of each target text: (M,)."""
        room = self.lm_.max_tokens - self.lengths_ - len(self.separator_)
        return np.clip(room, 0, num_tokens)

    def _behind(self, shown: list[int], row: EncodedText) -> EncodedText:
        """Put a target text behind the shown part of a text; its first token, which nothing predicts alone, does not count."""
        front = [*shown, *self.separator_]
        return EncodedText(row.text_id, front + row.input_ids, [IGNORED] * len(front) + row.labels)

    def _distances(self, rows: Sequence[EncodedText]) -> np.ndarray:
        """Measure how far the predictions of M target texts are from the truth: (M,) float64."""
        distances = np.zeros(len(rows))
        with torch.no_grad():
            for batch in self.lm_.batches(rows):
                losses, mask = self.lm_.token_losses(batch)  # both (B, L-1)
                losses, counts = losses.double(), mask.sum(1)
                if self.distance == "nats":
                    found = (losses * mask).sum(1) / counts
                else:
                    found = (((1 - (-losses).exp()) ** 2 * mask).sum(1) / counts).sqrt()
                distances[batch.positions] = found.cpu().numpy()
        return distances

    def _by_part(self, distances: np.ndarray) -> np.ndarray:
        """Average distances (M,) over the target texts of every part, weighted by tokens: (K,)."""
        totals = np.bincount(self.parts_, weights=distances * self.row_tokens_, minlength=len(self.columns_.parts))
        return totals / self.columns_.part_tokens


def _rows(batch: Batch) -> list[EncodedText]:
    """Take the texts out of a padded batch, each up to its last target token; what comes later changes nothing."""
    rows = []
    for number, (ids, labels) in enumerate(zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True)):
        length = max(index for index, label in enumerate(labels) if label != IGNORED) + 1
        rows.append(EncodedText(str(number), ids[:length], labels[:length]))
    return rows
