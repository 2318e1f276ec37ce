"""Selecting from a scored corpus on the command line: fidelity is looked for, and what is printed is JSON."""

import json

import numpy as np
import pytest

from oracle.errors import InputError, LowFidelityError, MismatchError
from oracle.labels import Labels
from surrogate.scoring.corpus import score_corpus
from surrogate.scoring.select_command import find_fidelity, select_corpus_stage


@pytest.fixture
def corpus(make_jsonl, make_texts, predictor, tmp_path):
    make_jsonl(tmp_path / "pool" / "a.jsonl", [{"text": text, "num_tokens": len(text)} for text in make_texts(30)])
    score_corpus(predictor, tmp_path / "pool", tmp_path / "scored", columns=["num_tokens"], workers=0)
    return tmp_path / "scored"


def test_the_summary_of_a_selection(corpus, tmp_path):
    found = select_corpus_stage(corpus, None, {"tokens": 500, "texts": None}, options=["combine=math"], texts=True)
    assert json.loads(json.dumps(found)) == found
    assert found["selection"] == str(tmp_path / "scored-selection") and 400 < found["num_tokens"] <= 500
    assert found["counts"]["selected"] == found["num_texts"] and (tmp_path / "scored-selection" / "texts").is_dir()


def test_labels_threshold_and_similarity_are_handed_on(corpus, tmp_path):
    chosen = select_corpus_stage(corpus, tmp_path / "all", {}, min_score=-1e9, options=["combine=math"])
    assert chosen["num_texts"] == 30
    alike = {"max_similarity": 0.1, "similarity_encoder": "hashed_ngrams:dim=64"}
    few = select_corpus_stage(corpus, tmp_path / "few", {"fraction": 1.0}, options=["combine=math"], **alike)
    assert few["counts"]["near_duplicates"] == 30 - few["num_texts"] > 20
    text_id = find_ids(corpus)[7]
    Labels.from_values(np.full((1, 2), 99.0), [text_id], ["math", "cooking"]).save(tmp_path / "labels")
    best = select_corpus_stage(corpus, tmp_path / "best", {"texts": 1}, options=["combine=math"], labels=tmp_path / "labels")
    assert best["counts"]["by_label"] == 1
    with pytest.raises(InputError, match="no effect alone"):
        select_corpus_stage(corpus, tmp_path / "x", {"texts": 1}, similarity_encoder="sentence")
    with pytest.raises(InputError, match="exactly one of"):
        select_corpus_stage(corpus, tmp_path / "x", {})


def find_ids(corpus):
    from surrogate.scoring.scored_corpus import ScoredCorpus

    return ScoredCorpus(corpus).scores().text_ids


def test_fidelity_is_that_of_the_predictor_that_made_the_scores(corpus, tmp_path, network_folder, predictor, monkeypatch):
    from surrogate.scoring.scored_corpus import ScoredCorpus

    scored = ScoredCorpus(corpus)
    assert find_fidelity(scored, None).as_dict() == predictor.fidelity_.as_dict()
    with pytest.raises(MismatchError, match="not of the predictor"):
        find_fidelity(scored, network_folder)
    monkeypatch.setattr("surrogate.fidelity.Fidelity.targets_at_chance", lambda self: ["math"])
    with pytest.raises(LowFidelityError, match="math"):
        select_corpus_stage(corpus, tmp_path / "chosen", {"texts": 3})
    assert select_corpus_stage(corpus, tmp_path / "chosen", {"texts": 3}, allow_low_fidelity=True)["targets_at_chance"] == [
        "math"
    ]
    (corpus / "predictor" / "predictor.json").unlink()
    with pytest.warns(UserWarning, match="fidelity is not checked"):
        assert find_fidelity(scored, None) is None
    predictor.save(tmp_path / "predictors" / "ridge")  # as in a run folder
    assert find_fidelity(scored, None) is not None
