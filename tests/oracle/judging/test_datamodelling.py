"""The linear datamodelling score knows true labels from random ones, and its ceiling is where true labels end up."""

from __future__ import annotations

import numpy as np
import pytest

from oracle.judging.datamodelling import datamodelling_scores, draw_subsets, predicted_effects, score_ceilings

IDS = [f"{number:032x}" for number in range(60)]


def _world(*, num_subsets, noise, num_seeds=1, num_targets=1, seed=0):
    """True labels (S, C), subsets, and effects (R, M, C) that are sums of true labels plus noise."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(len(IDS), num_targets))
    subsets = draw_subsets(IDS, alpha=0.5, num_subsets=num_subsets, seed=seed)
    sums = predicted_effects(values, IDS, subsets)
    scale = noise * sums.std(0)
    return values, subsets, sums + scale * rng.normal(size=(num_seeds, num_subsets, num_targets))


def test_subsets_follow_content_and_seed_and_not_row_order():
    subsets = draw_subsets(IDS, alpha=0.3, num_subsets=5, seed=1)
    assert all(len(subset) == len(set(subset)) == 18 for subset in subsets)
    assert len({frozenset(subset) for subset in subsets}) == 5
    assert draw_subsets(IDS[::-1], alpha=0.3, num_subsets=5, seed=1) == subsets
    assert draw_subsets(IDS, alpha=0.3, num_subsets=5, seed=2) != subsets
    assert draw_subsets(IDS, alpha=0.3, num_subsets=9, seed=1)[:5] == subsets  # more subsets keep those there are
    counts = np.bincount([IDS.index(i) for s in draw_subsets(IDS, alpha=0.5, num_subsets=400, seed=0) for i in s], minlength=60)
    assert counts.min() > 150 and counts.max() < 250  # no text is favoured: 200 on average, 5 standard deviations


def test_predicted_effects_are_sums_of_labels_whatever_the_row_order():
    values, subsets, _ = _world(num_subsets=7, noise=0.0, num_targets=2)
    found = predicted_effects(values, IDS, subsets)
    expected = [[sum(values[IDS.index(i), c] for i in subset) for c in range(2)] for subset in subsets]
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(predicted_effects(values[::-1], IDS[::-1], subsets), found)


def test_true_labels_score_one_flipped_ones_minus_one_and_random_ones_zero():
    values, subsets, effects = _world(num_subsets=40, noise=0.0, num_targets=2)
    scores, mean = datamodelling_scores(predicted_effects(values, IDS, subsets), effects[0], num_bootstrap=50)
    assert [score.value for score in scores] == [pytest.approx(1.0)] * 2 and mean.low > 0.99
    flipped, _ = datamodelling_scores(predicted_effects(-values, IDS, subsets), effects[0], num_bootstrap=50)
    assert flipped[0].value == pytest.approx(-1.0)
    random = [
        datamodelling_scores(
            predicted_effects(np.random.default_rng(number).normal(size=values.shape), IDS, subsets), effects[0], num_bootstrap=1
        )[1].value
        for number in range(50)
    ]
    assert abs(np.mean(random)) < 0.1 and np.std(random) < 0.3


def test_the_interval_covers_the_score_of_many_subsets_and_the_seed_repeats_it():
    values, subsets, effects = _world(num_subsets=1000, noise=1.0)
    predicted = predicted_effects(values, IDS, subsets)
    truth = datamodelling_scores(predicted, effects[0], num_bootstrap=1)[0][0].value
    covered = []
    for start in range(0, 1000, 25):
        rows = slice(start, start + 25)
        score = datamodelling_scores(predicted[rows], effects[0, rows], num_bootstrap=100)[0][0]
        covered.append(score.low <= truth <= score.high)
    assert 0.8 < np.mean(covered) <= 1.0
    again = datamodelling_scores(predicted[rows], effects[0, rows], num_bootstrap=100)[0][0]
    assert (again.low, again.high) == (score.low, score.high)


def test_a_difference_of_two_methods_on_the_same_subsets_is_known_better_than_either():
    values, subsets, effects = _world(num_subsets=40, noise=1.0)
    rng = np.random.default_rng(5)
    first, second = (
        datamodelling_scores(predicted_effects(values + noise, IDS, subsets), effects[0], num_bootstrap=200)[1]
        for noise in (0.0, 0.1 * rng.normal(size=values.shape))
    )
    difference = first.minus(second)
    assert difference.value == pytest.approx(first.value - second.value)
    assert difference.low <= difference.value <= difference.high
    assert difference.high - difference.low < 0.5 * (first.high - first.low)


@pytest.mark.parametrize("num_seeds", [2, 4])
def test_true_labels_reach_the_ceiling_that_the_seeds_tell(num_seeds):
    values, subsets, effects = _world(num_subsets=3000, noise=1.5, num_seeds=num_seeds)
    (ceiling,) = score_ceilings(effects, np.full((num_seeds, 2, 3000, 1), np.nan))
    scores, _ = datamodelling_scores(predicted_effects(values, IDS, subsets), effects.mean(0), num_bootstrap=1)
    assert ceiling.source == "seeds"
    assert ceiling.ceiling == pytest.approx(scores[0].value, abs=0.03)
    assert ceiling.ceiling == pytest.approx(np.sqrt(ceiling.reliability))
    other = _world(num_subsets=3000, noise=1.5, num_seeds=2 * num_seeds)[2]  # the reliability is that of two such means
    first, second = other[:num_seeds].mean(0), other[num_seeds:].mean(0)
    assert ceiling.reliability == pytest.approx(datamodelling_scores(first, second, num_bootstrap=1)[1].value, abs=0.03)


def test_with_one_seed_the_halves_of_the_target_set_stand_in_and_without_them_there_is_no_ceiling():
    _, _, effects = _world(num_subsets=3000, noise=1.0, num_seeds=2)
    (ceiling,) = score_ceilings(effects[:1], effects[None])  # halves (1, 2, M, C): two noisy measurements
    (by_seeds,) = score_ceilings(effects, np.full((2, 2, 3000, 1), np.nan))
    assert ceiling.source == "target halves" and ceiling.ceiling == pytest.approx(by_seeds.ceiling)
    assert score_ceilings(effects[:1], np.full((1, 2, 3000, 1), np.nan)) == [None]


def test_effects_that_are_all_noise_have_a_ceiling_of_about_zero():
    rng = np.random.default_rng(0)
    (ceiling,) = score_ceilings(rng.normal(size=(2, 2000, 1)), np.full((2, 2, 2000, 1), np.nan))
    assert ceiling.ceiling < 0.25
    (opposed,) = score_ceilings(np.array([[[1.0], [2.0], [3.0]], [[3.0], [2.0], [1.0]]]), np.full((2, 2, 3, 1), np.nan))
    assert opposed.ceiling == opposed.reliability == 0.0
