"""A block of texts: what an encoder gets of consecutive rows, and what is written beside their scores.

Equal texts of a block are encoded once. A text longer than the bound keeps its text_id and is scored by its beginning,
so that no tokenizer is held up by it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from oracle.text_formats import TEXT_ID, identify
from surrogate.scoring.items import SHOWN_CHARS, BadRow
from surrogate.scoring.positions import among

if TYPE_CHECKING:
    from datasets import Dataset

CANONICAL_TYPES = {
    "text": pa.string(),
    "prompt": pa.string(),
    "completion": pa.string(),
    "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
    "input_ids": pa.list_(pa.int64()),
    "labels": pa.list_(pa.int64()),
}


@dataclass
class Block:
    """Consecutive rows, read and identified.

    Attributes:
        next_row: Position of the first row after the block.
        num_rows: Rows it had, good and bad.
        positions: (n,) positions of the rows that have a text.
        text_ids: n text_ids.
        texts: The U different texts among them, as `oracle.read_texts` returns texts.
        text_of_row: (n,) which of the U texts each row has.
        passed: n values of each passed-through column.
        bad_rows: The rows without a text, in order.
        num_cut: Rows whose text is longer than the bound.
        notes: How many values of passed-through columns were left empty, by reason.
    """

    next_row: int
    num_rows: int
    positions: np.ndarray
    text_ids: list[str]
    texts: Dataset
    text_of_row: np.ndarray
    passed: dict[str, pa.Array] = field(default_factory=dict)
    bad_rows: list[BadRow] = field(default_factory=list)
    num_cut: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    def only(self, wanted: np.ndarray) -> Block:
        """Return the block with the rows at some positions (rising), and without its bad rows."""
        kept = among(self.positions, wanted)
        texts, text_of_row = np.unique(self.text_of_row[kept], return_inverse=True)
        return dataclasses.replace(
            self,
            num_rows=int(kept.sum()),
            positions=self.positions[kept],
            text_ids=[text_id for text_id, keep in zip(self.text_ids, kept, strict=True) if keep],
            texts=self.texts.select(texts),
            text_of_row=text_of_row,
            passed={name: column.filter(pa.array(kept)) for name, column in self.passed.items()},
            bad_rows=[],
        )

    def beginning(self, row: int | np.integer[Any]) -> str:
        """Return how the text of a row begins, for people."""
        text = self.texts[int(self.text_of_row[row])]
        return " ".join(str(value)[:SHOWN_CHARS] for name, value in text.items() if name != TEXT_ID)[:SHOWN_CHARS]


def distinct(row_ids: Sequence[str]) -> tuple[list[int], np.ndarray]:
    """Return the first row (U,) of each different id, and which of these each row (N,) has."""
    numbers: dict[str, int] = {}
    first_rows: list[int] = []
    text_of_row = np.empty(len(row_ids), dtype=np.int64)
    for row, text_id in enumerate(row_ids):
        number = numbers.setdefault(text_id, len(first_rows))
        if number == len(first_rows):
            first_rows.append(row)
        text_of_row[row] = number
    return first_rows, text_of_row


def text_dataset(
    format_name: str, columns: dict[str, list[Any]], ids: Sequence[str], *, max_chars: int
) -> tuple[Dataset, list[int]]:
    """Return texts as `oracle.read_texts` returns them, and which of them were cut to `max_chars`.

    Args:
        format_name: text, completion, chat or tokens.
        columns: The U values of each column of the format, all of them valid.
        ids: Their text_ids; a cut text gets that of what is left of it.
        max_chars: Characters (or token ids) that are kept.
    """
    import datasets

    if columns.get("labels") and all(value is None for value in columns["labels"]):
        del columns["labels"]
    if "messages" in columns:
        columns["messages"] = [
            [{"role": message["role"], "content": message["content"]} for message in messages] for messages in columns["messages"]
        ]
    ids = list(ids)
    cut = _cut_long(format_name, columns, ids, max_chars)
    arrays = {name: pa.array(values, CANONICAL_TYPES[name]) for name, values in columns.items()}
    table = pa.table({TEXT_ID: pa.array(ids, pa.string()), **arrays})
    info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(table.schema))
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=info, fingerprint="block"), cut


def _cut_long(format_name: str, columns: dict[str, list[Any]], ids: list[str], max_chars: int) -> list[int]:
    """Shorten texts that are too long, in place, and return which they are."""
    names = [name for name in columns if name != "labels"]
    if format_name == "chat":
        sizes = [sum(len(message["content"]) for message in messages) for messages in columns["messages"]]
    else:
        sizes = [sum(map(len, row)) for row in zip(*(columns[name] for name in names), strict=True)]
    cut = [row for row, size in enumerate(sizes) if size > max_chars]
    for row in cut:
        left = max_chars
        if format_name == "chat":
            for message in columns["messages"][row]:
                message["content"] = message["content"][:left]
                left -= len(message["content"])
        else:
            for name in names:
                columns[name][row] = columns[name][row][:left]
                left -= len(columns[name][row])
            if columns.get("labels") and columns["labels"][row] is not None:
                columns["labels"][row] = columns["labels"][row][:max_chars]
        found, _ = identify(format_name, {name: [column[row]] for name, column in columns.items()})
        ids[row] = found[0] or ids[row]
    return cut
