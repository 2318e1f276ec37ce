"""The pool of a scored corpus: distinct texts sorted by text_id, as columns on disk.

What `surrogate.pool` is for scores in memory, for any number of texts. The rows of all score files are dealt to parts by
the beginning of their text_id (a hash, so the parts are even), each part is sorted in memory, repeats are dropped (the
first in the order of files and rows is kept), labels put in the place of scores, and the parts written one after the other.
After that every question about the pool is one walk through a column.

Cost: one pass over the score files, one over the parts; about 40 bytes of disk per row and 4 more per target. Memory is
a few times that of one part: 64 MiB up to 700 million texts, a 512th of the pool beyond.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oracle.errors import InputError, MismatchError, NotFiniteError
from oracle.progress import track
from surrogate.pool import DUPLICATE_TOLERANCE, ROUNDING, LabelsLike, Pool
from surrogate.scoring.disk_columns import ID_TYPE, Column, Spill, num_parts_for, pack, unpack
from surrogate.scoring.score_files import POSITION, TEXT_ID, score_column

PLACE = [("id", ID_TYPE), ("file", "<u4"), ("position", "<i8")]
READ_ROWS = 65_536


class ScoreFileLike(Protocol):
    """A finished score file."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def name(self) -> str:
        """Name of the input that it is of."""

    @property
    def num_rows(self) -> int:
        """How many rows it has."""

    @property
    def stamp(self) -> str:
        """The state of the input when it was scored."""


class CorpusLike(Protocol):
    """What selecting needs of a scored corpus; `ScoredCorpus` has it."""

    @property
    def files(self) -> Sequence[ScoreFileLike]:
        """Its score files, in order."""

    @property
    def target_names(self) -> Sequence[str]:
        """C names."""

    def joined(self, name: str, /) -> Iterator[pa.Table]:
        """Yield the rows of an input file with their scores beside them."""


@dataclass
class DiskPool:
    """Distinct texts sorted by text_id, one row each in every column.

    Attributes:
        places: Records of text_id, file number and position: the row of the corpus that stands for the text.
        values: (N, C) float32, scores or labels of the targets that were asked for.
        is_label: (N,) bool, whether the row of `values` is a label.
        num_tokens: (N,) int64, or None where they are not known.
        num_rows: N, texts that may be chosen.
        num_pool: Distinct texts, with those that were excluded.
        num_duplicates: Rows that repeated a text.
        num_labelled: Rows of `values` that are labels.
        num_labels_found: Labels of texts of the pool, with those that were excluded.
        total_tokens: Tokens of the texts that may be chosen.
        smallest_tokens: Those of the shortest of them.
    """

    places: Column
    values: Column
    is_label: Column
    num_tokens: Column | None
    num_rows: int = 0
    num_pool: int = 0
    num_duplicates: int = 0
    num_labelled: int = 0
    num_labels_found: int = 0
    total_tokens: int = 0
    smallest_tokens: int = 0

    def float_values(self) -> Iterator[np.ndarray]:
        """Yield (B, C) float64 blocks."""
        return (block.astype(np.float64) for block in self.values.blocks())

    def append(self, rows: np.ndarray, is_label: np.ndarray) -> None:
        """Add texts that follow those that are there."""
        if len(rows) == 0:
            return
        self.places.append(rows[[name for name, _ in PLACE]].astype(PLACE))
        self.values.append(rows["values"])
        self.is_label.append(is_label)
        if self.num_tokens is not None:
            smallest = int(rows["tokens"].min())
            self.smallest_tokens = min(smallest, self.smallest_tokens) if self.num_rows else smallest
            self.total_tokens += int(rows["tokens"].sum())
            self.num_tokens.append(rows["tokens"])
        self.num_rows += len(rows)
        self.num_labelled += int(is_label.sum())


