"""How a corpus is cut: every row once, by the files alone."""

from __future__ import annotations

import json
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from surrogate.scoring import planning
from surrogate.scoring.files import InputFile, list_inputs
from surrogate.scoring.items import BLOCK_ROWS
from surrogate.scoring.planning import plan_shards


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "MIN_PART_BYTES", 20_000)
    rows = [{"text": f"row {number} {number**7}"} for number in range(20_000)]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "a.parquet")
    (tmp_path / "in" / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "in" / "c.json").write_text(json.dumps(rows))
    (tmp_path / "in" / "d.parquet").write_text("broken" * 20_000)
    (tmp_path / "in" / "e.jsonl").write_text("{}\n")
    return tmp_path


def ranges(shards, name):
    return [(shard.first_row, shard.num_rows) for shard in shards if shard.file.name == name]


def test_ranges_cover_each_row_once_and_begin_where_blocks_do(corpus):
    shards = plan_shards(list_inputs(corpus / "in").files, corpus / "out")
    for name in ("a.parquet", "b.jsonl"):
        parts = ranges(shards, name)
        assert len(parts) > 2 and parts[-1][1] is None
        assert all(first % BLOCK_ROWS == 0 for first, _ in parts)
        assert all(first + length == after for (first, length), (after, _) in pairwise(parts))
    for name in ("c.json", "d.parquet", "e.jsonl"):
        assert ranges(shards, name) == [(0, None)]


def test_the_plan_depends_on_the_files_alone_and_rows_are_counted_once(corpus, monkeypatch):
    files = list_inputs(corpus / "in").files
    first = plan_shards(files, corpus / "out", world_size=2)
    assert plan_shards(files, corpus / "elsewhere", world_size=2) == first
    monkeypatch.setattr(planning, "_count", lambda file: pytest.fail("counted again"))
    assert plan_shards(files, corpus / "out", world_size=2) == first


def test_packed_files_are_cut_into_few_parts(corpus, monkeypatch):
    import gzip

    (corpus / "in" / "b.jsonl.gz").write_bytes(gzip.compress((corpus / "in" / "b.jsonl").read_bytes()))
    monkeypatch.setattr(planning, "MAX_PACKED_PARTS", 2)
    assert len(ranges(plan_shards(list_inputs(corpus / "in").files, corpus / "out"), "b.jsonl.gz")) == 2


def test_json_is_counted_only_where_its_files_are_few(tmp_path, monkeypatch):
    """Counting reads it, in one process and before anything is scored."""
    monkeypatch.setattr(planning, "MIN_PART_BYTES", 100)
    monkeypatch.setattr(planning, "MAX_PART_BYTES", 200)
    monkeypatch.setattr(planning, "_count", lambda file: pytest.fail("counted") if file.name.endswith("jsonl") else 9)
    files = [InputFile(f"/{name}", name, 1000, "") for name in ("a.parquet", *(f"{number:03}.jsonl" for number in range(300)))]
    assert len(plan_shards(files, tmp_path)) == 301


def test_counts_are_kept_while_others_are_counted(corpus, monkeypatch):
    monkeypatch.setattr(planning, "SAVE_SECONDS", -1.0)
    plain = planning._count
    monkeypatch.setattr(planning, "_count", lambda file: 1 / 0 if file.name == "b.jsonl" else plain(file))
    with pytest.raises(ZeroDivisionError):
        plan_shards(list_inputs(corpus / "in").files, corpus / "out")
    assert list(json.loads((corpus / "out" / "row_counts.json").read_text())) == ["a.parquet"]
