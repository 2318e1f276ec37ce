"""What a source of a corpus names: its files in one order, each with a name of its own and a stamp.

A source is a path, glob, folder or fsspec URL, a dataset on the Hugging Face hub, or a list of these. Nothing is
opened here but listings, so that a million files are planned in seconds and a broken one is found by the worker that
reads it. The name decides where the scores of a file go; it is the path below what was named, so that it stays the same
when the corpus grows or moves.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
from fsspec.implementations.local import LocalFileSystem

from oracle.errors import InputError, InputTypeError, MissingFileError, MissingPackageError, closest
from oracle.sources import FILE_ENDINGS, HUB_NAME

CorpusSource: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"

ACCEPTED = (
    f"paths, globs, folders or URLs of files ending in {', '.join(ending for ending in FILE_ENDINGS if ending.count('.') == 1)} "
    "(JSON lines also packed: .gz, .zst, .bz2, .xz), or a hub dataset named 'org/name'"
)
MAGIC = "*?["
MAX_NAME_BYTES = 255 - len(".parquet.jsonl")  # of the name of a file, to which endings are added
SAVED_DATASET_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")  # what Dataset.save_to_disk puts beside its data
STAMP_KEYS = ("ETag", "etag", "md5Hash", "md5", "blob_id", "LastModified", "last_modified", "mtime", "updated", "created")


@dataclass(frozen=True)
class InputFile:
    """One file of a corpus.

    Attributes:
        url: An absolute path, or a URL for fsspec: what opens it on every machine.
        name: Its path below what the source named; no two files of a run share one.
        num_bytes: Its size when it was listed.
        stamp: Changes when the file does: size with entity tag or time of change.
    """

    url: str
    name: str
    num_bytes: int
    stamp: str


@dataclass
class Listing:
    """The files of a source, sorted by name; what could not be listed, with the reason; and how many are no data files."""

    files: list[InputFile] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    num_ignored: int = 0


@dataclass(frozen=True)
class _Found:
    url: str
    base: str  # the part of `url` that its name leaves out
    info: dict[str, Any]


def list_inputs(source: CorpusSource, *, split: str = "train") -> Listing:
    """List the files that a source names.

    In folders and globs, files of other kinds are left out and counted, as are those whose name begins with a dot or
    an underscore. A file that is named itself has to be of a known kind.

    Args:
        source: What `ACCEPTED` says, or a list of it.
        split: The split of a hub dataset.

    Raises:
        MissingFileError: Something that was named is not there, or a glob or folder holds no data file.
        MissingPackageError: A URL needs a package that is not installed.
        InputError: A file of an unknown kind was named.
    """
    locations = [source] if isinstance(source, (str, os.PathLike)) else source
    if not isinstance(locations, (list, tuple)) or not all(isinstance(item, (str, os.PathLike)) for item in locations):
        raise InputTypeError(
            f"a {type(source).__name__} is no corpus of files.",
            ACCEPTED,
            "name files; a Dataset is scored by dataset.map(surrogate.scoring.ScoreBatch(folder), batched=True).",
        )
    listing = Listing()
    found: dict[str, _Found] = {}
    for location in locations:
        for item in _expand(os.fspath(location), listing, split):
            found.setdefault(item.url, item)
    if not found and not listing.failed:
        raise MissingFileError(
            f"the source {_shown(locations)} holds no data file ({listing.num_ignored} of other kinds).",
            ACCEPTED,
            "check the path, or convert the files.",
        )
    names = _names(list(found.values()))
    for item, name in zip(found.values(), names, strict=True):
        fault = _fault_of_name(name)
        if fault:
            listing.failed[item.url] = fault
        else:
            listing.files.append(InputFile(item.url, name, int(item.info.get("size") or 0), _stamp(item.info)))
    listing.files.sort(key=lambda file: file.name)
    listing.failed = {printable(url): reason for url, reason in listing.failed.items()}
    return listing


def printable(text: str) -> str:
    """Return a text without the stand-ins for bytes that are not UTF-8, which no file of JSON can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def open_input(url: str) -> Any:
    """Open a file of a corpus for reading bytes."""
    return fsspec.open(url, "rb").open() if "://" in url or "::" in url else open(url, "rb")


def stamp_of_path(path: str) -> str:
    """Return the stamp of a local file; nothing where it is gone."""
    return _stamp(_local_info(path)) if os.path.exists(path) else ""


