"""Parts of `scoring.py`: texts per second from parquet to parquet beside the bare encoder, and of prediction alone.

Scoring and the encoder's own `encode` take turns, first with the process and its children held on one core, then with all
cores, where the bare encoder runs once per core on its share of the files (faster than one process with as many threads).
A worker's start (imports, loading the model) is timed on files of one row and taken off; it is printed beside. The floor is
what reading, encoding, predicting and writing take by themselves, one after the other, on every core.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scoring_texts import Halves, fit_predictor, mean_tokens, write_files
from setting import now

from surrogate import InfluenceNetwork, InfluenceTrees, score_corpus
from surrogate.features.hashed_ngrams import HashedNgrams
from surrogate.features.sentence import Sentence
from surrogate.features.static_embedding import StaticEmbedding
from surrogate.features.text_stats import TextStats
from surrogate.models.ridge import RidgeSurrogate
from surrogate.scoring.scorer import one_thread

Part = tuple[str, list[str], list[list[str]], dict[str, Any]]  # title, header, rows, figures

WORKER = Path(__file__).with_name("scoring_worker.py")
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
QUICK: dict[str, Any] = {"max_epochs": 5, "patience": 5}  # how well a network is trained does not change its speed
TEXTS_PER_SECOND = {  # about, on one core: decides how many texts are scored
    "sentence": 15,
    "hashed_ngrams": 13_000,
    "hashed_ngrams + text_stats": 3500,
    "static_embedding": 7000,
}
ENCODERS: dict[str, Callable[[], list[Any]]] = {
    "sentence": lambda: [Sentence()],
    "hashed_ngrams": lambda: [HashedNgrams()],
    "hashed_ngrams + text_stats": lambda: [HashedNgrams(), TextStats()],
    "static_embedding": lambda: [StaticEmbedding()],
}
STEPS = ("read", "encode", "predict", "write")
PREDICTED_COLUMNS = (384, 1100)
PREDICTION_FIT_ROWS = 1000


def throughput(strings: Sequence[str], options: Any, folder: Path) -> Part:
    """Measure texts per second end to end."""
    halves = Halves.of(strings, num_tokens=options.tokens)
    sample = halves.texts(0, 1000)
    tokens = mean_tokens(sample)
    counts = sorted({1, len(os.sched_getaffinity(0))})
    rows, figures = [], {}
    for name in options.encoders:
        num_rows = round(options.seconds * TEXTS_PER_SECOND[name])
        predictor = fit_predictor(
            ENCODERS[name](), InfluenceNetwork(**QUICK), sample, num_targets=options.targets, folder=folder / "predictor"
        )
        write_files(folder / "texts", halves, num_rows=num_rows, num_files=options.files)
        found = {count: _turns(predictor, folder, count, num_rows=num_rows, turns=options.turns) for count in counts}
        figures[name] = {"rows": num_rows, "by_cores": found}
        rows += [_throughput_row(name, count, result) for count, result in found.items()]
    title = (
        f"throughput: parquet to parquet, network, {options.targets} targets with spreads, texts of {tokens:.0f} tokens and "
        f"{np.mean([len(text) for text in sample]):.0f} characters, {options.files} files; texts per second, start taken off"
    )
    header = [
        "",
        "cores",
        "scored",
        "bare encode",
        "wall ratio",
        "CPU ratio",
        "start s",
        *(f"{step} alone" for step in STEPS),
        "floor",
        "of floor",
    ]
    return title, header, rows, {"tokens_per_text": tokens, "bytes_per_text": _mean_bytes(sample), "encoders": figures}


def _throughput_row(name: str, count: int, found: dict[str, Any]) -> list[str]:
    return [
        name,
        str(count),
        *(f"{found[key]:,.0f}" if found[key] >= 100 else f"{found[key]:.1f}" for key in ("scored_per_second", "bare_per_second")),
        f"{found['wall_ratio']:.3f}",
        f"{found['cpu_ratio']:.3f}",
        f"{found['start_seconds']:.1f}",
        *(f"{found['alone_per_second'][step]:,.0f}" for step in STEPS),
        f"{found['floor_per_second']:,.0f}",
        f"{found['of_floor']:.3f}",
    ]


def _turns(predictor: Path, folder: Path, count: int, *, num_rows: int, turns: int) -> dict[str, Any]:
    """Return medians over turns of what each took on so many cores; floor: the steps one after the other, on every core."""
    seen = []
    for _ in range(turns):
        with held_on(count):
            bare = _bare(predictor, folder, count)
            start = _scored(predictor, _one_row_files(folder, count), folder / "start", count)
            scored = _scored(predictor, folder / "texts", folder / "scored", count)
        net = {kind: scored[kind] - start[kind] for kind in ("wall", "cpu")}
        encode = {"wall": max(one["encode"]["wall"] for one in bare), "cpu": sum(one["encode"]["cpu"] for one in bare)}
        alone = {step: num_rows * count / sum(one[step]["cpu"] for one in bare) for step in STEPS}
        floor = 1 / sum(1 / rate for rate in alone.values())
        seen.append(
            {
                "scored_per_second": num_rows / net["wall"],
                "bare_per_second": num_rows / encode["wall"],
                "wall_ratio": encode["wall"] / net["wall"],
                "cpu_ratio": encode["cpu"] / net["cpu"],
                "scored_cpu_seconds": net["cpu"],
                "bare_cpu_seconds": encode["cpu"],
                "start_seconds": start["wall"],
                "alone_per_second": alone,
                "floor_per_second": floor,
                "of_floor": num_rows / net["wall"] / floor,
                "seconds_in_workers": scored["steps"],
            }
        )
    medians = {key: statistics.median(one[key] for one in seen) for key in seen[0] if not isinstance(seen[0][key], dict)}
    nested = {
        key: {step: statistics.median(one[key][step] for one in seen) for step in seen[0][key]}
        for key in ("alone_per_second", "seconds_in_workers")
    }
    spread = {
        "wall_ratios": [round(one["wall_ratio"], 4) for one in seen],
        "cpu_ratios": [round(one["cpu_ratio"], 4) for one in seen],
    }
    return {**medians, **nested, **spread}


@contextmanager
def held_on(num_cores: int) -> Iterator[None]:
    """Hold this thread, and the processes that it starts, on so many cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-num_cores:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _bare(predictor: Path, folder: Path, count: int) -> list[dict[str, Any]]:
    """Run each step by itself, in one process per core that begin together."""
    files = sorted(str(path) for path in (folder / "texts").iterdir())
    workers = []
    for number in range(count):
        scratch = folder / f"scratch-{number}"
        command = [sys.executable, str(WORKER), "alone", str(predictor), str(scratch), *files[number::count]]
        workers.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **THREADS})
        )
    answers = []
    for worker in workers:
        assert worker.stdout is not None
        if worker.stdout.readline().strip() != "ready":
            raise SystemExit(f"{WORKER} failed with exit code {worker.wait()}")
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        lines = worker.communicate()[0].splitlines()
        if worker.returncode:
            raise SystemExit(f"{WORKER} failed with exit code {worker.returncode}")
        answers.append(json.loads(lines[-1]))
    return answers


