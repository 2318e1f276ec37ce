"""Costs in FLOPs and seconds, what a refresh is expected to cost, and what was decided on it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from oracle.errors import InputError, check_at_least

UNITS = ("flops", "seconds")
UNIT_NAMES = {"flops": "FLOPs", "seconds": "seconds"}
ROUNDING = 1e-9  # share of a limit by which sums of floats may pass it


@dataclass(frozen=True)
class Cost:
    """Counted FLOPs and measured seconds."""

    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.seconds + other.seconds)

    def times(self, factor: float) -> Cost:
        """Return this cost so many times."""
        return Cost(self.flops * factor, self.seconds * factor)

    @classmethod
    def of_stages(cls, stages: Mapping[str, Mapping[str, float]], names: Collection[str] | None = None) -> Cost:
        """Sum the stages of a ranking, all of them or those that are named."""
        chosen = [cost for name, cost in stages.items() if names is None or name in names]
        return cls(*(float(sum(cost.get(unit, 0.0) for cost in chosen)) for unit in UNITS))


@dataclass(frozen=True)
class Expected:
    """What a refresh is expected to cost.

    Attributes:
        sampled: What grows with the number of labels, for the usual number of them. Seconds that are not known are 0.
        fixed: What every refresh costs, whatever its sample: target gradients, fitting, scoring.
        once: What only this refresh pays: features of frozen encoders that are not in the cache yet.
    """

    sampled: Cost = Cost()
    fixed: Cost = Cost()
    once: Cost = Cost()

    def total(self, factor: float = 1.0) -> Cost:
        """Return the whole cost with this share of the labels."""
        return self.sampled.times(factor) + self.fixed + self.once


@dataclass(frozen=True)
class Decision:
    """Whether there is a refresh now.

    Attributes:
        is_allowed: Whether it keeps the promise.
        sample_factor: Share of the usual number of labels that fits; 0 where there is no refresh.
        reason: Why, with the figures, in one sentence.
        unit: "flops" or "seconds" where one of them made the sample smaller or forbade the refresh, else "".
        flops: What it is expected to take, with this share of the labels.
    """

    is_allowed: bool
    sample_factor: float
    reason: str
    unit: str = ""
    flops: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values; `Decision(**values)` is the way back."""
        return asdict(self)


def check_share(name: str, value: float) -> None:
    """Raise `InputError` unless `value` is a finite number of at least 0."""
    check_at_least(name, value, 0)
    if not math.isfinite(value):
        raise InputError(f"{name}={value!r}.", "a finite share, such as 0.1", f"pass such a share for {name}.")


def is_within(value: float, limit: float) -> bool:
    """Whether a sum of floats keeps a limit."""
    return value <= limit * (1 + ROUNDING)
