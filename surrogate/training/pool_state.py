"""The pool as training sees it: which texts were trained on in this pass, which are kept out of it, and how long they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from oracle.errors import InputError
from oracle.texts import list_text_ids
from surrogate.scores import check_num_tokens

if TYPE_CHECKING:
    from datasets import Dataset

    from oracle.language_model import LanguageModel


@dataclass(frozen=True)
class Candidates:
    """Rows of the pool that a round may take, ascending.

    Attributes:
        rows: (M,) all of them.
        leftover: (L,) those that the pass before has left, fewer than the round takes: it takes them, and goes on among the
            others in a new pass.
        starts_pass: Whether a new pass over the pool begins.
    """

    rows: np.ndarray
    leftover: np.ndarray
    starts_pass: bool


class PoolState:
    """The pool and what was taken from it.

    Args:
        texts: The N texts of the pool, with `text_id`.
        reserved: Rows that are never trained on.
        consume_once: Whether a text is offered again only when the pool is spent.
        num_tokens: (N,) tokens of the texts, where they are known.
    """

    def __init__(
        self,
        texts: Dataset,
        *,
        reserved: np.ndarray,
        consume_once: bool,
        num_tokens: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        self.texts, self.consume_once = texts, consume_once
        self.text_ids = list_text_ids(texts)
        self.row_of = {text_id: row for row, text_id in enumerate(self.text_ids)}
        self._reserved = np.zeros(len(texts), dtype=bool)
        self._reserved[reserved] = True
        self._consumed = np.zeros(len(texts), dtype=bool)
        self._counts = None if num_tokens is None else check_num_tokens(num_tokens, num_texts=len(texts))
        if self._reserved.all():
            raise InputError(
                f"a pool of {len(texts)} texts, all of them in the probe set.",
                "more texts than the probe has",
                "enlarge the pool, or lower num_probe.",
            )

    def rows(self, text_ids: Sequence[str]) -> np.ndarray:
        """Return the (K,) rows of texts."""
        return np.array([self.row_of[text_id] for text_id in text_ids], dtype=np.int64)

    def take(self, rows: np.ndarray, *, starts_pass: bool) -> None:
        """Note that texts are trained on; with `starts_pass` all others are free again, also what was left of the pass before."""
        if starts_pass:
            self._consumed[:] = False
        self._consumed[rows] = True

    def forget(self) -> None:
        """Note that nothing was trained on."""
        self._consumed[:] = False

    @property
    def free(self) -> np.ndarray:
        """The rows that may be chosen at the beginning of a pass, ascending."""
        return np.flatnonzero(~self._reserved)

    def candidates(self, size: Mapping[str, int], lm: LanguageModel | None) -> Candidates:
        """Return what a round of `size` (`num_texts` or `num_tokens`) may take; too little left of a pass begins a new one."""
        free, none = self.free, np.zeros(0, dtype=np.int64)
        if not self.consume_once:
            return Candidates(free, none, starts_pass=False)
        left = np.flatnonzero(~self._reserved & ~self._consumed)
        available = int(self.token_counts(lm)[left].sum()) if "num_tokens" in size else len(left)
        if len(left) < len(free) and available < next(iter(size.values())):
            return Candidates(free, left, starts_pass=True)
        return Candidates(left, none, starts_pass=False)

    def count_tokens_by(self, num_tokens: Sequence[int] | np.ndarray) -> None:
        """Take these (N,) tokens of the texts, where none are known yet."""
        if self._counts is None:
            self._counts = check_num_tokens(num_tokens, num_texts=len(self.texts))

    def token_counts(self, lm: LanguageModel | None) -> np.ndarray:
        """(N,) tokens of the texts as the model sees them, counted once."""
        if self._counts is None:
            if lm is None:
                raise InputError(
                    "a round of so many tokens, and no model to count them with.", "a LanguageModel, or num_texts", "pass lm=..."
                )
            self._counts = np.array([len(text.input_ids) for text in lm.encode(self.texts)], dtype=np.int64)
        return self._counts
