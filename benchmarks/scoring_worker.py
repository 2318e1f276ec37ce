"""What `scoring.py` measures in processes of their own; one JSON line each.

python benchmarks/scoring_worker.py alone PREDICTOR SCRATCH FILE...    each step of scoring by itself, on one thread
python benchmarks/scoring_worker.py loaded PREDICTOR                   memory of a process with the model
python benchmarks/scoring_worker.py memory PREDICTOR SOURCE OUTPUT WORKERS
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

import oracle
from surrogate.scoring import ScoreOptions, list_inputs, score_corpus
from surrogate.scoring.blocks import Block
from surrogate.scoring.items import BLOCK_ROWS
from surrogate.scoring.outputs import corpus_identity, score_header
from surrogate.scoring.rows import read_blocks
from surrogate.scoring.score_files import ScoreHeader, score_schema
from surrogate.scoring.scorer import Scorer, load_scorer, one_thread, read_identity
from surrogate.scoring.segments import SegmentWriter

WARM_UP_TEXTS = 16
LOOK_SECONDS = 0.1


def main() -> None:
    """Do what the first argument says."""
    kind, *given = sys.argv[1:]
    results: dict[str, Callable[..., dict[str, Any]]] = {"alone": alone, "loaded": loaded, "memory": memory}
    print(json.dumps(results[kind](*given)))


def alone(predictor: str, scratch: str, *files: str) -> dict[str, Any]:
    """Measure each step by itself, on as many texts at a time as scoring takes: seconds on the wall and of the CPU."""
    scorer = load_scorer(predictor)
    header = score_header(corpus_identity(scorer.identity, ScoreOptions()), list_inputs(files[0]).files[0])
    texts = oracle.read_texts(list(files))
    with one_thread():
        encode(scorer, texts.select(range(min(WARM_UP_TEXTS, len(texts)))))
        print("ready", flush=True)
        sys.stdin.readline()  # all begin together
        seconds = {step: {"wall": 0.0, "cpu": 0.0} for step in ("encode", "predict", "read", "write")}
        values = []
        for start in range(0, len(texts), BLOCK_ROWS):
            rows = texts.select(range(start, min(start + BLOCK_ROWS, len(texts))))
            with counting(seconds["encode"]):
                features = encode(scorer, rows)
            with counting(seconds["predict"]):
                values.append(predict(scorer, features))
        with counting(seconds["read"]):
            read_rows = read(files)
        with counting(seconds["write"]):
            write(Path(scratch), header, read_rows, np.concatenate(values))
    return {**seconds, "num_texts": len(texts)}


@contextmanager
def counting(seconds: dict[str, float]) -> Iterator[None]:
    """Add the seconds that a block takes, on the wall and of the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    seconds["wall"] += time.perf_counter() - wall
    seconds["cpu"] += time.process_time() - cpu


def encode(scorer: Scorer, texts: Any) -> np.ndarray:
    """Return (N, D) features, by the encoders' own `encode`."""
    return np.concatenate([encoder.encode(texts) for encoder in scorer.predictor.encoders], axis=1)


def read(files: tuple[str, ...]) -> list[tuple[list[str], np.ndarray]]:
    """Read files as scoring does; return text_ids and positions, block by block."""
    found = []
    for file in list_inputs(list(files)).files:
        for item in read_blocks(file, ScoreOptions()):
            if isinstance(item, Block):
                found.append((item.text_ids, item.positions))
    return found


def predict(scorer: Scorer, features: np.ndarray) -> np.ndarray:
    """Return scores, and spreads where the surrogate has them."""
    surrogate: Any = scorer.predictor.surrogate_
    if scorer.identity.has_spread:
        return np.concatenate(surrogate.predict(features, return_spread=True), axis=1)
    return np.asarray(surrogate.predict(features))


def write(scratch: Path, header: ScoreHeader, rows: list[tuple[list[str], np.ndarray]], values: np.ndarray) -> None:
    """Write a score file."""
    writer = SegmentWriter(scratch, 0, score_schema(header))
    start = 0
    for text_ids, positions in rows:
        stop = start + len(text_ids)
        writer.add_rows(text_ids, positions, values[start:stop], [])
        start = stop
    writer.finish(scratch / "scores.parquet", scratch / "bad.jsonl")


def loaded(predictor: str) -> dict[str, Any]:
    """Measure a process that has loaded the model and scored one text."""
    scorer, text = load_scorer(predictor), oracle.read_texts(["one text"])
    with one_thread():
        scorer.score(text, scorer.prepare(text))
    return {"rss_mib": mib("self", "VmRSS")}


def memory(predictor: str, source: str, output: str, workers: str) -> dict[str, Any]:
    """Score a source and measure the largest resident size of this process and of each worker."""
    read_identity(predictor)
    before_mib = mib("self", "VmRSS")
    peaks: dict[int, float] = {}
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            for process in children():
                peaks[process] = max(peaks.get(process, 0.0), mib(str(process), "VmHWM"))

    watch = threading.Thread(target=look)
    watch.start()
    begin_seconds = time.perf_counter()
    try:
        scored = score_corpus(predictor, source, output, workers=int(workers))
    finally:
        done.set()
        watch.join()
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # sees what the last look was too early for
    return {
        "before_mib": before_mib,
        "driver_mib": mib("self", "VmHWM"),
        "worker_mib": [*sorted(peaks.values())[:-1], max(largest, *peaks.values())],
        "seconds": time.perf_counter() - begin_seconds,
        "num_scored": scored.manifest["num_scored"],
    }


def children() -> list[int]:
    """Return the child processes of this one."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError):  # the thread has ended
            found += [int(process) for process in path.read_text().split()]
    return found


def mib(process: str, kind: str) -> float:
    """Return the resident size of a process (VmRSS) or the largest so far (VmHWM), in MiB; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(kind)), 0.0)


if __name__ == "__main__":
    main()
