"""A cascade scores with the full predictor what the cheap one lets through, and tells beforehand what is lost."""

import json

import numpy as np
import pytest

import oracle
import surrogate
from oracle.errors import InputError, LowFidelityError, MismatchError
from oracle.labels import Labels
from surrogate.features.hashed_ngrams import HashedNgrams
from surrogate.scoring.cascade import score_cascade
from surrogate.scoring.cascade_recall import measure_recall
from surrogate.scoring.corpus import score_corpus

SHARE = {"share": 0.5, "top": 0.25}


@pytest.fixture(scope="module")
def labels(make_texts):
    texts = oracle.read_texts(make_texts(40, seed=7))
    values = np.array([[text.count("sum") - text.count("salt"), text.count("oven")] for text in texts["text"]], dtype=float)
    return Labels.from_values(values, texts["text_id"], ["math", "cooking"])


@pytest.fixture(scope="module")
def pair(make_texts, labels):
    """A cheap and a full predictor."""
    texts = oracle.read_texts(make_texts(40, seed=7))
    return [surrogate.InfluencePredictor(HashedNgrams(dim=dim), "ridge", num_folds=2).fit(texts, labels) for dim in (8, 64)]


@pytest.fixture(scope="module")
def source(make_jsonl, make_texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts(60)
    make_jsonl(folder / "a" / "x.jsonl", [{"text": text} for text in texts[:25]] + ["{broken"])
    make_jsonl(folder / "b" / "x.jsonl", [{"text": text} for text in texts[20:]] + [{"text": None}])
    return folder


def bytes_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}


def test_the_full_predictor_scores_the_best_share_and_nothing_else(pair, labels, source, tmp_path):
    scored = score_cascade(*pair, source, tmp_path / "out", labels=labels, workers=0, **SHARE)
    cheap, everything = (score_corpus(one, source, tmp_path / name, workers=0) for one, name in zip(pair, "ab", strict=True))
    chosen = surrogate.select(cheap.scores(), budget=surrogate.Budget(fraction=0.5)).text_ids
    assert len(chosen) == 30 and set(scored.scores().text_ids) == set(chosen)
    np.testing.assert_array_equal(np.asarray(scored.scores(chosen)), np.asarray(everything.scores(chosen)))
    for file in scored.files:  # rows keep their places in the input files
        kept, whole = (corpus.read(file.name).to_pylist() for corpus in (scored, everything))
        assert [row for row in whole if row in kept] == kept
    told = json.loads((tmp_path / "out" / "cascade.json").read_text())
    assert told["recall"] == [row.as_dict() for row in measure_recall(*pair, labels, shares=[0.5], top=0.25)]
    assert told["counts"]["pool"] == 60 and told["passes"]["full"]["num_scored"] == len(scored)
    assert told["passes"]["first"]["num_bad"] == 2 and told["passes"]["full"]["num_bad"] == 0  # the first has them


def test_a_second_run_changes_nothing_and_other_options_are_refused(pair, labels, source, tmp_path):
    given = {"labels": labels, "workers": 0, **SHARE}
    score_cascade(*pair, source, tmp_path / "out", **given)
    before = bytes_below(tmp_path / "out")
    again = score_cascade(*pair, source, tmp_path / "out", **given)
    assert bytes_below(tmp_path / "out") == before and again.manifest["runs"][-1]["num_rows"] == 0
    with pytest.raises(MismatchError, match="share"):
        score_cascade(*pair, source, tmp_path / "out", **{**given, "share": 0.6})


def test_with_a_share_of_1_the_scores_are_those_of_the_full_predictor_alone(pair, labels, source, tmp_path):
    scored = score_cascade(*pair, source, tmp_path / "out", labels=labels, share=1.0, top=0.25, workers=0)
    alone = score_corpus(pair[1], source, tmp_path / "alone", workers=0)
    ids = alone.scores().text_ids
    np.testing.assert_array_equal(np.asarray(scored.scores(ids)), np.asarray(alone.scores(ids)))


def test_a_recall_that_is_too_low_is_refused_before_anything_is_scored(pair, labels, source, tmp_path):
    recall = measure_recall(*pair, labels, shares=[0.5], top=0.25)[0].recall
    assert recall < 1
    with pytest.raises(LowFidelityError, match=f"lets through {recall:.2f} of the best 0.25"):
        score_cascade(*pair, source, tmp_path / "out", labels=labels, min_recall=recall + 1e-9, workers=0, **SHARE)
    assert not (tmp_path / "out" / "first").exists()
    with pytest.raises(InputError, match="no more can be selected"):
        score_cascade(*pair, source, tmp_path / "out", labels=labels, share=0.1, top=0.2)
    with pytest.raises(InputError, match="inside the source"):
        score_cascade(*pair, source, source / "out", labels=labels, **SHARE)
