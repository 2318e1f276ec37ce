"""How far the scoring of a corpus has come: rows, rows per second and time left, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from oracle.progress import LINE_INTERVAL_SECONDS

BAR_INTERVAL_SECONDS = 0.2


class ScoringProgress:
    """Counts rows and bytes; the time left goes by the bytes of files, for their rows are not known beforehand."""

    def __init__(self, total_bytes: float, num_shards: int, *, interval_seconds: float, ending: str) -> None:
        self.total_bytes, self.num_shards = total_bytes, num_shards
        self.num_rows = self.num_done = 0
        self.done_bytes, self.open_rows = 0.0, 0
        self._interval_seconds, self._ending = interval_seconds, ending
        self._start_seconds = self._shown_seconds = time.monotonic()
        self._first_rows = 0  # those of the first block, before which models were loaded

    def add_rows(self, num_rows: int) -> None:
        """Count rows of a shard that goes on."""
        if not self.num_rows:
            self._first_rows, self._start_seconds = num_rows, time.monotonic()
        self.num_rows += num_rows
        self.open_rows += num_rows
        self._show()

    def add_shard(self, num_bytes: float, num_rows: int) -> None:
        """Count a finished shard, whose rows were counted before."""
        self.num_done += 1
        self.done_bytes += num_bytes
        self.open_rows = max(0, self.open_rows - num_rows)
        self._show()

    @property
    def rate(self) -> float:
        """Rows per second since the first block was done."""
        return (self.num_rows - self._first_rows) / max(1e-9, time.monotonic() - self._start_seconds)

    @property
    def left_seconds(self) -> float | None:
        """Seconds left, by the bytes of rows so far; None before the first shard is done."""
        closed_rows = self.num_rows - self.open_rows
        if closed_rows <= 0 or not self.done_bytes or not self.rate:
            return None
        bytes_per_row = self.done_bytes / closed_rows
        left_rows = max(0.0, (self.total_bytes - self.done_bytes) / bytes_per_row - self.open_rows)
        return left_rows / self.rate

    def line(self) -> str:
        """Return what is shown."""
        rate = f", {self.rate:,.1f} rows/s" if self.rate else ""
        left = "" if self.left_seconds is None else f", {self.left_seconds:.0f} s left"
        return f"scoring: {self.num_rows:,} rows{rate}, {self.num_done}/{self.num_shards} shards{left}"

    def _show(self) -> None:
        now_seconds = time.monotonic()
        if now_seconds - self._shown_seconds >= self._interval_seconds:
            self._shown_seconds = now_seconds
            sys.stderr.write(self.line() + self._ending)
            sys.stderr.flush()


@contextmanager
def scoring_progress(total_bytes: float, num_shards: int) -> Iterator[ScoringProgress]:
    """Show progress while a block runs: one line that is overwritten on a terminal, a line every 30 seconds elsewhere."""
    on_terminal = sys.stderr.isatty()
    interval_seconds = BAR_INTERVAL_SECONDS if on_terminal else LINE_INTERVAL_SECONDS
    yield ScoringProgress(total_bytes, num_shards, interval_seconds=interval_seconds, ending="\x1b[K\r" if on_terminal else "\n")
    if on_terminal:
        sys.stderr.write("\x1b[K")
