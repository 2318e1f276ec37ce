"""The recall of a first pass is shown before anything is scored, and alone where no source is given."""

import json

import numpy as np
import pytest

import oracle
import surrogate
from oracle.errors import InputError
from oracle.labels import Labels
from surrogate.features.hashed_ngrams import HashedNgrams
from surrogate.scoring.cascade_command import cascade_stage


@pytest.fixture(scope="module")
def folders(make_texts, tmp_path_factory):
    """Folders of a cheap predictor, a full one and their labels."""
    folder = tmp_path_factory.mktemp("folders")
    texts = oracle.read_texts(make_texts(40, seed=7))
    labels = Labels.from_values(np.array([[float(text.count("sum"))] for text in texts["text"]]), texts["text_id"], ["math"])
    labels.save(folder / "labels")
    for name, dim in (("first", 8), ("full", 64)):
        surrogate.InfluencePredictor(HashedNgrams(dim=dim), "ridge", num_folds=2).fit(texts, labels).save(folder / name)
    return [folder / name for name in ("first", "full", "labels")]


def test_without_a_source_the_recall_of_several_shares_is_shown(folders, capsys):
    told = cascade_stage(*folders, top=0.25)
    assert [row["share"] for row in told["recall"]] == [0.3, 0.5]
    assert "first pass keeps" in capsys.readouterr().err and json.loads(json.dumps(told)) == told


def test_with_a_source_it_is_scored_in_two_passes(folders, make_texts, make_jsonl, tmp_path):
    make_jsonl(tmp_path / "pool" / "a.jsonl", [{"text": text} for text in make_texts(20)])
    source = [str(tmp_path / "pool")]
    with pytest.raises(InputError, match="no output folder"):
        cascade_stage(*folders, source=source, share=0.5, top=0.25)
    told = cascade_stage(*folders, source=source, output=tmp_path / "out", share=0.5, top=0.25, options=["workers=0"])
    assert told["num_scored"] == 10 and told["exit_code"] == 0 and (tmp_path / "out" / "cascade.json").exists()
