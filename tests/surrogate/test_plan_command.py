"""`surrogate plan`, in this process: a table on stderr, one JSON object on stdout, a refusal where nothing fits."""

from __future__ import annotations

import json
import sys

import pytest

import oracle
from surrogate import cli
from surrogate.training.small_models import build_model, train_tokenizer

SIZES = ["--pool-texts", "10000", "--text-tokens", "100", "--target-tokens", "1000"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line; return exit code, the JSON of the last line, and stderr."""

    def command(*arguments: object) -> tuple[int, dict, str]:
        monkeypatch.setattr(sys, "argv", ["surrogate", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_code:
            cli.main()
        printed = capsys.readouterr()
        lines = printed.out.strip().splitlines()
        return exit_code.value.code or 0, json.loads(lines[-1]) if lines else {}, printed.err

    return command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A pool file, a target file and a checkpoint without weights."""
    folder = tmp_path_factory.mktemp("files")
    strings = [f"text number {number} says that {number} is {number * 7}" for number in range(400)]
    (folder / "pool.jsonl").write_text("".join(json.dumps({"body": string}) + "\n" for string in strings))
    (folder / "dev.jsonl").write_text("".join(json.dumps({"text": string}) + "\n" for string in strings[:9]))
    tokenizer = train_tokenizer(strings, vocabulary_size=300)
    module = build_model("llama", vocabulary_size=300, width=16, num_layers=1, num_heads=2, context=64)
    oracle.LanguageModel(module, tokenizer).save(folder / "model")
    for file in (folder / "model").glob("*.safetensors"):
        file.unlink()
    return folder


def test_numbers_alone_give_the_plan_worked_out_by_hand(run):
    code, plan, table = run("--training-tokens", 1e6, "--parameters", 1e6, *SIZES)
    assert code == 0 and plan["fits"] and (plan["num_refreshes"], plan["sample_size"], plan["refresh_every"]) == (2, 426, 4)
    assert plan["overhead"]["flops"] == pytest.approx(0.1) and plan["round_tokens"] == 125_000
    assert "target gradients" in table and "not chosen:" in table and "assumed:" in table


def test_a_promise_that_no_plan_keeps_is_refused_with_the_one_that_would_do(run):
    code, refused, table = run("--training-tokens", 1e5, "--parameters", 1e6, *SIZES)
    assert code == 1 and refused["refused"] == "InputError" and "--max-overhead of at least 0.21" in refused["accepted"]
    assert "NO PLAN FITS" in table
    assert run("--training-tokens", 1e5, "--parameters", 1e6, *SIZES, "--max-overhead", 0.21)[0] == 0


def test_a_checkpoint_and_files_are_read_and_no_weights(run, files):
    arguments = ["--model", files / "model", "--pool", files / "pool.jsonl", "--text-column", "body", "--max-tokens", 32]
    code, plan, _ = run(
        "--training-tokens", 1e5, *arguments, "--target", f"a={files / 'dev.jsonl'}", "--max-overhead", 1, "--proxy", 100
    )
    assert code == 0 and plan["sizes"]["num_texts"] == 400 and plan["sizes"]["num_targets"] == 1
    assert 5 < plan["sizes"]["text_tokens"] <= 32 and plan["sizes"]["proxy_flops_per_token"] == 200.0
    assert not any("characters" in line for line in plan["assumptions"])


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["--parameters", 1e6, "--model", "somewhere"],
        ["--parameters", 1e6, "--measure"],
        ["--parameters", 1e6, "--method", "ekfac"],
        ["--parameters", 1e6, "--target", "a=b.jsonl"],
        ["--model", "./nowhere"],
    ],
)
def test_what_cannot_be_planned_is_refused_in_three_parts(run, wrong):
    code, refused, _ = run("--training-tokens", 1e6, *SIZES, *wrong)
    assert code == 1 and refused["refused"] and refused["given"] and refused["accepted"] and refused["to_do"]
