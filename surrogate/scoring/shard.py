"""`score_shard`: a file, or a range of its rows, in; its scores out. Running it again changes nothing.

Every engine is a loop around this function. The work on a file is finished when its score file and then its report have
their names. A shard that is one range of several leaves segments, and whoever finishes the last of them joins them; a
worker that is killed leaves those that it finished, and another goes on behind them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from surrogate.scoring.blocks import Block
from surrogate.scoring.files import InputFile, stamp_of_path
from surrogate.scoring.items import BadFile, BadRow
from surrogate.scoring.layout import Layout, ScoreOptions
from surrogate.scoring.outputs import (
    DAMAGED,
    DONE,
    FAILED,
    ShardReport,
    corpus_identity,
    finished_report,
    local_folder,
    open_output,
    output_name,
    quarantine_path,
    report_path,
    score_header,
    score_path,
)
from surrogate.scoring.positions import read_positions
from surrogate.scoring.read_ahead import read_ahead
from surrogate.scoring.rows import read_blocks
from surrogate.scoring.score_files import score_schema
from surrogate.scoring.scorer import PredictorLike, Scorer, WorkClock, load_scorer, one_thread, read_identity
from surrogate.scoring.segments import Counts, Segment, SegmentFolder, SegmentWriter, size_of, write_placed

Prepared: TypeAlias = Generator[tuple[Layout | Block | BadFile, Any], None, None]

CHECKPOINT_SECONDS = 60.0  # what a killed worker loses at most


@dataclass(frozen=True)
class Shard:
    """A file, or a range of its rows: what one call of `score_shard` works on.

    Attributes:
        file: The input file.
        first_row: The first row of the range, a multiple of `BLOCK_ROWS`.
        num_rows: How many rows; None to the end of the file, as the last range of each file has it.
    """

    file: InputFile
    first_row: int = 0
    num_rows: int | None = None

    @property
    def name(self) -> str:
        """The file's name, with the range where it is one."""
        if self.first_row == 0 and self.num_rows is None:
            return self.file.name
        end = "" if self.num_rows is None else self.first_row + self.num_rows - 1
        return f"{self.file.name}[{self.first_row}-{end}]"


@dataclass(frozen=True)
class ScoreTask:
    """What an engine hands to its workers: all that `score_shard` needs beside the shard; picklable for a folder."""

    predictor: PredictorLike
    output: str
    options: ScoreOptions = ScoreOptions()
    checkpoint_seconds: float = CHECKPOINT_SECONDS

    def score(self, shard: Shard, on_rows: Callable[[int], None] | None = None) -> ShardReport:
        """Call `score_shard`."""
        return score_shard(
            shard,
            self.predictor,
            self.output,
            options=self.options,
            on_rows=on_rows,
            checkpoint_seconds=self.checkpoint_seconds,
        )

    def num_kept(self, shard: Shard) -> int:
        """Return how many rows of a shard are in segments, for a file that is not finished."""
        segments = SegmentFolder(Path(self.output), output_name(shard.file.name), shard.file.stamp).finished()
        end = float("inf") if shard.num_rows is None else shard.first_row + shard.num_rows
        inside = [segment for segment in segments if segment.first_row >= shard.first_row and segment.next_row <= end]
        return sum(segment.next_row - segment.first_row for segment in inside)

    def fail(self, shard: Shard, reason: str) -> ShardReport:
        """Give up the rows of a shard that are not scored yet, so that the rest of its file can be finished."""
        return _Work(shard, self.predictor, Path(self.output), options=self.options).give_up(reason)


