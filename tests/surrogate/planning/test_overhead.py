"""The promise about the cost of selecting: arithmetic against figures worked out by hand."""

from __future__ import annotations

import json

import pytest

from oracle.errors import InputError, MismatchError
from surrogate.planning.costs import Cost, Decision, Expected
from surrogate.planning.overhead import Overhead


def refresh(labels: float, *, fixed: float = 0.0, features: float = 0.0, seconds: float = 0.0) -> dict:
    """Stage costs of a refresh in FLOPs; the seconds are those of the labels."""
    stages = {"label": labels, "targets": fixed, "features": features}
    return {name: {"flops": flops, "seconds": seconds if name == "label" else 0.0} for name, flops in stages.items()}


def flops(**parts: float) -> Expected:
    return Expected(**{name: Cost(flops=value) for name, value in parts.items()})


def test_spent_and_next_refresh_stay_within_the_share_of_the_planned_training():
    account = Overhead(0.1, planned_flops=1000.0)
    account.record(refresh(60.0))
    assert account.allowed(Cost(flops=40.0))[0]
    is_allowed, reason = account.allowed(Cost(flops=40.1))
    assert not is_allowed and "60 FLOPs spent and 40.1 for this refresh, of 100" in reason and "planned training" in reason


def test_the_sample_shrinks_to_what_is_left_after_what_does_not_depend_on_it():
    account = Overhead(0.1, planned_flops=1000.0)
    account.record(refresh(50.0))
    # 100 - 50 spent - 10 for features once - 20 fixed leave 20 for a sample that usually costs 80
    assert account.sample_factor(flops(sampled=80.0, fixed=20.0, once=10.0)) == pytest.approx(0.25)
    # shared by two refreshes: (100 - 50 - 10) / 2 - 15 = 5 of 80; the features are paid once
    assert account.sample_factor(flops(sampled=80.0, fixed=15.0, once=10.0), num_refreshes=2) == pytest.approx(5 / 80)
    assert account.sample_factor(flops(sampled=80.0, fixed=51.0)) == 0.0


def test_a_refresh_takes_from_later_ones_only_what_its_smallest_sample_needs():
    account = Overhead(0.1, planned_flops=1000.0)
    decision = account.decide(flops(sampled=100.0), num_refreshes=10, min_factor=0.3)
    assert decision.is_allowed and decision.sample_factor == pytest.approx(0.3) and "later refreshes" in decision.reason
    assert account.decide(flops(sampled=100.0), num_refreshes=2, min_factor=0.3).sample_factor == pytest.approx(0.5)
    assert not account.decide(flops(sampled=400.0), num_refreshes=10, min_factor=0.3).is_allowed


def test_of_unknown_length_training_pays_back_the_first_refresh_before_the_next():
    account = Overhead(0.1, first_allowance=0.5)
    assert account.allowed(Cost(flops=50.0), coming_flops=100.0)[0]
    is_allowed, reason = account.allowed(Cost(flops=51.0), coming_flops=100.0)
    assert not is_allowed and "unknown length" in reason
    account.record(refresh(50.0))
    account.observe(flops=500.0, seconds=0.0)
    assert not account.allowed(Cost(flops=50.0), coming_flops=100.0)[0]  # 100 of 0.1 * 600
    account.observe(flops=900.0, seconds=0.0)
    assert account.allowed(Cost(flops=50.0), coming_flops=100.0)[0]  # 100 of 0.1 * 1000


def test_seconds_decide_only_once_the_speed_of_training_is_known():
    slow = Cost(flops=1.0, seconds=60.0)
    account = Overhead(0.1, planned_flops=1000.0)
    assert account.allowed(slow)[0]
    account.observe(flops=100.0, seconds=50.0)  # 2 FLOPs a second, so 500 seconds in all, of which 50 may be spent
    decision = account.decide(Expected(sampled=slow))
    assert decision.unit == "seconds" and decision.sample_factor == pytest.approx(50 / 60) and "seconds" in decision.reason
    assert Overhead(0.1, planned_flops=1000.0, flops_per_second=2.0).allowed(slow)[0] is False
    assert Overhead(0.1, planned_flops=1000.0, planned_seconds=700.0).allowed(slow)[0] is True
    assert Overhead(0.1, planned_flops=1000.0, flops_per_second=2.0, units=("flops",)).allowed(slow)[0] is True


def test_measured_seconds_take_the_place_of_planned_ones():
    account = Overhead(0.1, planned_flops=1000.0, planned_seconds=10_000.0)
    account.observe(flops=100.0, seconds=50.0)
    assert account.share(of="planned") == {"flops": 0.0, "seconds": 0.0}
    account.record(refresh(1.0, seconds=50.0))
    assert account.share(of="planned")["seconds"] == pytest.approx(0.1)


