"""The rows of a file as blocks of texts.

A block is a run of consecutive rows that ends at a multiple of `BLOCK_ROWS`, or sooner where its rows are long. Where it
ends depends on the rows alone, so the texts that are encoded beside each other are the same however a file is cut into
row groups, shards or resumed runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from oracle.errors import InputError
from oracle.sources import Column
from surrogate.scoring.blocks import Block
from surrogate.scoring.files import InputFile, printable
from surrogate.scoring.items import BLOCK_BYTES, BLOCK_ROWS, BadFile, BadRow, Item, JsonRow, Piece, row_bytes
from surrogate.scoring.json_reader import JsonReader
from surrogate.scoring.layout import Layout, RawRows, ScoreOptions, walk
from surrogate.scoring.readers import open_reader


def read_blocks(
    file: InputFile, options: ScoreOptions, *, first_row: int = 0, num_rows: int | None = None
) -> Iterator[Layout | Block | BadFile]:
    """Yield the rows of a file as blocks of texts.

    Args:
        file: The file.
        options: Text column, format, passed columns and bounds.
        first_row: Where to begin: a multiple of `BLOCK_ROWS`, or the `next_row` of a block.
        num_rows: How many rows to read; None reads to the end.

    Yields:
        The layout of the file, once it is known; then blocks in order, and a `BadFile` for each thing that cannot be
        read. Nothing that a file holds raises.
    """
    reader = open_reader(file)
    if isinstance(reader, BadFile):
        yield reader
        return
    try:
        if isinstance(reader, JsonReader) and reader.is_empty:
            return
        try:
            layout = Layout(reader, options, file.name)
        except InputError as error:
            yield BadFile(printable(error.given))
            return
        yield layout
        items = reader.rows(layout.read_columns, first_row=first_row, num_rows=num_rows)
        gather = _json_blocks if isinstance(reader, JsonReader) else _arrow_blocks
        for rows in gather(items, layout):
            yield rows if isinstance(rows, BadFile) else layout.block(rows)
    finally:
        reader.close()


def _json_blocks(items: Iterator[Item], layout: Layout) -> Iterator[RawRows | BadFile]:
    """Gather rows of JSON into blocks."""
    rows: list[JsonRow] = []
    bad: list[BadRow] = []
    num_bytes = 0

    def finish() -> RawRows:
        positions = [row.position for row in rows]
        last = max([*positions[-1:], *(row.position for row in bad[-1:])])
        columns: dict[str, Column] = {path: [walk(row.values, path) for row in rows] for path in layout.read_columns}
        return RawRows(last + 1, positions, columns, bad)

    for item in items:
        if isinstance(item, BadFile):
            yield item
            continue
        assert not isinstance(item, Piece)
        if isinstance(item, JsonRow):
            rows.append(item)
            num_bytes += item.num_bytes
        else:
            bad.append(item)
        if (item.position + 1) % BLOCK_ROWS == 0 or num_bytes >= BLOCK_BYTES:
            yield finish()
            rows, bad, num_bytes = [], [], 0
    if rows or bad:
        yield finish()


def _arrow_blocks(items: Iterator[Item], layout: Layout) -> Iterator[RawRows | BadFile]:
    """Cut and join pieces of arrow into blocks."""
    waiting: list[Piece] = []
    num_bytes = 0

    def finish() -> RawRows:
        positions = [piece.first_row + row for piece in waiting for row in range(piece.table.num_rows)]
        table = pa.concat_tables([piece.table for piece in waiting]).combine_chunks()
        return RawRows(positions[-1] + 1, positions, {name: table[name] for name in table.column_names}, [])

    for item in items:
        if isinstance(item, BadFile):
            yield item
            continue
        assert isinstance(item, Piece)
        sizes = row_bytes(item.table)
        start = 0
        while start < item.table.num_rows:
            position = item.first_row + start
            if waiting and position > waiting[-1].first_row + waiting[-1].table.num_rows:
                yield finish()  # rows between them could not be read
                waiting, num_bytes = [], 0
            until_end = BLOCK_ROWS - position % BLOCK_ROWS
            total = np.cumsum(sizes[start : start + until_end])
            length = min(len(total), int(np.searchsorted(total, BLOCK_BYTES - num_bytes)) + 1)
            waiting.append(Piece(position, item.table.slice(start, length)))
            num_bytes += int(total[length - 1])
            start += length
            if (position + length) % BLOCK_ROWS == 0 or num_bytes >= BLOCK_BYTES:
                yield finish()
                waiting, num_bytes = [], 0
    if waiting:
        yield finish()