def _expand(location: str, listing: Listing, split: str) -> Iterator[_Found]:
    """Yield everything that one location stands for."""
    filesystem, path = _file_system(location)
    if "::" in location:  # a file inside an archive is opened by the very URL that was given
        yield _Found(location, posixpath.dirname(location), filesystem.info(path))
    elif isinstance(filesystem, LocalFileSystem) and os.path.lexists(path) and not os.path.exists(path):
        listing.failed[location] = "a broken symbolic link"
    elif _exists(filesystem, path, location):
        if filesystem.isdir(path):
            yield from _walk(filesystem, path, listing)
        elif not path.lower().endswith(FILE_ENDINGS):
            raise InputError(
                f"{location} has an ending that is not known.", ACCEPTED, "convert the file, or leave it out of the source."
            )
        else:
            yield _found(filesystem, path, base=posixpath.dirname(path))
    elif any(char in path for char in MAGIC):
        yield from _glob(filesystem, path, listing)
    elif _may_be_on_the_hub(location):
        yield from _hub_files(location, split)
    else:
        raise _missing(filesystem, path, location)


def _exists(filesystem: fsspec.AbstractFileSystem, path: str, location: str) -> bool:
    try:
        return bool(filesystem.exists(path))
    except Exception as error:  # every file system raises what its own library does
        raise InputError(
            f"{location} cannot be reached: {type(error).__name__}: {error}.",
            ACCEPTED,
            "check the network and the rights, or name local files.",
        ) from error


def _may_be_on_the_hub(location: str) -> bool:
    """Whether a name that is no file may be one of the hub; below a folder that is here it is a mistyped path."""
    is_below = os.path.isdir(location.partition("/")[0])
    return HUB_NAME.fullmatch(location) is not None and not location.lower().endswith(FILE_ENDINGS) and not is_below


