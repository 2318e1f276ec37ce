"""Finished pieces of a file that is not finished: what makes long files resume in the middle and be shared by workers.

A segment holds the scores of consecutive rows, its bad rows, and what was counted. It is cut by time, or where the work
of one worker ends. When the segments of a file reach from its first row to its end, they are joined into the one score
file, whose bytes are those of a file written in one go; so neither time nor workers leave a trace in it.

    segments/<name>/<first row>-<next row>.parquet   scores
    segments/<name>/<first row>-<next row>.bad.jsonl bad rows
    segments/<name>/<first row>-<next row>.json      counts; written last, its existence means complete
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oracle.artifacts import read_json, storing
from oracle.errors import InputError
from surrogate.scoring.items import BadRow
from surrogate.scoring.score_files import ScoreWriter

PARTIAL_FOLDER = ".partial"
MAX_ERRORS = 20


@dataclass
class Counts:
    """What was counted over some rows.

    Attributes:
        num_rows: Rows read, good and bad.
        num_scored: Rows with a score.
        bad_reasons: How many rows have none, by reason.
        num_cut: Rows whose text was longer than the bound, scored by its beginning.
        errors: What could not be read of the file; the first of it, for a file may have a fault in every row group.
        notes: How many values of passed-through columns were left empty, by reason.
        may_pass: Whether another attempt may read what this one could not.
        seconds: Seconds by kind of work.
        flops: Counted floating-point operations of the encoders.
    """

    num_rows: int = 0
    num_scored: int = 0
    bad_reasons: dict[str, int] = field(default_factory=dict)
    num_cut: int = 0
    errors: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    may_pass: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0

    def add(self, other: Counts) -> None:
        """Add what was counted over other rows; the same error counts once."""
        self.num_rows += other.num_rows
        self.num_scored += other.num_scored
        self.num_cut += other.num_cut
        self.may_pass |= other.may_pass
        self.flops += other.flops
        self.bad_reasons = dict(Counter(self.bad_reasons) + Counter(other.bad_reasons))
        self.notes = dict(Counter(self.notes) + Counter(other.notes))
        for kind, seconds in other.seconds.items():
            self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds
        self.errors = list(dict.fromkeys([*self.errors, *other.errors]))[:MAX_ERRORS]


@dataclass
class Segment:
    """A finished piece: its rows, whether the file ends with it, and its counts."""

    first_row: int
    next_row: int
    at_end: bool
    counts: Counts
    score_bytes: int = 0  # of its parquet file


class SegmentFolder:
    """The segments of one file.

    Args:
        output: The output folder.
        name: The name of the file's score file, without its ending.
        stamp: What the segments have to be made of; those of another stamp are removed.
    """

    def __init__(self, output: Path, name: str, stamp: str) -> None:
        self.output, self.stamp = output, stamp
        self.folder = output / "segments" / name

    def finished(self) -> list[Segment]:
        """Return the segments that are complete, in order, none of them overlapping."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                stored = read_json(path)
            except InputError:  # half of one, or another worker has joined them meanwhile
                continue
            if stored.pop("stamp") != self.stamp:
                self.remove()
                return []
            segment = Segment(**{**stored, "counts": Counts(**stored["counts"])})
            if size_of(self.path(segment, ".parquet")) == segment.score_bytes:
                found.append(segment)
        chain: list[Segment] = []
        for segment in sorted(found, key=lambda segment: (segment.first_row, -segment.next_row)):
            if not chain or segment.first_row >= chain[-1].next_row:
                chain.append(segment)
        return chain

    def remove_faulty(self, first_row: int, end: int | None) -> None:
        """Remove segments of a range (`end` is the first row after it) that another attempt may read better."""
        for segment in self.finished():
            if segment.counts.may_pass and segment.first_row >= first_row and (end is None or segment.next_row <= end):
                for ending in (".json", ".parquet", ".bad.jsonl"):
                    self.path(segment, ending).unlink(missing_ok=True)

    def schema(self, segments: Sequence[Segment]) -> pa.Schema:
        """Return the schema of the file; an empty segment may not know the types of passed-through columns."""
        known = next((segment for segment in segments if segment.counts.num_scored), segments[0])
        return pq.read_schema(self.path(known, ".parquet"))

    def copy(self, segments: Sequence[Segment], writer: SegmentWriter) -> None:
        """Add the rows of segments to a writer, row group by row group, and what was counted of them."""
        for segment in segments:
            if segment.counts.num_scored:
                with pq.ParquetFile(self.path(segment, ".parquet")) as file:
                    for group in range(file.num_row_groups):
                        writer.add_table(file.read_row_group(group, use_threads=False))
            if segment.counts.bad_reasons:
                with self.path(segment, ".bad.jsonl").open(encoding="utf-8") as lines:
                    writer.add_lines(lines)
            writer.counts.add(segment.counts)

    def path(self, segment: Segment, ending: str) -> Path:
        """Return where a file of a segment is."""
        return self.folder / f"{segment.first_row:012d}-{segment.next_row:012d}{ending}"

    def remove(self) -> None:
        """Remove all segments."""
        shutil.rmtree(self.folder, ignore_errors=True)


