"""Opens whatever texts are stored in and hands back their columns; nothing is judged here.

Accepted are files (JSON lines, also packed; parquet; arrow), globs, fsspec URLs, folders that
`Dataset.save_to_disk` wrote, Dataset objects, strings or dicts in memory, and dataset names on the
Hugging Face hub. Files are parsed directly rather than through `datasets.load_dataset`, which copies each
into a cache keyed by path and file time. JSON lines go through the standard library: a broken line can be
named, a column may mix types, and a string that looks like a date stays a string.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import zstandard
from fsspec.compression import compr
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.utils import infer_compression

from oracle.errors import InputError, InputTypeError, MissingFileError, MissingPackageError, closest

if TYPE_CHECKING:
    import datasets

Source: TypeAlias = (
    "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Iterable[str | Mapping[str, Any]]"
    " | datasets.Dataset | datasets.DatasetDict"
)
Column: TypeAlias = "list[Any] | pa.ChunkedArray"
Rows: TypeAlias = "list[dict[str, Any]]"

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
ARROW_ENDINGS = (".arrow", ".feather")
PACKED_ENDINGS = (".gz", ".zst", ".bz2", ".xz")
FILE_ENDINGS = (
    *JSON_ENDINGS,
    *(json_ending + packed for json_ending in JSON_ENDINGS for packed in PACKED_ENDINGS),
    ".parquet",
    *ARROW_ENDINGS,
)
ACCEPTED_ENDINGS = f"{', '.join(JSON_ENDINGS)} (also packed: {', '.join(PACKED_ENDINGS)}), .parquet, {', '.join(ARROW_ENDINGS)}"
ACCEPTED_SOURCES = (
    f"a path, glob or URL of files ending in {ACCEPTED_ENDINGS}; a folder written by Dataset.save_to_disk; "
    "a Dataset; a list of strings or of dicts; a hub dataset named 'org/name'"
)
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
BROKEN_ARCHIVE_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)
MAX_SHOWN_PATH_CHARS, SHOWN_TEXT_CHARS = 255, 80  # the longest name of a file, and what errors show of a longer text
MAX_PATH_CHARS = 4096  # PATH_MAX on Linux; asking the disk about a longer text raises


@dataclass(frozen=True)
class Material:
    """What a source holds: its columns as found, and the `datasets` features of those that arrow described."""

    columns: dict[str, Column]
    num_rows: int
    description: str
    features: dict[str, Any] = field(default_factory=dict)


def open_source(source: Source, *, text_column: str, split: str, limit: int | None) -> Material:
    """Read the columns of a source.

    Args:
        source: What `ACCEPTED_SOURCES` says. A list of strings is taken for texts, unless every one of them
            ends like a data file or exists as a path.
        text_column: The column that bare strings go to.
        split: Which split of a hub dataset or `DatasetDict`.
        limit: Read at most this many rows, the first ones.

    Raises:
        MissingFileError: A file, folder, URL or hub dataset cannot be found.
        MissingPackageError: A URL needs a package that is not installed.
        InputError: A file cannot be parsed or is of an unknown kind, or `split` has no effect.
    """
    import datasets

    if isinstance(source, datasets.DatasetDict):
        return _merge([_pick_split(source, split)[:limit]], f"split {split!r} of a DatasetDict")
    if isinstance(source, (str, os.PathLike)):
        return _merge(_read_location(os.fspath(source), split, limit), str(source))
    if isinstance(source, (list, tuple)) and source and all(_is_location(item) for item in source):
        parts: list[Rows | pa.Table] = []
        for location in source:
            parts += _read_location(os.fspath(location), split, _left(limit, parts))
        return _merge(parts, str(source[0]) if len(source) == 1 else f"{len(source)} paths from {source[0]} on")
    _check_split_unused(split)
    if isinstance(source, datasets.Dataset):
        return _merge([source.with_format("arrow")[:limit]], "a Dataset")
    if isinstance(source, (bytes, Mapping)) or not isinstance(source, Iterable):
        raise InputTypeError(f"a {type(source).__name__} is no source of texts.", ACCEPTED_SOURCES, "pass one of these.")
    items = itertools.islice(source, limit)
    return _merge([[dict(item) if isinstance(item, Mapping) else {text_column: item} for item in items]], "a list in memory")


def _is_location(item: object) -> bool:
    if isinstance(item, os.PathLike):
        return True
    if not isinstance(item, str) or not item or len(item) > MAX_PATH_CHARS or any(char in item for char in "\n\0"):
        return False
    return item.lower().endswith(FILE_ENDINGS) or os.path.exists(item.encode("utf-8", "surrogatepass"))


def _left(limit: int | None, parts: Sequence[Rows | pa.Table]) -> int | None:
    return None if limit is None else limit - sum(len(part) for part in parts)


def _check_split_unused(split: str) -> None:
    if split != "train":
        raise InputError(
            f"split={split!r} has no effect on this source.", "a split of a hub dataset or of a DatasetDict", "leave split out."
        )


def _pick_split(splits: Mapping[str, datasets.Dataset], split: str) -> datasets.Dataset:
    """Return one split, formatted as arrow."""
    if split not in splits:
        raise InputError(
            f"there is no split {split!r}{closest(split, splits)}.", ", ".join(splits), "choose one of these for split."
        )
    return splits[split].with_format("arrow")


def _merge(parts: Sequence[Rows | pa.Table], description: str) -> Material:
    """Join parts in order: as arrow where all are arrow, as Python values where some are rows."""
    import datasets

    tables = [part for part in parts if isinstance(part, pa.Table)]
    if tables and len(tables) == len(parts):
        try:
            table = tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(
                f"{description}: the files disagree on the type of a column: {error}.",
                "files in which a column of one name has one type",
                "unify the types, or read the files one by one.",
            ) from error
        columns = {name: table[name] for name in table.column_names}
        return Material(columns, table.num_rows, description, dict(datasets.Features.from_arrow_schema(table.schema)))
    rows = [row for part in parts for row in (part.to_pylist() if isinstance(part, pa.Table) else part)]
    names = dict.fromkeys(name for row in rows for name in row)
    return Material({name: [row.get(name) for row in rows] for name in names}, len(rows), description)


def _read_location(location: str, split: str, limit: int | None) -> list[Rows | pa.Table]:
    """Read everything that one path, glob, URL or hub name stands for."""
    try:
        filesystem, path = fsspec.url_to_fs(location)
    except ImportError as error:
        protocol = location.partition("://")[0]
        raise MissingPackageError(
            f"reading {_shown(location)} needs a package: {error}.",
            f"an fsspec file system for {protocol}://",
            "install it, for example: pip install s3fs (s3), gcsfs (gs) or adlfs (az).",
        ) from error
    except ValueError as error:
        raise InputError(
            f"{_shown(location)} cannot be opened: {error}.", ACCEPTED_SOURCES, "correct the URL's protocol."
        ) from error
    if filesystem.exists(path):
        names = [path]
    elif any(char in path for char in "*?["):
        names = sorted(filesystem.glob(path))
        if not names:
            raise MissingFileError(
                f"no file matches {_shown(location)}.",
                ACCEPTED_SOURCES,
                "check the folder and the pattern; texts themselves are passed as a list of strings.",
            )
    elif _may_be_on_hub(location):
        return [_hub_dataset(location, split)[:limit]]
    else:
        raise _missing(filesystem, path, location)
    parts: list[Rows | pa.Table] = []
    for name in names:
        if (num_left := _left(limit, parts)) == 0:
            break
        if filesystem.isdir(name):
            parts.append(_read_folder(filesystem, name, split)[:num_left])
        else:
            _check_split_unused(split)
            parts.append(_read_file(filesystem, name, num_left))
    return parts


def _shown(location: str) -> str:
    """Return a path as it is, and the beginning of what is rather a text."""
    is_text = "\n" in location or len(location) > MAX_SHOWN_PATH_CHARS
    return f"{location[:SHOWN_TEXT_CHARS]!r}..." if is_text else location


def _missing(filesystem: fsspec.AbstractFileSystem, path: str, location: str) -> MissingFileError:
    """Make the error for a path that does not exist, with what its folder does hold."""
    parent, _, name = path.rstrip("/").rpartition("/")
    siblings: list[str] = []
    if isinstance(filesystem, (LocalFileSystem, MemoryFileSystem)) and filesystem.isdir(parent or "/"):
        siblings = sorted(sibling.rstrip("/").rpartition("/")[2] for sibling in filesystem.ls(parent or "/", detail=False))
    shown = f" The folder holds {', '.join(siblings[:8])}{', ...' if len(siblings) > 8 else ''}." if siblings else ""
    return MissingFileError(
        f"there is no file or folder {_shown(location)}{closest(name, siblings)}.{shown}",
        ACCEPTED_SOURCES,
        "correct the path; texts themselves are passed as a list of strings.",
    )


def _may_be_on_hub(location: str) -> bool:
    """Tell a hub name from a mistyped path: a folder of the organisation's name means a path."""
    return (
        bool(HUB_NAME.fullmatch(location))
        and not location.lower().endswith(FILE_ENDINGS)
        and not os.path.isdir(location.partition("/")[0])
    )


