"""The demo end to end, and killed in the middle: really, with SIGKILL, three times."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "surrogate", "demo"]
SAME_BYTES = (
    "pool.parquet",
    "checkpoint/model.safetensors",
    "checkpoint/optimizer.safetensors",
    "labels/labels.parquet",
    "one_step_labels/labels.parquet",
    "selection/selection.jsonl",
    "training/random.json",
    "training/selected.json",
)
PROMISED = {
    "pool",
    "labelled",
    "fidelity",
    "noise_ceiling",
    "agreement_with_one_step",
    "target_loss",
    "tokens_to_random",
    "cost",
    "run_folder",
}


def _run(folder: Path) -> dict:
    answer = subprocess.run([*COMMAND, str(folder), "--size", "tiny"], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout.strip().splitlines()[-1])


def _kill_when(folder: Path, is_time, *, seconds: float = 120) -> None:
    """Start the demo and kill it as soon as `is_time()`."""
    process = subprocess.Popen([*COMMAND, str(folder), "--size", "tiny"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + seconds
    while not is_time() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, "the demo ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "whole"
    return folder, _run(folder)


@pytest.mark.slow
def test_the_demo_selects_better_than_random_and_reports_everything(whole):
    folder, report = whole
    assert set(report) >= PROMISED
    loss = report["target_loss"]
    assert loss["selected"] < loss["random"] < loss["before"]
    assert 0 < report["tokens_to_random"] < report["training_tokens"]
    assert set(report["fidelity"]) == {"ridge", "trees", "network"}
    assert all(row["spearman"] > 0.4 for row in report["fidelity"].values())
    assert report["agreement_with_one_step"] > 0.5
    assert report["cost"]["labelling_the_whole_pool_flops"] > report["cost"]["stages"]["labels"]["flops"]
    for picture in ("loss_curves.png", "fidelity.png"):
        assert (folder / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_killed_three_times_and_run_again_it_ends_with_the_same_bytes(whole, tmp_path):
    whole_folder, report = whole
    folder = tmp_path / "killed"
    _kill_when(folder, lambda: (folder / "warmup" / "state.json").exists())
    assert not (folder / "checkpoint").exists()
    _kill_when(folder, lambda: len(list((folder / "labels" / "blocks").glob("*.parquet"))) >= 2)
    assert not (folder / "labels" / "labels.parquet").exists()
    _kill_when(folder, lambda: (folder / "training" / "random" / "state.json").exists())
    assert not (folder / "report.json").exists()
    again = _run(folder)
    for name in SAME_BYTES:
        assert (folder / name).read_bytes() == (whole_folder / name).read_bytes(), name
    for key in ("target_loss", "fidelity", "tokens_to_random", "agreement_with_one_step"):
        assert again[key] == report[key], key


@pytest.mark.slow
def test_a_finished_demo_is_not_done_again(whole):
    folder, report = whole
    begin = {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".parquet", ".safetensors")
    }
    again = _run(folder)
    assert again["target_loss"] == report["target_loss"]
    assert again["cost"]["stages"] == report["cost"]["stages"]
    changed = [
        path
        for path, time_ns in begin.items()
        if path.stat().st_mtime_ns != time_ns and not {"selection", "targets"} & set(path.parts)
    ]
    assert not changed


def test_a_folder_of_another_seed_is_refused(whole):
    folder, _ = whole
    answer = subprocess.run([*COMMAND, str(folder), "--size", "tiny", "--seed", "7"], capture_output=True, text=True, check=False)
    assert answer.returncode == 1 and "seed: stored 0, asked 7" in answer.stderr
