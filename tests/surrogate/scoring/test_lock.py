"""One run on an output folder at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from surrogate.scoring import lock
from surrogate.scoring.lock import LockedError, locked

HOLD = """
import sys, time
from pathlib import Path
from surrogate.scoring.lock import locked
with locked(Path(sys.argv[1]), rank=int(sys.argv[2]), world_size=int(sys.argv[3])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold(tmp_path):
    """Hold the lock in another process."""
    running = []

    def start(rank=0, world_size=1):
        arguments = [sys.executable, "-c", HOLD, str(tmp_path), str(rank), str(world_size)]
        running.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout.readline() == "held\n"
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_a_second_run_is_refused_by_name_and_a_killed_one_lifts_the_lock(tmp_path, hold):
    process = hold()
    with pytest.raises(LockedError, match=f"process {process.pid} on .*sign of life"), locked(tmp_path):
        pass
    process.kill()
    process.wait()
    with locked(tmp_path):
        pass
    with locked(tmp_path):  # and again after a clean end
        pass


def test_workers_of_one_array_go_together_and_others_do_not(tmp_path, hold):
    hold(rank=0, world_size=2)
    with locked(tmp_path, rank=1, world_size=2):
        pass
    with pytest.raises(LockedError), locked(tmp_path, rank=0, world_size=2):
        pass
    for other in ({}, {"rank": 1, "world_size": 3}):
        with pytest.raises(LockedError), locked(tmp_path, **other):
            pass


def write_lease(path, *, host, pid, age_seconds):
    path.write_text(json.dumps({"host": host, "pid": pid, "began": time.time() - age_seconds}))
    os.utime(path, (time.time() - age_seconds,) * 2)


@pytest.mark.parametrize("has_flock", [True, False])
def test_a_lease_of_another_machine_counts_until_it_is_silent(tmp_path, monkeypatch, has_flock):
    if not has_flock:
        monkeypatch.setattr(lock.fcntl, "flock", lambda number, operation: (_ for _ in ()).throw(OSError(38, "no flock")))
    write_lease(tmp_path / ".lock", host="elsewhere", pid=1, age_seconds=10)
    with pytest.raises(LockedError, match="process 1 on elsewhere, for 10 s"), locked(tmp_path):
        pass
    write_lease(tmp_path / ".lock", host="elsewhere", pid=1, age_seconds=lock.LEASE_SECONDS + 5)
    with locked(tmp_path):
        pass


def test_without_flock_a_lease_of_this_machine_counts_while_its_process_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.fcntl, "flock", lambda number, operation: (_ for _ in ()).throw(OSError(38, "no flock")))
    host = lock.socket.gethostname()
    write_lease(tmp_path / ".lock", host=host, pid=os.getppid(), age_seconds=1)
    with pytest.raises(LockedError), locked(tmp_path):
        pass
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write_lease(tmp_path / ".lock", host=host, pid=dead.pid, age_seconds=1)
    with locked(tmp_path):
        pass


def test_the_lease_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.01)
    with locked(tmp_path):
        os.utime(tmp_path / ".lock", (1, 1))
        time.sleep(0.2)
        assert (tmp_path / ".lock").stat().st_mtime > 1


def test_many_may_look_at_the_lock_of_a_run_of_another_size_at_once(tmp_path):
    """As all workers of an array do that begin together on a folder where one machine worked before."""
    with locked(tmp_path):
        pass
    with (tmp_path / ".lock").open() as file:
        lock.fcntl.flock(file, lock.fcntl.LOCK_SH)  # another worker looks at this moment
        with locked(tmp_path, rank=1, world_size=2):
            pass
        with pytest.raises(LockedError), locked(tmp_path):  # but nobody works under its eyes
            pass


def test_a_run_that_fails_gives_its_lease_up(tmp_path):
    """Another machine need not wait until it is silent."""
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    assert (tmp_path / ".lock").read_bytes() == b""
