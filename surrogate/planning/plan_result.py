"""`Plan`: what a run should do and will cost, as a table for people, as JSON, and as options of a `Refresher`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from oracle.errors import InputError
from surrogate.planning.cost_model import Sizes
from surrogate.planning.costs import Cost
from surrogate.planning.plan_reasons import rounded_up, shares
from surrogate.planning.plan_search import NUM_PROBE, Alternative, Choices


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do, what it will cost, and what else there was.

    Attributes:
        fits: Whether it keeps the promise; if not, this is the cheapest plan that is worth its cost.
        reason: What it costs, or why nothing fits and which `max_overhead` would do.
        remedy: What to do about that; "" where it fits.
        max_overhead: The promise.
        choices: Oracle, labels, refreshes, features and surrogate.
        costs: Cost of every stage over the whole run; 0 seconds of models where their speed is not known.
        overhead: All of it as a share of training, by unit; None where unknown.
        training: FLOPs and seconds of the training; 0 seconds where its speed is not known.
        spearman: Held-out agreement that was measured of the like elsewhere; None for what was not measured.
        alternatives: What was not chosen, and why.
        assumptions: What was assumed, in sentences.
        sizes: The numbers it was made from.
    """

    fits: bool
    reason: str
    remedy: str
    max_overhead: float
    choices: Choices
    costs: dict[str, Cost]
    overhead: dict[str, float | None]
    training: Cost
    spearman: float | None
    alternatives: list[Alternative]
    assumptions: list[str]
    sizes: Sizes
    proxy: Any = field(default=None, repr=False, compare=False)

    @property
    def smallest_max_overhead(self) -> float:
        """The smallest promise that this plan would keep, rounded up to three digits."""
        return rounded_up(max(share for share in self.overhead.values() if share is not None))

    def table(self) -> str:
        """Return the plan for people, a few lines of text."""
        chosen, sizes = self.choices, self.sizes
        head = [
            f"training: {sizes.training_tokens:,.0f} tokens, {self.training.flops:.3g} FLOPs; pool: {sizes.num_texts:,} texts of "
            f"{sizes.text_tokens:.0f} tokens; targets: {sizes.num_targets} of {sizes.target_tokens:,.0f} tokens in all",
            f"{'plan' if self.fits else 'NO PLAN FITS; the cheapest'}: {chosen.method}, {chosen.sample_size} labels at each of "
            f"{chosen.num_refreshes} refreshes (every {chosen.refresh_every} of {sizes.num_rounds} rounds of "
            f"{sizes.training_tokens / sizes.num_rounds:,.0f} tokens), {chosen.features}, "
            f"{chosen.surrogate}; expected Spearman {_number(self.spearman)}",
            self.reason,
            f"{'stage':<28}{'FLOPs':>10}{'share':>9}{'seconds':>10}{'share':>9}",
        ]
        rows = {**self.costs, "in all": sum(self.costs.values(), Cost())}
        stages = [
            f"{name:<28}{cost.flops:>10.2e}{_percent(cost.flops, self.training.flops):>9}"
            f"{_seconds(self.seconds(cost)):>10}{_percent(cost.seconds, self.training.seconds):>9}"
            for name, cost in rows.items()
        ]
        others = [f"- {other.what}{_in_brackets(other)}: {other.reason}" for other in self.alternatives]
        assumed = [f"- {assumption}" for assumption in self.assumptions]
        return "\n".join([*head, *stages, "not chosen:", *others, "assumed:", *assumed])

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        stages = {name: {"flops": cost.flops, "seconds": self.seconds(cost)} for name, cost in self.costs.items()}
        total = sum(self.costs.values(), Cost())
        return {
            "fits": self.fits,
            "reason": self.reason,
            "remedy": self.remedy,
            "max_overhead": self.max_overhead,
            "overhead": self.overhead,
            **asdict(self.choices),
            "num_probe": self.choices.num_probe,
            "round_tokens": self.sizes.training_tokens / self.sizes.num_rounds,
            "expected_spearman": self.spearman,
            "stages": stages,
            "total": {"flops": total.flops, "seconds": self.seconds(total)},
            "training": {"flops": self.training.flops, "seconds": self.seconds(self.training)},
            "alternatives": [asdict(other) for other in self.alternatives],
            "assumptions": self.assumptions,
            "sizes": asdict(self.sizes),
        }

    def seconds(self, cost: Cost) -> float | None:
        """Seconds of a cost; None where a model takes part in it and the speed of training is not known."""
        return None if cost.flops and not self.training.seconds else cost.seconds

    def refresher_options(self, *, targets: Any = None) -> dict[str, Any]:
        """Return keyword arguments for `Refresher`.

        Args:
            targets: The target sets, for the features of a proxy model; None leaves its influence on them out.

        Raises:
            InputError: The plan does not fit, or the proxy model was given by its size only.
        """
        chosen = self.choices
        if not self.fits:
            raise InputError(f"{self.reason}.", "a plan that fits", f"{self.remedy}, and plan again.")
        options: dict[str, Any] = {
            "method": chosen.method,
            "sample_size": chosen.sample_size,
            "encoder": [self._encoder(name, targets) for name in chosen.encoder],
            "surrogate": chosen.surrogate,
            "num_rounds": self.sizes.num_rounds,
            "max_overhead": self.max_overhead,
        }
        if chosen.second_encoder:
            options["second_encoder"] = [self._encoder(name, targets) for name in chosen.second_encoder]
            options["second_share"] = chosen.second_share
        if chosen.num_refreshes == 1:
            return {"strategy": "static", **options}
        return {"strategy": "refresh", "refresh_every": chosen.refresh_every, "num_probe": NUM_PROBE, **options}

    def _encoder(self, name: str, targets: Any) -> Any:
        if name != "proxy":
            return name
        if isinstance(self.proxy, (int, float)):
            raise InputError(
                f"the plan has features of a proxy model of {self.proxy:g} parameters, and no such model.",
                "proxy=<LanguageModel, folder or hub name>",
                "plan with the proxy model itself.",
            )
        from surrogate.features.model_state import ModelState

        return ModelState(model=str(self.proxy) if isinstance(self.proxy, Path) else self.proxy, targets=targets)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def _in_brackets(other: Alternative) -> str:
    return f" ({shares(other.share)}, Spearman {_number(other.spearman)})" if other.share else ""


def _seconds(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}"


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole else "?"
