"""Rows of JSON: what is a row, what is broken, and that reading in pieces changes nothing."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma

import pyarrow as pa
import pytest
import zstandard

from surrogate.scoring import json_reader
from surrogate.scoring.files import list_inputs
from surrogate.scoring.items import BadFile, BadRow, JsonRow
from surrogate.scoring.json_reader import JsonReader, count_rows
from surrogate.scoring.readers import open_reader

PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def read(data, name="x.jsonl", *, first_row=0, num_rows=None):
    reader = JsonReader(pa.PythonFile(io.BytesIO(data), mode="r"), name)
    return list(reader.rows([], first_row=first_row, num_rows=num_rows))


def lines(num_rows):
    return [{"text": f"row {number} é", "number": number} for number in range(num_rows)]


def as_bytes(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize("ending", PACKERS)
def test_packed_rows_are_the_plain_ones(ending):
    found = read(PACKERS[ending](as_bytes(lines(100))), f"x.jsonl{ending}")
    assert [item.values for item in found] == lines(100)
    assert [item.position for item in found] == list(range(100))


@pytest.mark.parametrize("ending", [ending for ending in PACKERS if ending])
def test_a_packed_file_that_was_cut_gives_what_is_there_and_says_so(ending, monkeypatch, tmp_path):
    monkeypatch.setattr(json_reader, "READ_BYTES", 256)
    packed = PACKERS[ending](as_bytes([{"text": f"row {number} {hash(str(number))}"} for number in range(20_000)]))
    (tmp_path / f"x.jsonl{ending}").write_bytes(packed[: len(packed) // 2 + 1000])
    reader = open_reader(list_inputs(tmp_path).files[0])
    if isinstance(reader, BadFile):  # bzip2 unpacks blocks of 900 kB, and this is the first
        assert ending == ".bz2" and "Truncated" in reader.reason
        return
    *rows, last = reader.rows([], first_row=0, num_rows=None)
    assert isinstance(last, BadFile) and "cannot be read" in last.reason and not last.may_pass
    good = [item for item in rows if isinstance(item, JsonRow)]
    assert [item.position for item in good] == list(range(len(good)))
    assert 1_000 < len(good) < 20_000


def test_blank_lines_are_no_rows_and_broken_ones_are():
    data = b'\xef\xbb\xbf{"text": "a"}\n\n  \r\n{"text": \n[1]\n{"text": "b"}\r\n' + b"[" * 100_000 + b"\n{}"
    found = read(data)
    assert [getattr(item, "position", None) for item in found] == [0, 1, 2, 3, 4, 5]
    assert [item.values for item in found if isinstance(item, JsonRow)] == [{"text": "a"}, {"text": "b"}, {}]
    reasons = [item.reason for item in found if isinstance(item, BadRow)]
    assert reasons[0].startswith("not valid JSON") and reasons[1] == "a list where an object is needed"
    assert "deep" in reasons[2]


def test_bytes_that_are_no_utf8_are_read_for_the_layout_to_reject():
    (row,) = read(b'{"text": "caf\xe9"}\n')
    with pytest.raises(UnicodeEncodeError):
        row.values["text"].encode()


def test_a_row_that_is_too_long_is_passed_over_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(json_reader, "MAX_ROW_BYTES", 64)
    found = read(b'{"text": "a"}\n{"text": "' + b"x" * 10_000 + b'"}\n{"text": "b"}\n')
    assert isinstance(found[1], BadRow) and "longer than" in found[1].reason and len(found[1].text) <= 80
    assert found[2].values == {"text": "b"}


@pytest.mark.parametrize(("first_row", "num_rows"), [(0, 10), (5, None), (2048, 3), (3000, None), (2040, 20), (9000, None)])
def test_a_range_is_a_slice_of_all_rows(first_row, num_rows):
    data = as_bytes(lines(4000))
    stop = None if num_rows is None else first_row + num_rows
    assert read(data, first_row=first_row, num_rows=num_rows) == read(data)[first_row:stop]


@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_a_list_is_read_as_it_would_be_whole(block, monkeypatch):
    monkeypatch.setattr(json_reader, "READ_BYTES", block)
    rows = [{"text": "é" * number, "deep": [{"a": [1, 2.5, "]"]}], "number": 12345678901} for number in range(30)]
    for indent in (None, 2):
        data = json.dumps(rows, ensure_ascii=False, indent=indent).encode()
        assert [item.values for item in read(data, "x.json")] == rows


def test_a_list_that_breaks_off_gives_what_is_there_and_says_so():
    *rows, last = read(json.dumps(lines(10)).encode()[:-20], "x.json")
    assert len(rows) == 9 and isinstance(last, BadFile)


def test_json_lines_may_be_called_json():
    assert len(read(as_bytes(lines(3)), "x.json")) == 3


@pytest.mark.parametrize(
    ("data", "count"), [(b"", 0), (b"{}\n\n \n{}", 2), (as_bytes(lines(3000)), 3000)], ids=["empty", "blank", "many"]
)
def test_rows_are_counted_without_parsing(data, count):
    assert count_rows(pa.PythonFile(io.BytesIO(data), mode="r"), "x.jsonl") == count == len(read(data))


def test_a_list_is_not_counted():
    assert count_rows(pa.PythonFile(io.BytesIO(b"[{}]"), mode="r"), "x.json") is None


def test_reasons_are_few_however_many_lines_are_broken():
    """They are counted, so the place in the line is not in them."""
    data = b"".join(b'{"' + b"x" * number + b'": 1,}\n' for number in range(50)) + b'{"n": ' + b"9" * 5000 + b"}\n"
    reasons = {item.reason for item in read(data)}
    assert len(reasons) == 2 and "not valid JSON: a number of too many digits" in reasons
    assert all("char" not in reason for reason in reasons)


def test_a_list_that_is_nested_too_deeply_ends_the_file_and_raises_nothing():
    first, last = read(b'[{"text": "fine"}, ' + b"[" * 50_000, "x.json")
    assert first.values == {"text": "fine"} and "nested too deeply" in last.reason


def test_what_is_looked_at_beforehand_is_bounded_by_bytes_too(monkeypatch):
    monkeypatch.setattr(json_reader, "BLOCK_BYTES", 10_000)
    rows = [{"text": f"{number} " + "x" * 1000} for number in range(50)]
    reader = JsonReader(pa.PythonFile(io.BytesIO(as_bytes(rows)), mode="r"), "x.jsonl")
    assert len(reader.first_rows()) == 10
    assert [item.values for item in reader.rows([], first_row=5, num_rows=None)] == rows[5:]
