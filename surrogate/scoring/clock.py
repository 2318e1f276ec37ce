"""Seconds and operations that a shard takes, by kind of work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from surrogate.scoring.scorer import Scorer
from surrogate.scoring.segments import Counts


class WorkClock:
    """Adds up seconds by kind of work, and what the scorer counted since it was made or last asked."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.seconds = scorer, {"read": 0.0, "write": 0.0}
        self._began_seconds = time.perf_counter()
        self._before, self._flops = dict(scorer.seconds), scorer.flops

    @contextmanager
    def counting(self, kind: str) -> Iterator[None]:
        """Count the seconds of a block."""
        start_seconds = time.perf_counter()
        yield
        self.seconds[kind] += time.perf_counter() - start_seconds

    def stop(self, counts: Counts) -> None:
        """Put what was counted into `counts`, and begin anew."""
        now_seconds = time.perf_counter()
        spent = {kind: seconds - self._before[kind] for kind, seconds in self.scorer.seconds.items()}
        counts.seconds = {**self.seconds, **spent, "total": now_seconds - self._began_seconds}
        counts.flops = self.scorer.flops - self._flops
        self.seconds, self._began_seconds = {"read": 0.0, "write": 0.0}, now_seconds
        self._before, self._flops = dict(self.scorer.seconds), self.scorer.flops
