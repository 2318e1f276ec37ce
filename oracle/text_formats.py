"""The four formats of a text: which columns they take, the text_id, and what is rejected.

A text_id hashes the format's name and the parts that are trained on, each behind its length, with SHA-256
cut to 128 bits: two of a billion texts share one with a chance of about 1e-21.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from oracle.errors import InputError, closest
from oracle.sources import Column, Material

TEXT_ID = "text_id"
FORMATS = {"text": ("text",), "completion": ("prompt", "completion"), "chat": ("messages",), "tokens": ("input_ids",)}
ACCEPTED_COLUMNS = "text | prompt and completion | messages | input_ids (and labels)"
NAME_THE_COLUMN = "name the text's column: oracle.read_texts(source, text_column=...), --text-column on the command line"
NO_LOSS = -100  # the label of a token without loss, as in transformers
TOKEN_TYPE = np.dtype("<i8")  # ids are hashed as little-endian 64-bit integers, whatever type they are stored in


class _Rejected(Exception):
    """One text is rejected; its argument is the reason."""


def choose_format(material: Material, text_column: str, format_name: str) -> str:
    """Settle the format and check that its columns are there."""
    names = list(material.columns)
    if not material.num_rows:
        raise InputError(
            f"{material.description} holds no texts.",
            f"texts in the columns {ACCEPTED_COLUMNS}",
            "check that this is the right source.",
        )
    if text_column != "text":
        if text_column in names:
            return "text"
        raise InputError(
            f"{material.description} has no column {text_column!r}{closest(text_column, names)}.",
            ", ".join(names),
            "choose one of these for text_column.",
        )
    if format_name != "auto":
        missing = [name for name in FORMATS[format_name] if name not in names]
        if not missing:
            return format_name
        raise InputError(
            f"format={format_name!r} needs the column {missing[0]!r}{closest(missing[0], names)}; "
            f"{material.description} has {', '.join(names)}.",
            ACCEPTED_COLUMNS,
            f"choose another format, rename the columns, or {NAME_THE_COLUMN}.",
        )
    if TEXT_ID in names:
        known = format_by_id({name: column[:1] for name, column in material.columns.items()})
        if known is not None:
            return known
    for candidate in ("chat", "tokens", "completion", "text"):
        if all(name in names for name in FORMATS[candidate]):
            only_completions = candidate == "completion" and not any(column_values(material.columns["prompt"]))
            return "text" if only_completions and "text" in names else candidate
    hints = {closest(name, names) for columns in FORMATS.values() for name in columns} - {""}
    raise InputError(
        f"{material.description} has no column that holds texts; its columns are {', '.join(names)}{min(hints, default='')}.",
        ACCEPTED_COLUMNS,
        f"{NAME_THE_COLUMN}, or rename the columns.",
    )


def format_by_id(first: dict[str, Column]) -> str | None:
    """Return the format under which the first row's content has the text_id that stands there."""
    stored = column_values(first[TEXT_ID])
    for format_name, names in FORMATS.items():
        if stored and all(name in first for name in names):
            used = {name: first[name] for name in (*names, *(("labels",) if format_name == "tokens" else ())) if name in first}
            if judge(format_name, used, 1)[0] == stored:
                return format_name
    return None


def used_columns(material: Material, text_column: str, format_name: str) -> dict[str, Column]:
    """Return the columns that make up the texts, under their canonical names."""
    if format_name == "text":
        return {"text": material.columns[text_column]}
    names = [*FORMATS[format_name], *(("labels",) if format_name == "tokens" else ())]
    return {name: material.columns[name] for name in names if name in material.columns}


def judge(format_name: str, used: dict[str, Column], num_rows: int) -> tuple[list[str], list[str]]:
    """Return the text_ids of the kept rows, and for every row the reason of its rejection ("" when kept)."""
    row_ids, reasons = identify(format_name, used)
    text_ids: dict[str, None] = {}
    for row, text_id in enumerate(row_ids):
        if text_id in text_ids:
            reasons[row] = "duplicate"
        elif text_id:
            text_ids[text_id] = None
    assert len(reasons) == num_rows
    return list(text_ids), reasons


