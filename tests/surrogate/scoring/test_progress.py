"""Rows per second and time left."""

from __future__ import annotations

from surrogate.scoring import progress
from surrogate.scoring.progress import ScoringProgress, scoring_progress


def test_the_time_left_goes_by_bytes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    counting = ScoringProgress(1000.0, 4, interval_seconds=1e9, ending="\n")
    assert counting.left_seconds is None
    now[0] = 10.0
    counting.add_rows(10)  # whatever came before, such as loading a model, says nothing of what is to come
    assert counting.rate == 0.0 and counting.line() == "scoring: 10 rows, 0/4 shards"
    now[0] = 18.0
    counting.add_rows(40)
    counting.add_shard(250.0, 50)
    assert counting.rate == 5.0 and counting.left_seconds == 30.0
    now[0] = 19.0
    counting.add_rows(50)  # of the next shard, so half is done
    assert counting.rate == 10.0 and counting.left_seconds == 10.0
    assert counting.line() == "scoring: 100 rows, 10.0 rows/s, 1/4 shards, 10 s left"


def test_a_short_run_is_silent_and_a_long_one_shows_lines(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with scoring_progress(10.0, 1) as counting:
        counting.add_rows(5)
        assert capsys.readouterr().err == ""
        now[0] = 31.0
        counting.add_rows(5)
    assert capsys.readouterr().err == "scoring: 10 rows, 0.2 rows/s, 0/1 shards\n"
