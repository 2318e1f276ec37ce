"""`surrogate explain` over a run folder, in this process."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import oracle
from oracle.errors import InputError
from oracle.labels import Labels
from surrogate.cli import app
from surrogate.explain_command import as_text
from surrogate.explanation import SCALES, LabelShare, TargetExplanation, TextExplanation
from surrogate.pipeline import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose labels grow with how often a text says proof."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 12, size=80)
    words = np.array(["onion", "oven", "lemma", "sum", "axiom", "flour", "bake", "vector", "matrix", "sugar"])
    rows = [
        {"text": " ".join([f"number {number}", *["proof"] * count, *words[rng.integers(10, size=20)]])}
        for number, count in enumerate(counts)
    ]
    folder = tmp_path_factory.mktemp("explain") / "run"
    made = Run(folder)
    made.set_pool(oracle.read_texts(rows))
    sample = made.pool().select(range(50))
    Labels.from_values(counts[:50, None].astype(float), sample["text_id"], ["math"]).save(folder / "labels")
    made.fit(["hashed_ngrams:dim=64", "text_stats"], "ridge", num_folds=2)
    return made


def command(*arguments):
    answer = CliRunner().invoke(app, ["explain", *map(str, arguments)])
    if answer.exception is not None:
        raise answer.exception
    return json.loads(answer.stdout.strip().splitlines()[-1])


def test_the_texts_with_the_highest_scores_are_explained(run):
    found = command(run.folder, "--top", 2, "--top-k", 4)
    scores = run.score("ridge")
    best = [scores.text_ids[row] for row in np.argsort(-np.asarray(scores)[:, 0], kind="stable")[:2]]
    assert [entry["text_id"] for entry in found["explanations"]] == best and found["surrogate"] == "ridge"
    target = found["explanations"][0]["targets"][0]
    amounts = [share["amount"] for side in ("raised", "lowered") for share in target[side]]
    assert target["bias"] + sum(amounts) + target["others"] == pytest.approx(target["scaled_score"], abs=1e-6)
    named = {share["text_id"] for side in ("raised", "lowered") for share in target[side]}
    assert named <= set(found["excerpts"]) and found["excerpts"][best[0]].startswith("number ")
    assert len(command(run.folder)["explanations"]) == 3


def test_the_account_can_be_read_and_added_up(run):
    text_id = run.pool()["text_id"][3]
    lines = CliRunner().invoke(app, ["explain", str(run.folder), "--text-id", text_id, "--top-k", "4"]).stderr.splitlines()
    assert any(f"text {text_id}: number 3" in line for line in lines) and "alike" in " ".join(lines)
    assert any(line.startswith("  math: score ") and line.endswith("% of the labels") for line in lines)
    first, last = (next(i for i, line in enumerate(lines) if line.endswith(end)) for end in ("text starts", "in all"))
    amounts = [float(line.split()[0]) for line in lines[first : last + 1]]
    assert sum(amounts[:-1]) == pytest.approx(amounts[-1], abs=0.01)
    named = [line for line in lines[first:last] if " label " in line]
    assert len(named) == 8 and any(line.endswith("the text itself") for line in named)  # it has a label
    assert f"the other {50 - len(named)} labelled texts together" in lines[last - 1]


def test_what_is_not_told_is_shown_and_rounds_to_nothing_is_not():
    target = TargetExplanation(
        target="math",
        score=0.5,
        scaled_score=1.0,
        bias=-1e-9,
        earlier=0.25,
        raised=[LabelShare("b", 0.4, 2.0)],
        lowered=[],
        others=0.1,
        num_others=7,
        remainder=0.25,
        blocks={"text_stats": 0.75},
        features=[],
        block_bias=0.0,
        block_remainder=1e-9,
    )
    explanation = TextExplanation("a", "contributions", SCALES["none"], "nats per target token", [target])
    text = as_text([explanation], {"a": "first\ntext", "b": "x" * 200})
    for part in ("text a: first text", "+0.000  where every", "+0.250  from the surrogates", "+0.250  remainder", "xxx..."):
        assert part in text
    assert "start +0.250, text_stats +0.750\n" in text and "-0.000" not in text and "% of" not in text


def test_texts_are_named_by_their_id(run):
    wanted = [run.pool()["text_id"][place] for place in (70, 3)]
    found = command(run.folder, "--text-id", wanted[0], "--text-id", wanted[1])
    assert [entry["text_id"] for entry in found["explanations"]] == wanted


def test_wrong_words_are_refused(run):
    with pytest.raises(InputError, match="not in the pool"):
        command(run.folder, "--text-id", "nothing")
    with pytest.raises(InputError, match="one of the two"):
        command(run.folder, "--text-id", run.pool()["text_id"][0], "--top", 2)
    with pytest.raises(InputError, match="top"):
        command(run.folder, "--top", 0)
    with pytest.raises(InputError, match="method='boostin'"):
        command(run.folder, "--method", "boostin")
