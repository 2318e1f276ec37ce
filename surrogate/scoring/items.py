"""What reading a file yields: pieces of rows, and what could not be read, with the reason; and how large rows are.

Nothing that a file holds raises: a fault is a value, so that everything else is finished and each fault is counted.
Bounds on memory count the bytes of rows one by one, so that they depend on the rows and not on their chunks.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from surrogate.scoring.files import printable

READ_BYTES = 2**20
BLOCK_ROWS = 2048  # rows that are read, encoded and scored together, at most
BLOCK_BYTES = 2**24  # fewer rows where they take up more than this
MAX_ROW_BYTES = 2**26  # a longer line of JSON is no text
SHOWN_CHARS = 80
NUMBER_BYTES = 8  # what a value of anything but strings and lists is counted as
READ_ERRORS = (OSError, pa.lib.ArrowException, EOFError, lzma.LZMAError)


@dataclass(frozen=True)
class BadRow:
    """A row that has no score: its position, why, and how it begins."""

    position: int
    reason: str
    text: str = ""


@dataclass(frozen=True)
class BadFile:
    """Something of a file that cannot be read, and why; `may_pass` if another attempt may succeed."""

    reason: str
    may_pass: bool = False


@dataclass(frozen=True)
class Piece:
    """Consecutive rows: where the first stands, and their columns as arrow."""

    first_row: int
    table: pa.Table


@dataclass(frozen=True)
class JsonRow:
    """One row of JSON: its position, its object, and the bytes it takes up in the file."""

    position: int
    values: dict[str, Any]
    num_bytes: int


Item: TypeAlias = "Piece | JsonRow | BadRow | BadFile"


def bad_file(what: str, error: BaseException) -> BadFile:
    """Return the fault for an error of a file; one with a system error number may pass."""
    number = error.errno if isinstance(error, OSError) else None
    text = error.strerror if number is not None and isinstance(error, OSError) else str(error) or type(error).__name__
    shown = printable(str(text).splitlines()[0]) if text else type(error).__name__
    return BadFile(f"{what}: {shown}", may_pass=number is not None)


def row_bytes(table: pa.Table) -> np.ndarray:
    """Return about how many bytes each row takes up, (N,) int64."""
    total = np.zeros(table.num_rows, dtype=np.int64)
    for column in table.columns:
        sizes = [_value_bytes(chunk) for chunk in column.chunks]
        total += np.concatenate(sizes) if sizes else 0
    return total


def _value_bytes(array: pa.Array) -> np.ndarray:
    kind = array.type
    if any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)):
        return _numbers(pc.binary_length(array))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = _numbers(pc.list_value_length(array))
        ends = np.cumsum(lengths)
        inner = np.concatenate([[0], np.cumsum(_value_bytes(array.flatten()))])
        return np.asarray(inner[ends] - inner[ends - lengths], dtype=np.int64)
    if pa.types.is_struct(kind):
        total = np.zeros(len(array), dtype=np.int64)
        for child in array.flatten():
            total += _value_bytes(child)
        return total
    return np.full(len(array), NUMBER_BYTES, dtype=np.int64)


def _numbers(array: pa.Array) -> np.ndarray:
    return np.asarray(pc.fill_null(array, 0).to_numpy(zero_copy_only=False), dtype=np.int64)
