"""Predict how much training texts help a language model, score whole pools, and select.

The public names below are loaded on first use, so that `import surrogate` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surrogate.distilling import distil as distil
    from surrogate.feature_cache import FeatureCache as FeatureCache
    from surrogate.models.network import InfluenceNetwork as InfluenceNetwork
    from surrogate.models.ridge import RidgeSurrogate as RidgeSurrogate
    from surrogate.models.trees import InfluenceTrees as InfluenceTrees
    from surrogate.pipeline import Run as Run
    from surrogate.predictor import InfluencePredictor as InfluencePredictor
    from surrogate.scores import Scores as Scores
    from surrogate.scoring.corpus import score_corpus as score_corpus
    from surrogate.scoring.scored_corpus import ScoredCorpus as ScoredCorpus
    from surrogate.scoring.selecting import select_corpus as select_corpus
    from surrogate.selection import Budget as Budget
    from surrogate.selection import Selection as Selection
    from surrogate.selection import select as select

_HOMES = {
    "InfluencePredictor": "surrogate.predictor",
    "distil": "surrogate.distilling",
    "InfluenceNetwork": "surrogate.models.network",
    "InfluenceTrees": "surrogate.models.trees",
    "RidgeSurrogate": "surrogate.models.ridge",
    "FeatureCache": "surrogate.feature_cache",
    "Run": "surrogate.pipeline",
    "Scores": "surrogate.scores",
    "score_corpus": "surrogate.scoring.corpus",
    "ScoredCorpus": "surrogate.scoring.scored_corpus",
    "select_corpus": "surrogate.scoring.selecting",
    "Budget": "surrogate.selection",
    "Selection": "surrogate.selection",
    "select": "surrogate.selection",
}
_SUBPACKAGES = ("attribution", "scoring", "training")
__all__ = sorted([*_HOMES, *_SUBPACKAGES])


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"surrogate.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'surrogate' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
