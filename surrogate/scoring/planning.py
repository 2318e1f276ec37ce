"""Cuts a corpus into shards: large files into ranges of rows, the rest file by file.

How a file is cut changes nothing in its scores, only how many workers can share it and how soon it is done. The cut
depends on the files alone, so that all workers of an array come to the same plan by themselves.

Parquet says how many rows it has. JSON has to be read for that, by one process before any other begins, and each range
of it from its beginning, so it is cut only where its files are too few to keep many workers busy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from oracle.artifacts import read_json
from oracle.errors import InputError
from oracle.sources import JSON_ENDINGS
from surrogate.scoring.files import InputFile
from surrogate.scoring.items import BLOCK_ROWS, READ_ERRORS
from surrogate.scoring.json_reader import count_rows
from surrogate.scoring.readers import open_native
from surrogate.scoring.segments import write_placed
from surrogate.scoring.shard import Shard

ROWS_FILE = "row_counts.json"
PARTS = 256  # a corpus is cut into at least so many shards, if that leaves them large enough
MIN_PART_BYTES, MAX_PART_BYTES = 2**22, 2**28
MIN_PART_ROWS = 2 * BLOCK_ROWS
SAVE_SECONDS = 10.0  # how often counts are kept while files are counted
MAX_PACKED_PARTS = 16  # every part of a packed file is unpacked from the beginning


def plan_shards(files: Sequence[InputFile], output: Path, *, world_size: int = 1) -> list[Shard]:
    """Return the shards of a corpus, in the order of its files.

    Args:
        files: Its files.
        output: The output folder, where counts of rows are kept.
        world_size: How many machines share the work.
    """
    total_bytes = sum(file.num_bytes for file in files)
    share_bytes = max(MIN_PART_BYTES, total_bytes // (PARTS * world_size))
    counts = _RowCounts(output)
    shards = []
    for file in files:
        is_parquet = file.url.lower().endswith(".parquet")
        num_parts = file.num_bytes // (min(MAX_PART_BYTES, share_bytes) if is_parquet else share_bytes)
        num_rows = counts.of(file) if num_parts > 1 else None
        if num_rows is None:
            shards.append(Shard(file))
            continue
        if not file.url.lower().endswith((".parquet", *JSON_ENDINGS)):
            num_parts = min(num_parts, MAX_PACKED_PARTS)
        part_rows = max(MIN_PART_ROWS, BLOCK_ROWS * math.ceil(num_rows / num_parts / BLOCK_ROWS))
        starts = range(0, max(1, num_rows), part_rows)
        shards += [Shard(file, start, part_rows if start + part_rows < num_rows else None) for start in starts]
    counts.save()
    return shards


class _RowCounts:
    """How many rows files have, remembered in the output folder."""

    def __init__(self, output: Path) -> None:
        self.output = output
        try:
            self._known: dict[str, list[str | int]] = read_json(output / ROWS_FILE)
        except InputError:  # there is none, or half of one
            self._known = {}
        self._saved_seconds = time.monotonic()
        self._is_new = False

    def of(self, file: InputFile) -> int | None:
        """Return the number of rows; None where it cannot be known beforehand."""
        known = self._known.get(file.name)
        if known is not None and known[0] == file.stamp:
            return int(known[1]) if int(known[1]) >= 0 else None
        count = _count(file)
        self._known[file.name] = [file.stamp, -1 if count is None else count]
        self._is_new = True
        if time.monotonic() - self._saved_seconds > SAVE_SECONDS:
            self.save()
        return count

    def save(self) -> None:
        """Keep what was counted."""
        if self._is_new:
            write_placed(self.output, self.output / ROWS_FILE, self._known)
            self._is_new, self._saved_seconds = False, time.monotonic()


def _count(file: InputFile) -> int | None:
    name = file.url.lower()
    try:
        if name.endswith(".parquet"):
            with open_native(file.url) as raw:
                return pq.read_metadata(raw).num_rows
        if "://" in name or not any(ending in name for ending in JSON_ENDINGS):
            return None
        with open_native(file.url) as raw:
            return count_rows(raw, name)
    except READ_ERRORS:
        return None  # whoever reads it reports it
