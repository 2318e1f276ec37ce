"""SIGKILL at random moments, then again: no row lost, none doubled, the same bytes as of a run that was not killed."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import time

import numpy as np

from surrogate.scoring import planning
from surrogate.scoring.corpus import score_corpus


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for kind in ("scores", "quarantine")
        for path in sorted((folder / kind).rglob("*"))
        if path.is_file()
    }


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    tmp_path, predictor_folder, make_texts, make_parquet, make_jsonl, monkeypatch
):
    monkeypatch.setattr(planning, "MIN_PART_BYTES", 50_000)
    texts = make_texts(9000)
    texts[3000] = None
    make_parquet(tmp_path / "in" / "a.parquet", {"text": texts}, row_group_size=1000)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(5000, seed=1)) + "{broken\n"
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    make_jsonl(tmp_path / "in" / "c.jsonl", [{"text": text} for text in make_texts(50, seed=2)])
    started = time.monotonic()
    score_corpus(predictor_folder, tmp_path / "in", tmp_path / "whole", workers=0)
    seconds = time.monotonic() - started

    def run():
        score_corpus(predictor_folder, tmp_path / "in", tmp_path / "killed", workers=0, checkpoint_seconds=0.0)

    rng = np.random.default_rng(0)
    forking = multiprocessing.get_context("fork")
    num_killed = 0
    for _ in range(8):
        process = forking.Process(target=run)
        process.start()
        process.join(rng.uniform(0.02, 0.4 * seconds))
        if process.exitcode == 0:
            break
        assert process.exitcode is None
        process.kill()
        process.join()
        num_killed += 1
    run()
    assert num_killed >= 3, num_killed
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    manifest = json.loads((tmp_path / "killed" / "manifest.json").read_text())
    assert (manifest["complete"], manifest["num_rows"], manifest["num_bad"]) == (True, 14_051, 2)
