"""What selecting costs, beside the training that it serves: counted, and kept within a promised share.

`max_overhead` is a promise over the whole run, in FLOPs and in seconds: what was spent so far and what the next
refresh is expected to cost stay within that share of the planned training. Where the length of the training is not
known, they stay within that share of the training so far and of the round that comes next; the first refresh may then
cost as much as `first_allowance` of that round, a debt that training has to pay back before the next refresh.

FLOPs are counted, so what they decide is the same in every run. Seconds are measured. A decision that they took is
not repeatable: whoever asks for one keeps it (`Decision.as_dict`) and takes the kept one when the run is resumed.
Until a training step was timed, and without `flops_per_second` or `planned_seconds`, seconds decide nothing.

All figures are of the whole run: where several processes work, their FLOPs and seconds are summed on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from oracle.errors import MismatchError, check_at_least, check_choice
from surrogate.planning.costs import ROUNDING, UNIT_NAMES, UNITS, Cost, Decision, Expected, check_share, is_within


class Overhead:
    """The account of one run.

    Args:
        max_overhead: The promised share of training FLOPs and of training seconds; None counts and forbids nothing.
        planned_flops: FLOPs of the whole training, where its length is known.
        planned_seconds: Its seconds, as far as is known before it began; measured seconds take over.
        flops_per_second: Speed of training, as far as is known before it began; as above.
        first_allowance: Where the length is not known: what the first refresh may cost, as a share of the coming round.
        units: Which of "flops" and "seconds" the promise is about.

    Raises:
        InputError: A number is negative or none, or a unit is not known.

    Example:
        >>> account = Overhead(0.1, planned_flops=1000.0)
        >>> account.decide(Expected(sampled=Cost(flops=80.0), fixed=Cost(flops=10.0))).sample_factor
        1.0
        >>> account.record({"label": {"flops": 80.0, "seconds": 1.0}, "targets": {"flops": 10.0}}, num_labels=20).flops
        90.0
        >>> account.allowed(Cost(flops=11.0))[0]
        False
    """

    def __init__(
        self,
        max_overhead: float | None = 0.1,
        *,
        planned_flops: float | None = None,
        planned_seconds: float | None = None,
        flops_per_second: float | None = None,
        first_allowance: float = 0.5,
        units: Sequence[str] = UNITS,
    ) -> None:
        if max_overhead is not None:
            check_share("max_overhead", max_overhead)
        check_share("first_allowance", first_allowance)
        for unit in units:
            check_choice("units", unit, UNITS)
        for name, value in (("planned_flops", planned_flops), ("planned_seconds", planned_seconds)):
            if value is not None:
                check_at_least(name, value, 0)
        if flops_per_second is not None:
            check_at_least("flops_per_second", flops_per_second, 1e-30)
        self.max_overhead, self.first_allowance, self.units = max_overhead, first_allowance, tuple(units)
        self.planned_flops, self.planned_seconds, self.flops_per_second = planned_flops, planned_seconds, flops_per_second
        self.reset()

    # ------------------------------------------------------------------ what happened

    def record(
        self,
        costs: Mapping[str, Mapping[str, float]],
        *,
        num_labels: int = 0,
        sampled: Collection[str] = ("label",),
        once: Collection[str] = ("features", "rest"),
    ) -> Cost:
        """Add what a refresh cost, by stage, and expect the like of the next; return the sum.

        Args:
            costs: Stage -> `flops` and `seconds`, as in `Ranking.costs`.
            num_labels: How many labels were measured in it.
            sampled: Stages whose cost grows with the number of labels.
            once: Stages that are not paid again; of live features leave it empty.
        """
        self.num_refreshes += 1
        self._fixed = Cost.of_stages(costs, set(costs) - set(once) - (set(sampled) if num_labels else set()))
        if num_labels:
            self._per_label = Cost.of_stages(costs, sampled).times(1 / num_labels)
        return self.spend(costs)

    def spend(self, costs: Mapping[str, Mapping[str, float]]) -> Cost:
        """Add costs that say nothing of the next refresh: a look at the drift, a refresh that failed; return the sum."""
        total = Cost.of_stages(costs)
        self.spent += total
        for name in costs:
            self.stages[name] = self.stages.get(name, Cost()) + Cost.of_stages(costs, (name,))
        return total

    def observe(self, *, flops: float, seconds: float, planned_flops: float | None = None) -> None:
        """Say how much training there was so far, in all, without the time of refreshes; and how much there will be, if known."""
        check_at_least("flops", flops, 0)
        check_at_least("seconds", seconds, 0)
        self.trained = Cost(float(flops), float(seconds))
        if planned_flops is not None:
            check_at_least("planned_flops", planned_flops, 0)
            self.planned_flops = planned_flops

    def reset(self) -> None:
        """Forget all that was recorded and observed, so that the rounds of another checkpoint can be recorded again."""
        self.spent, self.trained = Cost(), Cost()
        self.stages: dict[str, Cost] = {}
        self.num_refreshes = 0
        self._per_label, self._fixed = Cost(), Cost()

    def expected(self, num_labels: int, *, num_fixed: int = 0) -> Expected | None:
        """What a refresh would cost by the measure of the last one; None before the first.

        Args:
            num_labels: The usual number of labels of a sample, which may be made smaller.
            num_fixed: Labels beside it, of which there are never fewer: those of a probe set, or of a whole pool.
        """
        if not self.num_refreshes:
            return None
        return Expected(self._per_label.times(num_labels), self._fixed + self._per_label.times(num_fixed))

    # ------------------------------------------------------------------ what may happen

    def allowed(self, cost: Cost, *, coming_flops: float = 0.0) -> tuple[bool, str]:
        """Say whether a refresh of this cost keeps the promise, and why.

        Args:
            cost: What it is expected to cost.
            coming_flops: Training FLOPs of the round that it is for.
        """
        decision = self.decide(Expected(fixed=cost), coming_flops=coming_flops)
        return decision.is_allowed, decision.reason

    def sample_factor(self, expected: Expected, *, coming_flops: float = 0.0, num_refreshes: int = 1) -> float:
        """Share of the labels, up to 1, with which this and all later refreshes fit; 0 where not even without any."""
        return max(self._factor(expected, coming_flops=coming_flops, num_refreshes=num_refreshes)[0], 0.0)

    def decide(
        self, expected: Expected, *, coming_flops: float = 0.0, num_refreshes: int = 1, min_factor: float = 0.0
    ) -> Decision:
        """Decide on a refresh.

        What is left is shared equally among the refreshes to come. Where that is too little for `min_factor` of the
        labels, this refresh may take of theirs, so far as that needs.

        Args:
            expected: What it would cost with the usual number of labels.
            coming_flops: Training FLOPs of the round that it is for.
            num_refreshes: How many refreshes are still to come, this one among them.
            min_factor: With a smaller share of the labels it would not be worth its cost.
        """
        check_at_least("num_refreshes", num_refreshes, 1)
        check_share("min_factor", min_factor)
        if self.max_overhead is None:
            told = "allowed: costs are counted and not limited (no max_overhead)"
            return Decision(True, 1.0, told, flops=expected.total().flops)
        factor, unit = self._factor(expected, coming_flops=coming_flops, num_refreshes=num_refreshes)
        note = ""
        if factor <= 0 or factor < min_factor:
            alone, unit = self._factor(expected, coming_flops=coming_flops, num_refreshes=1)
            if alone <= 0 or alone < min_factor:
                return Decision(False, 0.0, f"refused: {self._figures(expected.total(min_factor), unit, coming_flops)}", unit)
            factor, note = min_factor or alone, ", taken from later refreshes"
        cost = expected.total(factor)
        labels = f" with {factor:.0%} of its labels{note}" if factor < 1 else ""
        figures = self._figures(cost, unit or self._tightest(cost, coming_flops), coming_flops)
        return Decision(True, factor, f"allowed{labels}: {figures}", unit if factor < 1 else "", cost.flops)

    # ------------------------------------------------------------------ reports

    def share(self, *, of: str = "trained") -> dict[str, float | None]:
        """What was spent as a share of the training so far ("trained") or of all of it ("planned"); None where unknown."""
        check_choice("of", of, ("trained", "planned"))
        basis = {unit: getattr(self.trained, unit) for unit in UNITS} if of == "trained" else self._planned()
        return {unit: getattr(self.spent, unit) / value if (value := basis[unit]) else None for unit in UNITS}

    def report(self) -> dict[str, Any]:
        """Spent, trained and shares as JSON values; `is_kept` over the training so far, and where not, why not yet."""
        shares = self.share()
        known = {unit: share for unit in self.units if (share := shares[unit]) is not None and self.max_overhead is not None}
        broken = [unit for unit, share in known.items() if not is_within(share, self.max_overhead or 0.0)]
        return {
            "max_overhead": self.max_overhead,
            "spent": asdict(self.spent),
            "stages": {name: asdict(cost) for name, cost in self.stages.items()},
            "trained": asdict(self.trained),
            "share_of_training_so_far": shares,
            "share_of_planned_training": self.share(of="planned"),
            "num_refreshes": self.num_refreshes,
            "is_kept": not broken if known else None,
            "why_not": " ".join(self._why_not(unit) for unit in broken),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that was recorded, as JSON values; settings are those of the constructor."""
        costs = {"spent": self.spent, "trained": self.trained, "per_label": self._per_label, "fixed": self._fixed}
        return {
            **{name: asdict(cost) for name, cost in costs.items()},
            "stages": {name: asdict(cost) for name, cost in self.stages.items()},
            "num_refreshes": self.num_refreshes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            MismatchError: These are not the values of such an account.
        """
        if set(state) != set(self.state_dict()):
            raise MismatchError(
                f"an account of overhead has the entries {', '.join(sorted(state))}.",
                ", ".join(sorted(self.state_dict())),
                "pass what Overhead.state_dict returned.",
            )
        self.spent, self.trained = Cost(**state["spent"]), Cost(**state["trained"])
        self._per_label, self._fixed = Cost(**state["per_label"]), Cost(**state["fixed"])
        self.stages = {name: Cost(**cost) for name, cost in state["stages"].items()}
        self.num_refreshes = int(state["num_refreshes"])

    # ------------------------------------------------------------------ arithmetic

    def _rate(self) -> float | None:
        """FLOPs per second of training, measured if there was any."""
        if self.trained.flops > 0 and self.trained.seconds > 0:
            return self.trained.flops / self.trained.seconds
        return self.flops_per_second

    def _planned(self) -> dict[str, float | None]:
        """The whole training; never less than there already was."""
        rate = self._rate()
        seconds = self.planned_seconds
        if self.planned_flops is not None and rate is not None and (self.trained.seconds > 0 or seconds is None):
            seconds = self.planned_flops / rate
        planned = {"flops": self.planned_flops, "seconds": seconds}
        return {unit: None if value is None else max(value, getattr(self.trained, unit)) for unit, value in planned.items()}

    def _limits(self, coming_flops: float) -> dict[str, float]:
        """What may be spent in all, by unit; a unit that cannot be judged yet is left out."""
        assert self.max_overhead is not None
        planned, rate = self._planned(), self._rate()
        limits: dict[str, float] = {}
        for unit in self.units:
            coming = coming_flops if unit == "flops" else (None if rate is None else coming_flops / rate)
            if (value := planned[unit]) is not None:
                limits[unit] = self.max_overhead * value
            elif coming is not None:
                limits[unit] = self.max_overhead * (getattr(self.trained, unit) + coming)
                if self.num_refreshes == 0:
                    limits[unit] = max(limits[unit], self.first_allowance * coming)
        return limits

    def _factor(self, expected: Expected, *, coming_flops: float, num_refreshes: int) -> tuple[float, str]:
        """Largest share of the labels that fits, -1 where not even none does, and the unit that made it less than 1."""
        factor, binding = 1.0, ""
        for unit, limit in self._limits(coming_flops).items():
            left = limit * (1 + ROUNDING) - getattr(self.spent, unit) - getattr(expected.once, unit)
            left = left / num_refreshes - getattr(expected.fixed, unit)
            sampled = getattr(expected.sampled, unit)
            own = -1.0 if left < 0 else (left / sampled if sampled > 0 else math.inf)
            if own < factor:
                factor, binding = own, unit
        return factor, binding

    def _tightest(self, cost: Cost, coming_flops: float) -> str:
        """The unit of which the largest part would be used up."""
        limits = {unit: limit for unit, limit in self._limits(coming_flops).items() if limit > 0}
        return max(limits, key=lambda unit: getattr(self.spent + cost, unit) / limits[unit], default="")

    def _figures(self, cost: Cost, unit: str, coming_flops: float) -> str:
        if not unit:
            return "nothing limits it before a training step was timed"
        spent, limit = getattr(self.spent, unit), self._limits(coming_flops)[unit]
        sums = f"{spent:.3g} {UNIT_NAMES[unit]} spent and {getattr(cost, unit):.3g} for this refresh, of {limit:.3g}"
        if self._planned()[unit] is not None:
            return f"{sums} ({self.max_overhead:.3g} of the planned training)"
        if self.num_refreshes == 0 and self.first_allowance > (self.max_overhead or 0.0):
            return f"{sums} (of unknown length, training pays back a first refresh of {self.first_allowance:.3g} of its round)"
        return f"{sums} ({self.max_overhead:.3g} of the training so far and of the coming round)"

    def _why_not(self, unit: str) -> str:
        """Say in one sentence why the promise is not kept over the training so far."""
        planned = self.share(of="planned")[unit]
        text = f"{self.share()[unit]:.3g} of the training so far went into selecting, by {UNIT_NAMES[unit]}"
        if planned is not None and is_within(planned, self.max_overhead or 0.0):
            return f"{text}; it is {planned:.3g} of the planned training, so the promise is kept if that is done to its end."
        if not self.num_refreshes:
            return f"{text}, without a refresh: that is what looking at the model, choosing and writing took."
        if self.num_refreshes == 1:
            return f"{text}; the first refresh came before there was training to measure it by."
        return f"{text}; refreshes cost more than was expected of them, or the training is shorter than was planned."