def read_disk_pool(
    scored: CorpusLike,
    folder: Path,
    *,
    target_names: Sequence[str],
    tokens_column: str | None,
    labels: LabelsLike | None = None,
    exclude: Iterable[str] = (),
) -> DiskPool:
    """Sort a scored corpus by text_id and drop repeats.

    Args:
        scored: The corpus.
        folder: Where the columns are kept.
        target_names: The targets whose scores are needed.
        tokens_column: The column with token counts, if they are needed.
        labels: Measured influence of some of the texts, for all targets of the corpus; it takes the place of their scores.
        exclude: Texts that are left out.

    Raises:
        InputError: One text has different scores, or a text_id is not one of `oracle.read_texts`.
        MismatchError: Labels of other targets, or of other texts only.
        NotFiniteError: A score or label is NaN or infinite.
    """
    names = list(target_names)
    record = np.dtype([*PLACE, ("tokens", "<i8"), ("values", "<f4", (len(names),))])
    label_ids, label_values = _labels(labels, list(scored.target_names), names)
    excluded = np.sort(pack(list(exclude)))
    tokens = None if tokens_column is None else Column(folder / "tokens", "<i8")
    values = Column(folder / "values", "<f4", width=len(names))
    pool = DiskPool(Column(folder / "places", PLACE), values, Column(folder / "is_label", np.bool_), tokens)
    num_rows = sum(file.num_rows for file in scored.files)
    spread = _Spread()
    with Spill(folder / "by_id", record, num_parts=num_parts_for(num_rows, record.itemsize)) as spill:
        with track("reading scores", num_rows) as tracker:
            for rows in _records(scored, record, names, tokens_column):
                spread.add(rows["values"])
                spill.add(_part_of(rows["id"], len(spill)), rows)
                tracker.advance(len(rows))
        with track("sorting texts", num_rows) as tracker:
            for rows in spill.parts():
                _add_part(pool, rows, spread=spread, labels=(label_ids, label_values), excluded=excluded)
                tracker.advance(len(rows))
    if len(label_ids) and not pool.num_labels_found:
        raise MismatchError(
            f"labels of other text_ids: none of {len(label_ids)} is among the {pool.num_pool} scored texts.",
            "labels of texts of this corpus",
            "check that labels and scores were made from the same texts.",
        )
    return pool


def find_tokens_column(scored: CorpusLike, name: str | None) -> str:
    """Return the column of the score files that holds token counts.

    Raises:
        InputError: There is none, or it does not hold counts.
    """
    for file in scored.files:
        schema = pq.read_schema(file.path)
        wanted = name or "num_tokens"
        if wanted not in schema.names or not pa.types.is_integer(schema.field(wanted).type):
            held = ", ".join(schema.names)
            state = "no integers" if wanted in schema.names else "not there"
            raise InputError(
                f"a budget of tokens, and the column {wanted!r} of {file.path} holds {state}; the columns are {held}.",
                "score files with a column of token counts",
                "pass the column of the input that has them through (score with --column num_tokens, or name another one with "
                "tokens_column); or give a budget of texts or a fraction. Characters are no tokens: where a count of "
                "characters will do, name that column and count the budget in characters.",
            )
    return name or "num_tokens"


class _Spread:
    """Standard deviation of each target over all rows, to within what tells rounding from another score."""

    def __init__(self) -> None:
        self.num_rows, self.shift = 0, np.zeros(0)
        self.total, self.squares = np.zeros(()), np.zeros(())

    def add(self, values: np.ndarray) -> None:
        if not self.num_rows:
            self.shift = values[0].astype(np.float64)
        centred = values - self.shift
        self.num_rows += len(values)
        self.total, self.squares = self.total + centred.sum(axis=0), self.squares + np.square(centred).sum(axis=0)

    def of(self) -> np.ndarray:
        mean = self.total / self.num_rows
        return np.sqrt(np.maximum(0, self.squares / self.num_rows - mean * mean))


def _records(scored: CorpusLike, record: np.dtype, names: list[str], tokens_column: str | None) -> Iterator[np.ndarray]:
    """Yield the rows of all score files."""
    columns = [TEXT_ID, POSITION, *map(score_column, names), *([tokens_column] if tokens_column else [])]
    for number, file in enumerate(scored.files):
        for batch in pq.ParquetFile(file.path).iter_batches(READ_ROWS, columns=columns):
            rows = np.zeros(batch.num_rows, dtype=record)
            rows["id"], rows["file"] = pack(batch.column(TEXT_ID)), number
            rows["position"] = batch.column(POSITION).to_numpy()
            for place, name in enumerate(names):
                rows["values"][:, place] = batch.column(score_column(name)).to_numpy(zero_copy_only=False)
            if tokens_column:
                rows["tokens"] = _counts(batch.column(tokens_column), file, tokens_column)
            _check_finite(rows, file)
            yield rows


