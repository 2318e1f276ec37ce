"""Reading texts: every source and format, ids by content, and what is rejected."""

import gzip
import hashlib
import json
import os
import re
import warnings

import datasets
import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard

from oracle.errors import InputError, InputTypeError, MissingFileError, MissingPackageError
from oracle.texts import (
    TextsRejectedWarning,
    check_text_ids,
    list_text_ids,
    plain_strings,
    read_report,
    read_texts,
    text_format,
)

TEXTS = ["the first text", "a second one\nof two lines", "zażółć 漢字 🙂"]
ROWS = [{"text": text, "source": f"s{index}", "when": "2024-01-01"} for index, text in enumerate(TEXTS)]
CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


@pytest.fixture(autouse=True)
def warnings_are_errors():
    """A test that does not expect rejected texts must not see any."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", TextsRejectedWarning)
        yield


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path, kind):
    data = json_lines(ROWS)
    if kind == "stream.arrow":
        with pa.ipc.new_stream(path, pa.Table.from_pylist(ROWS).schema) as sink:
            sink.write_table(pa.Table.from_pylist(ROWS))
    elif kind in ("file.arrow", "feather"):
        pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), str(path))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "array.json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(data))
    elif kind == "jsonl.zst":  # two frames, as files that were joined have
        lines = data.splitlines(keepends=True)
        path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(line) for line in lines))
    else:
        path.write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n\n"))
    return str(path)


KINDS = ["jsonl", "json", "array.json", "jsonl.gz", "jsonl.zst", "parquet", "stream.arrow", "file.arrow", "feather", "saved"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_texts_and_ids(tmp_path, kind):
    path = write(tmp_path / f"pool.{kind}", kind)
    dataset = read_texts(path)
    assert dataset.to_list() == read_texts(ROWS).to_list()
    assert dataset.column_names == ["text_id", "text", "source", "when"]
    assert dataset["when"][0] == "2024-01-01"
    assert len(read_texts(path, limit=2)) == read_report(read_texts(path, limit=2)).num_read == 2


def test_ids_are_32_hex_digits_fixed_for_all_time():
    assert list_text_ids(read_texts(["hello"])) == [hashlib.sha256(b"text\x05" + bytes(7) + b"hello").hexdigest()[:32]]
    assert list_text_ids(read_texts(["hello"])) == ["9e53085da32159aa0b0f5707a1dbe46f"]


def test_zst_with_many_frames_is_read_to_its_end(tmp_path):
    rows = [{"text": f"{index} " + "x" * 5000} for index in range(100)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstandard.compress(json_lines([row])) for row in rows))
    assert len(read_texts(tmp_path / "a.jsonl.zst")) == 100


def test_glob_is_read_in_sorted_order_and_a_list_in_its_own(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines([{"text": name}]))
    pq.write_table(pa.table({"text": ["p"]}), tmp_path / "p.parquet")
    assert read_texts(str(tmp_path / "*.jsonl"))["text"][:] == ["a", "b", "c"]
    assert read_texts(str(tmp_path / "*.jsonl"), limit=2)["text"][:] == ["a", "b"]
    mixed = [tmp_path / "c.jsonl", tmp_path / "p.parquet", tmp_path / "a.jsonl"]
    assert read_texts(mixed)["text"][:] == ["c", "p", "a"]
    assert read_texts([str(path) for path in mixed], limit=2)["text"][:] == ["c", "p"]


def test_urls_are_read():
    with fsspec.open("memory://pool/a.jsonl.gz", "wb") as file:
        file.write(gzip.compress(json_lines(ROWS)))
    assert read_texts("memory://pool/*.jsonl.gz").to_list() == read_texts(ROWS).to_list()
    with pytest.raises(MissingFileError, match=r"did you mean 'a.jsonl.gz'"):
        read_texts("memory://pool/b.jsonl.gz")


def test_file_url_and_relative_path_are_read(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(json_lines(ROWS))
    monkeypatch.chdir(tmp_path)
    assert len(read_texts((tmp_path / "a.jsonl").as_uri())) == len(read_texts("a.jsonl")) == 3


def test_saved_split_and_dataset_dict_are_chosen_by_split(tmp_path):
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "dev": datasets.Dataset.from_list(ROWS[:1])})
    splits.save_to_disk(tmp_path / "both")
    assert len(read_texts(splits, split="dev")) == len(read_texts(tmp_path / "both", split="dev")) == 1
    with pytest.raises(InputError, match="did you mean 'dev'"):
        read_texts(splits, split="devv")


@pytest.mark.parametrize("source", [["a text"], datasets.Dataset.from_list(ROWS)])
def test_split_without_effect_is_an_error(source):
    with pytest.raises(InputError, match="has no effect"):
        read_texts(source, split="test")


def test_dataset_rows_follow_its_own_order_and_features_stay():
    features = datasets.Features({"text": datasets.Value("string"), "kind": datasets.ClassLabel(names=["x", "y"])})
    source = datasets.Dataset.from_dict({"text": TEXTS, "kind": [0, 1, 0]}, features=features).select([2, 0]).with_format("numpy")
    dataset = read_texts(source)
    assert dataset["text"][:] == [TEXTS[2], TEXTS[0]]
    assert dataset.features["kind"] == features["kind"]


def test_strings_dicts_and_generators_in_memory():
    assert read_texts(TEXTS)["text"][:] == TEXTS
    assert read_texts(row for row in ROWS)["source"][:] == ["s0", "s1", "s2"]
    assert read_texts(["org/name"])["text"][:] == ["org/name"]
    endless = (str(number) for number in iter(int, 1))
    with pytest.warns(TextsRejectedWarning):
        assert len(read_texts(endless, limit=5)) == 1


def test_hub_name_is_loaded_with_its_split(monkeypatch):
    def load(name, split):
        return datasets.Dataset.from_dict({"text": [name, split]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_texts("org/name", split="dev")["text"][:] == ["org/name", "dev"]


def test_unreachable_hub_says_that_local_files_were_looked_for(monkeypatch, tmp_path):
    def load(name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match=r"no local file or folder 'org/name'.*no network"):
        read_texts("org/name")
    (tmp_path / "org").mkdir()
    with pytest.raises(MissingFileError, match="there is no file or folder org/name"):
        read_texts("org/name")


# ---- formats


def test_completion_format_hashes_prompt_and_completion_apart():
    rows = [
        {"prompt": "ab", "completion": "c", "text": "abc", "kind": 1},
        {"prompt": "a", "completion": "bc", "text": "abc", "kind": 2},
    ]
    dataset = read_texts(rows)
    assert dataset.column_names == ["text_id", "prompt", "completion", "kind"]
    assert len(set(list_text_ids(dataset))) == 2
    assert text_format(dataset) == read_report(dataset).format == "completion"


def test_auto_takes_text_where_all_prompts_are_empty():
    rows = [{"prompt": "", "completion": "abc", "text": "abc"}, {"prompt": None, "completion": "d", "text": "d"}]
    assert text_format(read_texts(rows)) == "text"
    assert text_format(read_texts([{"prompt": "", "completion": "abc"}])) == "completion"
    assert text_format(read_texts([*rows, {"prompt": "p", "completion": "q", "text": "pq"}][::2])) == "completion"


def test_auto_order_is_messages_tokens_completion_text():
    row = {"text": "t", "prompt": "p", "completion": "c", "input_ids": [1, 2], "messages": CHAT}
    for name, column in (("chat", "messages"), ("tokens", "input_ids"), ("completion", "prompt"), ("text", "text")):
        dataset = read_texts([row])
        assert text_format(dataset) == name
        assert dataset.column_names[1] == column
        assert ("text" in dataset.column_names) == (name != "completion")
        del row[column]


def test_chat_keeps_role_and_content_only():
    dataset = read_texts([{"messages": [{**message, "name": "x"} for message in CHAT]}])
    assert dataset["messages"][0] == CHAT
    assert list_text_ids(dataset) == list_text_ids(read_texts([{"messages": CHAT}]))


def test_token_ids_do_not_depend_on_how_integers_are_stored():
    ids = [[1, 2, 3], [4], [1, 2]]
    plain = list_text_ids(read_texts([{"input_ids": row} for row in ids]))
    for kind in (pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64())):
        table = pa.table({"input_ids": pa.chunked_array([pa.array([[9]], kind), pa.array(ids, kind)]).slice(1)})
        assert list_text_ids(read_texts(datasets.Dataset(table))) == plain


def test_labels_belong_to_the_token_text():
    rows = [{"input_ids": [1, 2, 3], "labels": labels} for labels in ([-100, 2, 3], [-100, -100, 3], None)]
    dataset = read_texts(rows)
    assert dataset.column_names == ["text_id", "input_ids", "labels"]
    assert len(set(list_text_ids(dataset))) == 3
    assert list_text_ids(dataset)[2] == list_text_ids(read_texts([{"input_ids": [1, 2, 3]}]))[0]


def test_same_content_in_another_format_is_another_text():
    text, chat = read_texts(["a"]), read_texts([{"messages": [{"role": "assistant", "content": "a"}]}])
    completion = read_texts([{"prompt": "", "completion": "a"}])
    assert len({list_text_ids(dataset)[0] for dataset in (text, chat, completion)}) == 3


def test_ids_depend_on_content_only(tmp_path):
    forward = dict(zip(TEXTS, list_text_ids(read_texts(TEXTS)), strict=True))
    (tmp_path / "x.jsonl").write_bytes(json_lines([{"k": 1, "body": text, "text_id": "foreign"} for text in reversed(TEXTS)]))
    other = read_texts(tmp_path / "x.jsonl", text_column="body")
    assert dict(zip(other["text"], list_text_ids(other), strict=True)) == forward
    assert other.column_names == ["text_id", "text", "k"]


# ---- rejection


def test_rejected_texts_are_counted_by_reason_and_announced(tmp_path):
    path = tmp_path / "x.jsonl"
    values = ["a", "a", None, 3, ["a"], "", " \n\u2003", "b", "\ud800", "a"]
    bad = b'{"text": "\xff"}\n'
    path.write_bytes(json_lines([{"text": value, "row": row} for row, value in enumerate(values)]) + bad + b'{"row": 7}\n')
    counts = "dropped 10 of 12 texts: 4 not a string, 2 duplicate, 2 empty, 2 not valid Unicode"
    with pytest.warns(TextsRejectedWarning, match=counts):
        dataset = read_texts(path)
    assert dataset["text"][:] == ["a", "b"]
    assert dataset["row"][:] == [0, 7]
    report = read_report(dataset)
    assert (report.num_read, report.num_kept) == (12, 2)
    assert report.rejected == {"not a string": 4, "duplicate": 2, "empty": 2, "not valid Unicode": 2}
    assert report.source_description == str(path)


def test_rejection_is_the_same_from_arrow(tmp_path):
    table = pa.table({"text": ["a", None, "", "a", "b"], "row": range(5)})
    invalid = pa.table({"text": pa.array([b"\xff", b"c"]).view(pa.string()), "row": [5, 6]})
    pq.write_table(pa.concat_tables([table, invalid]), tmp_path / "x.parquet")
    with pytest.warns(TextsRejectedWarning):
        dataset = read_texts(tmp_path / "x.parquet")
    assert dataset["row"][:] == [0, 4, 6]
    assert read_report(dataset).rejected == {"duplicate": 1, "empty": 1, "not a string": 1, "not valid Unicode": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "completion": " "}, "empty"),
        ({"prompt": None, "completion": "c"}, "not a string"),
        ({"messages": []}, "empty"),
        ({"messages": None}, "not a list of messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
        ({"messages": [{"role": "assistant"}]}, "message without role or content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "message without role or content"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "empty"),
        ({"messages": [{"role": "assistant", "content": "\udfff"}]}, "not valid Unicode"),
        ({"input_ids": []}, "empty"),
        ({"input_ids": [1, -2]}, "not a list of token ids"),
        ({"input_ids": [1, None]}, "not a list of token ids"),
        ({"input_ids": [True]}, "not a list of token ids"),
        ({"input_ids": [1.5]}, "not a list of token ids"),
        ({"input_ids": [2**70]}, "not a list of token ids"),
        ({"input_ids": "1 2"}, "not a list of token ids"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels of another length"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "no token with loss"),
    ],
)
def test_each_format_rejects_what_cannot_be_trained_on(row, reason):
    good = {"prompt": "p", "completion": "c", "messages": CHAT, "input_ids": [5], "labels": [5]}
    with pytest.warns(TextsRejectedWarning):
        dataset = read_texts([{key: good[key] for key in row}, row])
    assert read_report(dataset).rejected == {reason: 1}


def test_token_lists_with_gaps_are_rejected_from_arrow():
    kind = pa.list_(pa.int64())
    table = pa.table(
        {
            "input_ids": pa.array([[1, None], None, [0, 1], [], [2, 3]], kind),
            "labels": pa.array([None, None, None, None, [2, None]], kind),
        }
    )
    with pytest.warns(TextsRejectedWarning):
        dataset = read_texts(datasets.Dataset(table))
    assert dataset["input_ids"][:] == [[0, 1]]
    assert read_report(dataset).rejected == {"not a list of token ids": 3, "empty": 1}


def test_nothing_kept_is_an_error_with_the_counts():
    with pytest.raises(InputError, match="dropped 3 of 3 texts: 2 empty, 1 not a string"):
        read_texts(["", " ", None])
    for nothing in ([], iter([]), datasets.Dataset.from_dict({"text": []})):
        with pytest.raises(InputError, match="holds no texts"):
            read_texts(nothing)


# ---- reading again


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        [{"prompt": "p", "completion": "c", "kind": 1}],
        [{"messages": CHAT, "text": "x"}],
        [{"input_ids": [1, 2], "labels": [1, -100]}],
    ],
)
def test_reading_again_changes_nothing(rows, tmp_path):
    once = read_texts(rows)
    twice = read_texts(once)
    once.to_parquet(tmp_path / "x.parquet")
    for again in (twice, read_texts(tmp_path / "x.parquet")):
        assert again.to_list() == once.to_list()
        assert again.features == once.features
        assert text_format(again) == text_format(once)


def test_reading_again_keeps_a_format_that_auto_would_not_choose():
    once = read_texts([{"text": "t", "messages": CHAT}], format="text")
    assert text_format(read_texts(once)) == "text"
    assert read_texts(once).to_list() == once.to_list()


def test_format_survives_selecting_saving_and_reordering_and_notices_changes(tmp_path):
    dataset = read_texts(ROWS).select([2, 0])
    dataset.save_to_disk(tmp_path / "saved")
    assert text_format(datasets.load_from_disk(tmp_path / "saved").select_columns(["source", "text", "text_id"])) == "text"
    with pytest.raises(InputError, match="not the hash"):
        text_format(dataset.map(lambda row: {"text": row["text"] + "!"}))


def test_report_is_only_on_the_dataset_that_was_read():
    dataset = read_texts(ROWS)
    assert read_report(dataset).num_kept == 3
    with pytest.raises(InputError, match="no report"):
        read_report(dataset.select([0]))


def test_missing_text_ids_are_refused():
    check_text_ids(read_texts(ROWS))
    with pytest.raises(InputError, match=r"call oracle.read_texts first"):
        check_text_ids(datasets.Dataset.from_list(ROWS))


# ---- plain strings


class Tokenizer:
    def decode(self, token_ids, /, *, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(map(str, token_ids))


def test_plain_strings_of_every_format():
    assert plain_strings(read_texts(TEXTS)) == TEXTS
    pairs = [("p", "c"), ("p ", "c"), ("p", "\nc"), ("", "c")]
    completions = read_texts([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    assert plain_strings(completions) == ["p\nc", "p c", "p\nc", "c"]
    assert plain_strings(read_texts([{"messages": CHAT}])) == ["user: 2+2?\nassistant: 4"]
    tokens = read_texts([{"input_ids": [1, 2]}])
    assert plain_strings(tokens, Tokenizer()) == ["1 2"]
    with pytest.raises(InputError, match="tokenizer"):
        plain_strings(tokens)


# ---- errors


def test_missing_path_names_close_ones(tmp_path):
    (tmp_path / "pool.jsonl").write_bytes(json_lines(ROWS))
    with pytest.raises(MissingFileError, match=r"did you mean 'pool.jsonl'") as caught:
        read_texts(tmp_path / "pol.jsonl")
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(MissingFileError, match="no file matches"):
        read_texts(str(tmp_path / "*.parquet"))
    with pytest.raises(MissingFileError):
        read_texts([str(tmp_path / "pool.jsonl"), str(tmp_path / "other.jsonl")])
    with pytest.raises(MissingFileError, match="list of strings"):
        read_texts("Once upon a time there was a text that was no path.")


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("x.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"x\.jsonl, line 3: not valid JSON"),
        ("x.jsonl", b'{"text": "a"}\n"b"\n', r"x\.jsonl, line 2: a str stands"),
        ("x.json", b'["a", "b"]', "not of objects"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-9], "cannot be unpacked"),
        ("x.jsonl.zst", b"no zst", "cannot be unpacked"),
        ("x.parquet", b"no parquet", "cannot be parsed"),
        ("x.arrow", b"no arrow file", "cannot be parsed"),
        ("x.csv", b"text\na\n", "ending that is not known"),
        ("x.jsonl", b'{"text": "a", "k": 1}\n{"text": "b", "k": "c"}\n', "'k' mixes types"),
        ("x.jsonl", b'{"text": "a", "k": "\xff"}\n', "'k' mixes types or holds"),
    ],
)
def test_unreadable_file_is_named(tmp_path, name, data, match):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=match) as caught:
        read_texts(tmp_path / name)
    assert caught.value.accepted
    assert caught.value.remedy


def test_folder_that_is_not_saved_names_a_glob(tmp_path):
    write(tmp_path / "a.parquet", "parquet")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/*.parquet")):
        read_texts(tmp_path)


def test_files_that_disagree_on_types_are_refused(tmp_path):
    for name, value in (("a", 1), ("b", "x")):
        pq.write_table(pa.table({"text": [name], "k": [value]}), tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match="disagree on the type"):
        read_texts(str(tmp_path / "*.parquet"))


def test_columns_found_and_accepted_are_listed():
    with pytest.raises(InputError, match=r"txt, kind \(did you mean 'txt'\?\)") as caught:
        read_texts([{"txt": "a", "kind": 1}])
    assert "prompt and completion" in str(caught.value)
    with pytest.raises(InputError, match="did you mean 'body'"):
        read_texts([{"body": "a", "text": "b"}], text_column="bdy")
    with pytest.raises(InputError, match="needs the column 'prompt'"):
        read_texts([{"text": "b"}], format="completion")
    with pytest.raises(InputError, match="has no effect"):
        read_texts([{"body": "a"}], text_column="body", format="chat")


def test_unknown_options_and_sources_are_refused():
    with pytest.raises(InputError, match="did you mean 'text'"):
        read_texts(TEXTS, format="texts")
    with pytest.raises(InputError, match="limit=0"):
        read_texts(TEXTS, limit=0)
    for source in (b"a", 3, {"text": ["a"]}):
        with pytest.raises(InputTypeError, match="no source of texts"):
            read_texts(source)
    with pytest.raises(InputError, match="cannot be opened"):
        read_texts("foo://bucket/x.jsonl")


def test_protocol_without_its_package_says_what_to_install(monkeypatch):
    def refuse(location):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", refuse)
    with pytest.raises(MissingPackageError, match="pip install s3fs"):
        read_texts("s3://bucket/x.jsonl")


def test_reading_writes_no_files(tmp_path):
    write(tmp_path / "saved", "saved")
    before = sorted(os.listdir(tmp_path / "saved"))
    read_texts(tmp_path / "saved")
    assert sorted(os.listdir(tmp_path / "saved")) == before


@pytest.mark.parametrize("text", ["A line.\n" * 60, "Is it here? " * 60, "word " * 1000], ids=["lines", "glob", "long"])
def test_a_bare_text_in_the_place_of_a_source_is_not_repeated_whole(text):
    with pytest.raises(MissingFileError, match="as a list of strings") as raised:
        read_texts(text)
    assert repr(text[:20])[:-1] in raised.value.given and len(raised.value.given.split("The folder holds")[0]) < 150


def test_a_sample_without_a_text_column_names_the_call_that_takes_one():
    with pytest.raises(InputError, match=r"oracle\.read_texts\(source, text_column=\.\.\.\)"):
        read_texts([{"body": "a text"}])


def test_rows_that_were_picked_out_of_a_dataset_lie_together_again():
    """Picking rows of it, as a loader does for every batch, otherwise goes through as many pieces as there are texts."""
    whole = read_texts([f"text {number}" for number in range(300)])
    picked = read_texts(whole.select(range(299, -1, -2)))
    assert picked["text"][:2] == ["text 299", "text 297"] and len(picked) == 150
    assert max(column.num_chunks for column in picked.data.table.columns) == 1
    assert read_texts(picked.select(range(3)))["text_id"][:] == picked["text_id"][:3]
