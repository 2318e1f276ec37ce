"""The example scripts run: trainings refresh and go on where they were, scores are those of the command line."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pyarrow.dataset
import pytest

from surrogate import InfluencePredictor, corpora

FOLDER = Path(__file__).parents[2] / "examples"
TRAININGS = ["plain_pytorch", "accelerate_loop", "huggingface_trainer"]
SCORINGS = ["score_with_datasets", "score_with_ray_data"]
SIZES = {"num_texts": 160, "every": 15, "sample_size": 30}


def load(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*TRAININGS, *SCORINGS}


@pytest.fixture(scope="module")
def corpus():
    return corpora.load("python_library", num_texts=SIZES["num_texts"])  # read once, which takes longer than a training


@pytest.fixture
def reads_once(corpus, monkeypatch):
    def load_corpus(name, *, num_texts):
        assert (name, num_texts) == ("python_library", SIZES["num_texts"])
        return corpus

    monkeypatch.setattr(corpora, "load", load_corpus)


@pytest.mark.slow
@pytest.mark.usefixtures("reads_once")
@pytest.mark.parametrize("name", TRAININGS)
def test_an_example_runs_and_when_run_again_goes_on_at_its_checkpoint(name, tmp_path, capsys):
    example = load(name)
    example.main(tmp_path, max_steps=21, **SIZES)
    first = [json.loads(line) for line in (tmp_path / "influence/rounds.jsonl").read_text().splitlines()]
    assert [record["refreshed"] for record in first] == [True, True] and first[0]["num_texts"] == 15 * 8
    assert capsys.readouterr().out.count("influence/round") == 2
    example.main(tmp_path, max_steps=22, **SIZES)
    again = [json.loads(line) for line in (tmp_path / "influence/rounds.jsonl").read_text().splitlines()]
    assert again == first and "influence/round" not in capsys.readouterr().out  # resumed within the second round


@pytest.fixture(scope="module")
def scored(corpus, tmp_path_factory):
    """The folder in which the example with `datasets` has run, and the best fifth that it returned."""
    folder = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "load", lambda name, *, num_texts: corpus)
        best = load("score_with_datasets").main(folder, num_texts=SIZES["num_texts"], sample_size=30)
    return folder, best


def test_the_best_fifth_of_the_datasets_example_is_that_of_predict(scored, corpus):
    folder, best = scored
    scores = InfluencePredictor.load(folder / "predictor").predict(corpus.pool)
    expected = dict(zip(scores.text_ids, scores[:, 0].tolist(), strict=True))
    assert len(best) == len(corpus.pool) // 5 == pyarrow.dataset.dataset(folder / "best.parquet").count_rows()
    assert best["score:documentation"][:] == sorted(best["score:documentation"], reverse=True)
    assert best["score:documentation"][:] == pytest.approx([expected[text_id] for text_id in best["text_id"]], rel=1e-5)
    assert best["score:documentation"][0] == pytest.approx(max(expected.values()), rel=1e-5)


@pytest.mark.slow
def test_the_ray_data_example_gives_each_row_once_with_the_scores_of_the_other_example(scored, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # no token in the home folder
    folder, best = scored
    (tmp_path / "corpus").mkdir()
    best.select_columns(["text", "kind"]).to_parquet(tmp_path / "corpus/best.parquet")
    example = load("score_with_ray_data")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
    try:
        output = example.main(folder / "predictor", tmp_path / "corpus", tmp_path / "output")
        with pytest.raises(FileExistsError):
            example.main(folder / "predictor", tmp_path / "corpus", output)
    finally:
        ray.shutdown()
    rows = pyarrow.dataset.dataset(output).to_table(columns=["text", "kind", "text_id", "score:documentation"]).to_pylist()
    assert sorted(row["text_id"] for row in rows) == sorted(best["text_id"])
    expected = dict(zip(best["text_id"], best["score:documentation"], strict=True))
    assert all(row["score:documentation"] == pytest.approx(expected[row["text_id"]], rel=1e-5) for row in rows)


def test_the_ray_data_example_says_that_ray_must_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r"needs Ray, .* pip install 'influence-surrogate\[ray\]'"):
        load("score_with_ray_data")