def _hub_dataset(name: str, split: str) -> datasets.Dataset:
    """Load a dataset from the hub, formatted as arrow."""
    import datasets

    hint = closest(name.partition("/")[0], (entry.name for entry in os.scandir() if entry.is_dir()))
    accepted = f"a hub dataset that this machine can reach, or local files: {ACCEPTED_SOURCES}"
    try:
        return datasets.load_dataset(name, split=split).with_format("arrow")
    except OSError as error:
        raise MissingFileError(
            f"there is no local file or folder {name!r}{hint}, and no dataset of that name was reached on the "
            f"Hugging Face hub: {error}.",
            accepted,
            "correct the path or name; without a network, pass local files or a loaded Dataset.",
        ) from error
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the hub dataset {name!r} cannot be loaded with split={split!r}: {error}.",
            accepted,
            "correct split, or load it with datasets.load_dataset and pass the Dataset.",
        ) from error


def _read_folder(filesystem: fsspec.AbstractFileSystem, path: str, split: str) -> datasets.Dataset:
    """Open a folder that `save_to_disk` wrote, formatted as arrow."""
    import datasets

    url = path if isinstance(filesystem, LocalFileSystem) else filesystem.unstrip_protocol(path)
    if filesystem.exists(f"{path}/dataset_dict.json"):
        return _pick_split(datasets.load_from_disk(url), split)
    if filesystem.exists(f"{path}/state.json"):
        _check_split_unused(split)
        return datasets.load_from_disk(url).with_format("arrow")
    endings = sorted(
        {ending for name in filesystem.ls(path, detail=False) for ending in FILE_ENDINGS if name.lower().endswith(ending)}
    )
    globs = " or ".join(f"{path}/*{ending}" for ending in endings)
    raise InputError(
        f"the folder {path} was not written by Dataset.save_to_disk.",
        ACCEPTED_SOURCES,
        f"name the files in it: {globs}." if globs else "name a folder or files that hold texts.",
    )


