"""What reading a file yields: pieces of rows, and what could not be read, with the reason.

Nothing that a file holds raises: a fault is a value, so that everything else is finished and each fault is counted.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa

READ_BYTES = 2**20
BLOCK_ROWS = 2048  # rows that are read, encoded and scored together, at most
BLOCK_BYTES = 2**24  # fewer rows where they take up more than this
MAX_ROW_BYTES = 2**26  # a longer line of JSON is no text
SHOWN_CHARS = 80
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
    return BadFile(f"{what}: {str(text).splitlines()[0] if text else type(error).__name__}", may_pass=number is not None)
