"""Tree attribution: which training rows of a LightGBM model moved a prediction or its loss.

The public names below are loaded on first use, so that importing the package stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surrogate.attribution.boostin import BoostIn as BoostIn
    from surrogate.attribution.label_suspects import LabelSuspects as LabelSuspects
    from surrogate.attribution.label_suspects import label_suspects as label_suspects
    from surrogate.attribution.leaf_contributions import LeafContributions as LeafContributions
    from surrogate.attribution.leaf_influence import LeafInfluence as LeafInfluence
    from surrogate.attribution.leaf_refit import LeafRefit as LeafRefit
    from surrogate.attribution.leaf_similarity import LeafSimilarity as LeafSimilarity
    from surrogate.attribution.leave_one_out import LeaveOneOut as LeaveOneOut
    from surrogate.attribution.top_rows import TopRows as TopRows
    from surrogate.attribution.trex import TREX as TREX

_HOMES = {
    "BoostIn": "surrogate.attribution.boostin",
    "LabelSuspects": "surrogate.attribution.label_suspects",
    "label_suspects": "surrogate.attribution.label_suspects",
    "LeafContributions": "surrogate.attribution.leaf_contributions",
    "LeafInfluence": "surrogate.attribution.leaf_influence",
    "LeafRefit": "surrogate.attribution.leaf_refit",
    "LeafSimilarity": "surrogate.attribution.leaf_similarity",
    "LeaveOneOut": "surrogate.attribution.leave_one_out",
    "TREX": "surrogate.attribution.trex",
    "TopRows": "surrogate.attribution.top_rows",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surrogate.attribution' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
