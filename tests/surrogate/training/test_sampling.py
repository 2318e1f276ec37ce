"""Which texts get a label: by content, part of them at random, the best and worst more often where that is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from oracle.errors import InputError
from surrogate.training.sampling import draw_sample

IDS = [f"text-{number}" for number in range(1000)]
SCORES = np.random.default_rng(0).normal(size=1000)


def test_the_draw_depends_on_content_and_not_on_order() -> None:
    shuffled = np.random.default_rng(1).permutation(1000)
    for how in ("random", "stratified"):
        first = draw_sample(IDS, 100, how=how, scores=SCORES, salt="a")
        second = draw_sample([IDS[place] for place in shuffled], 100, how=how, scores=SCORES[shuffled], salt="a")
        assert {IDS[place] for place in first.places} == {IDS[shuffled[place]] for place in second.places}


def test_another_salt_draws_other_texts() -> None:
    first, second = (set(draw_sample(IDS, 100, salt=salt).places.tolist()) for salt in "ab")
    assert len(first & second) < 40


def test_a_stratified_sample_is_half_at_random_and_has_more_of_the_tails() -> None:
    sample = draw_sample(IDS, 200, how="stratified", scores=SCORES)
    assert sample.at_random.sum() == 100 and len(set(sample.places.tolist())) == 200
    ranks = np.argsort(np.argsort(SCORES))[sample.places[~sample.at_random]]
    best, worst, middle = (ranks >= 900).sum(), (ranks < 100).sum(), ((ranks >= 400) & (ranks < 500)).sum()
    assert best > worst > middle > 0
    at_random = np.argsort(np.argsort(SCORES))[sample.places[sample.at_random]]
    assert abs(at_random.mean() - 500) < 100


@pytest.mark.parametrize(("how", "guide"), [("uncertain", "spread"), ("mass", "mass")])
def test_an_uncertain_sample_has_the_texts_of_the_largest_spread(how: str, guide: str) -> None:
    spread = np.abs(SCORES)
    sample = draw_sample(IDS, 100, how=how, **{guide: spread})
    chosen, random = sample.places[~sample.at_random], sample.places[sample.at_random]
    others = np.setdiff1d(np.arange(1000), sample.places)
    assert spread[chosen].min() >= spread[others].max()
    assert len(random) == 50


def test_without_scores_everything_is_drawn_at_random() -> None:
    sample = draw_sample(IDS, 100, how="stratified")
    assert sample.at_random.all()
    assert np.array_equal(sample.places, draw_sample(IDS, 100).places)


def test_a_sample_of_more_than_there_is_takes_all_and_a_wrong_word_is_refused() -> None:
    assert len(draw_sample(IDS[:7], 100).places) == 7
    with pytest.raises(InputError, match="sampling='best'"):
        draw_sample(IDS, 10, how="best")
