"""The chosen rows of the input files, with all their columns, one parquet file per input."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oracle.artifacts import storing
from oracle.errors import InputError
from surrogate.scoring.disk_pool import CorpusLike
from surrogate.scoring.outputs import output_name
from surrogate.scoring.positions import among, read_positions
from surrogate.scoring.score_files import POSITION


def write_chosen_rows(scored: CorpusLike, selection: Path, folder: Path) -> None:
    """Write `<folder>/<name>.parquet` for each input file with chosen rows, in their order in the file.

    Args:
        scored: The corpus; its `joined` reads the inputs again, which must not have changed.
        selection: Where the positions are.
        folder: For the files.
    """
    for file in scored.files:
        wanted = read_positions(selection, file.name)
        if not len(wanted):
            continue
        path = folder / output_name(file.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with storing(path):
            num_written = _write(scored, file.name, wanted, path)
        if num_written != len(wanted):
            raise InputError(
                f"only {num_written} of {len(wanted)} chosen rows of {file.name} were found again.",
                "the input files as they were scored",
                "score the corpus again.",
            )


def _write(scored: CorpusLike, name: str, wanted: np.ndarray, path: Path) -> int:
    """Write the wanted rows of one file and return how many there were."""
    if name.lower().endswith(".parquet"):
        schema = None
    else:  # rows of JSON have the types of their block; those of the file are known at its end
        found = {table.schema for table in _chosen(scored, name, wanted)}
        schema = pa.unify_schemas(sorted(found, key=str), promote_options="permissive")
    writer: pq.ParquetWriter | None = None
    num_written = 0
    for table in _chosen(scored, name, wanted):
        if schema is not None:
            table = pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
        if writer is None:
            writer = pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
        num_written += table.num_rows
    if writer is not None:
        writer.close()
    return num_written


def _chosen(scored: CorpusLike, name: str, wanted: np.ndarray) -> Iterator[pa.Table]:
    for table in scored.joined(name):
        kept = table.filter(pa.array(among(table[POSITION].to_numpy(), wanted)))
        if kept.num_rows:
            yield kept
