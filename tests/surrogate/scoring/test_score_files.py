"""The score file: bytes that depend on the rows alone, and a header that says what it is of."""

from __future__ import annotations

import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oracle.errors import InputError, MissingFileError, StorageError
from surrogate.scoring import score_files
from surrogate.scoring.score_files import ScoreHeader, ScoreWriter, read_header, score_schema

HEADER = ScoreHeader("abc", [{"name": "e", "fingerprint": "f"}], ["a", "b"], "nats", True, {"format": "auto"}, "x.jsonl", 7)


def rows_of(num_rows, schema):
    rng = np.random.default_rng(0)
    columns = [pa.array([f"{number:032x}" for number in range(num_rows)]), pa.array(np.arange(num_rows))]
    columns += [pa.array(rng.normal(size=num_rows).astype(np.float32)) for _ in range(4)]
    if len(schema) > 6:
        columns.append(pa.array([None if number % 7 == 0 else "x" * (number % 50) for number in range(num_rows)]))
    return pa.Table.from_arrays(columns, schema=schema)


@pytest.mark.parametrize("passed", [None, pa.schema([("note", pa.string())])], ids=["plain", "passed"])
def test_bytes_do_not_depend_on_how_rows_are_handed_over(tmp_path, monkeypatch, passed):
    monkeypatch.setattr(score_files, "ROW_GROUP_ROWS", 1000)
    monkeypatch.setattr(score_files, "ROW_GROUP_BYTES", 9000)
    schema = score_schema(HEADER, passed)
    rows = rows_of(2500, schema)
    written = []
    for step in (2500, 999, 64, 7):
        writer = ScoreWriter(tmp_path / f"{step}.parquet", schema)
        for start in range(0, 2500, step):
            writer.write(rows.slice(start, step))
        writer.close()
        written.append((tmp_path / f"{step}.parquet").read_bytes())
    assert len(set(written)) == 1
    sizes = [pq.read_metadata(tmp_path / "7.parquet").row_group(group).num_rows for group in range(3)]
    assert sizes == [1000, 1000, 500] if passed is None else max(sizes) < 1000
    assert pq.read_table(tmp_path / "7.parquet").equals(rows)


def test_a_header_comes_back(tmp_path):
    ScoreWriter(tmp_path / "x.parquet", score_schema(HEADER)).close()
    assert read_header(tmp_path / "x.parquet") == HEADER
    assert pq.read_table(tmp_path / "x.parquet").column_names == [
        "text_id",
        "position",
        "score:a",
        "score:b",
        "spread:a",
        "spread:b",
    ]


def test_what_is_no_score_file_is_refused(tmp_path):
    with pytest.raises(MissingFileError):
        read_header(tmp_path / "x.parquet")
    pq.write_table(pa.table({"text_id": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="is no score file"):
        read_header(tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_text("hello")
    with pytest.raises(InputError, match="is no score file"):
        read_header(tmp_path / "y.parquet")


def test_nothing_is_left_of_a_file_that_a_full_disk_does_not_let_begin(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2, limits[1]))  # less than the first bytes of parquet
    try:
        with pytest.raises(StorageError, match="free some space"):
            ScoreWriter(tmp_path / "x.parquet", score_schema(HEADER))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
