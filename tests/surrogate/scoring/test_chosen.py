"""The chosen rows of the inputs come out with all their columns, from parquet and from JSON whose types change."""

import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest

from oracle.errors import InputError, MismatchError
from surrogate.budget import Budget
from surrogate.scoring import scored_corpus
from surrogate.scoring.corpus import score_corpus
from surrogate.scoring.selecting import select_corpus


@pytest.fixture
def texts(make_texts):
    return make_texts(40)


def test_rows_of_parquet_and_json_come_with_their_columns_and_scores(
    texts, make_jsonl, make_parquet, predictor_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(scored_corpus, "BATCH_ROWS", 8)  # JSON has the types of its block
    rows = [{"text": text, "year": number if number < 8 else float(number) + 0.5} for number, text in enumerate(texts[:20])]
    make_jsonl(tmp_path / "pool" / "in" / "a.jsonl", rows)
    make_parquet(tmp_path / "pool" / "b.parquet", {"text": texts[20:], "tags": [[str(n)] * (n % 3) for n in range(20)]})
    scored = score_corpus(predictor_folder, tmp_path / "pool", tmp_path / "scored", workers=0)
    chosen = select_corpus(scored, tmp_path / "chosen", budget=Budget(texts=25), texts=True)
    wanted = {(row["file"], row["position"]): row["text_id"] for row in chosen.table().to_pylist()}
    found = {}
    for name, file in (("in/a.jsonl", "in/a.jsonl.parquet"), ("b.parquet", "b.parquet")):
        for row in pq.read_table(tmp_path / "chosen" / "texts" / file).to_pylist():
            found[name, row["position"]] = row["text_id"]
            own = texts.index(row["text"])
            assert own == row["position"] + (20 if name == "b.parquet" else 0)
            assert row["year"] == rows[own]["year"] if own < 20 else row["tags"] == [str(own - 20)] * ((own - 20) % 3)
            assert row["score:math"] == pytest.approx(float(np.asarray(scored.scores([row["text_id"]]))[0, 0]))
    assert found == wanted
    assert not [path for path in (tmp_path / "chosen").rglob("*") if "scratch" in path.name]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_chosen_rows(texts, make_jsonl, predictor_folder, tmp_path, streaming):
    for number in range(2):
        make_jsonl(tmp_path / "pool" / f"{number}.jsonl", [{"text": text} for text in texts[number::2]])
    scored = score_corpus(predictor_folder, tmp_path / "pool", tmp_path / "scored", workers=0)
    chosen = select_corpus(scored, tmp_path / "chosen", budget=Budget(fraction=0.5), texts=True)
    dataset = chosen.dataset(streaming=streaming)
    assert sorted(row["text_id"] for row in dataset) == sorted(chosen.text_ids) and len(chosen) == 20
    ids_only = select_corpus(scored, tmp_path / "ids", budget=Budget(fraction=0.5))
    with pytest.raises(InputError, match="texts=True"):
        ids_only.dataset()


def test_a_corpus_that_is_not_scored_to_its_end_is_refused(texts, make_jsonl, predictor_folder, tmp_path):
    for number in range(3):
        make_jsonl(tmp_path / "pool" / f"{number}.jsonl", [{"text": text} for text in texts[number::3]])
    scored = score_corpus(predictor_folder, tmp_path / "pool", tmp_path / "scored", rank=0, world_size=2, workers=0)
    with pytest.raises(InputError, match="1 files of the source"):
        select_corpus(scored, tmp_path / "chosen", budget=Budget(fraction=0.5))
    assert len(select_corpus(scored, tmp_path / "chosen", budget=Budget(fraction=0.5), allow_incomplete=True)) == 13


def test_a_selection_of_other_scores_is_refused(texts, make_jsonl, predictor_folder, tmp_path):
    """Also where the input kept its size and its number of rows."""
    path = make_jsonl(tmp_path / "a.jsonl", [{"text": f"{number} sum"} for number in range(5)])
    chosen = tmp_path / "chosen"
    for word in ("sum", "oil"):
        make_jsonl(path, [{"text": f"{number} {word}"} for number in range(5)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scored = score_corpus(predictor_folder, path, tmp_path / "scored", workers=0)
        if word == "oil":
            with pytest.raises(MismatchError, match="corpus: stored"):
                select_corpus(scored, chosen, budget=Budget(texts=2))
        else:
            assert len(select_corpus(scored, chosen, budget=Budget(texts=2))) == 2
    with pytest.raises(InputError, match="is a URL"):
        select_corpus(scored, "s3://bucket/chosen", budget=Budget(texts=2))
