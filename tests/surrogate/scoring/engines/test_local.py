"""The local engine: workers that die, files that kill them, and the same bytes as without workers."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oracle.errors import InputError, MismatchError, StorageError
from surrogate.scoring import planning
from surrogate.scoring.attempts import WorkerError
from surrogate.scoring.corpus import score_corpus
from surrogate.scoring.engines import local
from surrogate.scoring.files import InputFile
from surrogate.scoring.outputs import ShardReport
from surrogate.scoring.shard import ScoreTask, Shard

POISON = """
import os, signal
import surrogate.scoring.rows as rows

plain = rows.read_blocks

def read_blocks(file, options, **region):
    if file.name == "kills.jsonl":
        os.kill(os.getpid(), signal.SIGKILL)
    yield from plain(file, options, **region)

rows.read_blocks = read_blocks
"""
DRIVER = """
import sys
from surrogate.scoring import planning
from surrogate.scoring.corpus import score_corpus
planning.MIN_PART_BYTES = 20_000
score_corpus(*sys.argv[1:], workers=1, checkpoint_seconds=0.0)
"""
ACTOR = """
import json, os, sys, time
task = json.loads(sys.stdin.readline())
for line in sys.stdin:
    name = json.loads(line)["file"]["name"]
    log = os.path.join(task["output"], name)
    attempt = os.path.getsize(log) if os.path.exists(log) else 0
    open(log, "a").write("x")
    print(json.dumps({"rows": 5}), flush=True)
    if "kills" in name and attempt < int(name.split("-")[1]):
        os.kill(os.getpid(), 9)
    if "raises" in name and attempt < int(name.split("-")[1]):
        print(json.dumps({"error": "RuntimeError", "text": "RuntimeError: a bug"}), flush=True)
        time.sleep(60)
    if "full" in name:
        print(json.dumps({"error": "StorageError", "text": "", "parts": ["full", "space", "free some"]}), flush=True)
        time.sleep(60)
    print(json.dumps({"report": {"name": name, "input_name": name, "status": "done", "counts": {"num_rows": 5}}}), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class _Task(ScoreTask):
    """A task whose shards that are given up are reported and no more."""

    def fail(self, shard, reason):
        return ShardReport(shard.name, shard.name, "failed", url=reason)

    def num_kept(self, shard):
        return os.path.getsize(os.path.join(self.output, shard.name)) if "steady" in shard.name else 0


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Run the engine with workers that only act."""
    monkeypatch.setattr(local, "WORKER_COMMAND", (sys.executable, "-S", "-c", ACTOR))
    monkeypatch.setattr(local, "uses_gpu", lambda predictor: False)

    def run(*names, checkpoint_seconds=1e9, **options):
        shards = [Shard(InputFile(name, name, 1, "")) for name in names]
        task = _Task("predictor", str(tmp_path), checkpoint_seconds=checkpoint_seconds)
        rows = []
        reports = list(local.run(shards, task, on_rows=rows.append, **options))
        return {report.name: report.url or report.status for report in reports}, sum(rows)

    return run


def test_each_shard_is_reported_once_by_however_many_workers(play):
    names = [f"shard{number}" for number in range(7)]
    for workers in (1, 3, 20):
        assert play(*names, workers=workers) == (dict.fromkeys(names, "done"), 35)


def test_a_shard_whose_worker_dies_is_tried_again_and_given_up_at_last(play):
    found, _ = play("good", "kills-2-", "kills-9-", "raises-2-", "raises-9-", workers=2)
    assert found == {
        "good": "done",
        "kills-2-": "done",
        "raises-2-": "done",
        "kills-9-": "its worker was killed by signal 9, 3 times",
        "raises-9-": "RuntimeError: a bug, 3 times",
    }


def test_a_shard_that_gets_on_between_deaths_is_not_given_up(play):
    assert play("kills-5-steady", workers=1, max_attempts=2)[0] == {"kills-5-steady": "done"}


def test_a_shard_that_takes_its_time_to_die_is_given_up_all_the_same(play):
    """As one whose memory grows: what counts is that rows were kept, not that time went by."""
    found, _ = play("good", "kills-9-", workers=1, checkpoint_seconds=-1.0)
    assert found == {"good": "done", "kills-9-": "its worker was killed by signal 9, 3 times"}


def test_a_full_disk_ends_the_run(play):
    with pytest.raises(StorageError, match="full\n  accepted: space\n  to do: free some"):
        play("good", "full", "good2", workers=2)


def test_where_no_worker_gets_anywhere_the_run_stops(play):
    with pytest.raises(WorkerError, match="3 shards failed 1 times each and none succeeded, at last: its worker"):
        play(*(f"kills-9-{number}" for number in range(9)), workers=1, max_attempts=1)


def test_no_worker_is_left_when_the_caller_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "WORKER_COMMAND", (sys.executable, "-S", "-c", ACTOR))
    monkeypatch.setattr(local, "uses_gpu", lambda predictor: False)
    started = []
    plain = local._Worker.__init__
    monkeypatch.setattr(local._Worker, "__init__", lambda self, *args: (plain(self, *args), started.append(self))[0])
    shards = [Shard(InputFile(name, name, 1, "")) for name in ("a", "raises-9-", "b", "c")]
    running = local.run(shards, _Task("predictor", str(tmp_path)), workers=2)
    next(running)
    running.close()
    assert len(started) >= 2 and all(worker.process.returncode is not None for worker in started)


def scores_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted((folder / "scores").rglob("*.parquet"))}


@pytest.mark.slow
def test_real_workers_end_with_their_driver_and_another_run_goes_on_to_the_same_bytes(
    tmp_path, predictor_folder, make_texts, make_jsonl, make_parquet, monkeypatch
):
    monkeypatch.setattr(planning, "MIN_PART_BYTES", 20_000)
    make_parquet(tmp_path / "in" / "a.parquet", {"text": make_texts(9000)})
    make_jsonl(tmp_path / "in" / "b.jsonl", [{"text": text} for text in make_texts(30, seed=1)])
    score_corpus(predictor_folder, tmp_path / "in", tmp_path / "here", workers=0)
    make_jsonl(tmp_path / "in" / "kills.jsonl", [{"text": "salt"}])
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(POISON)
    arguments = [str(predictor_folder), str(tmp_path / "in"), str(tmp_path / "out")]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments])
    while not list((tmp_path / "out").glob("*/**/*.parquet")) and driver.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    driver.kill()
    driver.wait()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        time.sleep(0.01)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    scored = score_corpus(predictor_folder, tmp_path / "in", tmp_path / "out", workers=1, max_attempts=1)
    files = {entry["name"]: entry for entry in scored.manifest["files"]}
    assert {name: entry["status"] for name, entry in files.items()} == {
        "a.parquet": "done",
        "b.jsonl": "done",
        "kills.jsonl": "failed",
    }
    assert files["kills.jsonl"]["errors"] == ["kills.jsonl: its worker was killed by signal 9, once"]
    assert scores_of(tmp_path / "out") == scores_of(tmp_path / "here")


def test_faults_of_the_caller_are_raised_as_they_are(tmp_path, predictor_folder, network_folder, make_jsonl, monkeypatch):
    make_jsonl(tmp_path / "in" / "x.jsonl", [{"text": "salt"}])
    out = tmp_path / "out"
    score_corpus(predictor_folder, tmp_path / "in", out, workers=0)
    make_jsonl(tmp_path / "in" / "y.jsonl", [{"text": "salt"}])
    monkeypatch.setattr("surrogate.scoring.corpus.open_output", lambda *_: None)  # let the worker find out
    with pytest.raises(MismatchError, match="predictor: stored"):
        score_corpus(network_folder, tmp_path / "in", out, workers=1)


def test_one_worker_per_gpu_only_where_an_encoder_uses_one(tmp_path, predictor_folder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert local.visible_gpus() == ["2", "5"] and not local.uses_gpu(predictor_folder)
    entry = {"name": "sentence", "options": {"device": "auto"}}
    (tmp_path / "predictor.json").write_text(json.dumps({"encoders": [entry]}))
    assert local.uses_gpu(tmp_path)


def test_counts_of_workers_are_checked(tmp_path, predictor_folder, make_jsonl):
    make_jsonl(tmp_path / "x.jsonl", [{"text": "salt"}])
    for options in ({"workers": -1}, {"workers": 1.5}, {"max_attempts": 0}):
        with pytest.raises(InputError):
            score_corpus(predictor_folder, tmp_path / "x.jsonl", tmp_path / "out", **options)
