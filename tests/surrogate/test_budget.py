"""Budgets: what is kept never exceeds them, and those that make no sense are refused."""

import numpy as np
import pytest

from oracle.errors import InputError, InputTypeError
from surrogate.selection import Budget, Scores, select


def single(values, **changes):
    """Scores of one target for texts a, b, c, ..."""
    ids = [chr(ord("a") + row) for row in range(len(values))]
    return Scores(np.array(values, dtype=float)[:, None], **{"text_ids": ids, "target_names": ["math"], **changes})


def test_a_token_budget_takes_every_text_that_still_fits_and_is_never_exceeded():
    scores = single([5, 4, 3, 2, 1], num_tokens=[50, 60, 30, 20, 10])
    chosen = select(scores, budget=Budget(tokens=105))
    assert chosen.text_ids == ["a", "c", "d"] and chosen.ranks == [1, 3, 4] and chosen.num_tokens == 100
    rng = np.random.default_rng(1)
    scores = single(rng.normal(size=60), text_ids=[f"{number:02}" for number in range(60)], num_tokens=rng.integers(5, 200, 60))
    for tokens in (10, 137, 1000, int(scores.num_tokens.sum())):
        chosen = select(scores, budget=Budget(tokens=tokens))
        left = tokens - chosen.num_tokens
        assert left >= 0
        sizes = dict(zip(scores.text_ids, scores.num_tokens, strict=True))
        assert all(sizes[text_id] > left for text_id in scores.text_ids if text_id not in chosen.text_ids)


def test_a_fraction_is_a_share_of_the_pools_texts_rounded_down():
    assert len(select(single(range(7)), budget=Budget(fraction=0.5))) == 3
    assert len(select(single(range(7)), budget=Budget(fraction=1.0))) == 7
    ids = [f"{number:03}" for number in range(100)]
    scores = Scores(np.arange(100.0)[:, None], text_ids=ids, target_names=["math"])
    assert len(select(scores, budget=Budget(fraction=0.29))) == 29  # 0.29 * 100 is 28.999999999999996
    assert len(select(scores, budget=Budget(fraction=0.5), exclude=ids[:50])) == 50


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"texts": 1, "tokens": 1},
        {"fraction": 0},
        {"fraction": 1.5},
        {"fraction": float("nan")},
        {"texts": 0},
        {"texts": 2.5},
        {"tokens": -1},
        {"texts": True},
        {"fraction": "0.2"},
    ],
)
def test_budgets_that_make_no_sense_are_refused(options):
    with pytest.raises(InputError):
        Budget(**options)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(texts=6), "a budget of 6 texts for 5 texts"),
        (Budget(tokens=171), "a budget of 171 tokens for 170 tokens"),
        (Budget(tokens=9), "keeps nothing"),
        (Budget(fraction=0.1), "keeps nothing"),
    ],
)
def test_budgets_above_the_pool_or_below_any_text_are_refused_with_both_numbers(budget, message):
    scores = single([5, 4, 3, 2, 1], num_tokens=[50, 60, 30, 20, 10])
    with pytest.raises(InputError, match=message):
        select(scores, budget=budget)


def test_a_token_budget_needs_token_counts():
    with pytest.raises(InputError, match="without token counts"):
        select(single([1, 2]), budget=Budget(tokens=10))
    with pytest.raises(InputTypeError):
        select(single([1, 2]), budget=0.2)
