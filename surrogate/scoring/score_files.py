"""The file that scores are kept in: one parquet file per shard, the same bytes whoever wrote it.

Columns, in this order:

    text_id            string   the hash of the text's content, as `oracle.read_texts` gives it
    position           int64    the row in the input file, counted from 0
    score:<target>     float32  one per target, in the units of the labels
    spread:<target>    float32  one per target, where the surrogate knows how far its members disagree
    <passed column>    as read  the columns of the input that were asked for

The metadata of the file (`read_header`) says which predictor, options and input it was made of. Nothing in a file
depends on when, where or beside what it was made: no time, host, path, worker count, and no row group that ends where
some worker stopped. Left out: the texts themselves, unless they are passed through.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oracle.artifacts import storing
from oracle.errors import InputError, MissingFileError
from surrogate.scoring.items import row_bytes

SCHEMA_VERSION = 1
METADATA_KEY = b"influence_surrogate"
TEXT_ID, POSITION = "text_id", "position"
SCORE_PREFIX, SPREAD_PREFIX = "score:", "spread:"
ROW_GROUP_ROWS = 65_536
ROW_GROUP_BYTES = 2**26  # a row group ends sooner where passed-through columns are large
COMPRESSION, COMPRESSION_LEVEL = "zstd", 3


@dataclass(frozen=True)
class ScoreHeader:
    """What a score file says of itself.

    Attributes:
        predictor: Fingerprint of the predictor.
        encoders: Name and fingerprint of each encoder.
        target_names: C names, in column order.
        units: Units of the scores.
        has_spread: Whether there are spread columns.
        options: What else the scores depend on: text column, format, passed columns, the bound on a text's length.
        input_name: The input file's name below the source.
        input_bytes: Its size.
        schema_version: Of this layout.
    """

    predictor: str
    encoders: Sequence[Mapping[str, str]]
    target_names: Sequence[str]
    units: str
    has_spread: bool
    options: Mapping[str, Any]
    input_name: str
    input_bytes: int
    schema_version: int = SCHEMA_VERSION


def score_column(target: str) -> str:
    """Return the name of the column with the scores of a target."""
    return SCORE_PREFIX + target


def value_columns(target_names: Sequence[str], *, has_spread: bool) -> list[str]:
    """Return the names of all score and spread columns, in the file's order."""
    scores = [score_column(name) for name in target_names]
    return scores + ([SPREAD_PREFIX + name for name in target_names] if has_spread else [])


def score_schema(header: ScoreHeader, passed: pa.Schema | None = None) -> pa.Schema:
    """Return the schema of a score file, with its metadata; `passed` are the passed-through columns."""
    values = value_columns(header.target_names, has_spread=header.has_spread)
    fields = [pa.field(TEXT_ID, pa.string()), pa.field(POSITION, pa.int64()), *(pa.field(name, pa.float32()) for name in values)]
    text = json.dumps(dataclasses.asdict(header), sort_keys=True, ensure_ascii=False)
    return pa.schema([*fields, *(passed or [])], metadata={METADATA_KEY: text.encode()})


class ScoreWriter:
    """Writes one score file; its bytes depend on the rows alone and not on how they are handed over."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self._waiting: list[pa.Table] = []
        self._waiting_rows = self._waiting_bytes = 0
        self._passed = [name for name in schema.names if not is_own(name)]
        with storing(path):
            self._sink = pa.OSFile(str(path), "wb")
            try:
                self._writer = pq.ParquetWriter(
                    self._sink,
                    schema,
                    compression=COMPRESSION,
                    compression_level=COMPRESSION_LEVEL,
                    use_dictionary=self._passed or False,
                    write_page_checksum=True,
                )
            except (OSError, pa.ArrowException):
                self._sink.close()
                path.unlink()
                raise

    def write(self, rows: pa.Table) -> None:
        """Add rows; their columns are those of the schema."""
        sizes = np.cumsum(row_bytes(rows.select(self._passed))) if self._passed else np.zeros(rows.num_rows, dtype=np.int64)
        start = start_bytes = 0
        while start < rows.num_rows:
            room = ROW_GROUP_BYTES - self._waiting_bytes + start_bytes
            stop = min(start + ROW_GROUP_ROWS - self._waiting_rows, int(np.searchsorted(sizes, room)) + 1, rows.num_rows)
            self._waiting.append(rows.slice(start, stop - start))
            self._waiting_rows += stop - start
            self._waiting_bytes += int(sizes[stop - 1]) - start_bytes
            start, start_bytes = stop, int(sizes[stop - 1])
            if self._waiting_rows == ROW_GROUP_ROWS or self._waiting_bytes >= ROW_GROUP_BYTES:
                self._flush()

    def close(self) -> None:
        """Finish the file."""
        if self._waiting:
            self._flush()
        with storing(self.path):
            self._writer.close()
            self._sink.close()

    def abandon(self) -> None:
        """Close without finishing, as after an error, and remove the file."""
        self._writer.is_open = False  # its own close would write a footer
        self._sink.close()
        self.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        table = pa.concat_tables(self._waiting).combine_chunks()
        with storing(self.path):
            self._writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
        self._waiting, self._waiting_rows, self._waiting_bytes = [], 0, 0


def read_header(path: str | Path) -> ScoreHeader:
    """Read what a score file says of itself.

    Raises:
        MissingFileError: There is no such file.
        InputError: It is no score file, or one of a later version.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        fields = json.loads(metadata[METADATA_KEY])
    except FileNotFoundError as error:
        raise MissingFileError(f"there is no file {path}.", "a score file", "check the path.") from error
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise InputError(
            f"{path} is no score file: {error}.", "a parquet file that score_corpus wrote", "score the corpus again."
        ) from error
    if fields["schema_version"] > SCHEMA_VERSION:
        raise InputError(
            f"{path} has the layout {fields['schema_version']}.", f"layouts up to {SCHEMA_VERSION}", "update this package."
        )
    return ScoreHeader(**fields)


def is_own(name: str) -> bool:
    """Say whether a column of a score file is one of its own, and not passed through."""
    return name in (TEXT_ID, POSITION) or name.startswith((SCORE_PREFIX, SPREAD_PREFIX))