def score_shard(
    shard: Shard,
    predictor: PredictorLike,
    output: str | Path,
    *,
    options: ScoreOptions | None = None,
    on_rows: Callable[[int], None] | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> ShardReport:
    """Score the rows of a shard and write them; what is finished is left alone.

    Args:
        shard: The file or range.
        predictor: A predictor's folder, which is loaded once per process, or a fitted predictor.
        output: The output folder, the same for all shards of a corpus.
        options: How rows are read.
        on_rows: Told the number of rows of each block when it is written.
        checkpoint_seconds: After so many seconds what was scored is kept as a segment.

    Returns:
        What became of it. Faults of the input are in there and do not raise.

    Raises:
        MissingFileError: There is no predictor.
        MismatchError: The output folder holds scores of another predictor or of other options.
        StorageError: The disk is full; what was finished stays.

    Example:
        >>> shards = [Shard(file) for file in list_inputs("pool/*.parquet").files]              # doctest: +SKIP
        >>> for shard in shards[rank::world_size]: score_shard(shard, "predictor", "scored")   # doctest: +SKIP
    """
    predictor = predictor if isinstance(predictor, (str, Path)) else load_scorer(predictor)
    work = _Work(shard, predictor, local_folder(output), options=options or ScoreOptions())
    report = finished_report(work.output, shard.file)
    if report is not None and not report.counts.may_pass:
        return dataclasses.replace(report, name=shard.name, skipped=True)
    with one_thread():
        return work.run(load_scorer(predictor), on_rows or (lambda num_rows: None), checkpoint_seconds)


class _Work:
    """One shard on its way."""

    def __init__(self, shard: Shard, predictor: PredictorLike, output: Path, *, options: ScoreOptions) -> None:
        self.shard, self.file, self.output, self.options = shard, shard.file, output, options
        identity = corpus_identity(read_identity(predictor), options)
        open_output(output, identity)
        self.header = score_header(identity, self.file)
        self.segments = SegmentFolder(output, output_name(self.file.name), self.file.stamp)
        self.counts = Counts()  # of the rows of this shard
        self._next_row = shard.first_row

    def run(self, scorer: Scorer, on_rows: Callable[[int], None], checkpoint_seconds: float) -> ShardReport:
        """Score what no segment has, and join the segments of the file if it is complete."""
        self.segments.remove_faulty(self.shard.first_row, self.end)
        for first_row, num_rows in list(self._gaps()):
            rest = self._score(scorer, first_row, num_rows, on_rows=on_rows, checkpoint_seconds=checkpoint_seconds)
            self.counts.add(rest.counts)
            if rest.first_row == 0 and num_rows is None:
                return self._finish_file(rest, [])  # no segment was needed
            rest.finish_as(self.segments, next_row=self._next_row, at_end=num_rows is None)
        return self._join()

    def give_up(self, reason: str) -> ShardReport:
        """Cover what no segment has by empty ones, which another run tries again."""
        for first_row, num_rows in list(self._gaps()):
            writer = SegmentWriter(self.output, first_row, self._schema())
            writer.counts = Counts(errors=[f"{self.shard.name}: {reason}"], may_pass=True)
            self.counts.add(writer.counts)
            writer.finish_as(self.segments, next_row=first_row + (num_rows or 0), at_end=num_rows is None)
        return self._join()

    @property
    def end(self) -> int | None:
        """The first row after the shard; None at the end of the file."""
        return None if self.shard.num_rows is None else self.shard.first_row + self.shard.num_rows

    def _gaps(self) -> Iterator[tuple[int, int | None]]:
        """Yield first row and number of rows of what no segment has."""
        position = self.shard.first_row
        for segment in self.segments.finished():
            if segment.next_row < position or (segment.next_row == position and not segment.at_end):
                continue
            if self.end is not None and segment.first_row >= self.end:
                break
            if segment.first_row > position:
                yield position, segment.first_row - position
            if segment.at_end:
                return
            position = segment.next_row
        if self.end is None or position < self.end:
            yield position, None if self.end is None else self.end - position

    def _score(
        self,
        scorer: Scorer,
        first_row: int,
        num_rows: int | None,
        *,
        on_rows: Callable[[int], None],
        checkpoint_seconds: float,
    ) -> SegmentWriter:
        """Score consecutive rows, with a segment now and then; return the writer of the last rows."""
        clock = WorkClock(scorer)
        schema, writer = self._schema(), None
        self._next_row = first_row
        began_seconds = time.monotonic()
        try:
            for item, prepared in read_ahead(self._prepared(first_row, num_rows, clock)):
                if isinstance(item, Layout):
                    schema = self._schema(item)
                writer = writer or SegmentWriter(self.output, self._next_row, schema)
                if isinstance(item, BadFile):
                    writer.counts.add(Counts(errors=[item.reason], may_pass=item.may_pass))
                elif isinstance(item, Block):
                    self._write(item, prepared, writer, clock)
                    self._next_row = item.next_row
                    on_rows(item.num_rows)
                    if time.monotonic() - began_seconds >= checkpoint_seconds:
                        writer.counts.seconds, writer.counts.flops = clock.stop()
                        self.counts.add(writer.counts)
                        writer.finish_as(self.segments, next_row=self._next_row, at_end=False)
                        writer, began_seconds = None, time.monotonic()
            writer = writer or SegmentWriter(self.output, self._next_row, schema)
            writer.counts.seconds, writer.counts.flops = clock.stop()
            if num_rows is not None:
                self._next_row = first_row + num_rows
            return writer
        except BaseException:
            if writer is not None:
                writer.abandon()
            raise

    def _prepared(self, first_row: int, num_rows: int | None, clock: WorkClock) -> Prepared:
        """Read and tokenise; this runs in another thread."""
        blocks = read_blocks(self.file, self.options, first_row=first_row, num_rows=num_rows)
        wanted = read_positions(self.options.only, self.file.name) if self.options.only else None
        while True:
            with clock.counting("read"):
                item = next(blocks, None)
            if item is None:
                return
            if wanted is not None and isinstance(item, Block):
                item = item.only(wanted)
            yield item, clock.scorer.prepare(item.texts) if isinstance(item, Block) else None

    def _write(self, block: Block, prepared: Any, writer: SegmentWriter, clock: WorkClock) -> None:
        """Score a block and add it to the writer."""
        values, reasons = clock.scorer.score(block.texts, prepared)  # (U, C or 2C)
        with clock.counting("write"):
            bad_rows, positions, text_ids = block.bad_rows, block.positions, block.text_ids
            passed, text_of_row = list(block.passed.values()), block.text_of_row
            if any(reasons):
                good = np.array([not reasons[text] for text in text_of_row], dtype=bool)
                bad = [
                    BadRow(int(positions[row]), reasons[text_of_row[row]], block.beginning(row)) for row in np.flatnonzero(~good)
                ]
                bad_rows = sorted([*bad_rows, *bad], key=lambda row: row.position)
                text_ids = [text_id for text_id, keep in zip(text_ids, good, strict=True) if keep]
                positions, text_of_row = positions[good], text_of_row[good]
                passed = [column.filter(pa.array(good)) for column in passed]
            writer.add_bad(bad_rows)
            writer.add_rows(text_ids, positions, values[text_of_row], passed)
            writer.counts.add(Counts(num_rows=block.num_rows, num_cut=block.num_cut, notes=block.notes))

    def _schema(self, layout: Layout | None = None) -> pa.Schema:
        passed = pa.schema([pa.field(name, pa.string()) for name in self.options.columns])
        return score_schema(self.header, passed if layout is None else layout.passed_schema)

    def _join(self) -> ShardReport:
        """Join the segments of the file if they reach from its first row to its end."""
        segments = self.segments.finished()
        is_complete = bool(segments) and segments[0].first_row == 0 and segments[-1].at_end
        is_complete &= all(before.next_row == after.first_row for before, after in pairwise(segments))
        if not is_complete:
            return self._report(self.shard.name, self.counts)
        try:
            writer = SegmentWriter(self.output, 0, self.segments.schema(segments))
            with writer.or_abandoned():
                self.segments.copy(segments, writer)
        except FileNotFoundError:  # another worker has joined them meanwhile
            if finished_report(self.output, self.file) is None:
                raise
            return self._report(self.shard.name, self.counts)
        return self._finish_file(writer, segments)

    def _finish_file(self, writer: SegmentWriter, segments: list[Segment]) -> ShardReport:
        """Give score file and quarantine their names, then write the report."""
        if "://" not in self.file.url and stamp_of_path(self.file.url) != self.file.stamp:
            writer.counts.add(Counts(errors=["the file changed while it was read"], may_pass=True))
        report = self._report(self.file.name, writer.counts)
        scores, bad = score_path(self.output, self.file.name), quarantine_path(self.output, self.file.name)
        if report.status == FAILED:
            writer.abandon()
            scores.unlink(missing_ok=True)
            bad.unlink(missing_ok=True)
        else:
            writer.finish(scores, bad)
            report = dataclasses.replace(report, score_bytes=size_of(scores))
        write_placed(self.output, report_path(self.output, self.file.name), report.as_dict())
        if segments and not report.counts.may_pass:
            self.segments.remove()
        return self._report(self.shard.name, self.counts)

    def _report(self, name: str, counts: Counts) -> ShardReport:
        status = DONE if not counts.errors else DAMAGED if counts.num_rows else FAILED
        return ShardReport(name, self.file.name, status, counts, url=self.file.url, stamp=self.file.stamp)
