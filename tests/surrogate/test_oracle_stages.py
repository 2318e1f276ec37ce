"""`surrogate calibrate` and `surrogate judge` on a tiny checkpoint, in this process."""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np
import pytest
import torch

import oracle
from oracle.methods import Measured, self_rating
from surrogate import cli, cli_options, corpora
from surrogate.oracle_stages import LABEL_OPTIONS
from surrogate.training.small_models import build_model, train_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pool file, a target file, and a checkpoint with and without its optimiser."""
    folder = tmp_path_factory.mktemp("world")
    corpus = corpora.load("skills", num_texts=120)
    rows = [{"text": row["text"], "source": row["source"]} for row in corpus.pool]
    target = [{"text": text} for text in next(iter(corpus.targets.values()))["text"][:8]]
    for name, texts in (("pool", rows), ("target", target)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    tokenizer = train_tokenizer(corpus.pool["text"], vocabulary_size=320)
    module = build_model("llama", vocabulary_size=320, width=16, num_layers=1, num_heads=2, context=128)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for text in corpus.pool["text"][:6]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        module(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, own in (("model", optimizer), ("bare", None)):
        oracle.LanguageModel(module, tokenizer, own, max_tokens=128).save(folder / name)
    return folder


@pytest.fixture
def command(world, capsys, monkeypatch):
    """Run the command line; return the JSON of its last stdout line and what it wrote to stderr."""

    def run(name, folder, *more, model="model", ok=0):
        given = ["--pool", world / "pool.jsonl", "--target", f"skill={world / 'target.jsonl'}", "--model", world / model]
        monkeypatch.setattr(sys, "argv", ["surrogate", name, str(folder), *map(str, given), *map(str, more)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output, errors = capsys.readouterr()
        assert (ended.value.code or 0) == ok, errors
        return json.loads(output.strip().splitlines()[-1]), errors

    return run


CALIBRATE = ("--methods", "grad_dot,less", "--num-texts", 24, "--groups", "source")


def test_calibrate_compares_methods_with_real_steps_and_goes_on_where_it_was(command, world, tmp_path, monkeypatch):
    found, table = command("calibrate", tmp_path / "run", *CALIBRATE, "--option", "max_grad_norm=1.0")
    assert list(found["methods"]) == ["one_step", "grad_dot", "less"] and found["num_texts"] == 24
    slope = found["methods"]["grad_dot"]["targets"]["skill"]
    assert slope["num_texts"] == 24 and slope["spearman"] > 0.5
    assert found["cost"]["seconds"] > 0 and found["pool"] == 120
    lines = [line for line in table.splitlines() if line.split()[:1] in (["method"], ["one_step"], ["grad_dot"])]
    assert len(lines) == 3 and "within group" in lines[0]
    identity = json.loads((tmp_path / "run" / "calibration" / "one_step" / "meta.json").read_text())
    assert "1.0" in json.dumps(identity)
    monkeypatch.setattr(torch.optim.AdamW, "step", None)  # nothing is measured again
    assert command("calibrate", tmp_path / "run", *CALIBRATE, "--option", "max_grad_norm=1.0")[0] == found
    assert json.loads((tmp_path / "run" / "cost.json").read_text())["calibration"] == found["cost"]


JUDGE = ("--num-texts", 20, "--subsets", 4, "--target-texts", 6)


def test_judge_retrains_and_goes_on_where_it_was(command, tmp_path, monkeypatch):
    found, table = command("judge", tmp_path / "run", *JUDGE, "--methods", "grad_dot")
    verdict = found["methods"]["grad_dot"]
    assert set(verdict["lds"]) == {"skill"} and set(verdict["removal"]["skill"]) == {"top", "bottom"}
    assert verdict["same_checkpoint"] and verdict["same_target_texts"]
    assert found["settings"]["num_texts"] == 20 and found["settings"]["target_texts"] == {"skill": 6}
    assert found["cost"]["num_trained_now"] == found["cost"]["num_models"] > 4
    assert "lds" in table and "removal of top" in table
    monkeypatch.setattr(torch.optim.AdamW, "step", None)
    again = command("judge", tmp_path / "run", *JUDGE, "--methods", "grad_dot")[0]
    assert again["methods"] == found["methods"] and again["cost"]["num_trained_now"] == 0
    scores = command("judge", tmp_path / "run", *JUDGE, "--share", 0)[0]
    assert scores["methods"]["grad_dot"]["lds"] == verdict["lds"] and scores["methods"]["grad_dot"]["removal"] == {}


@pytest.mark.parametrize("name", ["calibrate", "judge"])
def test_what_cannot_be_measured_is_refused_and_the_folder_left_free(name, command, tmp_path):
    run = tmp_path / "run"
    bare, _ = command(name, run, model="bare", ok=1)
    assert f"{name} needs the optimiser" in bare["given"] and "checkpoint folder that has its optimiser" in bare["accepted"]
    unknown, _ = command(name, run, "--methods", "grad_dot,graddot", ok=1)
    assert "methods='graddot'" in unknown["given"] and "did you mean" in unknown["given"]
    twice, _ = command(name, run, "--methods", "grad_dot,grad_dot", ok=1)
    assert "twice" in twice["given"]
    no_model, _ = command(name, run, model="nothing", ok=1)
    assert no_model["refused"]
    few, _ = command(name, run, "--num-texts", 0, ok=1)
    assert "num_texts=0" in few["given"]
    assert not run.exists()


def test_options_of_the_reference_and_groups_are_checked(command, tmp_path):
    refused, _ = command("calibrate", tmp_path / "run", "--option", "similarity=cosine", ok=1)
    assert "no option of 'one_step'" in refused["given"]
    reference, _ = command("calibrate", tmp_path / "run", "--methods", "one_step", ok=1)
    assert "'one_step' is among" in reference["given"]
    column, _ = command("calibrate", tmp_path / "run", "--groups", "kind", ok=1)
    assert "no column 'kind'" in column["given"] and "source" in column["accepted"]


def test_methods_are_given_with_options_of_their_own_and_tried_before_any_measures(command, world, tmp_path):
    run = tmp_path / "run"
    written = f"grad_dot:max_grad_norm=None,statistics=False,rollout:companions={world / 'pool.jsonl'},num_steps=1"
    found, table = command("calibrate", run, "--methods", written, "--num-texts", 8, "--option", "max_grad_norm=1.0")
    slope, rollout = list(found["methods"])[1:]
    assert found["methods"][slope]["options"]["max_grad_norm"] is None
    assert found["methods"][rollout]["options"]["max_grad_norm"] == 1.0 and f"{rollout}: max_grad_norm=1.0 as one_step" in table
    for name in ("calibrate", "judge"):
        other = tmp_path / name
        refused, _ = command(name, other, "--methods", "grad_dot,ekfac", ok=1)
        assert "neither factors nor texts" in refused["given"] and not other.exists()
        option, _ = command(name, other, "--methods", "grad_dot:statistic=True", ok=1)
        assert "did you mean 'statistics'" in option["given"] and not other.exists()


def test_judge_takes_methods_with_options_and_methods_without_targets(command, tmp_path, monkeypatch):
    monkeypatch.setattr(self_rating.SelfRating, "prepare", lambda self, lm, columns: None)
    monkeypatch.setattr(self_rating.SelfRating, "measure", _rate)
    monkeypatch.setattr(self_rating.SelfRating, "facts", lambda self: {})
    monkeypatch.setattr(self_rating.SelfRating, "flops", lambda self, num_tokens, columns: 0.0)
    monkeypatch.setattr(self_rating.SelfRating, "prepare_flops", lambda self, columns: 0.0)
    methods = "grad_dot:similarity=cosine,self_rating,grad_dot"
    found, _ = command("judge", tmp_path / "run", *JUDGE, "--share", 0, "--methods", methods)
    assert set(found["methods"]) == {"grad_dot:similarity=cosine", "self_rating", "grad_dot"}
    assert found["methods"]["grad_dot"]["lds"]["skill"]["low"] is None  # 4 subsets
    stored = [json.loads(path.read_text()) for path in (tmp_path / "run" / "judge" / "labels").glob("grad_dot*/meta.json")]
    assert {meta["options"]["similarity"] for meta in stored} == {"dot", "cosine"}


def _rate(self, encoded):
    values = np.arange(len(encoded), dtype=float)[:, None]
    return Measured(values, np.full((2, *values.shape), np.nan))


def test_a_number_of_target_texts_is_refused_by_its_own_name(command, tmp_path):
    for name in ("label", "calibrate"):
        refused, _ = command(name, tmp_path / "run", "--option", "max_target_texts=0", ok=1)
        assert refused["given"].startswith("max_target_texts=0") and not (tmp_path / "run").exists()


def test_false_on_the_command_line_is_off(command, tmp_path):
    few = ("--sample-size", 4, "--option")
    command("label", tmp_path / "off", *few, "statistics=False")
    meta = json.loads((tmp_path / "off" / "labels" / "meta.json").read_text())
    assert meta["options"]["statistics"] is False
    refused, _ = command("label", tmp_path / "odd", *few, "statistics=of", ok=1)
    assert "statistics='of'" in refused["given"]


def test_methods_prints_text_for_people_and_json_last(capsys, monkeypatch):
    def run(*given):
        monkeypatch.setattr(sys, "argv", ["surrogate", "methods", *given])
        with pytest.raises(SystemExit):
            cli.main()
        output, text = capsys.readouterr()
        return json.loads(output.splitlines()[-1]), text

    everything, overview = run()
    assert len(everything) == 5 and "  one_step " in overview and "max_grad_norm" not in overview
    one, text = run("target_similarity")
    assert list(one) == ["oracle methods", "strategies"] and all(len(rows) == 1 for rows in one.values())
    assert "Paper: " in text and "Limit: " in text and "rank_value ('log2'): " in text
    assert max(map(len, text.splitlines()[1:])) < 200
    assert "did you mean 'grad_dot'" in run("graddot")[0]["given"]


@pytest.mark.parametrize("name", ["max_target_texts", "per", "halves", "block_size"])
def test_the_help_of_label_names_what_option_takes(name):
    assert name in LABEL_OPTIONS and f"{name}=" in cli_options.LABEL_HELP
