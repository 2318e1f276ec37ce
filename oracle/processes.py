"""Several processes that label one sample together, under an initialised `torch.distributed`.

Each process has the whole model and measures every so many-th block. They meet a few times: to see that they were
asked the same, to open the folder one after the other, and when all blocks are measured. At each meeting they tell
each other what went wrong, so that where one raises, all do and none waits for ever. A process that was killed
breaks the connection, which raises on the others.

The meetings have a process group of their own, on the CPU and with a long time limit: one process may have hours more
to do than another, and the training's own group would take that for a dead one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from oracle.errors import InputError, MismatchError

T = TypeVar("T")

MEETING_TIMEOUT = timedelta(days=7)


class OtherProcessError(InputError):
    """Another process of the group failed, so this one stopped."""


@dataclass(frozen=True)
class Processes:
    """The processes that work together, or this one alone.

    Attributes:
        rank: The number of this process.
        world_size: How many there are.
        group: Their process group for meetings; None where there is one process.
    """

    rank: int = 0
    world_size: int = 1
    group: Any = None

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; all have to call it."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Run a block on every process; all leave it together, and where one raises, all do.

        Raises:
            OtherProcessError: Another process failed.
        """
        try:
            yield
        except BaseException as error:
            self.gather(f"{type(error).__name__}: {error}")
            raise
        for rank, failure in enumerate(self.gather("")):
            if failure:
                raise OtherProcessError(
                    f"process {rank} of {self.world_size} failed, so all stop: {failure}",
                    "all processes finishing their part",
                    "mend what that process says and run all of them again; with a workdir, finished blocks are kept.",
                )

    def first_then_others(self, action: Callable[[], T]) -> T:
        """Call `action` on the first process and, when it is done, on the others."""
        results: list[T] = []
        for is_turn in (self.rank == 0, self.rank != 0):
            with self.all_or_none():
                if is_turn:
                    results.append(action())
        return results[0]

    def require_same(self, values: dict[str, Any]) -> None:
        """Refuse to go on unless all processes have the same values.

        Raises:
            MismatchError: They have not; the first process that differs is shown beside process 0. Raised on all of them.
        """
        gathered = self.gather(values)
        for rank, other in enumerate(gathered):
            differences = [f"{key}: {gathered[0][key]!r} and {other[key]!r}" for key in other if other[key] != gathered[0][key]]
            if differences:
                raise MismatchError(
                    f"process 0 and process {rank} were not asked the same: " + "; ".join(differences) + ".",
                    "the same model, optimiser, sample, targets and options in every process",
                    "load the same checkpoint everywhere, and give all processes the same texts in the same order.",
                )

    def on_first(self, action: Callable[[], T]) -> T:
        """Call `action` on the first process only, and return its result on all of them."""
        results: list[T] = []
        with self.all_or_none():
            if self.rank == 0:
                results.append(action())
        return self.gather(results)[0][0]


@contextmanager
def working_together() -> Iterator[Processes]:
    """Yield the processes of the initialised `torch.distributed`, or this one alone."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        yield Processes()
        return
    group = distributed.new_group(backend="gloo", timeout=MEETING_TIMEOUT)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), group)
    finally:
        distributed.destroy_process_group(group)
