"""Reads texts in four formats, gives each a `text_id`, and counts what it rejects and why.

A text is what one training example trains on: plain text, a prompt with its completion, chat messages or
token ids. Its text_id is a hash of exactly that content, so the same text has the same id in every file,
at every position and beside any other columns; every join in this project uses it. Texts that nothing
could be trained on are rejected, as are exact repeats (the first is kept). Near-duplicates, quality and
length are left to the reader of the texts.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from oracle.artifacts import atomic_path
from oracle.errors import InputError, check_at_least, check_choice
from oracle.sources import Column, Source, open_source
from oracle.text_formats import (
    ACCEPTED_COLUMNS,
    FORMATS,
    TEXT_ID,
    choose_format,
    column_values,
    format_by_id,
    judge,
    used_columns,
)

if TYPE_CHECKING:
    import datasets

_REPORT = "_read_report"
MAX_CHUNKS = 64  # of a column; rows that were picked out of a Dataset come as one each, and every later pick goes through all


class TextsRejectedWarning(UserWarning):
    """Some texts of a source were rejected."""


@dataclass(frozen=True)
class ReadReport:
    """What `read_texts` read, kept and rejected.

    Attributes:
        num_read: Texts in the source (at most `limit`).
        num_kept: Texts in the result.
        rejected: Number of rejected texts by reason, the most frequent first.
        format: text, completion, chat or tokens.
        source_description: Where the texts came from.
    """

    num_read: int
    num_kept: int
    rejected: dict[str, int]
    format: str
    source_description: str

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.rejected.items())
        dropped = f"dropped {self.num_read - self.num_kept:,} of {self.num_read:,} texts"
        return f"{dropped}: {reasons}" if reasons else dropped


class Decoder(Protocol):
    """What `plain_strings` needs of a tokenizer."""

    def decode(self, token_ids: Any, /, *, skip_special_tokens: bool) -> Any:
        """Return the string of one list of token ids."""


def read_texts(
    source: Source, *, text_column: str = "text", format: str = "auto", split: str = "train", limit: int | None = None
) -> datasets.Dataset:
    """Read texts from files, URLs, the hub or memory, and give each its text_id.

    Formats: `text` (column `text_column`), `completion` (columns prompt and completion; the loss is on the
    completion), `chat` (column messages, a list of {role, content}; the loss is on what the assistant
    says) and `tokens` (column input_ids, and optionally labels of the same length, -100 for no loss).

    Args:
        source: A path, glob or fsspec URL, or a list of them, of files in JSON lines (also packed), parquet
            or arrow; a folder written by `Dataset.save_to_disk`; a Dataset; strings or dicts; or a hub
            dataset "org/name". Files of a glob are read in sorted order. A list of strings is taken for
            texts, unless every one of them ends like a data file or exists as a path.
        text_column: The column with the text. A name other than "text" decides for the format `text`.
        format: One of the four, or "auto": what the columns say, in the order messages, input_ids, prompt
            and completion, text. Where all prompts are empty, a text column goes before prompt and completion.
        split: The split of a hub dataset or `DatasetDict`.
        limit: Read only the first so many texts, before any is rejected.

    Returns:
        A Dataset with the columns text_id (32 hex digits, computed anew where the source has such a column),
        then those of the format under the names above, then all others of the source unchanged. A column
        `text` that the format does not use is left out for completions (it repeats them) and where
        `text_column` names another. Messages keep role and content only, which is all that the id covers.
        `read_report` tells what was rejected.

    Raises:
        MissingFileError: The source cannot be found; close names are shown.
        InputError: A file cannot be parsed, no column fits, an option has no effect, or nothing is left.

    Example:
        >>> read_texts(["a text", "another", "a text"])["text"][:]  # warns of one duplicate
        ['a text', 'another']
    """
    check_choice("format", format, ("auto", *FORMATS))
    if limit is not None:
        check_at_least("limit", limit, 1)
    if text_column != "text" and format not in ("auto", "text"):
        raise InputError(
            f"text_column={text_column!r} has no effect with format={format!r}.",
            "format='text' or 'auto'",
            "leave out one of the two.",
        )
    material = open_source(source, text_column=text_column, split=split, limit=limit)
    format_name = choose_format(material, text_column, format)
    used = used_columns(material, text_column, format_name)
    text_ids, reasons = judge(format_name, used, material.num_rows)
    rejected = dict(sorted(Counter(reason for reason in reasons if reason).items(), key=lambda item: (-item[1], item[0])))
    report = ReadReport(material.num_rows, len(text_ids), rejected, format_name, material.description)
    if not text_ids:
        raise InputError(
            f"no text is left of {material.description}: {report}.",
            f"texts in the columns {ACCEPTED_COLUMNS}",
            "check that this is the right source and the right column.",
        )
    if rejected:
        warnings.warn(f"{report} ({material.description})", TextsRejectedWarning, stacklevel=2)
    redundant = {"text": {"text", text_column}, "completion": {"text"}}.get(format_name, set())
    others = [name for name in material.columns if name not in {TEXT_ID, *used, *redundant}]
    kept = np.array([not reason for reason in reasons])
    columns = {TEXT_ID: pa.array(text_ids, pa.string())}
    columns |= {name: _canonical(name, _filter(column, kept)) for name, column in used.items()}
    columns |= {name: _as_arrow(name, _filter(material.columns[name], kept)) for name in others}
    dataset = _make_dataset(pa.table(columns), {name: material.features[name] for name in others if name in material.features})
    setattr(dataset, _REPORT, report)
    return dataset


def write_texts(dataset: datasets.Dataset, path: Path) -> None:
    """Write texts to a parquet file that `read_texts` reads back with the same ids, atomically."""
    import pyarrow.parquet as pq

    with atomic_path(path) as partial:
        pq.write_table(dataset.with_format("arrow")[:], partial)


def read_report(dataset: datasets.Dataset) -> ReadReport:
    """Return what `read_texts` read, kept and rejected when it made `dataset`.

    Raises:
        InputError: The dataset does not come straight from `read_texts`.
    """
    report = getattr(dataset, _REPORT, None)
    if not isinstance(report, ReadReport):
        raise InputError(
            "this dataset carries no report of its reading.",
            "the very Dataset that oracle.read_texts returned",
            "ask for the report before selecting from the dataset or changing it.",
        )
    return report


def check_text_ids(dataset: datasets.Dataset) -> None:
    """Raise `InputError` unless `dataset` has a text_id column."""
    if TEXT_ID not in dataset.column_names:
        raise InputError(
            f"these texts have no text_id; their columns are {', '.join(dataset.column_names)}.",
            "a Dataset made by oracle.read_texts",
            "call oracle.read_texts first.",
        )


def list_text_ids(dataset: datasets.Dataset) -> list[str]:
    """Return the text_ids of `dataset`, in its order.

    Raises:
        InputError: It has none.
    """
    check_text_ids(dataset)
    return _values_of(dataset, TEXT_ID)


def text_format(dataset: datasets.Dataset) -> str:
    """Return the format of texts that `read_texts` made, also after selecting, saving or loading them.

    The format is the one under which the first text's content hashes to its text_id.

    Raises:
        InputError: There is no text_id, or it is not that of the text.
    """
    check_text_ids(dataset)
    first = dataset.with_format("arrow")[:1]
    format_name = format_by_id({name: first[name] for name in first.column_names})
    if format_name is None:
        raise InputError(
            "the text_id of the first text is not the hash of its content.",
            "texts as oracle.read_texts returned them",
            "call oracle.read_texts again after changing texts.",
        )
    return format_name


def plain_strings(dataset: datasets.Dataset, tokenizer: Decoder | None = None) -> list[str]:
    """Return each text as one string, for encoders that know neither chat nor tokens.

    Args:
        dataset: Texts made by `read_texts`.
        tokenizer: Needed for texts in token ids.

    Returns:
        The text; or prompt and completion, with a line break between them unless one of them has white
        space there; or the messages as lines "role: content"; or the decoded tokens.

    Raises:
        InputError: The texts are token ids, and there is no tokenizer.
    """
    format_name = text_format(dataset)
    if format_name == "text":
        return _values_of(dataset, "text")
    if format_name == "completion":
        pairs = zip(_values_of(dataset, "prompt"), _values_of(dataset, "completion"), strict=True)
        return [prompt + _seam(prompt, completion) + completion for prompt, completion in pairs]
    if format_name == "chat":
        return [
            "\n".join(f"{message['role']}: {message['content']}" for message in messages)
            for messages in _values_of(dataset, "messages")
        ]
    if tokenizer is None:
        raise InputError(
            "these texts are token ids, which only their tokenizer can turn into strings.",
            "a tokenizer with a decode method",
            "pass the tokenizer that made them.",
        )
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in _values_of(dataset, "input_ids")]


def _seam(prompt: str, completion: str) -> str:
    return "" if not prompt or prompt[-1].isspace() or completion[0].isspace() else "\n"


def _values_of(dataset: datasets.Dataset, name: str) -> list[Any]:
    return column_values(dataset.select_columns([name]).with_format("arrow")[:][name])


def _make_dataset(table: pa.Table, features_of_others: dict[str, Any]) -> datasets.Dataset:
    import datasets

    features = datasets.Features.from_arrow_schema(table.schema)
    features.update(features_of_others)
    if any(column.num_chunks > MAX_CHUNKS for column in table.columns):
        table = table.combine_chunks()
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=features))


def _filter(column: Column, kept: np.ndarray) -> Column:
    if isinstance(column, list):
        return [value for value, keep in zip(column, kept, strict=True) if keep]
    return column if kept.all() else column.filter(pa.array(kept))


def _canonical(name: str, column: Column) -> pa.Array | pa.ChunkedArray:
    """Give a column of the format its one type: strings, lists of role and content, or lists of integers."""
    if name == "messages":
        chats = [
            [{"role": message["role"], "content": message["content"]} for message in messages]
            for messages in column_values(column)
        ]
        return _as_arrow(name, chats)
    kind = pa.list_(pa.int64()) if name in ("input_ids", "labels") else pa.string()
    if isinstance(column, list):
        return pa.array(column, kind)
    holds_strings = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return column if holds_strings or name in ("input_ids", "labels") else column.cast(kind)


def _as_arrow(name: str, column: Column) -> pa.Array | pa.ChunkedArray:
    if not isinstance(column, list):
        return column
    try:
        return pa.array(column)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
        raise InputError(
            f"the column {name!r} mixes types or holds what arrow cannot: {error}.",
            "one type per column",
            f"unify the values of {name!r}, or drop the column.",
        ) from error
