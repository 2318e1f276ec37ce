"""Shards that wait for a worker, and what becomes of one whose worker fails: another attempt, or it is given up.

A shard is given up when it failed so many times without getting on, so that one that kills its workers ends at last and a
long one on machines that are taken away now and then does not. Each engine has its own workers and this one rule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from oracle.errors import InputError, check_count
from surrogate.scoring.outputs import ShardReport
from surrogate.scoring.shard import ScoreTask, Shard

MAX_ATTEMPTS = 3
MAX_LOST_NODES = 20  # a shard that loses so many machines is what takes them down
BROKEN_SHARDS = 3  # so many different shards that fail before any succeeds show that it is not the shards


class WorkerError(InputError, RuntimeError):
    """No worker gets anywhere, whatever the shard."""


@dataclass
class Job:
    """A shard on its way: how often it failed and how many machines were lost with it since it last got on."""

    shard: Shard
    num_failures: int = 0
    num_lost: int = 0
    num_kept: int = 0  # rows that no other attempt has to score again


class Attempts:
    """The jobs of one run.

    Args:
        shards: What is to be done.
        task: What is done with them.
        max_attempts: How often a shard may fail without getting on.
    """

    def __init__(self, shards: Sequence[Shard], task: ScoreTask, *, max_attempts: int) -> None:
        check_count("max_attempts", max_attempts)
        self.task, self.max_attempts = task, max_attempts
        self.waiting = deque(Job(shard) for shard in shards)
        self.num_reports = 0
        self._num_given_up = 0

    def failed(self, job: Job, reason: str, *, with_node: bool = False) -> list[ShardReport]:
        """Put a job back, or give it up and return its report.

        Args:
            job: What failed.
            reason: Why.
            with_node: Whether its whole machine was lost, which is rarely the job's fault.

        Raises:
            WorkerError: Several shards fail and none succeeds.
        """
        num_kept = self.task.num_kept(job.shard)
        if num_kept > job.num_kept:
            job.num_failures, job.num_lost, job.num_kept = 0, 0, num_kept
        job.num_failures += not with_node
        job.num_lost += with_node
        if job.num_failures < self.max_attempts and job.num_lost < MAX_LOST_NODES:
            self.waiting.append(job)
            return []
        self._num_given_up += 1
        if not self.num_reports and self._num_given_up >= BROKEN_SHARDS:
            raise WorkerError(
                f"{self._num_given_up} shards failed {self.max_attempts} times each and none succeeded, at last: {reason}",
                "workers that run",
                "see what the workers wrote: the package, the predictor and the files must be there on every machine; fewer "
                "workers need less memory.",
            )
        number = job.num_lost if with_node else job.num_failures
        return [self.task.fail(job.shard, f"{reason}, {'once' if number == 1 else f'{number} times'}")]
