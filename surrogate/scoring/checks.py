"""What is checked before a corpus is scored: where the scores go, the names of files, the names of columns."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from oracle.errors import InputError, check_count, closest
from surrogate.scoring.files import CorpusSource, Listing
from surrogate.scoring.items import BadFile
from surrogate.scoring.json_reader import JsonReader
from surrogate.scoring.layout import Layout, ScoreOptions
from surrogate.scoring.outputs import output_name
from surrogate.scoring.readers import open_reader

FILES_LOOKED_INTO = 20


def check_rank(rank: int, world_size: int) -> None:
    """Refuse the number of a machine that is not one of an array's."""
    check_count("world_size", world_size)
    check_count("rank", rank, minimum=0)
    if rank >= world_size:
        raise InputError(f"rank={rank} with world_size={world_size}.", "a rank from 0 to world_size - 1", "count ranks from 0.")


def check_apart(source: CorpusSource, output: Path) -> None:
    """Refuse an output folder that is a folder of the source or inside one: its files would be taken for texts."""
    for location in [source] if isinstance(source, (str, os.PathLike)) else source:
        if (
            isinstance(location, (str, os.PathLike))
            and os.path.isdir(location)
            and output.resolve().is_relative_to(Path(location).resolve())
        ):
            raise InputError(
                f"the output folder {output} is inside the source {location}.",
                "a folder elsewhere",
                "name another output folder, or name the files of the source by a glob.",
            )


def check_folder(output: Path, *, mark: str, own: Collection[str] = ()) -> None:
    """Refuse a folder that holds other things: one with the file `mark`, or with nothing but `own`, is ours."""
    if (output / mark).exists() or not output.is_dir():
        return
    others = sorted(path.name for path in output.iterdir() if not path.name.startswith(".") and path.name not in own)
    if others:
        raise InputError(
            f"the output folder {output} holds other things: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}.",
            "a new folder, or one that the same command wrote",
            "name another output folder.",
        )


def check_columns(listing: Listing, options: ScoreOptions) -> None:
    """Refuse a name that none of the first files has, before any is scored; some files may be without it, or broken."""
    refusals: list[InputError] = []
    absent: set[str] | None = None  # None before the first file that has texts
    names: list[str] = []
    for file in listing.files[:FILES_LOOKED_INTO]:
        reader = open_reader(file)
        if isinstance(reader, BadFile):
            continue
        try:
            if isinstance(reader, JsonReader) and reader.is_empty:
                continue
            layout = Layout(reader, options, file.name)
            absent = set(layout.absent) if absent is None else absent & set(layout.absent)
            names += reader.names
        except InputError as error:
            refusals.append(error)
        finally:
            reader.close()
        if absent is not None and not absent:
            return
    if refusals and absent is None:
        raise refusals[0]
    if absent:
        name = min(absent)
        raise InputError(
            f"the first {min(len(listing.files), FILES_LOOKED_INTO)} files have no column {name!r}{closest(name, names)}.",
            ", ".join(dict.fromkeys(names)),
            "correct the name of the column that is to be written beside the scores.",
        )


def check_names(listing: Listing) -> None:
    """Refuse files whose scores could not stand beside each other."""
    urls: dict[str, str] = {}
    for file in listing.files:
        other = urls.setdefault(output_name(file.name), file.url)
        if other != file.url:
            raise InputError(
                f"the scores of {file.url} and {other} would have the same name.",
                "files whose paths differ in more than the protocol and the ending .parquet",
                "rename one of them, or score them into two folders.",
            )
    for name, url in urls.items():
        above = next((parent.as_posix() for parent in PurePosixPath(name).parents if parent.as_posix() in urls), None)
        if above is not None:
            raise InputError(
                f"the scores of {url} would be in a folder with the name of those of {urls[above]}.",
                "no file named as the folder of another",
                "rename one of them, or score them into two folders.",
            )
