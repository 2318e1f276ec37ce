"""What the command line says of a scored corpus."""

from __future__ import annotations

import json

import pytest

from oracle.errors import InputError
from surrogate.scoring.command import score_corpus_stage


def test_the_summary_and_its_exit_code(tmp_path, predictor_folder, make_jsonl):
    make_jsonl(tmp_path / "in" / "x.jsonl", [{"text": "salt"}])
    options = {"predictor": predictor_folder, "output": tmp_path / "out", "options": ["workers=0"]}
    clean = score_corpus_stage([str(tmp_path / "in")], **options)
    assert (clean["exit_code"], clean["num_scored"], clean["files_by_status"]) == (0, 1, {"done": 1})
    make_jsonl(tmp_path / "in" / "y.jsonl", [{"text": "salt"}, {"text": None}])
    (tmp_path / "in" / "z.parquet").write_text("broken")
    found = score_corpus_stage([str(tmp_path / "in")], **options)
    assert (found["exit_code"], found["num_bad"], list(found["faulty_files"])) == (3, 1, ["z.parquet"])
    assert json.loads(json.dumps(found)) == found


def test_predictor_or_run_and_an_output(tmp_path, predictor_folder):
    for options, message in (
        ({}, "either a predictor"),
        ({"predictor": predictor_folder, "run": tmp_path}, "either a predictor"),
        ({"predictor": predictor_folder, "surrogate": "trees"}, "has no effect"),
        ({"predictor": predictor_folder}, "no output folder"),
    ):
        with pytest.raises(InputError, match=message):
            score_corpus_stage(["x.jsonl"], **options)
