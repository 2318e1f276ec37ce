"""The Ray engine: one task per shard, on the machines of a Ray cluster.

Tasks and not Ray Data: a task around `score_shard` may die anywhere and be started again anywhere, and each row is
written once; a stream of blocks that is written by many has to be told which of them came through. Dead workers are
counted here and not by Ray, whose own retries either end too soon for a cluster that is pre-empted or never for a file
that kills every worker. All machines must see the input files, the predictor and the output folder under the same paths,
and have this package installed.

It works on the cluster that the caller has joined, or on one that is named; where there is neither, it starts one on this
machine and stops it again. It never stops a cluster that it did not start.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oracle.errors import InputError, MissingPackageError, check_count
from surrogate.scoring.attempts import MAX_ATTEMPTS, Attempts, Job
from surrogate.scoring.outputs import ShardReport
from surrogate.scoring.shard import ScoreTask, Shard
from surrogate.scoring.worker import describe_error, raise_refusal

QUEUED_PER_SLOT = 2  # tasks handed out beyond those that run, so that no worker waits for the driver
OBJECT_STORE_BYTES = 2**27  # reports are small
OWN_CLUSTER = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


def run(
    shards: Sequence[Shard],
    task: ScoreTask,
    *,
    on_rows: Callable[[int], None] | None = None,
    address: str | None = None,
    workers: int | None = None,
    cpus_per_task: float = 1.0,
    gpus_per_task: float = 0.0,
    max_attempts: int = MAX_ATTEMPTS,
) -> Iterator[ShardReport]:
    """Score shards and yield their reports as they are finished.

    Args:
        shards: What to score.
        task: Predictor, output folder and options.
        on_rows: Told the number of rows of each shard when it is finished.
        address: A cluster to join and leave again; None takes the one that is joined already, or RAY_ADDRESS, or starts one.
        workers: Tasks at the same time, and CPUs of a cluster that is started; None takes as many as there is room for.
        cpus_per_task: CPUs that each task is counted as.
        gpus_per_task: GPUs that each task is counted as; 0.25 puts four on one GPU.
        max_attempts: How often a shard may kill its worker or fail before it is given up; lost nodes do not count.

    Raises:
        MissingPackageError: Ray is not installed.
        StorageError: The disk is full.
        MismatchError, MissingFileError: Predictor and output folder do not fit, or there is no predictor.
        WorkerError: Several shards fail and none succeeds.
    """
    if workers is not None:
        check_count("workers", workers)
    _check_resources(cpus_per_task, gpus_per_task)
    if not isinstance(task.predictor, (str, Path)):
        raise InputError("a predictor object cannot be handed to other processes.", "its folder", "save it first.")
    absolute = {name: os.path.abspath(getattr(task, name)) for name in ("predictor", "output")}
    attempts = Attempts(shards, dataclasses.replace(task, **absolute), max_attempts=max_attempts)
    with _cluster(address, workers, gpus_per_task) as ray:
        room = _room(ray, cpus_per_task, gpus_per_task, workers)
        remote = ray.remote(_score).options(
            num_cpus=cpus_per_task, num_gpus=gpus_per_task, max_retries=0, scheduling_strategy="SPREAD"
        )
        yield from _Scoring(ray, remote, attempts).run(room, on_rows or (lambda num_rows: None))


def _score(task: ScoreTask, shard: Shard) -> dict[str, Any]:
    """Score a shard in a worker; refusals come back in parts, for Ray cannot carry them."""
    num_rows = 0

    def count(more: int) -> None:
        nonlocal num_rows
        num_rows += more

    try:
        report = task.score(shard, count)
    except InputError as error:
        return describe_error(error)
    return {"report": report.as_dict(), "num_rows": num_rows}


class _Scoring:
    """The loop over the tasks of one run."""

    def __init__(self, ray: Any, remote: Any, attempts: Attempts) -> None:
        self.ray, self.remote, self.attempts = ray, remote, attempts
        self._running: dict[Any, Job] = {}

    def run(self, room: Callable[[], int], on_rows: Callable[[int], None]) -> Iterator[ShardReport]:
        """Yield the reports of shards; `room` says how many tasks may be out."""
        waiting = self.attempts.waiting
        try:
            while waiting or self._running:
                while waiting and len(self._running) < room():
                    job = waiting.popleft()
                    self._running[self.remote.remote(self.attempts.task, job.shard)] = job
                finished, _ = self.ray.wait(list(self._running))
                for reference in finished:
                    yield from self._take(reference, self._running.pop(reference), on_rows)
        finally:
            for reference in self._running:
                self.ray.cancel(reference, force=True)

    def _take(self, reference: Any, job: Job, on_rows: Callable[[int], None]) -> Iterator[ShardReport]:
        """Yield the report of a finished task, or see what becomes of its shard."""
        lost = (self.ray.exceptions.NodeDiedError, self.ray.exceptions.ObjectLostError)
        try:
            answer = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            yield from self.attempts.failed(job, _last_line(error), with_node=isinstance(error, lost))
        else:
            raise_refusal(answer)
            self.attempts.num_reports += 1
            on_rows(answer["num_rows"])
            yield ShardReport.from_dict(answer["report"])


@contextmanager
def _cluster(address: str | None, workers: int | None, gpus_per_task: float) -> Iterator[Any]:
    """Yield ray, joined to a cluster; leave or stop what was joined or started here."""
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError(
            "engine='ray' needs ray, which is not installed.",
            "engine='local', or ray",
            "run: pip install 'influence-surrogate[ray]'",
        ) from error
    if ray.is_initialized():
        if address is not None:
            raise InputError(
                f"address={address!r}, and this process has joined a Ray cluster already.",
                "no address, or ray.shutdown() first",
                "leave address out to use the cluster that was joined.",
            )
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError) as error:
            raise InputError(
                f"the Ray cluster at {address!r} cannot be joined: {error}.",
                "the address of a running cluster, or 'auto' on one of its machines",
                "check the address; without one a cluster is started here.",
            ) from error
    else:
        _start(ray, workers)
    try:
        if not address and ray.cluster_resources().get("GPU", 0.0) < gpus_per_task:
            raise InputError(
                f"gpus_per_task={gpus_per_task}, and this machine has no such GPU.",
                "gpus_per_task=0",
                "leave it out, or join a cluster.",
            )
        yield ray
    finally:
        ray.shutdown()  # stops what this process started, and only leaves what it joined


def _start(ray: Any, workers: int | None) -> None:
    """Start a cluster of this machine alone, whatever other ones run on it."""
    with own_variables():
        ray.init(
            address="local",
            num_cpus=workers or len(os.sched_getaffinity(0)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            object_store_memory=OBJECT_STORE_BYTES,
        )


@contextmanager
def own_variables() -> Iterator[None]:
    """Set the variables of a cluster of one's own for a while: no token in the home folder, nothing sent."""
    before = {name: os.environ.get(name) for name in OWN_CLUSTER}
    os.environ.update(OWN_CLUSTER)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _room(ray: Any, cpus_per_task: float, gpus_per_task: float, workers: int | None) -> Callable[[], int]:
    """Return a function that says how many tasks may be out; it follows a cluster that grows and shrinks."""

    def room() -> int:
        if workers is not None:
            return workers
        there = ray.cluster_resources()
        slots = there.get("CPU", 0.0) / cpus_per_task if cpus_per_task else float("inf")
        if gpus_per_task:
            slots = min(slots, there.get("GPU", 0.0) / gpus_per_task)
        return max(1, int(slots)) * QUEUED_PER_SLOT

    return room


def _check_resources(cpus_per_task: float, gpus_per_task: float) -> None:
    for name, value in (("cpus_per_task", cpus_per_task), ("gpus_per_task", gpus_per_task)):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and value >= 0 and (value <= 1 or value == int(value))) or not (cpus_per_task or gpus_per_task):
            raise InputError(
                f"{name}={value!r} cannot be used.",
                "a share up to 1 or a whole number, and not both 0",
                "pass cpus_per_task=1, or gpus_per_task=0.25 for four tasks on a GPU.",
            )


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