def _counts(column: pa.Array, file: ScoreFileLike, name: str) -> np.ndarray:
    if column.null_count or (len(column) and column.to_numpy().min() < 0):
        raise InputError(
            f"the column {name!r} of {file.path} has a missing or negative count.",
            "a count of at least 0 for each text",
            "repair the input's column, or give a budget of texts or a fraction.",
        )
    return column.to_numpy()


def _check_finite(rows: np.ndarray, file: ScoreFileLike) -> None:
    broken = ~np.isfinite(rows["values"]).all(axis=1)
    if broken.any():
        shown = unpack(rows["id"][broken][:1])[0].as_py()
        raise NotFiniteError(
            f"scores of {int(broken.sum())} texts in a block of {file.path} are NaN or infinite, first {shown}.",
            "finite scores",
            "score the corpus with this package, which sets such rows aside.",
        )


def _part_of(ids: np.ndarray, num_parts: int) -> np.ndarray:
    """Return part numbers that keep the order of the ids: the place of their first four bytes among all."""
    first = np.ascontiguousarray(ids).view(">u4").reshape(-1, 4)[:, 0].astype(np.int64)
    return first * num_parts >> 32


def _labels(labels: LabelsLike | None, all_names: list[str], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Check labels and return their ids, sorted, with their values of the targets that are needed."""
    if labels is None:
        return np.zeros(0, dtype=ID_TYPE), np.zeros((0, len(names)), dtype=np.float32)
    ids = list(labels.text_ids)
    blank = np.zeros((len(ids), len(all_names)), dtype=np.float32)
    pool, _ = Pool(ids, blank, all_names, None, np.zeros(len(ids), dtype=bool)).with_labels(labels)
    packed = pack(ids)
    order = np.argsort(packed)
    return packed[order], pool.values[order][:, [all_names.index(name) for name in names]]


def _add_part(
    pool: DiskPool, rows: np.ndarray, *, spread: _Spread, labels: tuple[np.ndarray, np.ndarray], excluded: np.ndarray
) -> None:
    """Sort the rows of one part, drop repeats and excluded texts, put labels in, and append what is left."""
    rows = rows[np.argsort(rows["id"], kind="stable")]
    is_first = np.ones(len(rows), dtype=bool)
    is_first[1:] = rows["id"][1:] != rows["id"][:-1]
    first = rows[is_first]
    if len(first) < len(rows):
        _check_repeats(rows, first[np.cumsum(is_first) - 1], spread.of())
    pool.num_duplicates += len(rows) - len(first)
    pool.num_pool += len(first)
    is_label, places = _found(first["id"], labels[0])
    first["values"][is_label] = labels[1][places[is_label]]
    pool.num_labels_found += int(is_label.sum())
    is_kept = ~_found(first["id"], excluded)[0]
    pool.append(first[is_kept], is_label[is_kept])


def _found(ids: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which ids are among `wanted` (sorted), and where there."""
    if len(wanted) == 0:
        return np.zeros(len(ids), dtype=bool), np.zeros(len(ids), dtype=np.int64)
    places = np.minimum(np.searchsorted(wanted, ids), len(wanted) - 1)
    return wanted[places] == ids, places


def _check_repeats(rows: np.ndarray, owners: np.ndarray, spread: np.ndarray) -> None:
    """Refuse different scores for one text: which of them counts would depend on the order of the rows."""
    distance = np.abs(rows["values"] - owners["values"])
    differs = (distance > DUPLICATE_TOLERANCE * spread + ROUNDING * np.abs(rows["values"])).any(axis=1)
    differs |= rows["tokens"] != owners["tokens"]
    if differs.any():
        text_id = unpack(rows["id"][differs][:1])[0].as_py()
        raise InputError(
            f"text {text_id} occurs more than once with different scores or token counts.",
            "one score per text",
            "score the corpus with one predictor and one tokenizer.",
        )
