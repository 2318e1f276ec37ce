"""Which columns of a file make up its texts, which are passed through, and what becomes of its rows.

The format is chosen per file, by its columns and first rows, as `oracle.read_texts` chooses it; so are the types of
passed-through columns of JSON. Both come out the same wherever in the file a worker begins.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oracle.errors import InputError
from oracle.sources import Column, Material
from oracle.text_formats import FORMATS, TEXT_ID, choose_format, column_values, identify
from surrogate.scoring.blocks import Block, distinct, text_dataset
from surrogate.scoring.items import BLOCK_ROWS, SHOWN_CHARS, BadRow, Piece
from surrogate.scoring.readers import ArrowReader, ParquetReader, Reader

JSON_TYPES = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}


@dataclass(frozen=True)
class ScoreOptions:
    """How rows are read.

    Attributes:
        text_column: The column with the text; `a.b` is the field b of the column a.
        format: text, completion, chat, tokens, or auto: by the columns, as `oracle.read_texts` chooses.
        columns: Columns that are passed through, by name; dotted names as for the text.
        max_chars: A longer text is scored by its first so many characters (or token ids).
        only: A folder with the positions of the rows that are scored (`surrogate.scoring.positions`); the others are read
            and left out. An empty string stands for all rows.
    """

    text_column: str = "text"
    format: str = "auto"
    columns: tuple[str, ...] = ()
    max_chars: int = 1_000_000
    only: str = ""


class RowReader:
    """Rows that are Python values, in memory or read from JSON, as far as a layout asks."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = list(rows)
        self.names = list(dict.fromkeys(name for row in self._rows for name in row))

    def first_rows(self) -> list[Mapping[str, Any]]:
        """Return the rows that the format is settled by."""
        return self._rows


@dataclass
class RawRows:
    """Rows of one block as they were read: positions, columns by name, and the rows that could not be parsed."""

    next_row: int
    positions: list[int]
    columns: dict[str, Column]
    bad_rows: list[BadRow] = field(default_factory=list)


class Layout:
    """The columns of one file.

    Attributes:
        format: text, completion, chat or tokens.
        read_columns: Names of all columns that are read.
        passed_schema: Names and types of the passed-through columns.
        absent: Columns that were to be passed through and are not there.
    """

    def __init__(self, reader: Reader | RowReader, options: ScoreOptions, name: str) -> None:
        """Settle the layout of a file.

        Raises:
            InputError: No column fits, or two have the name of one that is needed.
        """
        self._options = options
        self._is_json = not isinstance(reader, (ParquetReader, ArrowReader))
        names = list(reader.names)
        if options.text_column not in names and _find(reader, options.text_column) is not None:
            names.append(options.text_column)
        material = Material(_first_values(reader, names), 1, name)
        self.format = choose_format(material, options.text_column, options.format)
        paths = {"text": options.text_column} if self.format == "text" else {key: key for key in FORMATS[self.format]}
        if self.format == "tokens" and ("labels" in names or self._is_json):
            paths["labels"] = "labels"
        self._paths = paths
        needed = {path if path in names else path.partition(".")[0] for path in [*paths.values(), *options.columns]}
        twice = sorted(path for path in needed if names.count(path) > 1)
        if twice:
            raise InputError(f"{name} has two columns named {twice[0]!r}.", "one column of that name", "rename one.")
        kinds = {path: _find(reader, path) for path in options.columns}
        self.absent = [path for path, kind in kinds.items() if kind is None]
        self._left_out = {path: reason for path, kind in kinds.items() if (reason := _why_left_out(path, kind))}
        self.passed_schema = pa.schema(
            [pa.field(path, pa.string() if path in self._left_out else kind) for path, kind in kinds.items()]
        )
        self.read_columns = list(dict.fromkeys([*paths.values(), *(path for path in kinds if path not in self._left_out)]))

    def block(self, rows: RawRows) -> Block:
        """Identify the texts of rows and take what is passed through of them."""
        used = {name: _column(rows.columns, path) for name, path in self._paths.items()}
        values = {name: column_values(column) for name, column in used.items()}
        row_ids, reasons = identify(self.format, used if self.format == "tokens" else dict(values))
        good = [row for row, reason in enumerate(reasons) if not reason]
        bad = [
            BadRow(rows.positions[row], _reason(reason, values, row), _shown(values, row))
            for row, reason in enumerate(reasons)
            if reason
        ]
        kept_ids = [row_ids[row] for row in good]
        first_rows, text_of_row = distinct(kept_ids)
        columns = {name: [column[good[row]] for row in first_rows] for name, column in values.items()}
        texts, cut = text_dataset(self.format, columns, [kept_ids[row] for row in first_rows], max_chars=self._options.max_chars)
        passed, notes = self._pass_through(rows, good)
        return Block(
            rows.next_row,
            len(rows.positions) + len(rows.bad_rows),
            np.array(rows.positions, dtype=np.int64)[good],
            kept_ids,
            texts,
            text_of_row,
            passed,
            sorted([*rows.bad_rows, *bad], key=lambda row: row.position),
            int(np.isin(text_of_row, cut).sum()) if cut else 0,
            notes,
        )

    def _pass_through(self, rows: RawRows, good: list[int]) -> tuple[dict[str, pa.Array], Counter[str]]:
        passed: dict[str, pa.Array] = {}
        notes: Counter[str] = Counter()
        for name, kind in zip(self.passed_schema.names, self.passed_schema.types, strict=True):
            if name in self._left_out:
                passed[name] = pa.nulls(len(good), kind)
                notes[self._left_out[name]] += len(good)
                continue
            column = _column(rows.columns, name)
            if not isinstance(column, list):
                taken = column if len(good) == len(column) else column.take(pa.array(good, pa.int64()))
                passed[name] = _plain(taken)
                continue
            passed[name], num_left_out = json_array([column[row] for row in good], kind)
            if num_left_out:
                notes[f"values of column {name!r} that are no {kind}"] += num_left_out
        return passed, notes


