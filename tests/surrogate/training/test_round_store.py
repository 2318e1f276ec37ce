"""The folder of a refresher: one live process makes rounds in it, and its forked children do not keep it."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import textwrap

import pytest

from oracle.errors import MismatchError
from surrogate.training.round_store import RoundStore

HOLDER = """
    import os, sys, time
    from surrogate.training.round_store import RoundStore
    store = RoundStore(sys.argv[1])
    store.hold()
    if len(sys.argv) > 2 and os.fork():
        os._exit(0)
    print("ready", flush=True)
    time.sleep(20)
"""


def _start(folder, *more):
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "ready"  # said by the child, where there is one
    return process


def _can_hold_elsewhere(folder):
    code = "import sys; from surrogate.training.round_store import RoundStore; RoundStore(sys.argv[1]).hold()"
    return subprocess.run([sys.executable, "-c", code, str(folder)], stderr=subprocess.DEVNULL).returncode == 0


def test_two_live_processes_do_not_make_rounds_in_one_folder(tmp_path):
    other = _start(tmp_path / "rounds")
    try:
        with pytest.raises(MismatchError, match=r"(?s)another training that runs now.*workdir of its own"):
            RoundStore(tmp_path / "rounds").hold()
        RoundStore(tmp_path / "other").hold()
    finally:
        other.kill()
        other.wait()
    RoundStore(tmp_path / "rounds").hold()


def test_a_child_of_a_dead_training_does_not_keep_the_folder(tmp_path):
    parent = _start(tmp_path, "fork")
    parent.wait(timeout=30)
    assert _can_hold_elsewhere(tmp_path)
    parent.stdout.close()


def test_a_process_holds_a_folder_once_whatever_it_does_with_its_files(tmp_path):
    first, second = RoundStore(tmp_path / "rounds"), RoundStore(tmp_path / "rounds")
    first.hold(), first.hold(), second.hold(), pickle.loads(pickle.dumps(first)).hold()
    shutil.copytree(tmp_path / "rounds", tmp_path / "copy")
    del first
    assert not _can_hold_elsewhere(tmp_path / "rounds")
    second.write_account({})
    assert _can_hold_elsewhere(tmp_path / "rounds")


def test_a_folder_that_was_removed_is_held_anew(tmp_path):
    store = RoundStore(tmp_path / "rounds")
    store.hold()
    shutil.rmtree(tmp_path / "rounds")
    store.write_account({})
    store.hold()
    assert not _can_hold_elsewhere(tmp_path / "rounds")
