"""A training under the stock Trainer, killed with SIGKILL within a refresh and within a round, and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NUM_ROUNDS = 3
PARTS = ("ranking/labels/labels.parquet", "ranking/scores.parquet", "selection.parquet")
SCRIPT = textwrap.dedent("""
    import json, sys, time
    from pathlib import Path
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from oracle.methods.grad_dot import GradDot
    from surrogate.training import InfluenceCallback
    from tests.conftest import build_module, token_texts

    class Slow(TrainerCallback):
        def on_step_end(self, *_, **__):
            time.sleep(0.2)

    if __name__ == "__main__":
        folder, is_slow = Path(sys.argv[1]), sys.argv[2] == "slowly"
        if is_slow:  # leave time to be killed
            measure = GradDot.measure
            GradDot.measure = lambda self, encoded: time.sleep(1.0) or measure(self, encoded)
        callback = InfluenceCallback(
            token_texts(160, seed=5), {"goal": token_texts(6, seed=6)}, workdir=folder / "influence", every=3, max_tokens=64,
            sample_size=40, num_probe=8, encoder="hashed_ngrams", num_folds=2, allow_low_fidelity=True,
        )
        torch.manual_seed(0)
        args = TrainingArguments(
            output_dir=str(folder / "out"), per_device_train_batch_size=2, max_steps=8, learning_rate=1e-2, save_strategy="steps",
            save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no",
        )
        trainer = Trainer(
            build_module("llama", attention_dropout=0.2), args, train_dataset=callback.train_dataset,
            data_collator=callback.data_collator, callbacks=[callback, *([Slow()] if is_slow else [])],
        )
        callback.attach(trainer)
        whole = [path.parent for path in (folder / "out").glob("checkpoint-*/trainer_state.json")]
        last = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        torch.save(trainer.model.state_dict(), folder / "weights.pt")
        print(json.dumps([last.name if last else None, [record["seconds"] for record in callback.table()]]))
""")


def _start(folder: Path, *, how: str) -> subprocess.Popen[str]:
    script = folder.parent / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, str(script), str(folder), how], stdout=subprocess.PIPE, text=True, env=environment)


def _run(folder: Path) -> tuple[str | None, list[float]]:
    process = _start(folder, how="at once")
    answer, _ = process.communicate()
    assert process.returncode == 0
    checkpoint, seconds = json.loads(answer.splitlines()[-1])
    return checkpoint, seconds


def _kill_when(folder: Path, is_time: Callable[[], bool], *, seconds: float = 120) -> None:
    process = _start(folder, how="slowly")
    deadline = time.monotonic() + seconds
    while not is_time() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None and is_time()
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_a_training_that_is_killed_again_and_again_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _run(whole)
    rounds = killed / "influence"
    _kill_when(killed, lambda: (rounds / "round-00000/ranking").exists())
    assert not (rounds / "round-00000/round.json").exists()  # within the first refresh
    _kill_when(killed, lambda: (killed / "out/checkpoint-2/trainer_state.json").exists())
    assert not (rounds / "round-00001").exists()  # within the first round
    made = (rounds / "round-00000/round.json").stat().st_mtime_ns
    _kill_when(killed, lambda: (rounds / "round-00001/ranking").exists())
    assert not (rounds / "round-00001/round.json").exists()  # within the second refresh, at the border of a round
    checkpoint, seconds = _run(killed)
    assert checkpoint == "checkpoint-3" and len(seconds) == NUM_ROUNDS
    assert (rounds / "round-00000/round.json").stat().st_mtime_ns == made  # nothing is done twice
    for name in (*(f"influence/round-{index:05d}/{part}" for index in range(NUM_ROUNDS) for part in PARTS), "weights.pt"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
