"""`surrogate score --source`, `surrogate select --corpus` and `surrogate cascade` as typed on the command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from oracle.errors import InputError
from surrogate.cli import app


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
    "arguments", [["score"], ["score", "run", "--output", "x"], ["select", "run", "--min-score", "1"], ["select"]]
)
def test_options_of_a_corpus_without_one_are_refused(arguments):
    with pytest.raises(InputError, match="a run folder alone, or a corpus"):
        _run(*arguments)
