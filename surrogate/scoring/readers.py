"""Files as streams of rows, in bounded memory: parquet, arrow and JSON lines, also packed.

A reader yields pieces of rows in order, and beside them what it cannot give: a `BadRow` for a row, a `BadFile` for the
rest of a file or a part of it. Parquet and arrow stay arrow.

Left out: comma-separated values (convert them) and version 1 of feather, which cannot be read in pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from oracle.sources import ARROW_ENDINGS
from surrogate.scoring.files import InputFile, open_input
from surrogate.scoring.items import BLOCK_BYTES, BLOCK_ROWS, READ_BYTES, READ_ERRORS, BadFile, Item, Piece, bad_file
from surrogate.scoring.json_reader import JsonReader

Reader: TypeAlias = "ParquetReader | ArrowReader | JsonReader"


def open_reader(file: InputFile) -> Reader | BadFile:
    """Open a file by its ending, or say why it cannot be."""
    name = file.url.lower()
    try:
        if name.endswith(".parquet"):
            return ParquetReader(open_native(file.url))
        if name.endswith(ARROW_ENDINGS):
            return ArrowReader(open_native(file.url))
        return JsonReader(open_native(file.url), name)
    except READ_ERRORS as error:
        return bad_file("cannot be opened", error)


class ParquetReader:
    """Rows of a parquet file; a row group that cannot be read is left out, and the next one goes on."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        try:
            self._file = pq.ParquetFile(raw, buffer_size=READ_BYTES, pre_buffer=False)
        except READ_ERRORS:
            raw.close()
            raise
        self.schema = self._file.schema_arrow
        self.names = list(self.schema.names)
        self.num_rows: int = self._file.metadata.num_rows

    def rows(self, columns: Sequence[str], *, first_row: int, num_rows: int | None) -> Iterator[Item]:
        """Yield pieces of the range."""
        metadata = self._file.metadata
        end = self.num_rows if num_rows is None else min(first_row + num_rows, self.num_rows)
        group_start = 0
        for group in range(metadata.num_row_groups):
            group_rows = metadata.row_group(group).num_rows
            if group_start + group_rows > first_row and group_start < end:
                yield from self._group(group, columns, group_start=group_start, wanted=range(first_row, end))
            group_start += group_rows

    def _group(self, group: int, columns: Sequence[str], *, group_start: int, wanted: range) -> Iterator[Item]:
        metadata = self._file.metadata.row_group(group)
        mean_bytes = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
        batch_rows = max(1, min(BLOCK_ROWS, BLOCK_BYTES // mean_bytes))
        position, group_end = group_start, group_start + metadata.num_rows
        try:
            for batch in self._file.iter_batches(batch_rows, row_groups=[group], columns=list(columns), use_threads=False):
                start = max(0, wanted.start - position)
                stop = min(batch.num_rows, wanted.stop - position)
                if start < stop:
                    yield Piece(position + start, pa.Table.from_batches([batch.slice(start, stop - start)]))
                position += batch.num_rows
                if position >= wanted.stop:
                    return
        except READ_ERRORS as error:
            yield bad_file(f"rows {max(position, wanted.start)} to {min(group_end, wanted.stop) - 1} cannot be read", error)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._raw.close()


class ArrowReader:
    """Rows of an arrow file or stream, record batch by record batch."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        try:
            magic = raw.read(6)
            raw.seek(0)
            if magic[:4] == b"FEA1":
                raise pa.ArrowInvalid("version 1 of feather; write it again as version 2")
            opened = pa.ipc.open_file(raw) if magic == b"ARROW1" else pa.ipc.open_stream(raw)
        except READ_ERRORS:
            raw.close()
            raise
        self.schema = opened.schema
        self._batches = opened if magic != b"ARROW1" else map(opened.get_batch, range(opened.num_record_batches))
        self.names = list(self.schema.names)

    def rows(self, columns: Sequence[str], *, first_row: int, num_rows: int | None) -> Iterator[Item]:
        """Yield pieces of the range."""
        position = 0
        end = None if num_rows is None else first_row + num_rows
        roots = list(dict.fromkeys(_root(name, self.names) for name in columns))
        batches = iter(self._batches)
        while end is None or position < end:
            try:
                batch = next(batches, None)
            except READ_ERRORS as error:
                yield bad_file(f"rows from {max(position, first_row)} on cannot be read", error)
                return
            if batch is None:
                return
            start = max(0, first_row - position)
            stop = batch.num_rows if end is None else min(batch.num_rows, end - position)
            if start < stop:
                yield from self._pieces(batch, roots, position=position, wanted=range(start, stop))
            position += batch.num_rows

    def _pieces(self, batch: pa.RecordBatch, roots: Sequence[str], *, position: int, wanted: range) -> Iterator[Item]:
        try:
            table = pa.table({name: _checked(batch.column(name)) for name in roots})
        except READ_ERRORS as error:
            yield bad_file(f"rows {position + wanted.start} to {position + wanted.stop - 1} cannot be read", error)
            return
        for start in range(wanted.start, wanted.stop, BLOCK_ROWS):
            yield Piece(position + start, table.slice(start, min(BLOCK_ROWS, wanted.stop - start)))

    def close(self) -> None:
        """Close the file."""
        self._raw.close()


def open_native(url: str) -> Any:
    """Open a file for arrow to read bytes from."""
    return pa.PythonFile(open_input(url), mode="r") if "://" in url or "::" in url else pa.OSFile(url, "rb")


def _checked(column: pa.Array) -> pa.Array:
    """Return a column whose offsets were checked; a forged file could else read beyond its memory."""
    binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
    (column if binary is None else column.view(binary)).validate(full=binary is not None)
    return column


def _root(name: str, names: Iterable[str]) -> str:
    return name if name in names else name.partition(".")[0]