def identify(format_name: str, used: dict[str, Column]) -> tuple[list[str], list[str]]:
    """Return the text_id of every row ("" where it is rejected) and the reason of its rejection ("" where it is not)."""
    read_parts = _PARTS_READERS[format_name]
    values = [_token_lists(column) if format_name == "tokens" else column_values(column) for column in used.values()]
    row_ids, reasons = [], []
    for row in zip(*values, strict=True):
        try:
            row_ids.append(_text_id(format_name, read_parts(*row)))
            reasons.append("")
        except _Rejected as rejection:
            row_ids.append("")
            reasons.append(str(rejection))
    return row_ids, reasons


def _text_id(format_name: str, parts: Iterable[bytes]) -> str:
    """Hash the format's name and the parts, each behind its length so that no two lists of parts read alike."""
    digest = hashlib.sha256(format_name.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]


def _encode(value: object) -> bytes:
    if not isinstance(value, str):
        raise _Rejected("not a string")
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise _Rejected("not valid Unicode") from None


def _text_parts(text: object) -> list[bytes]:
    part = _encode(text)
    if not part or str(text).isspace():
        raise _Rejected("empty")
    return [part]


def _completion_parts(prompt: object, completion: object) -> list[bytes]:
    return [_encode(prompt), *_text_parts(completion)]


def _chat_parts(messages: object) -> list[bytes]:
    if not isinstance(messages, list):
        raise _Rejected("not a list of messages")
    if not messages:
        raise _Rejected("empty")
    parts, said = [], []
    for message in messages:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise _Rejected("message without role or content")
        parts += [_encode(message["role"]), _encode(message["content"])]
        said += [message["content"]] if message["role"] == "assistant" else []
    if not said:
        raise _Rejected("no assistant message")
    if not any(content.strip() for content in said):
        raise _Rejected("empty")
    return parts


def _token_lists(column: Column) -> Iterator[object]:
    """Yield each row's ids as an int64 array where the column is made of integers, else as Python values."""
    if isinstance(column, list):
        yield from column
        return
    kind = column.type
    holds_integers = (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)
    for chunk in column.chunks:
        if not holds_integers or chunk.values.null_count:
            yield from chunk.to_pylist()
            continue
        ids = chunk.values.to_numpy(zero_copy_only=False).astype(TOKEN_TYPE, copy=False)
        offsets, present = chunk.offsets.to_pylist(), chunk.is_valid().to_pylist()
        yield from (ids[start:end] if valid else None for start, end, valid in zip(offsets, offsets[1:], present, strict=False))


def _token_array(value: object) -> np.ndarray:
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu":
        return value.astype(TOKEN_TYPE, copy=False)
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(item, (int, np.integer)) and not isinstance(item, bool) and -(2**63) <= item < 2**63 for item in value
    ):
        raise _Rejected("not a list of token ids")
    return np.array(value, TOKEN_TYPE)


def _token_parts(input_ids: object, labels: object = None) -> list[bytes]:
    ids = _token_array(input_ids)
    if not len(ids):
        raise _Rejected("empty")
    if ids.min() < 0:
        raise _Rejected("not a list of token ids")
    if labels is None:
        return [ids.tobytes()]
    marks = _token_array(labels)
    if len(marks) != len(ids):
        raise _Rejected("labels of another length")
    if (marks == NO_LOSS).all():
        raise _Rejected("no token with loss")
    return [ids.tobytes(), marks.tobytes()]


_PARTS_READERS: dict[str, Callable[..., list[bytes]]] = {
    "text": _text_parts,
    "completion": _completion_parts,
    "chat": _chat_parts,
    "tokens": _token_parts,
}


def column_values(column: Column) -> list[Any]:
    """Return a column as Python values; bytes that are not UTF-8 become lone surrogates, as they do in JSON lines."""
    if isinstance(column, list):
        return column
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        binary = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in binary.to_pylist()]
