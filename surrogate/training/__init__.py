"""Training on a selection that is refreshed: the framework-free `Refresher`, and what puts it into a training loop.

The public names below are loaded on first use: `Rounds` for a plain PyTorch loop, `InfluenceCallback` for the Hugging Face
Trainer, `SelectedDataset` and `SelectedSampler` for loaders of one's own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surrogate.label_next import what_to_label_next as what_to_label_next
    from surrogate.planning.planner import plan as plan
    from surrogate.training.callback import InfluenceCallback as InfluenceCallback
    from surrogate.training.refresher import Refresher as Refresher
    from surrogate.training.rounds import Rounds as Rounds
    from surrogate.training.selected_dataset import SelectedDataset as SelectedDataset
    from surrogate.training.selected_dataset import SelectedSampler as SelectedSampler
    from surrogate.training.streaming import StreamRefresher as StreamRefresher
    from surrogate.training.weight_average import WeightAverage as WeightAverage

_HOMES = {
    "InfluenceCallback": "surrogate.training.callback",
    "Refresher": "surrogate.training.refresher",
    "Rounds": "surrogate.training.rounds",
    "SelectedDataset": "surrogate.training.selected_dataset",
    "SelectedSampler": "surrogate.training.selected_dataset",
    "StreamRefresher": "surrogate.training.streaming",
    "WeightAverage": "surrogate.training.weight_average",
    "plan": "surrogate.planning.planner",
    "what_to_label_next": "surrogate.label_next",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surrogate.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
