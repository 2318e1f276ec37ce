"""Measure how much training texts help a language model.

The public names below are loaded on first use, so that `import oracle` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oracle.calibration import calibrate as calibrate
    from oracle.comparison import agreement as agreement
    from oracle.comparison import noise_ceiling as noise_ceiling
    from oracle.gradients.curvature import fit_factors as fit_factors
    from oracle.judging.judge import judge as judge
    from oracle.judging.planted import plant as plant
    from oracle.judging.retraining import retrain as retrain
    from oracle.labels import Labels as Labels
    from oracle.language_model import LanguageModel as LanguageModel
    from oracle.measure import label as label
    from oracle.measure import method_names as method_names
    from oracle.several_checkpoints import label_checkpoints as label_checkpoints
    from oracle.targets import read_targets as read_targets
    from oracle.texts import read_report as read_report
    from oracle.texts import read_texts as read_texts

_HOMES = {
    "LanguageModel": "oracle.language_model",
    "Labels": "oracle.labels",
    "label": "oracle.measure",
    "method_names": "oracle.measure",
    "label_checkpoints": "oracle.several_checkpoints",
    "fit_factors": "oracle.gradients.curvature",
    "calibrate": "oracle.calibration",
    "agreement": "oracle.comparison",
    "noise_ceiling": "oracle.comparison",
    "judge": "oracle.judging.judge",
    "plant": "oracle.judging.planted",
    "retrain": "oracle.judging.retraining",
    "read_texts": "oracle.texts",
    "read_report": "oracle.texts",
    "read_targets": "oracle.targets",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'oracle' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
