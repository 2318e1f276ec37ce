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