class SegmentWriter:
    """Writes one segment, or a whole score file if it turns out to hold all rows."""

    def __init__(self, output: Path, first_row: int, schema: pa.Schema) -> None:
        self.first_row, self.counts = first_row, Counts()
        self._schema = schema
        folder = output / PARTIAL_FOLDER
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        stem = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._scores, self._bad = folder / f"{stem}.parquet", folder / f"{stem}.jsonl"
        self._writer = ScoreWriter(self._scores, schema)
        self._bad_file: Any = None

    def add_rows(self, text_ids: Sequence[str], positions: np.ndarray, values: np.ndarray, passed: Sequence[pa.Array]) -> None:
        """Add scored rows.

        Args:
            text_ids: n ids.
            positions: (n,) rows in the input file.
            values: (n, C) scores, or (n, 2C) scores and spreads.
            passed: n values of each passed-through column.
        """
        columns = [pa.array(text_ids, pa.string()), pa.array(positions, pa.int64())]
        columns += [pa.array(np.ascontiguousarray(column)) for column in values.T]
        self._writer.write(pa.Table.from_arrays([*columns, *passed], schema=self._schema))
        self.counts.num_scored += len(text_ids)

    def add_table(self, rows: pa.Table) -> None:
        """Add rows as another segment has them; they are not counted."""
        self._writer.write(rows)

    def add_bad(self, rows: Sequence[BadRow]) -> None:
        """Add rows without a score."""
        self.counts.add(Counts(bad_reasons=Counter(row.reason for row in rows)))
        self.add_lines(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows)

    def add_lines(self, lines: Iterable[str]) -> None:
        """Add bad rows as lines of JSON; they are not counted."""
        with storing(self._bad):
            for line in lines:
                if self._bad_file is None:
                    self._bad_file = self._bad.open("w", encoding="utf-8")
                self._bad_file.write(line)

    def finish(self, scores: Path, bad: Path) -> None:
        """Finish both files and give them their names; whatever fails, nothing half written is left."""
        with self.or_abandoned():
            self._writer.close()
            if self._bad_file is not None:
                with storing(self._bad):
                    self._bad_file.close()
                place(self._bad, bad)
            else:
                bad.unlink(missing_ok=True)
            place(self._scores, scores)

    def finish_as(self, folder: SegmentFolder, *, next_row: int, at_end: bool) -> None:
        """Make a segment of what was written."""
        segment = Segment(self.first_row, next_row, at_end, self.counts)
        self.finish(folder.path(segment, ".parquet"), folder.path(segment, ".bad.jsonl"))
        segment.score_bytes = size_of(folder.path(segment, ".parquet"))
        write_placed(folder.output, folder.path(segment, ".json"), {"stamp": folder.stamp, **dataclasses.asdict(segment)})

    def abandon(self) -> None:
        """Remove what was written."""
        self._writer.abandon()
        if self._bad_file is not None:
            with suppress(OSError):  # a full disk refuses the rest; the file goes anyway
                self._bad_file.close()
            self._bad.unlink(missing_ok=True)

    @contextmanager
    def or_abandoned(self) -> Iterator[None]:
        """Remove what was written if the block raises, also where the process is asked to stop."""
        try:
            yield
        except BaseException:
            self.abandon()
            raise


def place(partial: Path, path: Path) -> None:
    """Give a finished file its name; whoever else finished the same work has written the same bytes."""
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, path)


def size_of(path: Path) -> int:
    """Return the bytes of a file, -1 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def write_placed(output: Path, path: Path, value: Any) -> None:
    """Write JSON under a temporary name of the output folder, and give it its name."""
    partial = output / PARTIAL_FOLDER / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.json"
    with storing(path):
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
            place(partial, path)
        finally:
            partial.unlink(missing_ok=True)