def _file_system(location: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        filesystem, path = fsspec.url_to_fs(location)
    except ImportError as error:
        protocol = location.partition("://")[0]
        raise MissingPackageError(
            f"reading {location} needs a package: {error}.",
            f"an fsspec file system for {protocol}://",
            "install it, for example: pip install s3fs (s3), gcsfs (gs) or adlfs (az).",
        ) from error
    except ValueError as error:
        raise InputError(f"{location!r} cannot be opened: {error}.", ACCEPTED, "correct the URL's protocol.") from error
    return filesystem, path


def _glob(filesystem: fsspec.AbstractFileSystem, pattern: str, listing: Listing) -> Iterator[_Found]:
    parts = pattern.split("/")
    fixed = next(place for place, part in enumerate(parts) if any(char in part for char in MAGIC))
    base = "/".join(parts[:fixed])
    matches = filesystem.glob(pattern, detail=True)
    if not matches:
        raise MissingFileError(f"no file matches {pattern}.", ACCEPTED, "check the folder and the pattern.")
    for path, info in sorted(matches.items()):
        if isinstance(filesystem, LocalFileSystem) and not os.path.exists(path):
            listing.failed[path] = "a broken symbolic link"
        elif info["type"] == "directory" or filesystem.isdir(path):
            yield from _walk(filesystem, path, listing, base=base)
        elif path.lower().endswith(FILE_ENDINGS):
            yield _found(filesystem, path, base=base)
        else:
            listing.num_ignored += 1


def _walk(filesystem: fsspec.AbstractFileSystem, folder: str, listing: Listing, *, base: str | None = None) -> Iterator[_Found]:
    """Yield the data files below a folder."""
    base = folder if base is None else base
    paths = _local_paths(folder, listing) if isinstance(filesystem, LocalFileSystem) else filesystem.find(folder, detail=True)
    for path in sorted(paths):
        below = posixpath.relpath(path, folder)
        hidden = any(part.startswith((".", "_")) for part in below.split("/"))
        if hidden or posixpath.basename(path) in SAVED_DATASET_FILES or not path.lower().endswith(FILE_ENDINGS):
            listing.num_ignored += 1
        elif isinstance(filesystem, LocalFileSystem) and not os.path.exists(path):
            listing.failed[path] = "a broken symbolic link"
        else:
            yield _found(filesystem, path, base=base, info=None if isinstance(paths, list) else paths[path])


def _local_paths(folder: str, listing: Listing) -> list[str]:
    """List all files below a local folder; links to folders are followed, each folder is entered once."""
    paths: list[str] = []
    entered: set[str] = set()

    def refuse(error: OSError) -> None:
        listing.failed[str(error.filename)] = f"the folder cannot be listed: {error.strerror}"

    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        if not names and not folders and parent.lower().endswith(FILE_ENDINGS):
            listing.failed[parent] = "an empty folder with the name of a file"
        paths += [posixpath.join(parent, name) for name in names]
    return paths


def _found(filesystem: fsspec.AbstractFileSystem, path: str, *, base: str, info: dict[str, Any] | None = None) -> _Found:
    if isinstance(filesystem, LocalFileSystem):
        absolute = os.path.abspath(path)
        return _Found(absolute, os.path.abspath(base or "/"), _local_info(absolute))
    return _Found(filesystem.unstrip_protocol(path), filesystem.unstrip_protocol(base), info or filesystem.info(path))


def _local_info(path: str) -> dict[str, Any]:
    state = os.stat(path)
    return {"size": state.st_size, "mtime": state.st_mtime_ns}


def _hub_files(name: str, split: str) -> Iterator[_Found]:
    """Yield the files that make up one split of a hub dataset."""
    import datasets

    hint = closest(name.partition("/")[0], (entry.name for entry in os.scandir() if entry.is_dir()))
    try:
        files = datasets.load_dataset_builder(name).config.data_files or {}
    except (OSError, ValueError) as error:
        raise MissingFileError(
            f"there is no local file or folder {name!r}{hint}, and no dataset of that name was reached on the hub: {error}.",
            ACCEPTED,
            "correct the path or name; where a dataset has several configurations, name the files of one: "
            "hf://datasets/org/name/configuration/*.parquet; without a network, name local files.",
        ) from error
    if split not in files:
        raise InputError(f"{name!r} has no split {split!r}.", ", ".join(map(str, files)), "choose one of these for split.")
    found = []
    for url in files[split]:
        filesystem, path = _file_system(str(url))
        found.append(_found(filesystem, path, base=posixpath.dirname(path)))
    protocol, mark, _ = found[0].url.rpartition("://")
    base = posixpath.commonpath([posixpath.dirname(item.url.removeprefix(protocol + mark)) for item in found])
    for item in found:
        yield _Found(item.url, protocol + mark + base, item.info)


def _missing(filesystem: fsspec.AbstractFileSystem, path: str, location: str) -> MissingFileError:
    parent, _, name = path.rstrip("/").rpartition("/")
    siblings: list[str] = []
    if filesystem.isdir(parent or "/"):
        siblings = sorted(sibling.rstrip("/").rpartition("/")[2] for sibling in filesystem.ls(parent or "/", detail=False))
    return MissingFileError(
        f"there is no file or folder {location}{closest(name, siblings)}.", ACCEPTED, "correct the path or the pattern."
    )


def _names(found: Sequence[_Found]) -> list[str]:
    """Name each file by its path below its base, or, where two would share a name, below the folder common to all."""
    names = [_below(item.url, item.base) for item in found]
    if len(set(names)) == len(names):
        return names
    split = [item.url.partition("://") for item in found]
    paths = [rest if rest else first for first, _, rest in split]
    common = posixpath.commonpath([posixpath.dirname(path) for path in paths]) if _same_kind(paths) else ""
    return [posixpath.relpath(path, common) if common else path.lstrip("/") for path in paths]


def _fault_of_name(name: str) -> str:
    """Say why no score file can have the name of an input: keys of object stores may be anything."""
    try:
        parts = [len(part.encode()) for part in name.split("/")]
    except UnicodeEncodeError:
        return "its name is not valid UTF-8"
    if not all(part not in ("", ".", "..") for part in name.split("/")):
        return "its name has an empty part, '.' or '..'"
    return f"its name is longer than {MAX_NAME_BYTES} bytes" if max(parts) > MAX_NAME_BYTES else ""


def _same_kind(paths: Sequence[str]) -> bool:
    return len({path.startswith("/") for path in paths}) == 1


def _below(url: str, base: str) -> str:
    start = base.rstrip("/") + "/"
    return url[len(start) :] if url.startswith(start) else posixpath.basename(url)


def _stamp(info: dict[str, Any]) -> str:
    mark = next((info[key] for key in STAMP_KEYS if info.get(key)), "")
    return f"{info.get('size')}-{mark}"


def _shown(locations: Sequence[str | os.PathLike[str]]) -> str:
    shown = ", ".join(str(Path(item) if isinstance(item, os.PathLike) else item) for item in locations[:3])
    return f"{shown}, ..." if len(locations) > 3 else shown
