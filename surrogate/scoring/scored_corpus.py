"""`ScoredCorpus`: reads the scores of a corpus back, as a stream, and joins them to its texts.

Scores are joined by text_id, wherever a text stands, or by position in the very file that was scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oracle.artifacts import read_json
from oracle.errors import InputError, MismatchError, MissingFileError, closest
from oracle.texts import list_text_ids
from surrogate.scores import Scores
from surrogate.scoring.files import InputFile, list_inputs
from surrogate.scoring.items import BadFile, BadRow, JsonRow, Piece
from surrogate.scoring.layout import json_array, json_type
from surrogate.scoring.manifest import read_manifest, read_reports
from surrogate.scoring.outputs import CORPUS_FILE, FAILED, MANIFEST_FILE, score_path
from surrogate.scoring.readers import open_reader
from surrogate.scoring.score_files import POSITION, TEXT_ID, score_column, value_columns

if TYPE_CHECKING:
    from datasets import Dataset

BATCH_ROWS = 65_536


@dataclass(frozen=True)
class ScoreFile:
    """One score file.

    Attributes:
        name: The input file's name below the source.
        path: Where the scores are.
        num_rows: How many rows have a score.
        url: Where the input file was.
        stamp: Its state when it was scored.
    """

    name: str
    path: Path
    num_rows: int
    url: str
    stamp: str


class ScoredCorpus:
    """The scores that `score_corpus` wrote.

    Args:
        folder: The output folder; a run may still be writing to it, then its finished files are read.

    Attributes:
        folder: The output folder.
        files: The score files, by name.
        target_names: C target names.
        units: Units of the scores.
        has_spread: Whether there are spreads beside the scores.
        identity: What all score files have in common: predictor, encoders, options.

    Raises:
        MissingFileError: The folder holds no scored corpus.

    Example:
        >>> scored = surrogate.scoring.ScoredCorpus("scored")               # doctest: +SKIP
        >>> best = max(b["score:math"].to_numpy().max() for b in scored.batches(["score:math"]))  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.identity: dict[str, Any] = read_json(self.folder / CORPUS_FILE)
        self.target_names: list[str] = self.identity["target_names"]
        self.units: str = self.identity["units"]
        self.has_spread: bool = self.identity["has_spread"]
        self.files = list(self._finished())

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest: files, counts, what was put aside and why, what is missing, cost."""
        return read_manifest(self.folder)

    @property
    def num_rows(self) -> int:
        """Rows with a score."""
        return sum(file.num_rows for file in self.files)

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        return f"ScoredCorpus({self.num_rows} rows of {len(self.files)} files, targets={self.target_names}, {str(self.folder)!r})"

    def batches(self, columns: Sequence[str] | None = None, *, batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """Yield all scored rows in the order of files and rows.

        Args:
            columns: Columns to read, such as "text_id" and "score:math"; None reads all.
            batch_rows: Rows per batch at most; a batch never spans two files.

        Raises:
            InputError: A column is not there.
        """
        for file in self.files:
            with pq.ParquetFile(file.path) as parquet:
                _check_columns(columns, parquet.schema_arrow.names)
                yield from parquet.iter_batches(batch_rows, columns=None if columns is None else list(columns), use_threads=False)

    def read(self, name: str | None = None, *, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows, or those of one input file, as one table."""
        files = self.files if name is None else [self.file(name)]
        tables = [
            pq.read_table(file.path, columns=None if columns is None else list(columns), partitioning=None) for file in files
        ]
        if not tables:
            raise InputError(f"{self.folder} holds no scores.", "a corpus with a scored file", "see its manifest.")
        return pa.concat_tables([table.replace_schema_metadata() for table in tables], promote_options="permissive")

    def file(self, name: str) -> ScoreFile:
        """Return the score file of an input file.

        Raises:
            InputError: There is none of that name.
        """
        found = {file.name: file for file in self.files}
        if name not in found:
            raise InputError(
                f"{self.folder} has no scores of {name!r}{closest(name, found)}.",
                f"one of {len(found)} input files, by its path below the source",
                "see ScoredCorpus.files, or the manifest for what is missing.",
            )
        return found[name]

    def scores(self, text_ids: Sequence[str] | None = None) -> Scores:
        """Return scores in memory: of all different texts, or of some.

        Args:
            text_ids: The texts, in the order of the result; None returns all, in the order of the corpus.

        Raises:
            InputError: A text has no score; `join` leaves these empty instead.
        """
        wanted = None if text_ids is None else dict.fromkeys(text_ids)
        found: dict[str, np.ndarray] = {}
        for ids, values in self._rows(wanted):
            for text_id, row in zip(ids, values, strict=True):
                found.setdefault(text_id, row)
        names = list(found) if text_ids is None else list(text_ids)
        missing = [text_id for text_id in names if text_id not in found]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(names)} texts have no score in {self.folder}, first {missing[0]}.",
                "texts of the corpus that were scored",
                "leave them out, or join the texts: ScoredCorpus.join(texts).",
            )
        values = np.array([found[text_id] for text_id in names], dtype=np.float32).reshape(len(names), len(self.target_names))
        return Scores(values, text_ids=names, target_names=self.target_names)

    def join(self, texts: Dataset) -> Dataset:
        """Return texts with their scores beside them, NaN for a text without one; joined by text_id.

        Args:
            texts: What `oracle.read_texts` returned.
        """
        ids = list_text_ids(texts)
        places: dict[str, list[int]] = {}
        for place, text_id in enumerate(ids):
            places.setdefault(text_id, []).append(place)
        columns = value_columns(self.target_names, has_spread=self.has_spread)
        joined = np.full((len(ids), len(columns)), np.nan, dtype=np.float32)
        for found, values in self._rows(places, columns):
            for text_id, row in zip(found, values, strict=True):
                joined[places[text_id]] = row
        for column, name in enumerate(columns):
            texts = texts.add_column(name, pa.array(joined[:, column]))
        return texts

    def joined(self, name: str, *, columns: Sequence[str] | None = None, url: str | None = None) -> Iterator[pa.Table]:
        """Yield the rows of an input file with their scores beside them, block by block; joined by position.

        Rows without a score are left out. Rows of JSON get their types block by block.

        Args:
            name: The input file, by its path below the source.
            columns: Columns of the input; None reads all.
            url: Where the file is now; None where it was.

        Raises:
            MismatchError: The file changed since it was scored.
        """
        file = self.file(name)
        found = self.input_of(file, url=url)
        scores = pq.ParquetFile(file.path)
        kept = [TEXT_ID, POSITION, *value_columns(self.target_names, has_spread=self.has_spread)]
        waiting = scores.schema_arrow.empty_table().select(kept)
        batches = scores.iter_batches(columns=kept, use_threads=False)
        for first_row, rows in _input_rows(found, columns):
            end = first_row + rows.num_rows
            while (not waiting.num_rows or waiting[POSITION][-1].as_py() < end) and (batch := next(batches, None)) is not None:
                waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
            positions = waiting[POSITION].to_numpy()
            stop = int(np.searchsorted(positions, end))
            beside = waiting.slice(0, stop)
            rows = rows.take(pa.array(positions[:stop] - first_row))
            own = rows.select([column for column in rows.column_names if column not in kept])
            yield pa.table({**dict(zip(own.column_names, own.columns, strict=True)), **_columns(beside)})
            waiting = waiting.slice(stop)
        scores.close()

    def input_of(self, file: ScoreFile, *, url: str | None = None) -> InputFile:
        """Return the input of a score file, to be read again.

        Args:
            file: The score file.
            url: Where the input is now; None where it was.

        Raises:
            MismatchError: The input changed since it was scored.
            MissingFileError: It is gone.
        """
        try:
            (found,) = list_inputs(url or file.url).files
        except MissingFileError as error:
            raise MissingFileError(
                f"the input {url or file.url} is not there any more.",
                "the files from which the corpus was scored",
                "put it back, score again from where it is now, or do without the texts (no write_texts, no near-duplicates).",
            ) from error
        if url is None and found.stamp != file.stamp:
            raise MismatchError(
                f"{file.url} changed since it was scored.", "the file as it was scored", "score the corpus again."
            )
        return found

    def _finished(self) -> Iterator[ScoreFile]:
        """Yield the score files of the manifest, or, while a run goes on, of all reports."""
        is_complete = (self.folder / MANIFEST_FILE).exists() and self.manifest["complete"]
        if is_complete:
            entries = self.manifest["files"]
            found = [(entry["name"], entry["status"], entry["num_scored"], entry["url"], entry["stamp"]) for entry in entries]
        else:
            reports = read_reports(self.folder)
            found = [(of.input_name, of.status, of.counts.num_scored, of.url, of.stamp) for of in reports]
        for name, status, num_rows, url, stamp in found:
            if status != FAILED:
                yield ScoreFile(name, score_path(self.folder, name), num_rows, url, stamp)

    def _rows(
        self, wanted: Mapping[str, Any] | None, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[list[str], np.ndarray]]:
        """Yield text_ids and values (n, C) of rows, of all or of those that are wanted."""
        names = list(columns or map(score_column, self.target_names))
        ids = None if wanted is None else pa.array(list(wanted), pa.string())
        for batch in self.batches([TEXT_ID, *names]):
            rows = batch if ids is None else batch.filter(pc.is_in(batch[TEXT_ID], ids))
            if rows.num_rows:
                yield rows[TEXT_ID].to_pylist(), np.stack([rows[name].to_numpy() for name in names], axis=1)


