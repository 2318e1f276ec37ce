"""The local engine: worker processes on this machine, one core or one GPU each, over shards of any size.

A worker that dies is replaced and its shard tried again; what it had finished is kept. A shard that kills its workers
again and again is given up, and everything else is finished. With `workers=0` all is done in the caller's process,
which starts at once and survives nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from oracle.artifacts import read_json
from oracle.errors import InputError, check_count
from surrogate.scoring.attempts import MAX_ATTEMPTS, Attempts, Job
from surrogate.scoring.outputs import ShardReport
from surrogate.scoring.scorer import PREDICTOR_FILE
from surrogate.scoring.shard import ScoreTask, Shard
from surrogate.scoring.worker import as_line, raise_refusal

WAIT_SECONDS = 10.0
WORKER_COMMAND = (sys.executable, "-m", "surrogate.scoring.worker")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run(
    shards: Sequence[Shard],
    task: ScoreTask,
    *,
    on_rows: Callable[[int], None] | None = None,
    workers: int | None = None,
    max_attempts: int = MAX_ATTEMPTS,
) -> Iterator[ShardReport]:
    """Score shards and yield their reports as they are finished.

    Args:
        shards: What to score.
        task: Predictor, output folder and options.
        on_rows: Told the number of rows of each block that was scored.
        workers: Processes; 0 works in this one. None takes one per GPU where an encoder uses one, else one per core.
        max_attempts: How often a shard may fail before it is given up.

    Raises:
        StorageError: The disk is full.
        MismatchError, MissingFileError: Predictor and output folder do not fit, or there is no predictor.
        WorkerError: Several shards fail in the same way and none succeeds.
    """
    on_rows = on_rows or (lambda num_rows: None)
    if workers is not None:
        check_count("workers", workers, minimum=0)
    if workers == 0 or not shards:
        for shard in shards:
            yield task.score(shard, on_rows)
        return
    if not isinstance(task.predictor, (str, Path)):
        raise InputError("a predictor object cannot be handed to other processes.", "its folder", "save it, or pass workers=0.")
    devices = visible_gpus() if uses_gpu(task.predictor) else []
    num_workers = min(len(shards), workers or len(devices) or num_cores())
    yield from _Pool(Attempts(shards, task, max_attempts=max_attempts), num_workers, devices).run(on_rows)


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def uses_gpu(predictor: str | Path) -> bool:
    """Say whether an encoder of a predictor's folder would use a GPU if there is one."""
    encoders = read_json(Path(predictor) / PREDICTOR_FILE)["encoders"]
    return any(str(encoder["options"].get("device", "cpu")) != "cpu" or "model_state" in encoder["name"] for encoder in encoders)


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


class _Worker:
    """One process and the job it is at."""

    def __init__(self, task: ScoreTask, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            WORKER_COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            process_group=0,  # Ctrl-C is for the driver, which ends its workers
        )
        self.job: Job | None = None
        self._unread = b""
        self._tell(task)

    def begin(self, job: Job) -> None:
        """Hand out a job."""
        self.job = job
        self._tell(job.shard)

    def answers(self) -> list[dict[str, Any]] | None:
        """Return the answers that have come; None at the end of the process."""
        assert self.process.stdout is not None
        data = os.read(self.process.stdout.fileno(), 2**16)
        if not data:
            return None
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self, *, kill: bool = False) -> None:
        """Let the process end."""
        if kill:
            self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        self.process.wait()

    def _tell(self, value: ScoreTask | Shard) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead, and its end will be read
            self.process.stdin.write(as_line(value))
            self.process.stdin.flush()


class _Pool:
    """Workers that share jobs."""

    def __init__(self, attempts: Attempts, num_workers: int, devices: Sequence[str]) -> None:
        self.attempts, self.num_workers, self.devices = attempts, num_workers, devices
        self._workers: dict[int, _Worker] = {}
        self._selector = DefaultSelector()

    def run(self, on_rows: Callable[[int], None]) -> Iterator[ShardReport]:
        """Yield the reports of shards."""
        try:
            for place in range(self.num_workers):
                self._start(place)
            while self._workers:
                for key, _ in self._selector.select(WAIT_SECONDS):
                    yield from self._listen(key.data, on_rows)
        finally:
            for worker in self._workers.values():
                worker.end(kill=True)
            self._selector.close()

    def _start(self, place: int) -> None:
        """Start the worker of a place, if there is a job for it."""
        if not self.attempts.waiting:
            return
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        threads = max(1, num_cores() // self.num_workers)
        environment |= dict.fromkeys(THREAD_VARIABLES, "1")
        environment |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false"}
        environment.setdefault("TQDM_DISABLE", "1")  # bars of loading models, one per worker
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[place % len(self.devices)]
        worker = _Worker(self.attempts.task, environment)
        self._workers[place] = worker
        self._selector.register(worker.process.stdout, EVENT_READ, place)  # type: ignore[arg-type]
        worker.begin(self.attempts.waiting.popleft())

    def _stop(self, place: int, *, kill: bool = False) -> _Worker:
        worker = self._workers.pop(place)
        self._selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
        worker.end(kill=kill)
        return worker

    def _listen(self, place: int, on_rows: Callable[[int], None]) -> Iterator[ShardReport]:
        """Read what a worker has to say, and hand it the next job or replace it."""
        worker = self._workers[place]
        answers = worker.answers()
        if answers is None:
            code = self._stop(place).process.returncode
            reason = f"its worker was killed by signal {-code}" if code < 0 else f"its worker ended with exit code {code}"
            if worker.job is not None:
                yield from self.attempts.failed(worker.job, reason)
            self._start(place)
            return
        for answer in answers:
            if "rows" in answer:
                on_rows(answer["rows"])
            elif "report" in answer:
                self.attempts.num_reports += 1
                worker.job = None
                yield ShardReport.from_dict(answer["report"])
                if self.attempts.waiting:
                    worker.begin(self.attempts.waiting.popleft())
                else:
                    self._stop(place)
            else:
                self._stop(place, kill=True)  # after an error nobody knows what state it is in
                raise_refusal(answer)
                assert worker.job is not None
                yield from self.attempts.failed(worker.job, answer["text"])
                self._start(place)
