"""Scoring in pipelines of others: a batch of columns, a stream of texts."""

from __future__ import annotations

import itertools
import pickle

import datasets
import numpy as np
import pytest

from oracle.errors import InputTypeError, MissingFileError
from oracle.texts import TextsRejectedWarning
from surrogate.scoring.batch import ScoreBatch, stream_scores


def test_datasets_map_adds_the_scores_of_predict(predictor, predictor_folder, make_texts):
    texts = make_texts(50)
    mapped = datasets.Dataset.from_dict({"text": texts, "n": list(range(50))}).map(
        ScoreBatch(predictor_folder), batched=True, batch_size=16
    )
    expected = predictor.predict(texts)
    assert mapped.column_names == ["text", "n", "text_id", "score:math", "score:cooking", "score_error"]
    assert mapped["text_id"][:] == expected.text_ids and set(mapped["score_error"][:]) == {""}
    np.testing.assert_allclose(mapped["score:cooking"][:], np.asarray(expected)[:, 1], rtol=1e-5)


def test_a_bad_row_long_after_the_first_batches_fits_the_columns_that_were_written(predictor_folder, make_texts):
    rows = datasets.Dataset.from_dict({"text": [*make_texts(60), " "]})
    mapped = rows.map(ScoreBatch(predictor_folder), batched=True, batch_size=8, writer_batch_size=8)
    assert mapped["score_error"][-2:] == ["", "empty"] and mapped["text_id"][-1] == ""


def test_a_streamed_dataset_maps_too(predictor_folder, make_texts):
    stream = datasets.Dataset.from_dict({"text": make_texts(20)}).to_iterable_dataset()
    rows = list(stream.map(ScoreBatch(predictor_folder), batched=True, batch_size=8))
    assert len(rows) == 20 and all(np.isfinite(row["score:math"]) for row in rows)


def test_rows_that_cannot_be_scored_keep_their_place(predictor_folder):
    found = ScoreBatch(predictor_folder)({"text": np.array(["salt", None, "", "salt"], dtype=object)})
    assert found["score_error"] == ["", "missing", "empty", ""]
    assert np.isnan(found["score:math"]).tolist() == [False, True, True, False]
    assert found["text_id"][0] == found["text_id"][3] and found["text_id"][1] == ""
    assert found["score:math"][0] == found["score:math"][3]


def test_arrays_of_ray_and_nested_columns(predictor_folder):
    chat = [{"role": "user", "content": "sum"}, {"role": "assistant", "content": "proof"}]
    nested = np.empty(1, dtype=object)
    nested[0] = np.array(chat, dtype=object)
    plain = ScoreBatch(predictor_folder)({"messages": [chat]})
    assert ScoreBatch(predictor_folder)({"messages": nested})["text_id"] == plain["text_id"]
    dotted = ScoreBatch(predictor_folder, text_column="data.text")({"data": [{"text": "salt"}]})
    assert dotted["text_id"] == ScoreBatch(predictor_folder)({"text": ["salt"]})["text_id"]
    assert ScoreBatch(predictor_folder)({"text": []})["text_id"] == []


def test_it_is_pickled_by_the_path_of_the_predictor(predictor, predictor_folder, network_folder, make_texts):
    batch = ScoreBatch(predictor_folder)
    batch({"text": make_texts(3)})
    data = pickle.dumps(batch)
    assert len(data) < 2000
    assert pickle.loads(data)({"text": ["salt"]})["score:math"] == batch({"text": ["salt"]})["score:math"]
    hasher = datasets.fingerprint.Hasher
    assert hasher.hash(batch) == hasher.hash(ScoreBatch(predictor_folder)) != hasher.hash(ScoreBatch(network_folder))
    with pytest.raises(InputTypeError, match="save it first"):
        ScoreBatch(predictor)
    with pytest.raises(MissingFileError):
        ScoreBatch("nowhere")


def test_a_stream_is_scored_block_by_block(predictor, make_texts):
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield {"body": f"text {number} sum"} if number % 2 else f"text {number} salt"

    blocks = stream_scores(predictor, endless(), text_column="body", batch_rows=10)
    first = next(blocks)
    assert len(taken) == 10 and first.shape == (10, 2)
    expected = predictor.predict([f"text {number} " + ("sum" if number % 2 else "salt") for number in range(10)])
    assert first.text_ids == expected.text_ids
    np.testing.assert_allclose(np.asarray(first), np.asarray(expected), rtol=1e-5)


def test_a_stream_counts_what_it_leaves_out(predictor, network_folder):
    with pytest.warns(TextsRejectedWarning, match="dropped 2 of 4 texts: 2 empty"):
        blocks = list(stream_scores(predictor, ["salt", "", " ", "sum"], batch_rows=2))
    assert [len(block) for block in blocks] == [1, 1]
    (block,) = stream_scores(network_folder, ["salt"])
    assert block.shape == (1, 2)  # spreads are no scores
