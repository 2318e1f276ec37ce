"""Measure how much training texts help a language model.

The public names below are loaded on first use, so that `import oracle` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oracle.comparison import agreement as agreement
    from oracle.comparison import noise_ceiling as noise_ceiling
    from oracle.labels import Labels as Labels
    from oracle.language_model import LanguageModel as LanguageModel
    from oracle.measure import label as label
    from oracle.measure import method_names as method_names
    from oracle.targets import read_targets as read_targets
    from oracle.texts import read_report as read_report
    from oracle.texts import read_texts as read_texts

_HOMES = {
    "LanguageModel": "oracle.language_model",
    "Labels": "oracle.labels",
    "label": "oracle.measure",
    "method_names": "oracle.measure",
    "agreement": "oracle.comparison",
    "noise_ceiling": "oracle.comparison",
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