def _read_file(filesystem: fsspec.AbstractFileSystem, path: str, limit: int | None) -> Rows | pa.Table:
    name = path.lower()
    if not name.endswith(FILE_ENDINGS):
        raise InputError(
            f"{path} has an ending that is not known.",
            ACCEPTED_ENDINGS,
            "convert the file, or load it yourself and pass a Dataset or a list of dicts.",
        )
    with filesystem.open(path, "rb") as raw:
        if name.endswith(".parquet") or name.endswith(ARROW_ENDINGS):
            try:
                return _read_parquet(raw, limit) if name.endswith(".parquet") else _read_arrow(raw).slice(0, limit)
            except pa.ArrowInvalid as error:
                raise InputError(
                    f"{path} cannot be parsed: {error}.", "a complete parquet, arrow or feather file", "write the file again."
                ) from error
        packing = infer_compression(name)
        try:
            # fsspec takes whichever zstd package it finds, and each has its own error; this one also joins frames
            unpacked = (
                raw
                if packing is None
                else (
                    zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                    if packing == "zstd"
                    else compr[packing](raw, mode="rb")
                )
            )
            lines = io.TextIOWrapper(unpacked, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
            return _read_json(lines, path, limit=limit, may_be_array=".json" in (name[-5:], name.rpartition(".")[0][-5:]))
        except BROKEN_ARCHIVE_ERRORS as error:
            raise InputError(
                f"{path} cannot be unpacked: {error}.", f"a complete {packing} file", "write the file again."
            ) from error


def _read_parquet(raw: IO[bytes], limit: int | None) -> pa.Table:
    file = pq.ParquetFile(raw)
    if limit is None:
        return file.read()
    batches, num_rows = [], 0
    for batch in file.iter_batches():
        batches.append(batch)
        num_rows += batch.num_rows
        if num_rows >= limit:
            break
    return pa.Table.from_batches(batches, schema=file.schema_arrow).slice(0, limit)


def _read_arrow(raw: IO[bytes]) -> pa.Table:
    """Read an IPC stream (as `datasets` writes it) or an IPC or feather file, told apart by the first bytes."""
    magic = raw.read(4)
    raw.seek(0)
    if magic in (b"ARRO", b"FEA1"):
        return pyarrow.feather.read_table(pa.PythonFile(raw))
    return pa.ipc.open_stream(raw).read_all()


def _read_json(lines: IO[str], path: str, *, limit: int | None, may_be_array: bool) -> Rows:
    rows: Rows = []
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        if may_be_array and not rows and line.lstrip().startswith("["):
            values = _parse(line + lines.read(), f"{path}, from line {number}")
            if isinstance(values, list) and all(isinstance(value, dict) for value in values):
                return values[:limit]
            raise InputError(
                f"{path} holds a list, but not of objects.",
                "a JSON list of objects, or one object per line",
                'wrap each text: {"text": ...}.',
            )
        row = _parse(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise InputError(
                f"{path}, line {number}: a {type(row).__name__} stands where an object is needed.",
                "one JSON object per line",
                'wrap each text: {"text": ...}.',
            )
        rows.append(row)
        if len(rows) == limit:
            break
    return rows


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{where}: not valid JSON: {error}.",
            "one JSON object per line",
            "correct or remove this line; a file that was cut short has to be written again.",
        ) from error
