"""`score_corpus`: every file once, every fault told, the same bytes however it is run."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem

import oracle
from oracle.errors import InputError, InputTypeError, MismatchError, MissingFileError
from surrogate.scoring import planning
from surrogate.scoring.corpus import ChangedInputWarning, score_corpus
from surrogate.scoring.lock import LockedError, locked
from surrogate.scoring.planning import plan_shards

HERE = {"workers": 0}


def scores_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for kind in ("scores", "quarantine")
        for path in sorted((folder / kind).rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def corpus(tmp_path, make_texts, make_jsonl, make_parquet):
    make_jsonl(tmp_path / "in" / "en" / "x.jsonl", [{"text": text} for text in make_texts(30)])
    make_parquet(tmp_path / "in" / "de" / "x.parquet", {"text": make_texts(5000, seed=1)}, row_group_size=500)
    make_parquet(tmp_path / "in" / "y.parquet", {"text": make_texts(20, seed=2)})
    return tmp_path / "in"


def test_every_file_has_a_score_file_of_its_name(corpus, predictor_folder, tmp_path):
    scored = score_corpus(predictor_folder, corpus, tmp_path / "out", **HERE)
    assert [file.name for file in scored.files] == ["de/x.parquet", "en/x.jsonl", "y.parquet"]
    assert sorted(scores_of(tmp_path / "out")) == ["scores/de/x.parquet", "scores/en/x.jsonl.parquet", "scores/y.parquet"]
    manifest = scored.manifest
    assert manifest["complete"] and manifest["clean"] and len(scored) == manifest["num_scored"] == 5050
    assert manifest["runs"][0]["num_rows"] == 5050 and manifest["seconds"]["encode"] > 0
    assert not (tmp_path / "out" / ".partial").exists()


def test_a_rerun_does_nothing_and_a_grown_corpus_only_what_is_new(corpus, predictor_folder, tmp_path, make_jsonl):
    score_corpus(predictor_folder, corpus, tmp_path / "out", **HERE)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "scores").rglob("*.parquet")}
    again = score_corpus(predictor_folder, corpus, tmp_path / "out", **HERE)
    assert [run["num_rows"] for run in again.manifest["runs"]] == [5050, 0]
    make_jsonl(corpus / "z.jsonl", [{"text": "new"}])
    grown = score_corpus(predictor_folder, corpus, tmp_path / "out", **HERE)
    assert grown.manifest["runs"][-1]["num_rows"] == 1 and len(grown) == 5051
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_changed_file_is_scored_anew_with_a_warning(corpus, predictor_folder, tmp_path, make_jsonl):
    score_corpus(predictor_folder, corpus, tmp_path / "out", **HERE)
    make_jsonl(corpus / "en" / "x.jsonl", [{"text": "other"}, {"text": "texts"}])
    (corpus / "y.parquet").unlink()
    with pytest.warns(ChangedInputWarning, match="1 files changed and are scored anew, first en/x.jsonl"):
        scored = score_corpus(predictor_folder, corpus, tmp_path / "out", **HERE)
    assert scored.file("en/x.jsonl").num_rows == 2 and scored.manifest["runs"][-1]["num_rows"] == 2
    assert scored.manifest["not_in_source"] == ["y.parquet"] and [file.name for file in scored.files] == [
        "de/x.parquet",
        "en/x.jsonl",
    ]


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_array_of_machines_makes_the_same_files(corpus, predictor_folder, tmp_path, world_size, monkeypatch):
    monkeypatch.setattr(planning, "MIN_PART_BYTES", 20_000)  # the long file is shared
    assert len(plan_shards(oracle_files(corpus), tmp_path)) == 4
    score_corpus(predictor_folder, corpus, tmp_path / "one", **HERE)
    for rank in range(world_size):
        scored = score_corpus(predictor_folder, corpus, tmp_path / "many", rank=rank, world_size=world_size, **HERE)
        assert scored.manifest["complete"] == (rank == world_size - 1)
    assert scores_of(tmp_path / "many") == scores_of(tmp_path / "one")


def oracle_files(corpus):
    from surrogate.scoring.files import list_inputs

    return list_inputs(corpus).files


def test_an_object_is_saved_beside_its_scores_and_another_is_refused(corpus, predictor, network_folder, tmp_path):
    import surrogate

    score_corpus(predictor, corpus / "y.parquet", tmp_path / "out", **HERE)
    again = surrogate.InfluencePredictor.load(tmp_path / "out" / "predictor")
    assert len(score_corpus(again, corpus / "y.parquet", tmp_path / "out", **HERE)) == 20
    with pytest.raises(MismatchError):
        score_corpus(surrogate.InfluencePredictor.load(network_folder), corpus / "y.parquet", tmp_path / "out", **HERE)
    with pytest.raises(MismatchError):
        score_corpus(predictor, corpus / "y.parquet", tmp_path / "out", max_chars=5, **HERE)


def test_an_object_that_is_refused_leaves_nothing_behind(corpus, predictor, predictor_folder, network_folder, tmp_path):
    import surrogate

    score_corpus(predictor_folder, corpus / "y.parquet", tmp_path / "out", **HERE)
    with pytest.raises(MismatchError, match="predictor: stored"):
        score_corpus(surrogate.InfluencePredictor.load(network_folder), corpus / "y.parquet", tmp_path / "out", **HERE)
    assert not (tmp_path / "out" / "predictor").exists()
    assert len(score_corpus(predictor, corpus / "y.parquet", tmp_path / "out", **HERE)) == 20


def test_what_was_cut_short_is_made_anew(corpus, predictor_folder, tmp_path, make_jsonl):
    """A machine that loses its power may keep the name of a file and lose what is in it."""
    out = tmp_path / "out"
    score_corpus(predictor_folder, corpus, out, **HERE)
    before = scores_of(out)
    (out / "scores" / "y.parquet").write_bytes(before["scores/y.parquet"][:100])
    (out / "reports" / "en" / "x.jsonl.parquet.json").write_text("")
    (out / "row_counts.json").write_text("")
    again = score_corpus(predictor_folder, corpus, out, **HERE)
    assert again.manifest["complete"] and again.manifest["runs"][-1]["num_rows"] == 50 and scores_of(out) == before


def test_the_end_of_one_machine_of_an_array_removes_nothing_that_another_may_be_writing(corpus, predictor_folder, tmp_path):
    partial = tmp_path / "out" / ".partial" / "elsewhere-1-abc.json"
    partial.parent.mkdir(parents=True)
    partial.touch()
    for rank in range(2):
        scored = score_corpus(predictor_folder, corpus, tmp_path / "out", rank=rank, world_size=2, **HERE)
    assert scored.manifest["complete"] and partial.exists()


def test_urls_are_read_and_an_output_in_the_source_or_among_other_things_is_refused(predictor_folder, tmp_path, make_jsonl):
    with fsspec.open("memory://scoring/x.jsonl.gz", "wb") as file:
        file.write(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert len(score_corpus(predictor_folder, "memory://scoring/*.gz", tmp_path / "urls", **HERE)) == 2
    make_jsonl(tmp_path / "in" / "x.jsonl", [{"text": "one"}])
    for output in (tmp_path / "in", tmp_path / "in" / "scored"):
        with pytest.raises(InputError, match="is inside the source"):
            score_corpus(predictor_folder, tmp_path / "in", output, **HERE)
    for _ in range(2):
        scored = score_corpus(predictor_folder, tmp_path / "in" / "*.jsonl", tmp_path / "in" / "scored", **HERE)
    assert [file.name for file in scored.files] == ["x.jsonl"] and "1 rows of 1 files" in repr(scored)
    with pytest.raises(InputError, match="holds other things: fitted_rows"):
        score_corpus(predictor_folder, tmp_path / "in" / "*.jsonl", predictor_folder, **HERE)


def test_a_column_that_no_file_has_is_refused_before_anything_is_scored(predictor_folder, tmp_path, make_jsonl):
    rows = {"body": "one", "lang": "en"}
    for name in ("a", "b"):
        make_jsonl(tmp_path / "in" / f"{name}.jsonl", [rows])
    wrong = (
        ({}, "no column that holds texts"),
        ({"text_column": "boddy"}, "boddy"),
        ({"text_column": "body", "columns": ["langg"]}, "no column 'langg' .did you mean 'lang'"),
        ({"text_column": "body", "columns": "lang"}, "is one string"),
    )
    for options, message in wrong:
        with pytest.raises((InputError, InputTypeError), match=message):
            score_corpus(predictor_folder, tmp_path / "in", tmp_path / "out", **options, **HERE)
        assert not (tmp_path / "out").exists()
    make_jsonl(tmp_path / "in" / "c.jsonl", [{"body": "one"}])
    scored = score_corpus(predictor_folder, tmp_path / "in", tmp_path / "out", text_column="body", columns=["lang"], **HERE)
    assert len(scored) == 3


def broken_inputs(folder, make_jsonl, make_parquet):
    """More than twenty kinds of broken input beside one good file."""
    good = [{"text": f"good {number}", "kept": number} for number in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in good * 3000).encode()
    make_jsonl(folder / "good.jsonl", good)
    make_jsonl(
        folder / "rows.jsonl", [*good, "{broken", "[1, 2]", {"text": None}, {"text": "   "}, {"other": 1}, {"text": 5}, '"a"']
    )
    make_jsonl(folder / "long.jsonl", [{"text": "long " * 1000}])
    (folder / "utf8.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "fine"}\n')
    (folder / "nul.jsonl").write_bytes(b"\0" * 100 + b'\n{"text": "fine"}\n')
    (folder / "deep.jsonl").write_bytes(b'{"text": "fine"}\n' + b"[" * 50_000 + b"\n")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-30])
    (folder / "cut.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines)[:-10])
    (folder / "wrong.jsonl.gz").write_bytes(b"this is no gzip")
    (folder / "wrong.jsonl.zst").write_bytes(b"this is no zstd")
    (folder / "cut.json").write_bytes(json.dumps(good).encode()[:-10])
    (folder / "wrong.parquet").write_bytes(b"this is no parquet")
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "wrong.arrow").write_bytes(b"this is no arrow")
    path = make_parquet(folder / "cut.parquet", {"text": ["a", "b"]})
    path.write_bytes(path.read_bytes()[:-20])
    make_parquet(folder / "no_column.parquet", {"body": ["a"]})
    make_parquet(folder / "type.parquet", {"text": [1, 2, 3]})
    make_parquet(folder / "list.parquet", {"text": [["a"], ["b"]]})
    make_parquet(folder / "null.parquet", {"text": pa.nulls(4, pa.string())})
    make_parquet(folder / "bytes.parquet", {"text": [b"raw", b"\xff"]})
    make_parquet(folder / "no_rows.parquet", {"text": pa.array([], pa.string())})
    pq.write_table(pa.table({"n": [1]}).select([]), folder / "no_columns.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 2, names=["text", "text"]), folder / "twice.parquet")
    make_jsonl(folder / "a" / "same.jsonl", good)
    make_jsonl(folder / "b" / "same.jsonl", good)
    (folder / "folder.parquet").mkdir()
    (folder / "gone.jsonl").symlink_to(folder / "nowhere.jsonl")
    (folder / "table.csv").write_text("text\nx\n")
    make_jsonl(folder / ("x" * 244 + ".jsonl"), good)  # its score file's name would be too long
    (folder / os.fsdecode(b"caf\xe9.jsonl")).write_bytes(b'{"text": "a"}\n')
    (folder / "key.jsonl").write_bytes(b'{"caf\xe9": "a", "body": "b"}\n')
    (folder / "deep.json").write_bytes(b'[{"text": "fine"}, ' + b"[" * 50_000)
    union = pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])])
    table = pa.table({"text": ["a", "b"], "kept": union})
    with pa.ipc.new_file(str(folder / "union.arrow"), table.schema) as file:
        file.write_table(table)
    if os.getuid():
        make_jsonl(folder / "locked.jsonl", good).chmod(0)


def test_every_kind_of_broken_input_is_told_and_none_is_fatal(tmp_path, predictor_folder, make_jsonl, make_parquet):
    broken_inputs(tmp_path / "in", make_jsonl, make_parquet)
    scored = score_corpus(predictor_folder, tmp_path / "in", tmp_path / "out", max_chars=2000, columns=["kept"], **HERE)
    manifest = json.loads(json.dumps(scored.manifest, ensure_ascii=False).encode())
    assert manifest["complete"] and not manifest["clean"]
    files = {entry["name"]: entry for entry in manifest["files"]}
    failed = {name for name, entry in files.items() if entry["status"] == "failed"} - {"locked.jsonl"}
    assert failed == {
        *("wrong.jsonl.gz", "wrong.jsonl.zst", "wrong.parquet", "empty.parquet", "wrong.arrow", "cut.parquet"),
        *("no_column.parquet", "no_columns.parquet", "twice.parquet", "key.jsonl"),
    }
    damaged = {name: entry["num_scored"] for name, entry in files.items() if entry["status"] == "damaged"}
    assert damaged.pop("deep.json") == 1
    assert set(damaged) == {"cut.jsonl.gz", "cut.jsonl.zst", "cut.json"} and min(damaged.values()) > 1
    (note,) = files["union.arrow"]["notes"].items()
    assert "a type that parquet does not have" in note[0] and note[1] == files["union.arrow"]["num_scored"] == 2
    assert all(entry["errors"] for entry in files.values() if entry["status"] != "done")
    assert files["rows.jsonl"]["num_scored"] == 3 and files["rows.jsonl"]["num_bad"] == 7
    assert files["long.jsonl"]["num_cut"] == 1 and files["long.jsonl"]["num_scored"] == 1
    for name in ("utf8.jsonl", "nul.jsonl", "deep.jsonl"):
        assert (files[name]["num_scored"], files[name]["num_bad"]) == (1, 1), name
    for name, count in (("type.parquet", 3), ("list.parquet", 2), ("null.parquet", 4), ("bytes.parquet", 2)):
        assert (files[name]["num_scored"], files[name]["num_bad"]) == (0, count), name
    assert files["no_rows.parquet"]["num_rows"] == 0
    assert {"a/same.jsonl", "b/same.jsonl"} <= set(files)
    not_listed = {os.path.basename(path): reason for path, reason in manifest["not_listed"].items()}
    assert set(not_listed) == {"folder.parquet", "gone.jsonl", "caf\\udce9.jsonl", "x" * 244 + ".jsonl"}
    assert not_listed["caf\\udce9.jsonl"] == "its name is not valid UTF-8"
    assert manifest["num_ignored"] == 1
    assert scored.read("good.jsonl")["text_id"].to_pylist() == oracle.read_texts(["good 0", "good 1", "good 2"])["text_id"][:]


def test_what_cannot_be_used_is_refused_before_anything_is_written(corpus, predictor_folder, tmp_path):
    out = tmp_path / "out"
    for options, message in (
        ({"engine": "spark"}, "engine='spark' is not known"),
        ({"wokers": 2}, "did you mean 'workers'"),
        ({"format": "prose"}, "format='prose'"),
        ({"text_column": "body", "format": "chat"}, "has no effect"),
        ({"columns": ["score:math"]}, "cannot be passed through"),
        ({"columns": ["a", "a"]}, "cannot be passed through"),
        ({"max_chars": 0}, "max_chars"),
        ({"rank": 2, "world_size": 2}, "rank=2 with world_size=2"),
    ):
        with pytest.raises(InputError, match=message):
            score_corpus(predictor_folder, corpus, out, **options)
    with pytest.raises(MissingFileError):
        score_corpus(predictor_folder, corpus / "nothing.jsonl", out)
    assert not out.exists()
    for url in ("memory://bucket/out", Path("s3://bucket/out")):  # a path has one slash left
        with pytest.raises(InputError, match="is a URL"):
            score_corpus(predictor_folder, corpus, url)
    with pytest.raises(MissingFileError, match="there is no predictor"):
        score_corpus(tmp_path / "nothing", corpus, out)


def test_two_files_whose_scores_would_have_one_name_are_refused(tmp_path, predictor_folder, make_jsonl, make_parquet):
    make_jsonl(tmp_path / "in" / "x.jsonl", [{"text": "a"}])
    make_parquet(tmp_path / "in" / "x.jsonl.parquet", {"text": ["b"]})
    with pytest.raises(InputError, match="would have the same name"):
        score_corpus(predictor_folder, tmp_path / "in", tmp_path / "out", **HERE)


class Bucket(MemoryFileSystem):
    """Objects with entity tags, as in S3; only the first bytes of each are read while it is away."""

    protocol = "bucket"
    store, pseudo_dirs = {}, [""]
    is_away = False

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("bucket://").strip("/")

    def info(self, path, **options):
        found = super().info(path, **options)
        is_file = found["type"] == "file"
        return {**found, "created": "", "ETag": hashlib.md5(self.store[found["name"]].getvalue()).hexdigest() if is_file else ""}

    def _open(self, path, mode="rb", **options):
        opened = super()._open(path, mode, **options)
        if mode == "rb":
            opened = io.BytesIO(opened.getvalue())
            opened.read = functools.partial(self._read, opened, opened.read)
        return opened

    def _read(self, opened, read, *arguments):
        if opened.tell() >= 2**14 and Bucket.is_away:
            raise ConnectionResetError(104, "Connection reset by peer")
        return read(*arguments)


@pytest.fixture
def bucket():
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    Bucket.store.clear()
    yield fsspec.filesystem("bucket")
    Bucket.is_away = False


def test_a_bucket_that_fails_for_a_while_is_read_again_by_the_next_run(tmp_path, predictor_folder, bucket, make_texts):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(5_000))
    bucket.pipe("/corpus/a.jsonl", lines.encode())
    bucket.pipe("/corpus/b.jsonl", b'{"text": "salt"}\n')
    Bucket.is_away = True
    scored = score_corpus(predictor_folder, "bucket://corpus", tmp_path / "out", **HERE)
    files = {entry["name"]: entry for entry in scored.manifest["files"]}
    assert files["a.jsonl"]["status"] == "damaged" and "Connection reset" in files["a.jsonl"]["errors"][0]
    assert files["b.jsonl"]["status"] == "done" and not scored.manifest["clean"]
    Bucket.is_away = False
    again = score_corpus(predictor_folder, "bucket://corpus", tmp_path / "out", **HERE)
    assert again.manifest["clean"] and len(again) == 5_001
    bucket.pipe("/corpus/b.jsonl", b'{"text": "oven"}\n')  # as large as before
    with pytest.warns(ChangedInputWarning, match=r"1 files changed .* first b\.jsonl"):
        score_corpus(predictor_folder, "bucket://corpus", tmp_path / "out", **HERE)


def test_one_path_on_two_file_systems_and_a_file_named_as_a_folder_are_refused(tmp_path, predictor_folder, make_jsonl, bucket):
    """Else the scores of one would be lost to the other, without a word."""
    urls = ["memory://one/two/x.jsonl", "bucket://one/two/x.jsonl"]
    for url in urls:
        with fsspec.open(url, "wb") as file:
            file.write(b'{"text": "salt"}\n')
    with pytest.raises(InputError, match="would have the same name"):
        score_corpus(predictor_folder, urls, tmp_path / "out", **HERE)
    make_jsonl(tmp_path / "a" / "x.jsonl.parquet" / "y.jsonl", [{"text": "a"}])
    make_jsonl(tmp_path / "b" / "x.jsonl", [{"text": "b"}])
    with pytest.raises(InputError, match="in a folder with the name of those of"):
        score_corpus(predictor_folder, [tmp_path / "a", tmp_path / "b"], tmp_path / "out", **HERE)


def test_two_runs_on_one_folder_are_not_let_go_together(corpus, predictor_folder, tmp_path):
    import subprocess
    import sys

    code = "import sys; from surrogate.scoring.corpus import score_corpus; score_corpus(*sys.argv[1:], workers=0)"
    with locked(tmp_path / "out"):
        answer = subprocess.run(
            [sys.executable, "-c", code, str(predictor_folder), str(corpus), str(tmp_path / "out")],
            capture_output=True,
            text=True,
            check=False,
        )
    assert (
        answer.returncode == 1 and f"LockedError: {tmp_path / 'out'} is being worked on by process {os.getpid()}" in answer.stderr
    )
    assert issubclass(LockedError, InputError)


def test_a_run_that_fails_still_writes_what_it_has(corpus, predictor_folder, tmp_path, monkeypatch):
    from surrogate.scoring.shard import ScoreTask

    plain = ScoreTask.score

    def score(self, shard, on_rows=None):
        if shard.file.name == "y.parquet":
            raise KeyboardInterrupt
        return plain(self, shard, on_rows)

    monkeypatch.setattr(ScoreTask, "score", score)
    with pytest.raises(KeyboardInterrupt):
        score_corpus(predictor_folder, corpus, tmp_path / "out", **HERE)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert not manifest["complete"] and manifest["missing"] == ["y.parquet"]
    monkeypatch.setattr(ScoreTask, "score", plain)
    assert score_corpus(predictor_folder, corpus, tmp_path / "out", **HERE).manifest["complete"]


def test_leftovers_of_dead_processes_are_removed_and_those_of_living_ones_kept(corpus, predictor_folder, tmp_path):
    import socket
    import subprocess
    import sys

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    partial = tmp_path / "out" / ".partial"
    partial.mkdir(parents=True)
    names = [f"{socket.gethostname()}-{pid}-abc.parquet" for pid in (dead.pid, os.getppid())] + ["elsewhere-1-abc.parquet"]
    for name in names:
        (partial / name).touch()
    with pytest.raises(MissingFileError):
        score_corpus(tmp_path / "nothing", corpus, tmp_path / "out")
    assert {path.name for path in partial.iterdir()} == set(names[1:])


def test_memory_and_order_do_not_decide_scores_beyond_rounding(corpus, predictor_folder, predictor, tmp_path):
    scored = score_corpus(predictor_folder, corpus / "en", tmp_path / "out", **HERE)
    texts = oracle.read_texts(str(corpus / "en" / "x.jsonl"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(
            np.asarray(scored.scores(texts["text_id"][:])), np.asarray(predictor.predict(texts)), rtol=1e-5
        )
