"""One run on an output folder at a time, on this machine or another; the workers of one array count as one run.

The lock is `flock`, which the system lifts when a process dies, and beside it a lease: who holds it, touched every half
minute. The lease decides where a file system knows no `flock` or keeps it to one machine. Left out: file systems whose
clock is minutes ahead of or behind the machine's.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from oracle.artifacts import storing
from oracle.errors import InputError

TOUCH_SECONDS = 30.0
LEASE_SECONDS = 4 * TOUCH_SECONDS  # a lease that was not touched for so long is of a dead process
LOCK_NAME = re.compile(r"\.lock(?:-(\d+)-of-(\d+))?")
NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class LockedError(InputError):
    """Another run works on the output folder."""


@contextmanager
def locked(output: Path, *, rank: int = 0, world_size: int = 1) -> Iterator[None]:
    """Hold the lock of an output folder.

    Args:
        output: The folder.
        rank: The number of this worker of an array.
        world_size: How many there are; each has a lock of its own, and no run of another size goes beside them.

    Raises:
        LockedError: Another run holds it; the error names its host, process and age.
    """
    with storing(output):
        output.mkdir(parents=True, exist_ok=True)
        path = output / (".lock" if world_size == 1 else f".lock-{rank:05d}-of-{world_size:05d}")
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(number, path)
        _refuse_others(output, world_size)
        with storing(path):
            os.ftruncate(number, 0)
            os.pwrite(number, json.dumps(_holder()).encode(), 0)
        try:
            with _touching(path):
                yield
        finally:
            os.ftruncate(number, 0)  # the lease is given up
    finally:
        os.close(number)  # this gives `flock` up too


def _take(number: int, path: Path, *, kind: int = fcntl.LOCK_EX) -> None:
    """Take the lock of an open file, or raise `LockedError`."""
    has_flock = True
    try:
        fcntl.flock(number, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise _locked_error(path, _read(path)) from error
        if error.errno not in NO_FLOCK:
            raise
        has_flock = False
    holder = _read(path)
    if holder and _is_alive(holder, path, has_flock=has_flock):
        raise _locked_error(path, holder)


def _refuse_others(output: Path, world_size: int) -> None:
    """Raise if a run of another size holds a lock of the folder."""
    for path in output.glob(".lock*"):
        found = LOCK_NAME.fullmatch(path.name)
        if found is not None and int(found[2] or 1) != world_size:
            number = os.open(path, os.O_RDWR)
            try:
                _take(number, path, kind=fcntl.LOCK_SH)  # many may look at once
            finally:
                os.close(number)


def _is_alive(holder: dict[str, Any], path: Path, *, has_flock: bool) -> bool:
    """Say whether the process of a lease may still run, where `flock` did not say so."""
    if holder["host"] == socket.gethostname():
        if has_flock or holder["pid"] == os.getpid():
            return False
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
    return time.time() - path.stat().st_mtime < LEASE_SECONDS


def _holder() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": time.time()}


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):  # being written, or given up
        return {}


def _locked_error(path: Path, holder: dict[str, Any]) -> LockedError:
    who = "another process"
    if holder:
        age_seconds, silent_seconds = time.time() - holder["began"], time.time() - path.stat().st_mtime
        who = (
            f"process {holder['pid']} on {holder['host']}, for {age_seconds:.0f} s (last sign of life {silent_seconds:.0f} s ago)"
        )
    return LockedError(
        f"{path.parent} is being worked on by {who}.",
        "one run on an output folder at a time, or workers of one array with the same world_size",
        "wait for it or end it; a lock of a dead process is lifted by itself.",
    )


@contextmanager
def _touching(path: Path) -> Iterator[None]:
    """Touch a file every half minute."""
    stopped = threading.Event()

    def run() -> None:
        while not stopped.wait(TOUCH_SECONDS):
            with suppress(OSError):  # a file server that is away for a while
                path.touch()

    thread = threading.Thread(target=run, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
