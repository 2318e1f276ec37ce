"""The run folder and the command line over it, with a tiny model and generated texts."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import oracle
import surrogate
from oracle.errors import InputError, MismatchError, MissingFileError
from surrogate import corpora
from surrogate.pipeline import Run
from surrogate.training.small_models import build_model, train_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pool file, a target file and a checkpoint on disk."""
    folder = tmp_path_factory.mktemp("world")
    corpus = corpora.load("skills", num_texts=240)
    pool = folder / "pool.jsonl"
    pool.write_text("".join(json.dumps({"text": row["text"], "source": row["source"]}) + "\n" for row in corpus.pool))
    name, target = next(iter(corpus.targets.items()))
    (folder / "target.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in target["text"]))
    tokenizer = train_tokenizer(corpus.pool["text"], vocabulary_size=320)
    module = build_model("llama", vocabulary_size=320, width=16, num_layers=1, num_heads=2, context=128)
    oracle.LanguageModel(module, tokenizer, max_tokens=128).save(folder / "model")
    return {
        "folder": folder,
        "pool": str(pool),
        "target": str(folder / "target.jsonl"),
        "model": str(folder / "model"),
        "name": name,
    }


def command(*arguments, ok=0):
    """Run the command line in this interpreter's environment; return the JSON of its last stdout line."""
    answer = subprocess.run(
        [sys.executable, "-m", "surrogate", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert answer.returncode == ok, answer.stderr[-3000:]
    return json.loads(answer.stdout.strip().splitlines()[-1]) if answer.stdout.strip() else answer.stderr


@pytest.mark.slow
def test_the_commands_lead_from_a_pool_to_a_selection(world, tmp_path):
    run = tmp_path / "run"
    labelled = command(
        "label",
        run,
        "--pool",
        world["pool"],
        "--target",
        f"skill={world['target']}",
        "--model",
        world["model"],
        "--sample-size",
        60,
        "--max-tokens",
        128,
    )
    assert labelled["labelled"] == 60 and labelled["pool"] == 240 and set(labelled["noise_ceiling"]) == {"skill"}
    assert command("embed", run)["num_texts"] == 240
    fitted = command("fit", run, "--surrogate", "ridge")
    assert fitted["fidelity"]["surrogate"][0]["target"] == "skill"
    assert command("score", run)["num_texts"] == 240
    selected = command("select", run, "--fraction", 0.2, "--allow-low-fidelity")
    assert selected["num_texts"] == 48 and selected["num_tokens"] > 0
    kept = oracle.read_texts(str(run / "selection" / "texts.parquet"))
    assert list(kept["text_id"]) == surrogate.Selection.load(run / "selection").text_ids
    tokens = command("select", run, "--tokens", 500, "--rule", "softmax", "--option", "temperature=0.5", "--allow-low-fidelity")
    assert tokens["num_tokens"] <= 500
    again = command(
        "label", run, "--target", f"skill={world['target']}", "--model", world["model"], "--sample-size", 60, "--max-tokens", 128
    )
    assert again["labels"] == labelled["labels"]


def test_refusals_exit_with_1_and_a_reason_and_wrong_usage_with_2(world, tmp_path):
    refused = command("embed", tmp_path / "run", "--pool", tmp_path / "nothing.jsonl", ok=1)
    assert refused["refused"] == "MissingFileError" and refused["given"] and refused["accepted"] and refused["to_do"]
    assert command("select", tmp_path / "empty", "--fraction", 0.2, ok=1)["refused"] == "MissingFileError"
    command("select", tmp_path / "run", "--no-such-option", 1, ok=2)
    command("no-such-command", ok=2)


def test_methods_lists_every_plugin_with_its_options():
    listed = command("methods")
    assert {row["name"] for row in listed["oracle methods"]} >= {"one_step", "grad_dot"}
    assert {row["name"] for row in listed["rules"]} >= {"top", "softmax", "random"}
    assert all("help" in option for row in listed["encoders"] for option in row["options"])


def test_a_larger_sample_contains_the_smaller_and_does_not_depend_on_the_files_order(world, tmp_path):
    run = Run(tmp_path / "a")
    run.set_pool(world["pool"])
    rows = oracle.read_texts(world["pool"])
    other = Run(tmp_path / "b")
    other.set_pool(rows.select(range(len(rows) - 1, -1, -1)))
    small, large = run.sample(20, seed=1)["text_id"], run.sample(50, seed=1)["text_id"]
    assert list(small) == list(large)[:20] == list(other.sample(20, seed=1)["text_id"])
    assert set(small) != set(run.sample(20, seed=2)["text_id"])
    with pytest.raises(InputError, match="240 texts"):
        run.sample(241)


def test_another_pool_is_refused_and_the_first_kept(world, tmp_path):
    run = Run(tmp_path)
    run.set_pool(world["pool"])
    run.set_pool(world["pool"])
    with pytest.raises(MismatchError, match="num_texts: stored 240, asked 2"):
        run.set_pool(["another text", "and one more"])
    assert len(Run(tmp_path).pool()) == 240


def test_stages_in_the_wrong_order_say_which_comes_first(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(MissingFileError, match="--pool"):
        run.pool()
    with pytest.raises(MissingFileError, match="no complete labels"):
        run.fit(surrogate="ridge")
    with pytest.raises(MissingFileError, match="fit"):
        run.score()


def test_a_finished_stage_is_read_and_a_changed_one_done_again(world, tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.set_pool(world["pool"])
    lm = oracle.LanguageModel.from_pretrained(world["model"], max_tokens=128)
    run.label(lm, {"skill": world["target"]}, sample_size=40)
    first = run.fit(surrogate="ridge", lm=lm)
    scores = run.score("ridge", lm=lm)
    monkeypatch.setattr(surrogate.InfluencePredictor, "fit", None)
    assert run.fit(surrogate="ridge", lm=lm).fidelity_.as_dict() == first.fidelity_.as_dict()
    assert np.asarray(run.score("ridge", lm=lm)).tobytes() == np.asarray(scores).tobytes()
    costs = run.costs()
    assert costs["labels"]["flops"] > 0 and costs["labels"]["num_texts"] == 40
    assert {"fit ridge", "score", "features hashed_ngrams", "features text_stats"} <= set(costs)
    run.label(lm, {"skill": world["target"]}, sample_size=40)
    assert run.costs()["labels"] == costs["labels"]  # looking at finished labels costs nothing
    with pytest.raises(TypeError):
        run.fit(surrogate="ridge:alpha=3.0", lm=lm)  # another option: not the finished one


def test_model_state_by_name_gets_the_runs_own_model_and_targets(world, tmp_path):
    run = Run(tmp_path)
    run.set_pool(world["pool"])
    lm = oracle.LanguageModel.from_pretrained(world["model"], max_tokens=128)
    run.label(lm, {"skill": world["target"]}, sample_size=40, model_path=world["model"])
    predictor = run.fit(["text_stats", "model_state:states=false"], "ridge")
    assert predictor.encoders[1].feature_names()[-1] == "last_layer.skill"


def test_a_predictor_of_earlier_labels_is_not_used_silently(world, tmp_path):
    run = Run(tmp_path)
    run.set_pool(world["pool"])
    lm = oracle.LanguageModel.from_pretrained(world["model"], max_tokens=128)
    run.label(lm, {"skill": world["target"]}, sample_size=30)
    run.fit(surrogate="ridge", lm=lm)
    run.label(lm, {"skill": world["target"]}, sample_size=50)
    with pytest.raises(MismatchError, match="fitted on other labels"):
        run.score("ridge", lm=lm)
    run.fit(surrogate="ridge", lm=lm)
    assert len(run.score("ridge", lm=lm)) == 240


def test_token_counts_come_with_the_model_also_after_scoring_without(world, tmp_path):
    run = Run(tmp_path)
    run.set_pool(world["pool"])
    lm = oracle.LanguageModel.from_pretrained(world["model"], max_tokens=128)
    run.label(lm, {"skill": world["target"]}, sample_size=40)
    run.fit(surrogate="ridge")
    assert run.score("ridge").num_tokens is None
    with pytest.raises(InputError, match="without token counts"):
        run.select(surrogate.Budget(tokens=500), allow_low_fidelity=True)
    assert run.select(surrogate.Budget(tokens=500), lm=lm, allow_low_fidelity=True).num_tokens <= 500


def test_a_proxy_by_path_measures_on_the_runs_targets(world, tmp_path):
    run = Run(tmp_path)
    run.set_pool(world["pool"])
    lm = oracle.LanguageModel.from_pretrained(world["model"], max_tokens=128)
    small = build_model("llama", vocabulary_size=320, width=8, num_layers=1, num_heads=2, context=128)
    oracle.LanguageModel(small, lm.tokenizer, max_tokens=128).save(tmp_path / "proxy")
    run.label(lm, {"skill": world["target"]}, sample_size=40, model_path=world["model"])
    predictor = run.fit([f"model_state:model={tmp_path / 'proxy'},states=false"], "ridge", lm=lm)
    assert predictor.encoders[0].feature_names()[-1] == "last_layer.skill"
    assert len(run.score("ridge", lm=lm)) == 240  # the live model at hand is not taken for the proxy


def test_scores_do_not_depend_on_the_blocks_they_are_predicted_in(world, tmp_path, monkeypatch):
    texts = oracle.read_texts(world["pool"])
    values = np.random.default_rng(0).normal(size=(len(texts), 1)) + np.array([[len(text)] for text in texts["text"]])
    labels = oracle.Labels.from_values(values, texts["text_id"], ["t"])
    predictor = surrogate.InfluencePredictor("text_stats", "ridge").fit(texts, labels)
    whole = np.asarray(predictor.predict(texts))
    monkeypatch.setattr("surrogate.predictor.ROWS_PER_BLOCK", 100)
    np.testing.assert_allclose(np.asarray(predictor.predict(texts)), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", ["seed=3", "workdir=x", "simlarity=dot"])
def test_an_option_that_the_method_lacks_is_refused_and_not_a_traceback(option, world, tmp_path):
    refused = command("label", tmp_path / "run", "--pool", world["pool"], "--target", f"skill={world['target']}",
                      "--model", world["model"], "--option", option, ok=1)  # fmt: skip
    assert "is no option of 'grad_dot'" in refused["given"]


def test_a_refused_first_command_leaves_the_folder_free_for_another_pool(world, tmp_path):
    run = tmp_path / "run"
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n")
    arguments = ["--model", world["model"], "--sample-size", 20, "--pool", world["pool"]]
    assert "chat template" in command("label", run, *arguments, "--target", f"t={chat}", ok=1)["given"]
    assert (
        "no folder"
        in command("label", run, *arguments[2:], "--model", "./nothing", "--target", f"t={world['target']}", ok=1)["given"]
    )
    assert not run.exists()
    labelled = command("label", run, *arguments, "--target", f"t={world['target']}")
    assert labelled["labelled"] == 20 and labelled["num_without_target_token"] == 0
