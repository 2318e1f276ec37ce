"""The contract of selection rules, the distribution that softmax draws from, and how targets are combined."""

import itertools
import math

import numpy as np
import pytest

from oracle import plugins
from oracle.errors import InputError
from surrogate.aggregation import combine, standardise, targets_used
from surrogate.rules.random import Random
from surrogate.rules.softmax import Softmax
from surrogate.rules.top import Top

PACKAGE = "surrogate.rules"
RULES = plugins.names(PACKAGE)
NAMES = ["math", "code"]
SCORES = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32) * np.array([1, 30], dtype=np.float32)


@pytest.fixture(params=RULES)
def rule(request):
    return plugins.create(PACKAGE, request.param, {})


def test_the_three_rules_are_found():
    assert {"random", "softmax", "top"} <= set(RULES)


def test_an_order_names_each_row_once_and_leaves_the_scores_alone(rule):
    scores = SCORES.copy()
    order = rule.order(scores, target_names=NAMES, seed=3)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(50))
    np.testing.assert_array_equal(scores, SCORES)


def test_the_same_seed_gives_the_same_order(rule):
    first, again, other = (rule.order(SCORES, target_names=NAMES, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first, other) == isinstance(rule, Top)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_tells_its_paper_cost_and_limit(name):
    told = plugins.describe(PACKAGE, name)
    assert told["summary"] and told["paper"] and told["cost"] and told["limit"]
    assert all(option["help"] for option in told["options"])


def test_top_takes_the_highest_first_and_breaks_ties_by_row():
    scores = np.array([[1.0], [3.0], [2.0], [3.0]])
    np.testing.assert_array_equal(Top().order(scores, target_names=["math"], seed=0), [1, 3, 2, 0])


@pytest.mark.parametrize("temperature", [0.0, 1e-9])
def test_softmax_tends_to_top_as_its_temperature_goes_to_zero(temperature):
    for options in ({}, {"combine": "min_z"}, {"combine": "code"}, {"weights": {"math": 1, "code": 0}}):
        cold = Softmax(temperature=temperature, **options).order(SCORES, target_names=NAMES, seed=5)
        np.testing.assert_array_equal(cold, Top(**options).order(SCORES, target_names=NAMES, seed=0))


def test_softmax_forgets_the_scores_as_its_temperature_grows():
    orders = [Softmax(temperature=1e9).order(scores, target_names=NAMES, seed=5) for scores in (SCORES, -SCORES)]
    np.testing.assert_array_equal(*orders)


def sequence_probability(sequence, weights):
    """Draw one after the other without replacement, each in proportion to its weight."""
    probability, left = 1.0, sum(weights)
    for row in sequence:
        probability *= weights[row] / left
        left -= weights[row]
    return probability


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_softmax_draws_without_replacement_in_proportion_to_exp_of_the_z_score(temperature):
    scores = np.array([[0.3], [-1.0], [2.0], [0.4]])
    z_scores = (scores[:, 0] - scores.mean()) / scores.std()
    weights = [math.exp(z / temperature) for z in z_scores]
    num_draws = 6000
    rule = Softmax(temperature=temperature)
    draws = [tuple(rule.order(scores, target_names=["math"], seed=seed)[:2]) for seed in range(num_draws)]
    for pair in itertools.permutations(range(4), 2):
        expected = sequence_probability(pair, weights)
        deviation = 4 * math.sqrt(expected * (1 - expected) / num_draws)
        assert draws.count(pair) / num_draws == pytest.approx(expected, abs=deviation)


def test_a_temperature_means_the_same_in_any_units():
    orders = [Softmax(combine="code").order(scores, target_names=NAMES, seed=5) for scores in (SCORES, 1000 * SCORES + 7)]
    np.testing.assert_array_equal(*orders)


def test_random_draws_every_pair_alike():
    num_draws = 4000
    draws = [tuple(Random().order(np.arange(4.0)[:, None], target_names=["math"], seed=seed)[:2]) for seed in range(num_draws)]
    for pair in itertools.permutations(range(4), 2):
        assert draws.count(pair) / num_draws == pytest.approx(1 / 12, abs=4 * math.sqrt(1 / 12 * 11 / 12 / num_draws))


def test_negative_temperatures_are_refused():
    with pytest.raises(InputError, match="temperature"):
        Softmax(temperature=-0.1)


def test_each_way_of_combining_is_what_it_says():
    z_scores = (SCORES - SCORES.mean(0)) / SCORES.std(0)
    np.testing.assert_allclose(standardise(SCORES.astype(float)), z_scores, atol=1e-5)
    expected = {
        "sum_z": z_scores.mean(1),
        "max_z": z_scores.max(1),
        "min_z": z_scores.min(1),
        "mean": SCORES.mean(1),
        "math": SCORES[:, 0],
        "code": SCORES[:, 1],
    }
    for how, values in expected.items():
        np.testing.assert_allclose(combine(SCORES, how, target_names=NAMES), values, atol=1e-5)
    weighted = combine(SCORES, "sum_z", target_names=NAMES, weights={"code": 1, "math": 3})
    np.testing.assert_allclose(weighted, 0.75 * z_scores[:, 0] + 0.25 * z_scores[:, 1], atol=1e-5)
    raw = combine(SCORES, "mean", target_names=NAMES, weights={"code": 1, "math": 3})
    np.testing.assert_allclose(raw, 0.75 * SCORES[:, 0] + 0.25 * SCORES[:, 1], atol=1e-5)


def test_sum_z_does_not_care_about_the_units_of_a_column():
    scaled = SCORES * np.array([1000, 1]) + np.array([7, -3])
    np.testing.assert_allclose(combine(scaled, target_names=NAMES), combine(SCORES, target_names=NAMES), atol=1e-4)


def test_a_column_without_spread_ranks_nothing():
    constant = np.full(50, 0.1)
    constant[::7] = np.nextafter(0.1, 1)  # rounding is no spread
    flat = np.stack([SCORES[:, 0].astype(float), constant], axis=1)
    order = np.argsort(combine(flat, target_names=NAMES))
    np.testing.assert_array_equal(order, np.argsort(SCORES[:, 0]))


def test_targets_used_are_those_that_can_change_the_result():
    assert targets_used("code", target_names=NAMES) == ["code"]
    assert targets_used("min_z", target_names=NAMES) == NAMES
    assert targets_used("sum_z", target_names=NAMES, weights={"math": 0, "code": 2}) == ["code"]


@pytest.mark.parametrize(
    ("how", "weights", "message"),
    [
        ("sumz", None, "did you mean 'sum_z'"),
        ("max_z", {"math": 1, "code": 1}, "no effect"),
        ("sum_z", {"math": 1}, "one weight for each of math, code"),
        ("sum_z", {"math": 1, "cod": 1}, "one weight for each of math, code"),
        ("mean", {"math": -1, "code": 1}, "at least 0"),
        ("mean", {"math": 0, "code": 0}, "not all 0"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(how, weights, message):
    with pytest.raises(InputError, match=message):
        combine(SCORES, how, target_names=NAMES, weights=weights)


def test_a_target_may_not_be_called_like_a_way_to_combine():
    with pytest.raises(InputError, match="rename"):
        combine(SCORES, "mean", target_names=["mean", "code"])
