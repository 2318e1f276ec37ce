"""What the commands for corpora hand on and print: scoring, selecting, the cascade; as functions and as typed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import oracle
import surrogate
from oracle.errors import InputError, LowFidelityError, MismatchError, MissingFileError
from oracle.labels import Labels
from surrogate.cli import app
from surrogate.features.hashed_ngrams import HashedNgrams
from surrogate.scoring.commands import cascade_stage, find_fidelity, score_corpus_stage, select_corpus_stage
from surrogate.scoring.corpus import score_corpus
from surrogate.scoring.scored_corpus import ScoredCorpus


def test_the_summary_and_its_exit_code(tmp_path, predictor_folder, make_jsonl, capsys):
    make_jsonl(tmp_path / "in" / "x.jsonl", [{"text": "salt"}])
    options = {"predictor": predictor_folder, "output": tmp_path / "out", "options": ["workers=0"]}
    clean = score_corpus_stage([str(tmp_path / "in")], **options)
    assert (clean["exit_code"], clean["num_scored"], clean["files_by_status"]) == (0, 1, {"done": 1})
    make_jsonl(tmp_path / "in" / "y.jsonl", [{"text": "salt"}, {"text": None}])
    (tmp_path / "in" / "z.parquet").write_text("broken")
    found = score_corpus_stage([str(tmp_path / "in")], **options)
    assert (found["exit_code"], found["num_bad"], list(found["faulty_files"])) == (3, 1, ["z.parquet"])
    assert json.loads(json.dumps(found)) == found
    assert found["predictor"] == str(predictor_folder) and found["num_ignored"] == 0
    assert "put aside: 1 rows and 1 files; see" in capsys.readouterr().err
    (tmp_path / "in" / "x.jsonl").rename(tmp_path / "in" / "x.txt")
    score_corpus_stage([str(tmp_path / "in")], **options)
    words = capsys.readouterr().err
    assert "there was nothing left to do" in words and "1 files that were scored before are not in this source" in words


def test_predictor_or_run_and_an_output(tmp_path, predictor_folder):
    for options, message in (
        ({}, "either a predictor"),
        ({"predictor": predictor_folder, "run": tmp_path}, "either a predictor"),
        ({"predictor": predictor_folder, "surrogate": "trees"}, "has no effect"),
        ({"predictor": predictor_folder}, "no output folder"),
    ):
        with pytest.raises(InputError, match=message):
            score_corpus_stage(["x.jsonl"], **options)


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
    return ScoredCorpus(corpus).scores().text_ids


def test_near_duplicates_are_told_and_a_moved_input_is_named(corpus, tmp_path, capsys):
    encoder = "hashed_ngrams:dim=16,word_ngrams=1"
    found = select_corpus_stage(corpus, tmp_path / "few", {"texts": 20}, max_similarity=0.5, similarity_encoder=encoder)
    assert f"{20 - found['num_texts']} chosen texts were near-duplicates" in capsys.readouterr().err
    (tmp_path / "pool").rename(tmp_path / "moved")
    with pytest.raises(MissingFileError, match=r"the input .*pool/a\.jsonl is not there any more"):
        select_corpus_stage(corpus, tmp_path / "rows", {"texts": 3}, texts=True)
    assert not (tmp_path / "rows").exists()
    assert len(surrogate.select_corpus(corpus, tmp_path / "ids", budget=surrogate.Budget(texts=3))) == 3


def test_fidelity_is_that_of_the_predictor_that_made_the_scores(corpus, tmp_path, network_folder, predictor, monkeypatch):
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
    predictor.save(tmp_path / "elsewhere")
    score_corpus(tmp_path / "elsewhere", tmp_path / "pool", corpus, columns=["num_tokens"], workers=0)
    (corpus / "predictor" / "predictor.json").unlink()
    assert find_fidelity(scored, None) is not None  # the manifest says where it was
    (tmp_path / "elsewhere" / "predictor.json").unlink()
    with pytest.warns(UserWarning, match=r"fidelity is not checked; give --predictor"):
        assert find_fidelity(scored, None) is None
    predictor.save(tmp_path / "predictors" / "ridge")  # as in a run folder
    assert find_fidelity(scored, None) is not None


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
    with pytest.raises(InputError, match=r"a cascade that let through 0\.5"):
        select_corpus_stage(tmp_path / "out", tmp_path / "chosen", {"fraction": 0.6})
    chosen = select_corpus_stage(tmp_path / "out", tmp_path / "chosen", {"fraction": 0.2}, allow_low_fidelity=True)
    assert chosen["num_texts"] == 4  # of the 20, not of the 10 that the full predictor saw


def test_rows_that_the_first_pass_puts_aside_are_told(folders, make_texts, make_jsonl, tmp_path):
    make_jsonl(tmp_path / "pool" / "a.jsonl", [*({"text": text} for text in make_texts(20)), {"text": " "}])
    told = cascade_stage(
        *folders, source=[str(tmp_path / "pool")], output=tmp_path / "out", share=0.5, top=0.25, options=["workers=0"]
    )
    assert told["exit_code"] == 3 and told["first_pass"]["bad_reasons"] == {"empty": 1}
    with pytest.raises(InputError, match="holds other things: pool, wrong"):
        (tmp_path / "other" / "pool").mkdir(parents=True)
        (tmp_path / "other" / "wrong").touch()
        cascade_stage(*folders, source=[str(tmp_path / "pool")], output=tmp_path / "other", share=0.5, top=0.25)


def _run(*arguments):
    answer = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return answer.exit_code, json.loads(answer.stdout.splitlines()[-1])


def test_a_corpus_is_scored_and_selected_from(tmp_path, predictor_folder, make_jsonl, make_texts):
    make_jsonl(tmp_path / "in" / "x.jsonl", [*({"text": text} for text in make_texts(20)), "no JSON"])
    scored, chosen = tmp_path / "scored", tmp_path / "chosen"
    code, summary = _run(
        "score", "--source", tmp_path / "in", "--predictor", predictor_folder, "--output", scored, "--option", "workers=0"
    )
    assert (code, summary["num_scored"], summary["num_bad"]) == (3, 20, 1)
    options = ("--texts", 5, "--predictor", predictor_folder, "--allow-low-fidelity", "--output", chosen, "--write-texts")
    code, selection = _run("select", "--corpus", scored, *options)
    assert (code, selection["num_texts"], selection["counts"]["pool"]) == (0, 5, 20)
    assert chosen.is_dir()


def test_a_cascade_needs_the_labels_that_its_recall_is_measured_on(tmp_path, predictor_folder, network_folder):
    with pytest.raises(InputError, match="no complete labels"):
        _run("cascade", predictor_folder, network_folder, tmp_path / "labels")


@pytest.mark.parametrize(
    "arguments",
    [
        ["score"],
        ["score", "run", "--output", "x"],
        ["score", "run", "--text-column", "x"],
        ["select", "run", "--min-score", "1"],
        ["select", "run", "--write-texts"],
        ["select"],
    ],
)
def test_options_of_a_corpus_without_one_are_refused(arguments):
    with pytest.raises(InputError, match="a run folder alone, or a corpus"):
        _run(*arguments)
