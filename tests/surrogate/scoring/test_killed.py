"""SIGKILL at random moments, then again: no row lost, none doubled, the same bytes as of a run that was not killed.

A few kills in the default run; `SCORING_KILLS=20 pytest tests/surrogate/scoring/test_killed.py` makes so many of each.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import time

import numpy as np
import pytest

from surrogate.scoring import planning
from surrogate.scoring.corpus import score_corpus
from surrogate.scoring.engines import local
from surrogate.scoring.progress import ScoringProgress

NUM_KILLS = int(os.environ.get("SCORING_KILLS", "2"))


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for kind in ("scores", "quarantine")
        for path in sorted((folder / kind).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory, make_texts, make_parquet, make_jsonl):
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts(9000)
    texts[3000] = None
    make_parquet(folder / "a.parquet", {"text": texts}, row_group_size=1000)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(5000, seed=1)) + "{broken\n"
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    make_jsonl(folder / "c.jsonl", [{"text": text} for text in make_texts(50, seed=2)])
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, source, predictor_folder):
    """Scores of a run that nobody killed, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    start_seconds = time.monotonic()
    score_corpus(predictor_folder, source, folder, workers=0)
    return files_of(folder), time.monotonic() - start_seconds


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(planning, "MIN_PART_BYTES", 50_000)


def assert_as_if_never_killed(folder, whole):
    assert files_of(folder) == whole[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["complete"], manifest["num_rows"], manifest["num_bad"]) == (True, 14_051, 2)
    assert not list(folder.rglob("*.partial")) and not (folder / ".partial").exists()


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path, predictor_folder, source, whole):
    def run(folder):
        score_corpus(predictor_folder, source, folder, workers=0, checkpoint_seconds=0.0)

    rng = np.random.default_rng(0)
    forking = multiprocessing.get_context("fork")
    num_killed = num_runs = 0
    while num_killed < 2 * NUM_KILLS:
        process = forking.Process(target=run, args=(tmp_path / str(num_runs),))
        process.start()
        process.join(rng.uniform(0.02, 0.5 * whole[1]))
        if process.exitcode is None:
            process.kill()
            num_killed += 1
        process.join()
        if process.exitcode == 0:
            assert_as_if_never_killed(tmp_path / str(num_runs), whole)
            num_runs += 1
    run(tmp_path / str(num_runs))
    assert_as_if_never_killed(tmp_path / str(num_runs), whole)


@pytest.mark.slow
def test_workers_that_are_killed_again_and_again_leave_the_same_bytes(tmp_path, predictor_folder, source, whole, monkeypatch):
    """The driver goes on; who is killed, and where in its work, is chance."""
    rng = np.random.default_rng(1)
    started, killed = [], []
    plain_init, plain_rows = local._Worker.__init__, ScoringProgress.add_rows
    monkeypatch.setattr(local._Worker, "__init__", lambda self, *args: (plain_init(self, *args), started.append(self.process))[0])

    def add_rows(self, num_rows):
        plain_rows(self, num_rows)
        alive = [process for process in started if process.poll() is None]
        if len(killed) < NUM_KILLS and rng.random() < 0.5 and alive:
            time.sleep(rng.uniform(0, 0.05))
            killed.append(alive[rng.integers(len(alive))])
            killed[-1].kill()

    monkeypatch.setattr(ScoringProgress, "add_rows", add_rows)
    num_runs, num_workers = 0, 1 if NUM_KILLS < 3 else 2  # each takes seconds to start
    while len(killed) < NUM_KILLS:
        score_corpus(
            predictor_folder,
            source,
            tmp_path / str(num_runs),
            workers=num_workers,
            checkpoint_seconds=0.0,
            max_attempts=NUM_KILLS + 1,
        )
        assert_as_if_never_killed(tmp_path / str(num_runs), whole)
        num_runs += 1
    assert all(process.poll() is not None for process in started)
