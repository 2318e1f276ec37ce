"""The pool's texts as a map-style dataset of token ids, tokenised when they are asked for, and the batch made of them.

Tokens, loss mask and limit are those under which the texts are labelled (`oracle.encoding`), so what was measured is what
is trained on. Nothing is kept: a text that is asked for again is tokenised again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oracle.encoding import IGNORED, EncodedText, encode_texts
from oracle.errors import InputError
from oracle.language_model import DEFAULT_MAX_TOKENS
from oracle.text_formats import TEXT_ID
from oracle.texts import list_text_ids, text_format

if TYPE_CHECKING:
    from datasets import Dataset

PADDING = 0  # any token will do: the attention mask hides it, and it has no label


class PoolTexts(torch.utils.data.Dataset):
    """Item i is the pool's text i as `input_ids` and `labels`, -100 where the loss does not count.

    Args:
        pool: What `oracle.read_texts` returns, in any of its four formats.
        tokenizer: A Hugging Face tokenizer; None for texts that are token ids. It may be set later.
        max_tokens: Longer texts are cut there; it may be set later.
    """

    def __init__(self, pool: Dataset, tokenizer: Any = None, *, max_tokens: int = DEFAULT_MAX_TOKENS) -> None:
        self.pool, self.tokenizer, self.max_tokens = pool, tokenizer, max_tokens

    @property
    def version(self) -> int:
        """Another number where the texts are others; here they never are."""
        return 0

    @property
    def needs_tokenizer(self) -> bool:
        """Whether the texts are not token ids yet."""
        return text_format(self.pool) != "tokens"

    @property
    def separator(self) -> int | None:
        """The token after each text where texts are packed: the tokenizer's end-of-text token, or none."""
        found = getattr(self.tokenizer, "eos_token_id", None)
        return None if found is None else int(found)

    def encode(self, rows: Sequence[int]) -> list[EncodedText]:
        """Tokenise some texts.

        Raises:
            InputError: There is no tokenizer, or see `encode_texts`.
        """
        return encode_texts(self.pool.select(rows), self.tokenizer, max_tokens=self.max_tokens) if len(rows) else []

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, list[int]]]:
        return [{"input_ids": text.input_ids, "labels": text.labels} for text in self.encode(rows)]


def check_base(base: Any, pool: Dataset | None) -> None:
    """Refuse items of a user's own that are not, one by one, those of the pool's texts.

    Args:
        base: A map-style dataset; a column `text_id`, if it has one, is compared with the pool's.
        pool: The pool, without the texts that were rejected; None of a stream, whose texts are not known in advance.

    Raises:
        InputError: They are not.
    """
    if pool is None:
        raise InputError(
            "base=..., and a stream.", "one of the two", "leave base out: the windows of a stream are tokenised here."
        )
    columns = getattr(base, "column_names", None) or ()
    if len(base) != len(pool) or (TEXT_ID in columns and list(base[TEXT_ID]) != list_text_ids(pool)):
        raise InputError(
            f"a base of {len(base)} items, which are not those of the pool's {len(pool)} texts in their order.",
            "a dataset whose item i is text i of the pool, without the texts that were rejected (empty ones, repeats)",
            "make it of the `pool` of the callback or the refresher; or of oracle.read_texts(...), passed as the pool, too.",
        )


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pad items of `input_ids` and `labels` on the right.

    Shapes:
        `input_ids`, `labels` (-100 in the padding) and `attention_mask`, all (B, L) int64.
    """
    ids = [torch.as_tensor(item["input_ids"], dtype=torch.long) for item in items]
    labels = [torch.as_tensor(item["labels"], dtype=torch.long) for item in items]
    return {
        "input_ids": _pad(ids, PADDING),
        "labels": _pad(labels, IGNORED),
        "attention_mask": _pad([torch.ones_like(row) for row in ids], 0),
    }


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)  # (B, L)
