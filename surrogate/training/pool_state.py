"""The pool as training sees it: which texts were trained on in this pass, which are kept out of it, and how long they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from oracle.errors import InputError
from oracle.texts import list_text_ids
from surrogate.scores import check_num_tokens

if TYPE_CHECKING:
    from datasets import Dataset

    from oracle.language_model import LanguageModel


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
        """Note that texts are trained on; with `starts_pass` all others are free again."""
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

    def candidates(self, size: Mapping[str, int], lm: LanguageModel | None) -> tuple[np.ndarray, bool]:
        """Return the rows that may be chosen, ascending, and whether a new pass over the pool begins.

        It does where what is left is less than `size` (`num_texts` or `num_tokens`) asks for.
        """
        free = self.free
        if not self.consume_once:
            return free, False
        left = np.flatnonzero(~self._reserved & ~self._consumed)
        available = int(self.token_counts(lm)[left].sum()) if "num_tokens" in size else len(left)
        is_spent = len(left) < len(free) and available < next(iter(size.values()))
        return (free, True) if is_spent else (left, False)

    def token_counts(self, lm: LanguageModel | None) -> np.ndarray:
        """(N,) tokens of the texts as the model sees them, counted once."""
        if self._counts is None:
            if lm is None:
                raise InputError(
                    "a round of so many tokens, and no model to count them with.", "a LanguageModel, or num_texts", "pass lm=..."
                )
            self._counts = np.array([len(text.input_ids) for text in lm.encode(self.texts)], dtype=np.int64)
        return self._counts