def _one_row_files(folder: Path, count: int) -> Path:
    return write_files(folder / "one_row", Halves(["a text", "and another"], np.arange(2)), num_rows=count, num_files=count)


def _scored(predictor: Path, source: Path, output: Path, workers: int) -> dict[str, Any]:
    """Score a folder by worker processes; return wall and CPU seconds, those of the workers included."""
    shutil.rmtree(output, ignore_errors=True)
    wall, cpu = time.perf_counter(), cpu_seconds()
    scored = score_corpus(predictor, source, output, workers=workers)
    spent = {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}
    if not scored.manifest["clean"]:
        raise SystemExit(f"not all of {source} was scored: {scored.manifest}")
    return {**spent, "steps": scored.manifest["seconds"]}


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of all children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _mean_bytes(texts: Sequence[str]) -> float:
    return float(np.mean([len(text.encode()) for text in texts]))


def prediction(options: Any) -> Part:
    """Measure rows per second from features in memory, on one core and on all, beside what no such surrogate can leave out."""
    rng = np.random.default_rng(0)
    rows, figures = [], {}
    for num_columns in PREDICTED_COLUMNS:
        X = rng.normal(size=(options.prediction_rows, num_columns)).astype(np.float32)
        y = X[:PREDICTION_FIT_ROWS, : options.targets] + 0.5 * X[:PREDICTION_FIT_ROWS, options.targets : 2 * options.targets] ** 2
        for name, made in (
            ("network", InfluenceNetwork(**QUICK)),
            ("ridge", RidgeSurrogate()),
            ("trees", InfluenceTrees(num_threads=1)),
        ):
            fitted = made.fit(X[:PREDICTION_FIT_ROWS], y)
            jobs: dict[str, Callable[[], Any]] = {"scores": partial(fitted.predict, X)}
            if isinstance(fitted, InfluenceNetwork):
                jobs["with spreads"] = partial(fitted.predict, X, return_spread=True)
            beside, jobs["beside"] = _beside(name, fitted, X)
            with one_thread():
                for job in jobs.values():
                    job()  # warms up
                seconds, _ = in_turns(jobs, options.turns)
            rates = {job: len(X) / statistics.median(taken) for job, taken in seconds.items()}
            over = statistics.median(b / a for a, b in zip(seconds["scores"], seconds["beside"], strict=True))
            if isinstance(fitted, InfluenceNetwork):
                rates["all cores"] = len(X) / _wall_seconds(jobs["scores"], options.turns)
            figures[f"{name}, {num_columns}"] = {"rows_per_second": rates, "beside": beside, "over_beside": over}
            columns = ("scores", "with spreads", "all cores", "beside")
            shown = [f"{rates[column]:,.0f}" if column in rates else "" for column in columns]
            rows.append([f"{name}, {num_columns} columns", *shown[:3], beside, shown[3], f"{over:.3f}"])
    title = (
        f"prediction: {options.prediction_rows:,} rows of features in memory, {options.targets} targets; rows per second on one "
        f"core, and by one call of predict on all {len(os.sched_getaffinity(0))} (wall-clock)"
    )
    return title, ["", "scores", "with spreads", "scores, all cores", "beside", "its rate", "ratio"], rows, figures