def walk(row: Mapping[str, Any], path: str) -> Any:
    """Return a value of a JSON object by its dotted name; None where there is none."""
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value


def _find(reader: Reader | RowReader, path: str) -> pa.DataType | None:
    """Return the type of a column by its dotted name; None where there is none."""
    if not isinstance(reader, (ParquetReader, ArrowReader)):
        rows = reader.first_rows()
        values = [value for row in rows if (value := walk(row, path)) is not None]
        return json_type(values) if values or any(path in row for row in rows) else None
    kind: Any = pa.struct(list({field.name: field for field in reader.schema}.values()))
    for name in [path] if path in reader.names else path.split("."):
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _why_left_out(path: str, kind: pa.DataType | None) -> str:
    """Say why a column cannot be passed through, if it cannot."""
    if kind is None:
        return f"there is no column {path!r}"
    try:
        pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([(path, kind)])).close()
    except pa.ArrowNotImplementedError:
        return f"column {path!r} is of a type that parquet does not have, {kind}"
    return ""


def _first_values(reader: Reader | RowReader, names: Sequence[str]) -> dict[str, Column]:
    """Return all columns, with their first values where the choice of a format may depend on them."""
    empty: dict[str, Column] = {name: [] for name in names}
    if not isinstance(reader, (ParquetReader, ArrowReader)):
        rows = reader.first_rows()
        return {name: [walk(row, name) for row in rows] for name in names}
    if TEXT_ID not in names and not all(name in names for name in ("prompt", "completion", "text")):
        return empty
    asked = list(dict.fromkeys(name for columns in (*FORMATS.values(), (TEXT_ID, "labels")) for name in columns if name in names))
    if isinstance(reader, ParquetReader) and len(set(names)) == len(names):
        for item in reader.rows(asked, first_row=0, num_rows=BLOCK_ROWS):
            if isinstance(item, Piece):
                return empty | {name: item.table[name] for name in asked}
    return empty


def _column(columns: Mapping[str, Column], path: str) -> Column:
    """Return a column by its dotted name."""
    if path in columns:
        return columns[path]
    root, *fields = path.split(".")
    column = columns[root]
    assert not isinstance(column, list)
    return pc.struct_field(column, fields)


def _reason(reason: str, values: Mapping[str, list[Any]], row: int) -> str:
    return "missing" if any(column[row] is None for name, column in values.items() if name != "labels") else reason


def _shown(values: Mapping[str, list[Any]], row: int) -> str:
    texts = [column[row] for column in values.values() if column[row] is not None]
    shown = " ".join(text[:SHOWN_CHARS] if isinstance(text, str) else repr(text)[:SHOWN_CHARS] for text in texts)
    return shown[:SHOWN_CHARS].encode("utf-8", "replace").decode()


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """Return one array, without a dictionary."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def json_type(values: Sequence[Any]) -> pa.DataType:
    """Return the type of a column of JSON, by its first values; what has no one type is kept as JSON text."""
    kinds = {type(value) for value in values}
    if kinds == {int, float}:
        return pa.float64()
    return JSON_TYPES.get(next(iter(kinds)), pa.string()) if len(kinds) == 1 else pa.string()


def json_array(values: Sequence[Any], kind: pa.DataType) -> tuple[pa.Array, int]:
    """Return values as one type, and how many did not fit and are empty."""
    if kind == pa.string():
        texts = [value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
        return pa.array([None if text is None else text.encode("utf-8", "replace").decode() for text in texts], kind), 0
    python_type = next(python for python, arrow in JSON_TYPES.items() if arrow == kind)
    accepted = (int, float) if python_type is float else (python_type,)
    kept = [
        value if type(value) in accepted and (python_type is not int or -(2**63) <= value < 2**63) else None for value in values
    ]
    num_left_out = sum(before is not None and after is None for before, after in zip(values, kept, strict=True))
    return pa.array(kept, kind), num_left_out
