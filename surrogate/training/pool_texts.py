"""The pool's texts as a map-style dataset of token ids, tokenised when they are asked for, and the batch made of them.

Tokens, loss mask and limit are those under which the texts are labelled (`oracle.encoding`), so what was measured is what
is trained on. Nothing is kept: a text that is asked for again is tokenised again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oracle.encoding import IGNORED, EncodedText, encode_texts
from oracle.errors import InputError, InputTypeError
from oracle.language_model import DEFAULT_MAX_TOKENS
from oracle.text_formats import TEXT_ID
from oracle.texts import list_text_ids, text_format

if TYPE_CHECKING:
    from datasets import Dataset

PADDING = 0  # any token will do: the attention mask hides it, and it has no label
MASK_COLUMNS = ("attention_mask", "completion_mask", "assistant_masks")  # 0 where an item without labels is not predicted
KEPT_COLUMNS = ("position_ids", "token_type_ids")  # of items of a user's own, padded with 0


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
    if not (hasattr(base, "__len__") and hasattr(base, "__getitem__")):
        raise InputTypeError(
            f"base={type(base).__name__}, which has no length or no items by number.",
            "a map-style dataset, such as a datasets.Dataset or a list of items",
            "make a list of it.",
        )
    columns = getattr(base, "column_names", None) or ()
    if len(base) != len(pool) or (TEXT_ID in columns and list(base[TEXT_ID]) != list_text_ids(pool)):
        raise InputError(
            f"a base of {len(base)} items, which are not those of the pool's {len(pool)} texts in their order.",
            "a dataset whose item i is text i of the pool, without the texts that were rejected (empty ones, repeats)",
            "make it of the `pool` of the callback or the refresher; or of oracle.read_texts(...), passed as the pool, too.",
        )


def check_items(base: Any) -> None:
    """Refuse items that `collate` cannot make a batch of, by the first one.

    Raises:
        InputError: It has no `input_ids`.
    """
    item = base[0]
    if not isinstance(item, Mapping) or "input_ids" not in item:
        given = ", ".join(item) if isinstance(item, Mapping) else type(item).__name__
        raise InputError(
            f"a dataset whose items have no input_ids ({given}).",
            "items with input_ids and, unless all of them are predicted, labels",
            "pass train_dataset=callback.train_dataset, which tokenises the pool's texts; or tokenised items; or a collator of "
            "your own that tokenises them.",
        )


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pad items of `input_ids` and `labels` on the right.

    Items without `labels` are predicted wherever none of their masks says otherwise (`attention_mask`, and TRL's
    `completion_mask` and `assistant_masks`). What they have of `attention_mask`, `position_ids` and `token_type_ids` is kept;
    without a mask all their tokens are attended to. Other columns are left out.

    Shapes:
        `input_ids`, `labels` (-100 in the padding) and `attention_mask`, all (B, L) int64.

    Raises:
        InputError: An item has no `input_ids`.
    """
    check_items(items)
    ids = _tensors(item["input_ids"] for item in items)
    masks = [item.get("attention_mask", [1] * len(item["input_ids"])) for item in items]
    batch = {
        "input_ids": _pad(ids, PADDING),
        "labels": _pad(_tensors(map(labels_of, items)), IGNORED),
        "attention_mask": _pad(_tensors(masks), 0),
    }
    kept = [name for name in KEPT_COLUMNS if all(name in item for item in items)]
    return batch | {name: _pad(_tensors(item[name] for item in items), 0) for name in kept}


def labels_of(item: Mapping[str, Any]) -> list[int]:
    """Return an item's labels; without any, its ids where none of its masks leaves them out."""
    if "labels" in item:
        return list(item["labels"])
    masks = [item[name] for name in MASK_COLUMNS if name in item]
    return [token if all(kept) else IGNORED for token, *kept in zip(item["input_ids"], *masks, strict=True)]


def _tensors(rows: Iterable[Any]) -> list[Tensor]:
    return [torch.as_tensor(row, dtype=torch.long) for row in rows]


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)  # (B, L)
