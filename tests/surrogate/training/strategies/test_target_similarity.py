"""Texts like the target texts first, as explicit ranks say."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from oracle.errors import InputError
from surrogate.training.strategies.target_similarity import TargetSimilarity


def pieces(text):
    """The set of pieces of three to five characters within words, spaces at their ends."""
    words = [f" {word} " for word in text.lower().split()]
    return Counter(
        word[start : start + size] for size, word in itertools.product((3, 4, 5), words) for start in range(len(word) - size + 1)
    ).keys()


def similarity(one, other):
    return len(pieces(one) & pieces(other)) / math.sqrt(len(pieces(one)) * len(pieces(other)))


def test_scores_are_explicit_ranks_among_the_candidates(make_context):
    candidates = np.array([0, 1, 2, 3, 4, 7, 8, 9])
    context = make_context(candidates=candidates)
    texts = list(context.candidate_texts()["text"])
    expected = np.zeros((len(texts), 2))
    for column, target in enumerate(context.targets):
        for row, text in enumerate(texts):
            ranks = []
            for wanted in target.texts["text"]:
                own = similarity(text, wanted)
                others = [similarity(other, wanted) for other in texts]
                better, alike = (
                    sum(compare) for compare in ([o > own + 1e-9 for o in others], [abs(o - own) < 1e-9 for o in others])
                )
                ranks.append(better + (alike + 1) / 2)
            expected[row, column] = max(-math.log2(rank) for rank in ranks)
    np.testing.assert_allclose(np.asarray(TargetSimilarity().rank(context).scores), expected, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"rank_value": "inverse"}])
def test_copies_of_target_texts_come_first(make_context, options):
    plain = make_context()
    planted = list(plain.targets[0].texts["text"])
    scores = TargetSimilarity(**options).rank(make_context([*plain.pool["text"], *planted], name="planted")).scores
    assert set(np.argsort(-np.asarray(scores)[:, 0])[:2]) == {len(plain.pool), len(plain.pool) + 1}


def test_options_are_checked_when_they_are_given():
    with pytest.raises(InputError, match="over='best'"):
        TargetSimilarity(over="best")


def test_a_repeated_call_reads_what_was_ranked(make_context, monkeypatch):
    from oracle.methods import target_similarity

    first = TargetSimilarity().rank(make_context())
    monkeypatch.setattr(target_similarity.TargetSimilarity, "measure", None)
    again = TargetSimilarity().rank(make_context())
    assert first.scores.tobytes() == again.scores.tobytes()
    assert first.costs == again.costs


def test_options_go_to_the_ranks(make_context):
    log2, inverse, mean = (
        np.asarray(TargetSimilarity(**options).rank(make_context(name=str(options))).scores)
        for options in ({}, {"rank_value": "inverse"}, {"over": "mean"})
    )
    np.testing.assert_allclose(inverse, 2.0**log2, rtol=1e-5)
    assert (mean <= log2).all() and (mean < log2).any()
