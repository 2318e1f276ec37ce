"""Files that one process holds at a time, on one machine: `flock`, which the system lifts when the process dies.

A lock belongs to the process: taking it twice is taking it once, and a forked child, such as a data worker, closes its copy
and holds nothing. File systems without `flock` lock nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

_held: dict[tuple[int, int], int] = {}  # device and inode -> open file


def hold(path: Path) -> bool:
    """Hold a file, made if need be, until `give_up` or the end of the process; return False where another process does."""
    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    key = _key(number)
    if key in _held:
        os.close(number)
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(number)
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    _held[key] = number
    return True


def give_up(path: Path) -> None:
    """Hold a file no longer, if this process did."""
    try:
        status = path.stat()
    except OSError:  # removed meanwhile
        return
    number = _held.pop((status.st_dev, status.st_ino), None)
    if number is not None:
        os.close(number)


def _key(number: int) -> tuple[int, int]:
    status = os.fstat(number)
    return status.st_dev, status.st_ino


def _close_in_child() -> None:
    for number in _held.values():
        os.close(number)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
