"""`score_shard`: the same bytes however the work is cut, killed, repeated or shared."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oracle.errors import MismatchError, MissingFileError, StorageError
from surrogate.scoring.files import list_inputs
from surrogate.scoring.layout import ScoreOptions
from surrogate.scoring.outputs import finished_report
from surrogate.scoring.score_files import read_header
from surrogate.scoring.scorer import Scorer, load_scorer
from surrogate.scoring.segments import SegmentFolder
from surrogate.scoring.shard import ScoreTask, Shard, score_shard

OPTIONS = ScoreOptions(columns=("number",))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, make_texts, make_parquet):
    """9,000 rows, some of them bad."""
    texts = make_texts(9000)
    for number in range(0, 9000, 700):
        texts[number] = "" if number % 3 else None
    path = tmp_path_factory.mktemp("corpus") / "x.parquet"
    return make_parquet(path, {"text": texts, "number": list(range(9000))}, row_group_size=1500)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus, predictor_folder):
    """The corpus scored in one go."""
    folder = tmp_path_factory.mktemp("whole")
    report = score_shard(Shard(list_inputs(corpus).files[0]), predictor_folder, folder, options=OPTIONS)
    assert (report.status, report.counts.num_rows, report.num_bad, report.skipped) == ("done", 9000, 13, False)
    return folder


def files_of(folder, *kinds):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for kind in kinds or ("scores", "quarantine")
        for path in sorted((folder / kind).rglob("*"))
        if path.is_file()
    }


def test_scores_are_those_of_predict(corpus, whole, predictor):
    table = pq.read_table(whole / "scores" / "x.parquet")
    texts = pq.read_table(corpus)["text"].to_pylist()
    positions = table["position"].to_numpy()
    expected = predictor.predict([texts[position] for position in positions[:500]])
    assert table["text_id"].to_pylist()[:500] == expected.text_ids
    assert table["number"].to_pylist() == positions.tolist() == [row for row in range(9000) if texts[row]]
    found = np.stack([table[f"score:{name}"].to_numpy()[:500] for name in ("math", "cooking")], axis=1)
    np.testing.assert_allclose(found, np.asarray(expected), rtol=1e-5, atol=1e-6)
    header = read_header(whole / "scores" / "x.parquet")
    assert list(header.target_names) == ["math", "cooking"] and header.input_name == "x.parquet" and not header.has_spread


def test_bad_rows_are_beside_it(whole):
    rows = [json.loads(line) for line in (whole / "quarantine" / "x.parquet.jsonl").read_text().splitlines()]
    assert [row["position"] for row in rows] == list(range(0, 9000, 700))
    assert {row["reason"] for row in rows} == {"empty", "missing"}


def test_a_finished_shard_is_left_alone(corpus, whole, predictor_folder, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    monkeypatch.setattr("surrogate.scoring.shard.read_blocks", lambda *_, **__: pytest.fail("read again"))
    report = score_shard(Shard(list_inputs(corpus).files[0]), predictor_folder, whole, options=OPTIONS)
    assert report.skipped and report.counts.num_rows == 9000
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_segments_by_time_leave_no_trace(tmp_path, corpus, whole, predictor_folder, ending):
    import gzip

    rows = pq.read_table(corpus).to_pylist()
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / f"x.{ending}"
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    outputs = []
    for seconds in (0.0, 60.0):
        output = tmp_path / f"out-{seconds}"
        score_shard(Shard(list_inputs(path).files[0]), predictor_folder, output, options=OPTIONS, checkpoint_seconds=seconds)
        outputs.append(files_of(output))
        assert not list((output / "segments").rglob("*.parquet"))
    assert outputs[0] == outputs[1]
    found, expected = (
        pq.read_table(path) for path in (tmp_path / f"out-0.0/scores/x.{ending}.parquet", whole / "scores/x.parquet")
    )
    assert found.replace_schema_metadata().equals(expected.replace_schema_metadata())


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_ranges_in_any_order_make_the_same_file(tmp_path, corpus, whole, predictor_folder, order):
    file = list_inputs(corpus).files[0]
    shards = [Shard(file, 0, 4096), Shard(file, 4096, 2048), Shard(file, 6144)]
    task = ScoreTask(str(predictor_folder), str(tmp_path), OPTIONS, checkpoint_seconds=0.0 if order[0] else 60.0)
    for place in order[:-1]:
        task.score(shards[place])
        assert not (tmp_path / "scores").exists() and finished_report(tmp_path, file) is None
    report = task.score(shards[order[-1]])
    assert report.counts.num_rows in (4096, 2048, 2856)
    assert files_of(tmp_path) == files_of(whole)
    assert finished_report(tmp_path, file).counts.num_rows == 9000


class _Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("num_blocks", [0, 1, 3])
def test_a_killed_shard_goes_on_behind_its_last_segment(tmp_path, corpus, whole, predictor_folder, num_blocks, monkeypatch):
    shard = Shard(list_inputs(corpus).files[0])
    seen = []

    def kill(num_rows):
        seen.append(num_rows)
        if len(seen) > num_blocks:
            raise _Killed

    with pytest.raises(_Killed):
        score_shard(shard, predictor_folder, tmp_path, options=OPTIONS, on_rows=kill, checkpoint_seconds=0.0)
    assert not list((tmp_path / ".partial").iterdir())
    rest = []
    score_shard(shard, predictor_folder, tmp_path, options=OPTIONS, on_rows=rest.append)
    assert sum(rest) == 9000 - num_blocks * 2048
    assert files_of(tmp_path) == files_of(whole)


def test_another_predictor_or_other_options_are_refused(corpus, whole, network_folder, predictor_folder):
    shard = Shard(list_inputs(corpus).files[0])
    with pytest.raises(MismatchError, match="predictor: stored"):
        score_shard(shard, network_folder, whole, options=OPTIONS)
    with pytest.raises(MismatchError, match="max_chars"):
        score_shard(shard, predictor_folder, whole, options=ScoreOptions(columns=("number",), max_chars=10))
    with pytest.raises(MissingFileError, match="there is no predictor"):
        score_shard(shard, whole, whole, options=OPTIONS)


def test_a_file_that_changed_is_scored_anew(tmp_path, predictor_folder, make_jsonl, make_texts):
    path = make_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in make_texts(10)])
    assert score_shard(Shard(list_inputs(path).files[0]), predictor_folder, tmp_path / "out").counts.num_rows == 10
    make_jsonl(path, [{"text": text} for text in make_texts(12, seed=1)])
    report = score_shard(Shard(list_inputs(path).files[0]), predictor_folder, tmp_path / "out")
    assert (report.skipped, report.counts.num_rows) == (False, 12)
    assert pq.read_metadata(tmp_path / "out" / "scores" / "x.jsonl.parquet").num_rows == 12
    path.write_text("broken\n")  # no row is left, and nor are scores of rows that are gone
    score_shard(Shard(list_inputs(path).files[0]), predictor_folder, tmp_path / "out")
    assert not (tmp_path / "out" / "scores" / "x.jsonl.parquet").exists()


def test_a_file_that_changes_while_it_is_read_is_told_and_scored_anew(tmp_path, predictor_folder, make_jsonl, make_texts):
    path = make_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in make_texts(10)])
    shard = Shard(list_inputs(path).files[0])
    change = [{"text": text} for text in make_texts(5, seed=1)]
    report = score_shard(shard, predictor_folder, tmp_path / "out", on_rows=lambda _: make_jsonl(path, change))
    of_file = finished_report(tmp_path / "out", shard.file)
    assert (report.status, of_file.status, of_file.counts.errors) == ("done", "damaged", ["the file changed while it was read"])
    again = score_shard(Shard(list_inputs(path).files[0]), predictor_folder, tmp_path / "out")
    assert (again.skipped, again.counts.num_rows) == (False, 5)


def test_segments_of_another_state_of_the_file_are_dropped(tmp_path, predictor_folder, make_parquet, make_texts):
    path = make_parquet(tmp_path / "x.parquet", {"text": make_texts(5000)})
    score_shard(Shard(list_inputs(path).files[0], 0, 4096), predictor_folder, tmp_path / "out")
    make_parquet(path, {"text": make_texts(5000, seed=2)})
    score_shard(Shard(list_inputs(path).files[0], 4096), predictor_folder, tmp_path / "out")
    assert not (tmp_path / "out" / "scores").exists()
    segments = SegmentFolder(tmp_path / "out", "x.parquet", list_inputs(path).files[0].stamp).finished()
    assert [segment.first_row for segment in segments] == [4096]


def test_rows_that_were_given_up_are_tried_again(tmp_path, corpus, whole, predictor_folder):
    file = list_inputs(corpus).files[0]
    task = ScoreTask(str(predictor_folder), str(tmp_path), OPTIONS)
    task.score(Shard(file, 0, 4096))
    task.score(Shard(file, 6144))
    report = task.fail(Shard(file, 4096, 2048), "killed its worker")
    assert report.status == "failed" and "killed its worker" in report.counts.errors[0]
    of_file = finished_report(tmp_path, file)
    assert of_file.status == "damaged" and of_file.counts.num_rows == 9000 - 2048 and of_file.counts.may_pass
    assert pq.read_metadata(tmp_path / "scores" / "x.parquet").num_rows == 9000 - 13 - 2048 + 3
    rows = []
    task.score(Shard(file), rows.append)
    assert sum(rows) == 2048 and files_of(tmp_path) == files_of(whole)
    assert finished_report(tmp_path, file).status == "done"


def test_scores_that_are_not_finite_are_bad_rows(tmp_path, predictor, make_jsonl):
    path = make_jsonl(tmp_path / "x.jsonl", [{"text": "salt"}, {"text": "sum proof"}, {"text": "oven onion"}])
    scorer = Scorer(predictor)
    plain = scorer._predict
    scorer._predict = lambda features: np.where([[False], [True], [False]], np.nan, plain(features))
    report = score_shard(Shard(list_inputs(path).files[0]), scorer, tmp_path / "out")
    assert report.counts.bad_reasons == {"a score that is not finite": 1}
    assert pq.read_table(tmp_path / "out" / "scores" / "x.jsonl.parquet")["position"].to_pylist() == [0, 2]
    line = json.loads((tmp_path / "out" / "quarantine" / "x.jsonl.parquet.jsonl").read_text())
    assert line == {"position": 1, "reason": "a score that is not finite", "text": "sum proof"}


def test_a_full_disk_keeps_what_was_finished(tmp_path, predictor_folder, make_parquet, make_texts, corpus, whole):
    noise = [os.urandom(2000).hex() for _ in range(200)]
    small = make_parquet(tmp_path / "a.parquet", {"text": make_texts(50), "number": list(range(50))})
    large = make_parquet(tmp_path / "b.parquet", {"text": make_texts(200), "number": noise})
    output = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may grow beyond it, as on a full disk
    try:
        score_shard(Shard(list_inputs(small).files[0]), predictor_folder, output, options=OPTIONS)
        with pytest.raises(StorageError, match="free some space"):
            score_shard(Shard(list_inputs(large).files[0]), predictor_folder, output, options=OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(files_of(output, "scores")) == ["scores/a.parquet"] and not list((output / ".partial").iterdir())
    assert score_shard(Shard(list_inputs(large).files[0]), predictor_folder, output, options=OPTIONS).status == "done"


def test_spreads_stand_beside_scores_where_the_surrogate_has_them(tmp_path, network_folder, make_jsonl, make_texts):
    path = make_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in make_texts(20)])
    score_shard(Shard(list_inputs(path).files[0]), network_folder, tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "scores" / "x.jsonl.parquet")
    assert table.column_names[2:] == ["score:math", "score:cooking", "spread:math", "spread:cooking"]
    scorer = load_scorer(network_folder)
    texts = [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]
    features = scorer.predictor.features(texts)
    scores, spreads = scorer.predictor.surrogate_.predict(features, return_spread=True)
    np.testing.assert_allclose(table["spread:math"].to_numpy(), spreads[:, 0], rtol=1e-5)
    np.testing.assert_allclose(table["score:cooking"].to_numpy(), scores[:, 1], rtol=1e-5)


def test_equal_texts_are_scored_alike_and_encoded_once(tmp_path, predictor, make_jsonl):
    path = make_jsonl(tmp_path / "x.jsonl", [{"text": "salt"}, {"text": "sum"}] * 50)
    scorer, seen = Scorer(predictor), []
    encode = predictor.encoders[0].encode
    plain = scorer._encode
    scorer._encode = lambda encoder, texts, prepared: (seen.append(len(texts)), plain(encoder, texts, prepared))[1]
    report = score_shard(Shard(list_inputs(path).files[0]), scorer, tmp_path / "out")
    assert seen == [2] and report.counts.num_scored == 100 and encode is not None
    scores = pq.read_table(tmp_path / "out" / "scores" / "x.jsonl.parquet")["score:math"].to_numpy()
    assert len(np.unique(scores)) == 2


def test_an_empty_file_has_an_empty_score_file(tmp_path, predictor_folder):
    (tmp_path / "x.jsonl").write_text("")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "y.parquet")
    for file in list_inputs(tmp_path).files:
        assert score_shard(Shard(file), predictor_folder, tmp_path / "out").status == "done"
    assert [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "out" / "scores").iterdir())] == [0, 0]


def test_the_caller_s_threads_are_given_back(tmp_path, predictor_folder, make_jsonl):
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        path = make_jsonl(tmp_path / "x.jsonl", [{"text": "salt"}])
        score_shard(Shard(list_inputs(path).files[0]), predictor_folder, tmp_path / "out")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_segment_that_was_cut_short_is_made_anew(tmp_path, corpus, whole, predictor_folder):
    file = list_inputs(corpus).files[0]
    task = ScoreTask(str(predictor_folder), str(tmp_path), OPTIONS)
    for shard in (Shard(file, 0, 2048), Shard(file, 2048, 2048), Shard(file, 4096, 2048)):
        task.score(shard)
    folder = tmp_path / "segments" / "x.parquet"
    next(folder.glob("*-000000002048.parquet")).write_bytes(b"")
    next(folder.glob("*-000000004096.json")).write_text("")
    next(folder.glob("*-000000006144.parquet")).unlink()
    assert task.num_kept(Shard(file)) == 0
    rows = []
    task.score(Shard(file), rows.append)
    assert sum(rows) == 9000 and files_of(tmp_path) == files_of(whole)


def test_a_file_with_a_fault_in_every_part_has_a_short_report(tmp_path, predictor_folder, make_parquet, make_texts):
    path = make_parquet(
        tmp_path / "x.parquet", {"text": make_texts(400)}, row_group_size=10, compression="none", use_dictionary=False
    )
    metadata, data = pq.read_metadata(path), bytearray(path.read_bytes())
    for group in range(1, 40):  # the headers of their pages
        start = metadata.row_group(group).column(0).data_page_offset
        data[start : start + 10] = b"\xff" * 10
    path.write_bytes(data)
    report = score_shard(Shard(list_inputs(path).files[0]), predictor_folder, tmp_path / "out")
    assert (report.status, report.counts.num_scored, len(report.counts.errors)) == ("damaged", 10, 20)
