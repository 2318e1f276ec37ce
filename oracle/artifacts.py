"""Results on disk: written under a temporary name and renamed last, with a `meta.json` beside the data.

Existence therefore means complete. `meta.json` holds the options, fingerprints of the inputs, package
version, git commit, seconds and cost; reopening with other options raises and lists the differences.
Nothing here pickles.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from oracle.errors import InputError, MismatchError, MissingFileError, StorageError

FULL_DISK_BYTES = 2**20
FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust's standard library ends the text of a system error


def fingerprint(value: object) -> str:
    """Return 16 hex digits that identify a JSON-like value by content (key order does not matter)."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a three-part `StorageError` that names `path`.

    safetensors gives the system's error number only in its text, and for a full disk none; then the free space decides.
    """
    from safetensors import SafetensorError

    try:
        yield
    except InputError:  # such as MissingFileError of something that is read meanwhile
        raise
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}.",
            "a folder that may be written",
            "name another folder, or remove the file that is in the way.",
        ) from error
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        is_full = shutil.disk_usage(_existing_parent(path)).free < FULL_DISK_BYTES
        if number not in FULL_DISK_ERRNOS and not (number is None and isinstance(error, SafetensorError) and is_full):
            raise
        raise StorageError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}.",
            "a disk with free space that may be written",
            "free some space and run the same command again; it continues after the last finished part.",
        ) from error


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = SYSTEM_ERROR.search(str(error))
    return int(found[1]) if found else None


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in [path, *path.absolute().parents] if parent.exists())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` on success, remove it on failure."""
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path` that takes its place when the block succeeds."""
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            if path.exists():
                shutil.rmtree(path)
            os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        MissingFileError: There is no such file.
        InputError: The file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFileError(
            f"there is no file {path}.", "a folder that this project wrote", "check the path, or run the stage that writes it."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not valid JSON: {error}.",
            "the file as this project wrote it",
            "delete it and run the stage that writes it again.",
        ) from error


@cache
def provenance() -> dict[str, str]:
    """Return the version of this package and the git commit of its checkout (empty outside one)."""
    try:
        version = metadata.version("influence-surrogate")
    except metadata.PackageNotFoundError:
        version = "not installed"
    root = Path(__file__).resolve().parent.parent
    commit = ""
    if (root / ".git").exists():
        answer = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = answer.stdout.strip()
    return {"version": version, "git_commit": commit}


def require_same(
    stored: Mapping[str, Any],
    asked: Mapping[str, Any],
    *,
    where: Path,
    remedy: str = "repeat the stored options, or name another folder for the new ones.",
) -> None:
    """Refuse to go on with results that were made otherwise.

    Args:
        stored: Options and fingerprints as found on disk.
        asked: The same for the call at hand.
        where: The folder, named in the error.
        remedy: What to do.

    Raises:
        MismatchError: Some value differs; all differences are listed.
    """
    stored, asked = (json.loads(json.dumps(value, default=str)) for value in (stored, asked))
    differences = _differences(stored, asked)
    if differences:
        raise MismatchError(
            f"{where} holds results made with other options or inputs: " + "; ".join(differences) + ".",
            "the same options and inputs as stored",
            remedy,
        )


def _differences(stored: Any, asked: Any, name: str = "") -> list[str]:
    """Name what differs between two JSON values, down to the single entries of mappings."""
    if stored == asked:
        return []
    if not (isinstance(stored, dict) and isinstance(asked, dict) and stored.keys() & asked.keys()):
        return [f"{name}: stored {stored!r}, asked {asked!r}"]
    inner = f"{name}." if name else ""
    keys = sorted(stored.keys() | asked.keys())
    return [line for key in keys for line in _differences(stored.get(key), asked.get(key), f"{inner}{key}")]


@contextmanager
def timed(add_seconds: Callable[[float], None]) -> Iterator[None]:
    """Give the wall-clock seconds of a block to `add_seconds`, also when it raises."""
    start_seconds = time.perf_counter()
    try:
        yield
    finally:
        add_seconds(time.perf_counter() - start_seconds)
