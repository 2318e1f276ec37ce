"""Blocks of texts: the same ids as `read_texts`, and the same blocks however a file is laid out."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

import oracle
from surrogate.scoring import rows as rows_module
from surrogate.scoring.blocks import Block
from surrogate.scoring.files import list_inputs
from surrogate.scoring.items import BadFile
from surrogate.scoring.layout import Layout, ScoreOptions
from surrogate.scoring.rows import read_blocks

FORMATS = {
    "text": [{"text": "one"}, {"text": "two é"}, {"text": "one"}],
    "completion": [{"prompt": "p", "completion": "c"}, {"prompt": "", "completion": "d"}],
    "chat": [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "extra": 1}]}],
    "tokens": [{"input_ids": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}, {"input_ids": [5, 6], "labels": [-100, 6]}],
}


def write(rows, path):
    names = dict.fromkeys(name for row in rows for name in row)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    else:
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    return path


def blocks_of(path, options=None, **region):
    (file,) = list_inputs(path).files
    items = list(read_blocks(file, options or ScoreOptions(), **region))
    return [item for item in items if isinstance(item, Block)], [item for item in items if isinstance(item, BadFile)]


def summary(blocks):
    return [(b.positions.tolist(), b.text_ids, b.texts.to_dict(), b.text_of_row.tolist(), b.bad_rows) for b in blocks]


@pytest.mark.filterwarnings("ignore:dropped")
@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".feather", ".arrow"])
@pytest.mark.parametrize("name", FORMATS)
def test_texts_and_ids_are_those_of_read_texts(tmp_path, name, ending):
    rows = FORMATS[name]
    (block,), faults = blocks_of(write(rows, tmp_path / f"x{ending}"))
    expected = oracle.read_texts(rows)
    assert not faults
    assert list(dict.fromkeys(block.text_ids)) == expected["text_id"][:]
    assert block.texts["text_id"][:] == expected["text_id"][:]
    assert oracle.texts.text_format(block.texts) == name
    if name != "tokens":
        assert oracle.texts.plain_strings(block.texts) == oracle.texts.plain_strings(expected)
    assert [block.text_ids[row] for row in range(len(rows))] == [block.texts["text_id"][:][text] for text in block.text_of_row]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_text_goes_before_completions_whose_prompts_are_all_empty(tmp_path, ending):
    rows = [{"prompt": "", "completion": f"c{number}", "text": f"t{number}"} for number in range(3)]
    (block,), _ = blocks_of(write(rows, tmp_path / f"x{ending}"))
    assert block.texts.column_names == ["text_id", "text"] and block.text_ids == oracle.read_texts(rows)["text_id"][:]
    (block,), _ = blocks_of(write([*rows, {**rows[0], "prompt": "p"}], tmp_path / f"y{ending}"))
    assert block.texts.column_names == ["text_id", "prompt", "completion"]
    known = [{**row, "text_id": text_id} for row, text_id in zip(rows, oracle.read_texts(rows)["text_id"][:], strict=True)]
    (block,), _ = blocks_of(write(known, tmp_path / f"z{ending}"))
    assert block.texts.column_names == ["text_id", "text"]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".feather"])
def test_nested_columns_by_dotted_name(tmp_path, ending):
    rows = [{"data": {"text": "one", "id": 7}, "other": 1}, {"data": {"text": "two", "id": 8}, "other": 2}]
    options = ScoreOptions("data.text", columns=("data.id",))
    (block,), _ = blocks_of(write(rows, tmp_path / f"x{ending}"), options)
    assert block.text_ids == oracle.read_texts(["one", "two"])["text_id"][:]
    assert block.passed["data.id"].to_pylist() == [7, 8]


def test_the_layout_of_a_parquet_file_does_not_matter(tmp_path, make_texts):
    table = pa.table({"text": make_texts(5000)})
    found = []
    for number, row_group_size in enumerate((5000, 700, 33)):
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=row_group_size)
        found.append(summary(blocks_of(tmp_path / f"{number}.parquet")[0]))
    assert [len(positions) for positions, *_ in found[0]] == [2048, 2048, 904]
    assert found[0] == found[1] == found[2]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in table["text"].to_pylist()))
    assert summary(blocks_of(tmp_path / "x.jsonl")[0]) == found[0]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_blocks_of_long_rows_end_sooner_and_resume_alike(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", 3000)
    rows = [{"text": f"{number} " * (1 + number % 50)} for number in range(300)]
    path = write(rows, tmp_path / f"x{ending}")
    whole, _ = blocks_of(path)
    assert len(whole) > 5
    for place in range(1, len(whole)):
        rest, _ = blocks_of(path, first_row=whole[place - 1].next_row)
        assert summary(rest) == summary(whole[place:])


def test_bad_rows_are_told_with_reason_and_beginning(tmp_path):
    rows = [
        '{"text": "fine"}',
        '{"text": null}',
        '{"text": "  "}',
        '{"text": 7}',
        "{broken",
        '{"other": 1}',
        '{"text": "caf\\ud800"}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    (block,), _ = blocks_of(tmp_path / "x.jsonl")
    assert block.positions.tolist() == [0] and block.num_rows == 7
    assert [row.position for row in block.bad_rows] == [1, 2, 3, 4, 5, 6]
    reasons = [row.reason for row in block.bad_rows]
    assert reasons[:3] == ["missing", "empty", "not a string"] and reasons[3].startswith("not valid JSON")
    assert reasons[4:] == ["missing", "not valid Unicode"]


def test_bad_utf8_in_parquet_is_one_bad_row(tmp_path):
    column = pa.array([b"fine", b"caf\xe9", b"too"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    (block,), faults = blocks_of(tmp_path / "x.parquet")
    assert block.positions.tolist() == [0, 2] and not faults
    assert [(row.position, row.reason) for row in block.bad_rows] == [(1, "not valid Unicode")]


@pytest.mark.parametrize("name", FORMATS)
def test_a_long_text_keeps_its_id_and_is_cut_for_the_encoder(tmp_path, name):
    long = {
        "text": {"text": "x" * 50},
        "completion": {"prompt": "p" * 3, "completion": "c" * 50},
        "chat": {"messages": [{"role": "user", "content": "u" * 8}, {"role": "assistant", "content": "a" * 50}]},
        "tokens": {"input_ids": list(range(50)), "labels": list(range(50))},
    }[name]
    (block,), _ = blocks_of(write([long, *FORMATS[name]], tmp_path / "x.jsonl"), ScoreOptions(max_chars=10))
    assert block.num_cut == 1
    assert block.text_ids[0] == oracle.read_texts([long])["text_id"][0]
    cut = block.texts.select([0])
    assert oracle.texts.text_format(cut) == name
    kept = len(cut["input_ids"][0]) if name == "tokens" else len(oracle.texts.plain_strings(cut)[0])
    assert kept <= 10 + (20 if name == "chat" else 1)  # roles and line breaks of a chat are not counted


def test_passed_columns_keep_their_types_and_say_what_did_not_fit(tmp_path):
    rows = [{"text": f"t{number}", "n": number, "s": "a", "mixed": [1, {"b": 2}][number % 2], "late": 1} for number in range(4)]
    rows[3] |= {"n": "three", "late": 2**70}
    path = write(rows, tmp_path / "x.jsonl")
    (block,), _ = blocks_of(path, ScoreOptions(columns=("n", "s", "mixed", "late", "gone")))
    types = {name: str(column.type) for name, column in block.passed.items()}
    assert types == {"n": "string", "s": "string", "mixed": "string", "late": "int64", "gone": "string"}
    assert block.passed["n"].to_pylist() == ["0", "1", "2", "three"]
    assert block.passed["mixed"].to_pylist() == ["1", '{"b": 2}', "1", '{"b": 2}']
    assert block.passed["late"].to_pylist() == [1, 1, 1, None] and block.notes == {
        "there is no column 'gone'": 4,
        "values of column 'late' that are no int64": 1,
    }
    assert block.passed["gone"].null_count == 4


def test_types_of_passed_json_are_settled_by_the_first_rows_wherever_one_begins(tmp_path):
    rows = [{"text": f"t{number}", "n": number if number < 2048 else number + 0.5} for number in range(2100)]
    path = write(rows, tmp_path / "x.jsonl")
    (block,), _ = blocks_of(path, ScoreOptions(columns=("n",)), first_row=2048)
    assert str(block.passed["n"].type) == "int64"


def test_columns_that_are_absent_or_there_twice_are_a_fault_of_the_file(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]), tmp_path / "b.parquet")
    pq.write_table(pa.table({"n": pa.array([], pa.int64())}).select([]), tmp_path / "c.parquet")
    for name, reason in (("a", "no column that holds texts"), ("b", "two columns named 'text'"), ("c", "no column")):
        blocks, (fault,) = blocks_of(tmp_path / f"{name}.parquet")
        assert not blocks and reason in fault.reason


def test_an_arrow_file_with_forged_offsets_is_refused_and_not_followed(tmp_path):
    offsets = np.array([0, 2**30, 11], dtype=np.int32)
    forged = pa.StringArray.from_buffers(2, pa.py_buffer(offsets), pa.py_buffer(b"hello world"))
    with pa.ipc.new_file(tmp_path / "x.arrow", pa.schema([("text", pa.string())])) as file:
        file.write_batch(pa.record_batch([pa.array(["fine", "too"])], names=["text"]))
        file.write_batch(pa.record_batch([forged], names=["text"]))
        file.write_batch(pa.record_batch([pa.array(["last"])], names=["text"]))
    blocks, faults = blocks_of(tmp_path / "x.arrow")
    assert [position for block in blocks for position in block.positions] in ([0, 1, 4], [0, 1]) and len(faults) == 1


def test_an_unreadable_row_group_is_left_out_and_the_next_is_read(tmp_path, make_texts):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": make_texts(3000)}), path, row_group_size=1000, compression="none", use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(data)
    blocks, (fault,) = blocks_of(path)
    positions = np.concatenate([block.positions for block in blocks])
    assert positions.tolist() == [*range(1000), *range(2000, 3000)]
    assert fault.reason.startswith("rows 1000 to 1999 cannot be read")


def test_the_layout_comes_first(tmp_path):
    (file,) = list_inputs(write(FORMATS["text"], tmp_path / "x.jsonl")).files
    assert isinstance(next(read_blocks(file, ScoreOptions())), Layout)
