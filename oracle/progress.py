"""Progress of long loops, on stderr: a bar on a terminal, a line every 30 seconds elsewhere.

Library code calls `track` and never prints; a loop that ends within the first interval stays silent
where there is no terminal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

LINE_INTERVAL_SECONDS = 30.0


class Tracker(Protocol):
    """What `track` yields."""

    def advance(self, amount: int = 1) -> None:
        """Count `amount` more units as done."""


class _LineTracker:
    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.start_seconds = self.last_line_seconds = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        now_seconds = time.monotonic()
        if now_seconds - self.last_line_seconds < LINE_INTERVAL_SECONDS:
            return
        self.last_line_seconds = now_seconds
        rate = self.done / (now_seconds - self.start_seconds)
        left_seconds = (self.total - self.done) / rate if rate > 0 else float("inf")
        sys.stderr.write(f"{self.title}: {self.done}/{self.total} {self.unit}, {rate:.1f}/s, {left_seconds:.0f} s left\n")
        sys.stderr.flush()


class _BarTracker:
    def __init__(self, advance_bar: object) -> None:
        self._advance_bar = advance_bar

    def advance(self, amount: int = 1) -> None:
        self._advance_bar(amount)  # type: ignore[operator]


@contextmanager
def track(title: str, total: int, *, unit: str = "texts") -> Iterator[Tracker]:
    """Show how far a loop over `total` units has come, with its rate and the time left.

    Args:
        title: What is being done, in a few words.
        total: How many units there are.
        unit: The name of one unit, in the plural.
    """
    if not sys.stderr.isatty():
        yield _LineTracker(title, total, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, rate="")

        def advance(amount: int) -> None:
            bar.advance(task, amount)
            speed = bar.tasks[0].speed
            if speed:
                bar.update(task, rate=f"{speed:.1f}/s")

        yield _BarTracker(advance)


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence the bars of transformers, one per file that it loads or writes."""
    from transformers.utils import logging

    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()
