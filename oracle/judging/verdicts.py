"""What `oracle.judge` finds: methods by judge by cost, as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from oracle.judging.datamodelling import Ceiling, Score
from oracle.judging.planted import Recovery
from oracle.judging.shares import ADDITION, BOTTOM, JUDGES, REMOVAL, TOP, Worth
from oracle.tables import aligned

MEAN = "(mean)"  # no target set can be called so
MIN_INTERVAL_SUBSETS = 8  # a bootstrap over fewer subsets draws the same few again and gives no interval
COST_KEYS = ("label_flops", "label_seconds", "num_tokens", "num_labelled", "prepare_flops", "prepare_seconds")


@dataclass(frozen=True)
class LabelCost:
    """What a method's labels cost.

    Attributes:
        passes_per_text: Counted FLOPs of labelling one text, in forward and backward passes over it.
        passes_with_preparing: The same with what was done once, shared by the texts that were labelled.
        seconds_per_text: Measured seconds of labelling one text.
    """

    passes_per_text: float
    passes_with_preparing: float
    seconds_per_text: float


@dataclass(frozen=True)
class Verdict:
    """What the judges say of one method's labels. A judge that was left out has nothing here.

    Attributes:
        lds: Target name -> linear datamodelling score.
        lds_mean: Mean of the scores over the targets.
        shares: Target name -> "removal" and "addition" -> "top" and "bottom" -> worth beside a random share.
        planted: Kind -> target name -> how well planted texts are found.
        cost: What the labels cost; None where they do not say.
        same_checkpoint: Whether they were measured at the weights and optimiser state judged; None where they do not say.
        same_target_texts: Whether they were measured on the target texts judged by; None where they do not say.
    """

    lds: dict[str, Score]
    lds_mean: Score | None
    shares: dict[str, dict[str, dict[str, Worth]]]
    planted: dict[str, dict[str, Recovery]]
    cost: LabelCost | None
    same_checkpoint: bool | None
    same_target_texts: bool | None


@dataclass(frozen=True)
class Judgement:
    """What the judges say of several methods, by the same retrained models.

    Attributes:
        methods: Method name -> verdict.
        target_names: The C targets.
        ceilings: Target name -> how high a linear datamodelling score can be.
        settings: Texts, subsets, seeds and shares that were used.
        cost: Number, FLOPs and seconds of the retrained models.
    """

    methods: dict[str, Verdict]
    target_names: list[str]
    ceilings: dict[str, Ceiling | None]
    settings: dict[str, Any]
    cost: dict[str, float]

    def table(self) -> str:
        """Return an aligned plain-text table, one row per method and target, and notes below it."""
        kinds = list(next(iter(self.methods.values())).planted)
        has_lds, has_shares = bool(self.ceilings), self.settings["share"] is not None
        header = ["method", "target", *(["lds", "95 % interval"] if has_lds else [])]
        header += [f"{judge} of {side}" for judge in JUDGES for side in (TOP, BOTTOM)] if has_shares else []
        lines = [[*header, *kinds, "passes per text"]]
        digits = self._digits()
        for name, verdict in self.methods.items():
            for target in [*self.target_names, *([MEAN] if has_lds and len(self.target_names) > 1 else [])]:
                cells = self._score_cells(verdict.lds_mean if target == MEAN else verdict.lds[target]) if has_lds else []
                cells += _share_cells(verdict.shares.get(target), digits) if has_shares else []
                cells += [_recovery_cell(verdict.planted[kind].get(target)) for kind in kinds]
                lines.append([name, target, *cells, "-" if verdict.cost is None else f"{verdict.cost.passes_per_text:.2f}"])
        for target, ceiling in self.ceilings.items():
            shown = "-" if ceiling is None else f"{ceiling.ceiling:.3f}"
            lines.append(["(ceiling)", target, shown, *("" for _ in lines[0][3:])])
        return "\n".join([aligned(lines, num_names=2), *self._notes(kinds)])

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; intervals of too few subsets are None."""
        return {
            "methods": {
                name: _verdict_as_dict(verdict, has_interval=self._has_interval()) for name, verdict in self.methods.items()
            },
            "ceilings": {name: None if ceiling is None else asdict(ceiling) for name, ceiling in self.ceilings.items()},
            "settings": self.settings,
            "cost": self.cost,
        }

    def _has_interval(self) -> bool:
        return bool(self.settings["num_subsets"] >= MIN_INTERVAL_SUBSETS)

    def _score_cells(self, score: Score | None) -> list[str]:
        assert score is not None
        return [f"{score.value:.3f}", f"{score.low:.2f} to {score.high:.2f}" if self._has_interval() else "-"]

    def _digits(self) -> int:
        """Decimals that show two digits of the largest worth of a share."""
        worths = [abs(worth.mean) for verdict in self.methods.values() for worth in _all_worths(verdict)]
        return max(0, 1 - int(np.floor(np.log10(max([*worths, 1e-9])))))

    def _notes(self, kinds: list[str]) -> list[str]:
        notes = []
        if self.ceilings and not self._has_interval():
            notes.append(f"{self.settings['num_subsets']} subsets give no interval; it takes {MIN_INTERVAL_SUBSETS}")
        notes += self._above_ceiling()
        if self.settings["share"] is not None:
            num_seeds = self.settings["num_seeds"]
            notes.append(
                f"{REMOVAL} and {ADDITION}: by how many nats the {100 * self.settings['share']:g} % of the texts lower the loss "
                "more than random ones do, "
                + (f"mean ± standard deviation of {num_seeds} seeds" if num_seeds > 1 else "with one seed, so without spread")
            )
        if kinds:
            notes.append(f"{', '.join(kinds)}: AUC/recall, and how many rank below their original")
        for name, verdict in self.methods.items():
            if verdict.same_checkpoint is False:
                notes.append(f"{name}: labels of another checkpoint")
            if verdict.same_target_texts is False:
                notes.append(f"{name}: labels of other target texts")
        return notes

    def _above_ceiling(self) -> list[str]:
        """Say where a score is higher than labels without error would be expected to reach."""
        above = [
            f"{name} on {target}"
            for name, verdict in self.methods.items()
            for target, score in verdict.lds.items()
            for ceiling in [self.ceilings.get(target)]
            if ceiling is not None and score.value > ceiling.ceiling
        ]
        if not above:
            return []
        return [
            f"above the ceiling: {', '.join(above)}; the ceiling is an estimate from these few models"
            ", and from target halves it leaves out the noise that labels of the same target texts share"
        ]


