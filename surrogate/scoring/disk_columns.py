"""Columns of numbers and of packed text_ids on disk, and sorting what does not fit in memory by dealing it to parts first.

A selection looks at its pool several times and always from the first row to the last, so plain files that are read in
blocks are enough. They are read, not memory-mapped: pages of a mapped file would count as memory of the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from oracle.errors import InputError
from surrogate.aggregation import BLOCK_ROWS

PART_BYTES = 2**26  # what a part of a spill should have at most; sorting it takes a few times as much
MAX_PARTS = 512  # files that are open at once
WRITE_BYTES = 2**20
ID_TYPE = np.dtype("S16")  # a text_id as 16 bytes in place of 32 hex digits; they sort alike
HEX = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
NIBBLE = np.full(256, 255, dtype=np.uint8)
NIBBLE[HEX] = np.arange(16, dtype=np.uint8)


class Column:
    """Numbers of one type, one after the other in a file.

    Args:
        path: The file; what is there is written over.
        dtype: Type of a number, or of a record.
        width: Numbers per row; None makes plain vectors of them.
    """

    def __init__(self, path: Path, dtype: np.typing.DTypeLike, *, width: int | None = None) -> None:
        self.path, self.dtype, self.width = path, np.dtype(dtype), width
        self.num_rows = 0
        self._file: BinaryIO | None = path.open("wb", buffering=WRITE_BYTES)

    def append(self, rows: np.ndarray) -> None:
        """Add rows, (B,) or (B, width)."""
        assert self._file is not None and rows.dtype == self.dtype, "a column is written first and then read"
        self._file.write(np.ascontiguousarray(rows).tobytes())
        self.num_rows += len(rows)

    def close(self) -> None:
        """Write everything out."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def blocks(self, num_rows: int = BLOCK_ROWS) -> Iterator[np.ndarray]:
        """Yield the rows in blocks, (B,) or (B, width)."""
        self.close()
        with self.path.open("rb") as file:
            while data := file.read(num_rows * self.dtype.itemsize * (self.width or 1)):
                yield self._shaped(np.frombuffer(data, dtype=self.dtype))

    def read(self) -> np.ndarray:
        """Return all rows."""
        self.close()
        return self._shaped(np.fromfile(self.path, dtype=self.dtype))

    def _shaped(self, numbers: np.ndarray) -> np.ndarray:
        return numbers if self.width is None else numbers.reshape(-1, self.width)


class Spill:
    """Records dealt to parts, each of which is small enough to be sorted in memory.

    Args:
        folder: Where the parts are kept; made, and left empty.
        dtype: Type of a record.
        num_parts: How many parts; `num_parts_for` says how many are needed.
    """

    def __init__(self, folder: Path, dtype: np.dtype, *, num_parts: int) -> None:
        folder.mkdir(parents=True)
        self._parts = [Column(folder / f"part-{number:03d}", dtype) for number in range(num_parts)]

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for part in self._parts:
            part.close()

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, parts: np.ndarray, records: np.ndarray) -> None:
        """Add records, each to the part of that number, (B,)."""
        order = np.argsort(parts, kind="stable")
        ends = np.cumsum(np.bincount(parts, minlength=len(self._parts)))
        start = 0
        for number, end in enumerate(ends.tolist()):
            if end > start:
                self._parts[number].append(records[order[start:end]])
            start = end

    def parts(self) -> Iterator[np.ndarray]:
        """Yield the records of each part in the order in which they were added, and remove them."""
        for part in self._parts:
            yield part.read()
            part.path.unlink()


def num_parts_for(num_rows: int, row_bytes: int) -> int:
    """Return how many parts keep each within `PART_BYTES`, at most `MAX_PARTS`."""
    return min(MAX_PARTS, max(1, -(-num_rows * row_bytes // PART_BYTES)))


def pack(text_ids: Sequence[str] | pa.Array) -> np.ndarray:
    """Return text_ids as 16 bytes each.

    Raises:
        InputError: One is not 32 hex digits.
    """
    ids = pa.array(text_ids, pa.string()) if not isinstance(text_ids, pa.Array) else text_ids
    if len(ids) == 0:
        return np.zeros(0, dtype=ID_TYPE)
    lengths = np.diff(np.frombuffer(ids.buffers()[1], dtype=np.int32)[ids.offset : ids.offset + len(ids) + 1])
    if not ids.null_count and (lengths == 32).all():
        start = int(np.frombuffer(ids.buffers()[1], dtype=np.int32)[ids.offset])
        digits = NIBBLE[np.frombuffer(ids.buffers()[2], dtype=np.uint8)[start : start + 32 * len(ids)]].reshape(-1, 16, 2)
        if digits.max() < 16:
            return np.ascontiguousarray(digits[..., 0] << 4 | digits[..., 1]).view(ID_TYPE).ravel()
    raise InputError(
        f"some text_id of {len(ids)} is not 32 hex digits, such as {ids[0].as_py()!r}.",
        "text_ids as oracle.read_texts and score_corpus give them",
        "score the corpus with this package.",
    )


def unpack(ids: np.ndarray) -> pa.Array:
    """Return packed text_ids as strings."""
    plain = np.ascontiguousarray(ids).view(np.uint8).reshape(-1, 16)
    digits = HEX[np.stack([plain >> 4, plain & 15], axis=2)]  # (N, 16, 2)
    offsets = np.arange(0, 32 * len(ids) + 1, 32, dtype=np.int64)
    strings = pa.LargeStringArray.from_buffers(len(ids), pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(digits)))
    return strings.cast(pa.string())
