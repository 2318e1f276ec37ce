"""Results on disk appear complete or not at all, and a full disk is said so."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import oracle
from oracle.artifacts import atomic_folder, atomic_path, fingerprint, read_json, require_same, timed, write_json
from oracle.errors import InputError, MismatchError, MissingFileError, StorageError


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})
    with pytest.raises(KeyError), atomic_path(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert read_json(path) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["value.json"]
    with pytest.raises(KeyError), atomic_folder(tmp_path / "folder") as partial:
        (partial / "a").write_text("half")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_a_folder_replaces_the_old_one_whole(tmp_path):
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "folder") as partial:
            (partial / content).write_text(content)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["second"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_a_storage_error_in_three_parts(number, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="continues after the last finished part") as caught:
        write_json(tmp_path / "value.json", 1)
    assert caught.value.given and caught.value.accepted and caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_of_a_folder_is_said_so_and_other_errors_pass_through(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="in the way"):
        write_json(tmp_path / "file" / "value.json", 1)
    with pytest.raises(OSError, match="something else") as caught, atomic_path(tmp_path / "value.json"):
        raise OSError(errno.EIO, "something else")
    assert not isinstance(caught.value, StorageError)


def test_a_disk_that_fills_while_labelling_keeps_the_finished_blocks(make_module, make_token_texts, tmp_path, monkeypatch):
    lm = oracle.LanguageModel(make_module("llama"), max_tokens=64)
    sample, targets = make_token_texts(8, seed=1), {"t": make_token_texts(3, seed=2)}
    original, written = os.replace, []

    def fills(source, target):
        if str(target).endswith(".parquet"):
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(target)
        original(source, target)

    monkeypatch.setattr(os, "replace", fills)
    with pytest.raises(StorageError, match="No space left"):
        oracle.label(lm, sample, targets, method="grad_dot", workdir=tmp_path, block_size=2)
    monkeypatch.setattr(os, "replace", original)
    labels = oracle.label(lm, sample, targets, method="grad_dot", workdir=tmp_path, block_size=2)
    assert labels.meta["cost"]["num_measured_now"] == 4
    np.testing.assert_array_equal(labels.values, oracle.label(lm, sample, targets, method="grad_dot", block_size=2).values)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full_is_said_so_for_json_and_for_safetensors(make_module, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        with pytest.raises(StorageError):
            write_json(disk / "value.json", "x" * 200_000)
        with pytest.raises(StorageError):
            oracle.LanguageModel(make_module("llama"), max_tokens=64).save(disk / "checkpoint")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="file-size limits are of POSIX")
def test_a_limit_of_the_file_size_is_a_storage_error_for_safetensors_and_for_features(tmp_path):
    script = textwrap.dedent("""
        import resource, signal, sys
        import numpy as np
        from safetensors.numpy import save_file
        from oracle.artifacts import atomic_folder
        from oracle.errors import StorageError
        from surrogate.feature_cache import FeatureCache
        from surrogate.features.hashed_ngrams import HashedNgrams
        from oracle.texts import read_texts
        from pathlib import Path

        folder = Path(sys.argv[1])
        texts = read_texts([f"text {number}" for number in range(200)])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        refused = 0
        try:
            with atomic_folder(folder / "checkpoint") as partial:
                save_file({"a": np.ones(100_000, np.float32)}, partial / "model.safetensors")
        except StorageError:
            refused += 1
        try:
            FeatureCache(folder / "features").features(HashedNgrams(dim=256), texts)
        except StorageError:
            refused += 1
        sys.exit(0 if refused == 2 else 3)
    """)
    answer = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert not list(tmp_path.rglob("*.npy")) and not list(tmp_path.rglob("*.partial"))


def test_differences_are_listed_one_by_one(tmp_path):
    require_same({"a": 1, "b": (1, 2)}, {"b": [1, 2], "a": 1}, where=tmp_path)
    with pytest.raises(MismatchError, match=r"a: stored 1, asked 2; c: stored None, asked 3"):
        require_same({"a": 1, "b": 0}, {"a": 2, "b": 0, "c": 3}, where=tmp_path)


def test_fingerprints_follow_content_and_not_key_order():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint("\ud800")) == 16  # a lone surrogate must not crash


def test_broken_and_missing_json_are_named(tmp_path):
    with pytest.raises(MissingFileError, match="there is no file"):
        read_json(tmp_path / "nothing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_json(tmp_path / "broken.json")
    write_json(tmp_path / "fine.json", {"ä": 1})
    assert json.loads((tmp_path / "fine.json").read_text(encoding="utf-8")) == {"ä": 1}


def test_time_is_given_also_when_the_block_raises():
    seconds = []
    with pytest.raises(KeyError), timed(seconds.append):
        raise KeyError
    assert len(seconds) == 1 and seconds[0] >= 0
