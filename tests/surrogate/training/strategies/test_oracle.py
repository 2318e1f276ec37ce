"""Labels of all candidates are the ranking."""

from __future__ import annotations

import numpy as np
import pytest

import oracle
from oracle.errors import InputError
from oracle.methods.grad_dot import GradDot
from oracle.texts import list_text_ids
from surrogate.training.strategies.oracle import Oracle


class Interrupted(RuntimeError):
    pass


@pytest.fixture
def many(make_context, make_token_texts):
    """A pool of token ids that takes three blocks."""

    def many(**changes):
        return make_context(make_token_texts(70, seed=1, longest=12), {"t": make_token_texts(4, seed=2)}, **changes)

    return many


def test_scores_are_the_labels_of_one_text_after_the_other(make_context, lm):
    context = make_context(candidates=np.array([0, 2, 3, 6, 9]))
    ranking = Oracle(method="one_step").rank(context)
    alone = [
        oracle.label(lm, context.pool.select([row]), list(context.targets), method="one_step", halves=False).values[0]
        for row in context.candidates
    ]
    np.testing.assert_allclose(np.asarray(ranking.scores), np.array(alone), rtol=1e-3, atol=1e-5)
    assert ranking.labels.text_ids == ranking.scores.text_ids == list_text_ids(context.candidate_texts())
    np.testing.assert_array_equal(ranking.labels.values, np.asarray(ranking.scores))
    assert ranking.facts["num_labelled"] == 5


def test_interrupted_and_asked_again_it_gives_the_same_bytes(many, monkeypatch):
    whole = many(name="whole")
    expected = Oracle().rank(whole)
    measure, measured = GradDot.measure, []

    def stops_at_the_second(self, encoded):
        if len(measured) == 1:
            raise Interrupted
        measured.append(len(encoded))
        return measure(self, encoded)

    monkeypatch.setattr(GradDot, "measure", stops_at_the_second)
    with pytest.raises(Interrupted):
        Oracle().rank(many(name="broken"))
    monkeypatch.setattr(GradDot, "measure", measure)
    broken = many(name="broken")
    assert len(list((broken.folder / "labels" / "blocks").glob("*.parquet"))) == 1
    ranking = Oracle().rank(broken)
    assert ranking.scores.tobytes() == expected.scores.tobytes()
    files = [context.folder / "labels" / "labels.parquet" for context in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert ranking.costs["label"]["flops"] == expected.costs["label"]["flops"]


def test_flops_are_those_of_all_candidates_and_of_the_targets(many, lm):
    context = many()
    ranking = Oracle().rank(context)
    num_tokens = sum(map(len, context.pool["input_ids"]))
    assert ranking.costs["label"]["flops"] == 3 * lm.forward_flops_per_token * num_tokens
    assert ranking.costs["targets"]["flops"] > 0
    assert ranking.costs["label"]["flops"] < 4 * lm.forward_flops_per_token * (num_tokens + 4 * 40)


def test_what_it_needs_follows_from_the_method(make_context):
    assert Oracle().needs_model and Oracle().needs_targets and Oracle().adapts
    similar = Oracle(method="target_similarity")
    assert not similar.needs_model and not similar.adapts
    assert similar.rank(make_context(lm=None)).scores.target_names == ["animals", "sums"]
    rated = Oracle(method="self_rating")
    assert rated.needs_model and not rated.needs_targets


def test_options_go_to_the_method_and_are_checked_at_once(make_context):
    plain, summed = (
        Oracle(method_options=options).rank(make_context(name=name))
        for name, options in (("plain", None), ("summed", {"text_loss": "sum"}))
    )
    assert summed.labels.meta["options"]["text_loss"] == "sum"
    assert summed.scores.tobytes() != plain.scores.tobytes()
    few = Oracle(max_target_texts=1).rank(make_context(name="few"))
    assert few.labels.meta["num_target_texts"] == {"animals": 1, "sums": 1}
    drawn = [Oracle(max_target_texts=1).rank(make_context(name=f"seed-{seed}", seed=seed)).labels.meta for seed in range(5)]
    assert len({str(meta["targets"]) for meta in drawn}) > 1
    with pytest.raises(InputError, match="text_los"):
        Oracle(method_options={"text_los": "sum"})
    with pytest.raises(InputError, match="grad_dott"):
        Oracle(method="grad_dott")