def _wall_seconds(job: Callable[[], Any], turns: int) -> float:
    """Return the median of a job's wall-clock seconds with as many threads as there are cores."""
    num_threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        job()  # warms up
        for _ in range(turns):
            begin = time.perf_counter()
            job()
            seconds.append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(num_threads)
    return statistics.median(seconds)


def _beside(name: str, fitted: Any, X: np.ndarray) -> tuple[str, Callable[[], Any]]:
    """Return what a surrogate's speed is held against, with its name."""
    if name == "trees":
        return "LightGBM itself", lambda: [booster.predict(X, num_threads=1) for booster in fitted.boosters_]
    if name == "ridge":
        weights = torch.zeros(X.shape[1], fitted.num_targets_)
    else:
        hidden = sum(member.weights[0].shape[1] for member in fitted.members_)
        weights = torch.zeros(X.shape[1], hidden + len(fitted.intercept_))
    return "first product alone", lambda: torch.from_numpy(X) @ weights


def in_turns(jobs: dict[str, Callable[[], Any]], turns: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Run jobs in turns; return the seconds of each turn (of the CPU, where there is no GPU), and what each job returned."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    results = {}
    for _ in range(turns):
        for name, job in jobs.items():
            begin = now()
            results[name] = job()
            seconds[name].append(now() - begin)
    return seconds, results
