"""The example scripts run, refresh, and go on where they were."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from surrogate import corpora

FOLDER = Path(__file__).parents[2] / "examples"
SIZES = {"num_texts": 160, "every": 15, "sample_size": 30}


def load(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == {"plain_pytorch", "accelerate_loop", "huggingface_trainer"}


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
@pytest.mark.parametrize("name", ["plain_pytorch", "accelerate_loop", "huggingface_trainer"])
def test_an_example_runs_and_when_run_again_goes_on_at_its_checkpoint(name, tmp_path, capsys):
    example = load(name)
    example.main(tmp_path, max_steps=21, **SIZES)
    first = [json.loads(line) for line in (tmp_path / "influence/rounds.jsonl").read_text().splitlines()]
    assert [record["refreshed"] for record in first] == [True, True] and first[0]["num_texts"] == 15 * 8
    assert capsys.readouterr().out.count("influence/round") == 2
    example.main(tmp_path, max_steps=22, **SIZES)
    again = [json.loads(line) for line in (tmp_path / "influence/rounds.jsonl").read_text().splitlines()]
    assert again == first and "influence/round" not in capsys.readouterr().out  # resumed within the second round