def label_cost(meta: Mapping[str, Any], *, forward_flops_per_token: float) -> LabelCost | None:
    """Read from a label set's meta what a text cost; None where it does not say.

    Args:
        meta: `Labels.meta`.
        forward_flops_per_token: Of the model that is judged; a backward pass costs twice a forward one.
    """
    cost = meta.get("cost", {})
    if any(key not in cost for key in COST_KEYS):
        return None
    labelling, preparing = cost["label_flops"], cost["prepare_flops"]
    one_pass = 3 * forward_flops_per_token * cost["num_tokens"]  # over all labelled texts
    passes = [flops / one_pass if flops else 0.0 for flops in (labelling, labelling + preparing)]
    return LabelCost(passes[0], passes[1], cost["label_seconds"] / cost["num_labelled"])


def _verdict_as_dict(verdict: Verdict, *, has_interval: bool) -> dict[str, Any]:
    def score_as_dict(score: Score) -> dict[str, float | None]:
        ends = (score.low, score.high) if has_interval else (None, None)
        return {"value": score.value, "low": ends[0], "high": ends[1]}

    return {
        "lds": {target: score_as_dict(score) for target, score in verdict.lds.items()},
        "lds_mean": None if verdict.lds_mean is None else score_as_dict(verdict.lds_mean),
        **{
            judge: {
                target: {
                    side: {"mean": worth.mean, "spread": worth.spread, "by_seed": list(worth.by_seed)}
                    for side, worth in found[judge].items()
                }
                for target, found in verdict.shares.items()
            }
            for judge in JUDGES
        },
        "planted": {
            kind: {target: asdict(found) for target, found in by_target.items()} for kind, by_target in verdict.planted.items()
        },
        "cost": None if verdict.cost is None else asdict(verdict.cost),
        "same_checkpoint": verdict.same_checkpoint,
        "same_target_texts": verdict.same_target_texts,
    }


def _all_worths(verdict: Verdict) -> list[Worth]:
    return [worth for found in verdict.shares.values() for by_side in found.values() for worth in by_side.values()]


def _share_cells(found: dict[str, dict[str, Worth]] | None, digits: int) -> list[str]:
    if found is None:
        return ["" for _ in range(2 * len(JUDGES))]
    worths = [found[judge][side] for judge in JUDGES for side in (TOP, BOTTOM)]
    return [f"{worth.mean:+.{digits}f}" + ("" if worth.spread is None else f" ±{worth.spread:.{digits}f}") for worth in worths]


def _recovery_cell(found: Recovery | None) -> str:
    if found is None:
        return ""
    figures = f"{found.auc:.2f}/{found.recall:.2f}"
    return figures if found.below_origin is None else f"{figures}, {found.below_origin:.2f}"