def _columns(table: pa.Table) -> dict[str, Any]:
    return dict(zip(table.column_names, table.columns, strict=True))


def _check_columns(columns: Sequence[str] | None, names: Sequence[str]) -> None:
    for column in columns or []:
        if column not in names:
            raise InputError(
                f"scores have no column {column!r}{closest(column, names)}.", ", ".join(names), "choose one of these columns."
            )


def _input_rows(file: Any, columns: Sequence[str] | None) -> Iterator[tuple[int, pa.Table]]:
    """Yield first row and rows of an input file, piece by piece; a row that cannot be parsed is empty."""
    reader = open_reader(file)
    if isinstance(reader, BadFile):
        raise InputError(f"{file.url} {reader.reason}.", "the file as it was scored", "restore it.")
    try:
        waiting: list[JsonRow | BadRow] = []
        for item in reader.rows(columns or reader.names, first_row=0, num_rows=None):
            if isinstance(item, Piece):
                yield item.first_row, item.table
            elif not isinstance(item, BadFile):
                waiting.append(item)
                if len(waiting) == BATCH_ROWS:
                    yield waiting[0].position, _json_table(waiting, columns)
                    waiting = []
        if waiting:
            yield waiting[0].position, _json_table(waiting, columns)
    finally:
        reader.close()


def _json_table(items: Sequence[JsonRow | BadRow], columns: Sequence[str] | None) -> pa.Table:
    rows = [item.values if isinstance(item, JsonRow) else {} for item in items]
    names = columns or list(dict.fromkeys(name for row in rows for name in row))
    table = {}
    for name in names:
        values = [row.get(name) for row in rows]
        table[name], _ = json_array(values, json_type([value for value in values if value is not None]))
    return pa.table(table)
