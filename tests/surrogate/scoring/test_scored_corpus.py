"""Reading scores back and joining them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

import oracle
from oracle.errors import InputError, MismatchError, MissingFileError
from surrogate.scoring.corpus import score_corpus
from surrogate.scoring.scored_corpus import ScoredCorpus


@pytest.fixture(scope="module")
def scored(tmp_path_factory, predictor_folder, make_texts, make_jsonl, make_parquet):
    folder = tmp_path_factory.mktemp("scored")
    rows = [{"text": text, "n": number} for number, text in enumerate(make_texts(20))]
    make_jsonl(folder / "in" / "a.jsonl", [*rows[:10], "{broken", {"text": ""}, *rows[10:]])
    make_parquet(folder / "in" / "b.parquet", {"text": make_texts(2500, seed=1), "n": list(range(2500))}, row_group_size=300)
    make_jsonl(folder / "in" / "c.jsonl", ["broken"])
    return score_corpus(predictor_folder, folder / "in", folder / "out", workers=0)


def test_batches_stream_all_rows_in_order(scored):
    batches = list(scored.batches(["position", "score:math"], batch_rows=1000))
    assert [batch.num_rows for batch in batches] == [20, 1000, 1000, 500]
    assert np.concatenate([batch["position"].to_numpy() for batch in batches[1:]]).tolist() == list(range(2500))
    assert pa.Table.from_batches(batches).equals(scored.read(columns=["position", "score:math"]))
    assert len(scored) == scored.num_rows == 2520 and scored.target_names == ["math", "cooking"] and not scored.has_spread
    with pytest.raises(InputError, match="did you mean 'score:math'"):
        next(scored.batches(["score:maths"]))


def test_one_file_by_name(scored):
    assert scored.read("a.jsonl")["position"].to_pylist() == [*range(10), *range(12, 22)]
    with pytest.raises(InputError, match=r"did you mean 'b\.parquet'"):
        scored.file("bb.parquet")
    assert "c.jsonl" not in [file.name for file in scored.files]


def test_join_by_text_id(scored, make_texts, predictor):
    texts = oracle.read_texts([*make_texts(5, seed=1), "never seen", *make_texts(3)])
    joined = scored.join(texts)
    math = np.array(joined["score:math"][:])
    assert np.isnan(math).tolist() == [False] * 5 + [True] + [False] * 3
    keep = [row for row in range(9) if row != 5]
    np.testing.assert_allclose(math[keep], np.asarray(predictor.predict(texts))[keep, 0], rtol=1e-5)
    ids = texts["text_id"][:]
    assert np.asarray(scored.scores([ids[row] for row in keep]))[:, 0].tolist() == math[keep].tolist()
    with pytest.raises(InputError, match="1 of 9 texts have no score"):
        scored.scores(ids)
    assert len(scored.scores()) == 2520


@pytest.mark.parametrize("name", ["a.jsonl", "b.parquet"])
def test_join_by_position(scored, name, make_texts):
    tables = list(scored.joined(name))
    joined = pa.concat_tables(tables)
    texts = make_texts(20) if name == "a.jsonl" else make_texts(2500, seed=1)
    assert joined["text"].to_pylist() == texts and joined["n"].to_pylist() == list(range(len(texts)))
    assert joined["score:math"].to_pylist() == scored.read(name)["score:math"].to_pylist()
    assert next(scored.joined(name, columns=["n"])).column_names == ["n", "text_id", "position", "score:math", "score:cooking"]


def test_a_file_that_changed_is_not_joined(scored, tmp_path, predictor_folder, make_jsonl):
    path = make_jsonl(tmp_path / "x.jsonl", [{"text": "a"}])
    own = score_corpus(predictor_folder, path, tmp_path / "out", workers=0)
    make_jsonl(path, [{"text": "b"}, {"text": "c"}])
    with pytest.raises(MismatchError, match="changed since it was scored"):
        next(own.joined("x.jsonl"))


def test_an_unfinished_run_is_read_as_far_as_it_is(scored, tmp_path):
    import shutil

    shutil.copytree(scored.folder, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").unlink()
    assert len(ScoredCorpus(tmp_path / "out")) == len(scored) == manifest["num_scored"]
    (tmp_path / "out" / "reports" / "b.parquet.json").unlink()
    assert [file.name for file in ScoredCorpus(tmp_path / "out").files] == ["a.jsonl"]


def test_what_is_no_scored_corpus_is_refused(tmp_path):
    with pytest.raises(MissingFileError):
        ScoredCorpus(tmp_path)
