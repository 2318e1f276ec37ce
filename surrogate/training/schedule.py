"""When the pool is ranked anew: on schedule, by drift, and only as far as the overhead allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oracle.errors import InputError, check_at_least, check_count
from surrogate.planning.costs import Decision, Expected
from surrogate.planning.overhead import Overhead

MIN_LABELS = 200  # a refresh with fewer is not worth its cost


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When to refresh.

    Attributes:
        refresh_every: Rounds from one refresh to the next, or from one look at the drift to the next.
        drift_threshold: Refresh only when the stale scores' agreement with fresh labels has fallen below this share of what
            it was; None refreshes on schedule.
        first_selected: First round that is selected; those before it get texts at random.
        num_rounds: How many rounds there will be; None where that is not known.
    """

    refresh_every: int = 1
    drift_threshold: float | None = None
    first_selected: int = 0
    num_rounds: int | None = None

    @classmethod
    def make(
        cls,
        *,
        refresh_every: int,
        drift_threshold: float | None,
        warmup_fraction: float,
        final_fraction: float | None,
        num_rounds: int | None,
    ) -> Schedule:
        """Check the options of a refresher.

        Raises:
            InputError: One of them cannot be used.
        """
        check_count("refresh_every", refresh_every)
        for name, value in (("warmup_fraction", warmup_fraction), ("final_fraction", final_fraction)):
            if value is not None:
                check_at_least(name, value, 0)
                if value > 1:
                    raise InputError(f"{name}={value!r}.", "a share from 0 to 1", f"pass for example {name}=0.2.")
        if drift_threshold is not None:
            check_at_least("drift_threshold", drift_threshold, 0)
        if drift_threshold is not None and not 0 < drift_threshold <= 1:
            raise InputError(f"drift_threshold={drift_threshold!r}.", "a share above 0 and up to 1", "pass for example 0.8.")
        if num_rounds is not None:
            check_count("num_rounds", num_rounds)
        if warmup_fraction and final_fraction is not None:
            raise InputError(
                f"warmup_fraction={warmup_fraction!r} and final_fraction={final_fraction!r}.",
                "one of the two",
                "say either how much is trained on random texts first, or in how much at the end texts are selected.",
            )
        share = warmup_fraction if final_fraction is None else 1 - final_fraction
        if share > 0 and num_rounds is None:
            raise InputError(
                f"warmup_fraction={warmup_fraction!r}, final_fraction={final_fraction!r}, and no number of rounds.",
                "the number of rounds beside such a share",
                "pass num_rounds=... beside it.",
            )
        first = math.ceil(share * (num_rounds or 0) - 1e-9)
        if num_rounds and share < 1:  # few rounds: what is asked for is at least one of them
            first = min(first, num_rounds - 1)
        return cls(refresh_every=refresh_every, drift_threshold=drift_threshold, first_selected=first, num_rounds=num_rounds)

    def why_not(self, index: int, *, ranked_in: int | None, strategy: Any) -> str:
        """Say why round `index` begins without a new ranking; "" where one is due.

        Args:
            index: The round.
            ranked_in: Round in which the present ranking was made; None where there is none of use.
            strategy: The strategy; one that draws anew does so in every round.
        """
        if index < self.first_selected:
            return f"random texts until round {self.first_selected}"
        if ranked_in is None:
            return ""
        if not strategy.adapts:
            return f"{strategy.plugin_name} ranks once"
        is_due = strategy.redraws or (index - ranked_in) % self.refresh_every == 0
        return "" if is_due else f"refreshed every {self.refresh_every} rounds"

    def afford(
        self, index: int, account: Overhead, expected: Expected, *, sample_size: int, adapts: bool, coming_flops: float
    ) -> Decision:
        """Say whether a refresh at round `index` keeps the promise, and with which share of its labels.

        Args:
            index: The round.
            account: What was spent and promised.
            expected: What the refresh is expected to cost.
            sample_size: Its usual number of labels; 0 for a strategy without labels.
            adapts: Whether more refreshes will follow.
            coming_flops: Training FLOPs of the round.
        """
        left = self.num_rounds - index if self.num_rounds is not None and adapts else 1
        return account.decide(
            expected,
            coming_flops=coming_flops,
            num_refreshes=max(math.ceil(left / self.refresh_every), 1),
            min_factor=min(MIN_LABELS / sample_size, 1.0) if sample_size else 0.0,
        )

    def has_drifted(self, found: Mapping[str, Any]) -> tuple[bool, str]:
        """Say whether what `agreement_now` found calls for a refresh, and why."""
        assert self.drift_threshold is not None
        now, then = found["scores"], found["scores_then"]
        told = f"scores agree {now:.2f} with fresh labels of the probe, {then:.2f} at the last refresh"
        if then <= 0:  # nothing to fall from, and nothing worth keeping
            return True, f"{told}: they never agreed"
        is_past = now < self.drift_threshold * then
        return is_past, f"{told}: {'below' if is_past else 'not below'} {self.drift_threshold:g} of it"


def drift_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the table of rounds says of the drift: 1 minus the rank agreement of the probe's labels then and now."""
    return {"labels": 1 - found["labels"], "scores_agree": found["scores"], "scores_agreed": found["scores_then"]}
