"""What a refresh cost, by stage, over all processes that took part.

What one process does while the others wait costs all of them: its seconds count as often as there are processes. So do
those of target gradients, which each process makes for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from oracle.artifacts import read_json, write_json
from oracle.labels import Labels
from oracle.texts import list_text_ids
from surrogate.training.strategies import RankingContext

if TYPE_CHECKING:
    from surrogate.predictor import InfluencePredictor

FEATURE_COSTS_FILE = "feature_costs.json"


def label_costs(labels: Labels, *, num_processes: int) -> dict[str, dict[str, float]]:
    """Return the stages of labelling: `targets`, what was done once in each process, and `label`, summed over all of them."""
    cost = labels.meta["cost"]
    return {
        "targets": {unit: float(cost[f"prepare_{unit}"]) * num_processes for unit in ("seconds", "flops")},
        "label": {unit: float(cost[f"label_{unit}"]) for unit in ("seconds", "flops")},
    }


def ranking_costs(
    context: RankingContext, labels: Labels, predictors: Sequence[InfluencePredictor], *, seconds: float
) -> dict[str, dict[str, float]]:
    """Return the stages of a refresh.

    Args:
        context: What the strategy was asked with.
        labels: The labels that were measured.
        predictors: What was fitted on them.
        seconds: Of features, fitting and scoring on the first process.
    """
    features = _feature_costs(context, [encoder for predictor in predictors for encoder in predictor.encoders])
    fit_seconds = sum(predictor.cost_[key] for predictor in predictors for key in ("fit_seconds", "crossfit_seconds"))
    score_seconds = max(seconds - fit_seconds - features["seconds"], 0.0)
    on_first = {
        "features": features,
        "fit": {"seconds": fit_seconds, "flops": 0.0},
        "score": {"seconds": score_seconds, "flops": 0.0},
    }
    for cost in on_first.values():
        cost["seconds"] *= context.num_processes
    return {**label_costs(labels, num_processes=context.num_processes), **on_first}


def _feature_costs(context: RankingContext, encoders: Sequence[Any]) -> dict[str, float]:
    """What the features of this refresh took: of frozen encoders what came to the cache since the refresh before.

    Other runs may share the cache; only the texts of this pool count.
    """
    text_ids = list_text_ids(context.pool)
    totals = {encoder.key(): context.cache.cost(encoder, text_ids) for encoder in encoders}
    write_json(context.folder / FEATURE_COSTS_FILE, totals)
    before = read_json(context.earlier[-1] / FEATURE_COSTS_FILE) if context.earlier else {}
    return {
        unit: sum(total[unit] - before.get(key, {}).get(unit, 0.0) for key, total in totals.items())
        for unit in ("seconds", "flops")
    }