@pytest.mark.parametrize("unit", ["flops", "seconds"])
def test_a_larger_promise_never_allows_less(unit):
    expected = Expected(sampled=Cost(40.0, 40.0), fixed=Cost(7.0, 7.0), once=Cost(3.0, 3.0))
    factors = []
    for promise in (0.0, 0.05, 0.1, 0.11, 0.2, 0.5, 1.0):
        account = Overhead(promise, planned_flops=500.0, planned_seconds=500.0, units=(unit,))
        factors.append(account.decide(expected, num_refreshes=3, min_factor=0.2).sample_factor)
    assert factors == sorted(factors) and factors[0] == 0.0 and factors[-1] == 1.0


@pytest.mark.parametrize("promise", [0.0, 0.03, 0.1, 0.4])
def test_a_run_that_obeys_every_decision_keeps_the_promise(promise):
    account = Overhead(promise, planned_flops=10_000.0)
    for round_number in range(20):
        account.observe(flops=500.0 * round_number, seconds=1.0 * round_number)
        usual = flops(sampled=90.0, fixed=10.0, once=30.0 if round_number == 0 else 0.0)
        decision = account.decide(usual, num_refreshes=20 - round_number, min_factor=0.3)
        if decision.is_allowed:
            cost = refresh(90.0 * decision.sample_factor, fixed=10.0, features=usual.once.flops)
            account.record(cost, num_labels=int(100 * decision.sample_factor))
    account.observe(flops=10_000.0, seconds=20.0)
    share = account.share()["flops"]
    assert share is not None and share <= promise * (1 + 1e-6)
    assert share >= 0.7 * min(promise, 0.203)  # and it is made use of, up to 20 whole refreshes
    assert account.report()["is_kept"] is True


def test_the_next_refresh_is_expected_to_cost_what_the_last_one_did_without_frozen_features():
    account = Overhead(0.1, planned_flops=1e6)
    assert account.expected(10) is None
    account.record(refresh(100.0, fixed=7.0, features=500.0, seconds=4.0), num_labels=20)
    assert account.expected(10, num_fixed=2) == Expected(sampled=Cost(50.0, 2.0), fixed=Cost(17.0, 0.4))
    account.record(refresh(100.0, fixed=7.0, features=500.0), num_labels=20, once=())
    assert account.expected(0).fixed.flops == 507.0


def test_a_look_at_the_drift_is_spent_and_changes_no_expectation():
    account = Overhead(0.1, planned_flops=1000.0)
    account.record(refresh(30.0), num_labels=3)
    before = account.expected(3)
    account.spend({"drift": {"flops": 5.0, "seconds": 1.0}})
    assert account.spent == Cost(35.0, 1.0) and account.expected(3) == before and account.num_refreshes == 1


def test_a_broken_promise_is_reported_with_its_reason():
    account = Overhead(0.1, planned_flops=1000.0)
    account.record(refresh(80.0))
    assert account.report()["is_kept"] is None  # there is no training to measure it by
    account.observe(flops=200.0, seconds=2.0)
    report = account.report()
    assert report["is_kept"] is False and "0.4 of the training so far" in report["why_not"] and "to its end" in report["why_not"]
    account.record(refresh(50.0))
    account.observe(flops=1000.0, seconds=10.0)
    assert account.report()["is_kept"] is False and "more than was expected" in account.report()["why_not"]
    json.dumps(report, allow_nan=False)


def test_an_account_goes_on_from_its_state():
    account = Overhead(0.1, planned_flops=1000.0)
    account.record(refresh(30.0, fixed=5.0, seconds=2.0), num_labels=10)
    account.observe(flops=300.0, seconds=9.0)
    other = Overhead(0.1, planned_flops=1000.0)
    other.load_state_dict(json.loads(json.dumps(account.state_dict())))
    assert other.report() == account.report() and other.expected(4) == account.expected(4)
    usual = flops(sampled=100.0, fixed=1.0)
    assert other.decide(usual, num_refreshes=2) == account.decide(usual, num_refreshes=2)
    account.reset()
    assert account.state_dict() == Overhead(0.1).state_dict()
    with pytest.raises(MismatchError, match="entries"):
        other.load_state_dict({"spent": {}})


def test_a_decision_survives_json():
    decision = Overhead(0.1, planned_flops=1000.0).decide(flops(sampled=300.0))
    assert Decision(**json.loads(json.dumps(decision.as_dict()))) == decision


def test_without_a_promise_everything_is_allowed_and_counted():
    account = Overhead(None, planned_flops=1.0)
    assert account.decide(flops(sampled=1e9)).sample_factor == 1.0
    account.record(refresh(1e9))
    account.observe(flops=1.0, seconds=1.0)
    assert account.share()["flops"] == 1e9 and account.report()["is_kept"] is None


@pytest.mark.parametrize(
    "options",
    [
        {"max_overhead": -0.1},
        {"max_overhead": float("nan")},
        {"max_overhead": float("inf")},
        {"max_overhead": True},
        {"planned_flops": -1.0},
        {"flops_per_second": 0.0},
        {"first_allowance": -1.0},
        {"units": ("hours",)},
    ],
)
def test_what_is_no_share_or_size_is_refused(options):
    with pytest.raises(InputError):
        Overhead(**options)
