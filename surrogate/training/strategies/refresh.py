"""Label, fit and score again at today's checkpoint: model-aware selection as in MATES."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surrogate.training.labelled_ranking import LabelledRanking


@dataclass(kw_only=True)
class Refresh(LabelledRanking):
    """Labels of a fresh sample and a surrogate's scores, again at every refresh.

    Paper:
        MATES, Yu et al. 2024, arXiv 2406.06046; features are computed once, old labels are kept while they agree.
    Cost:
        Per refresh, labels of `sample_size` texts and of the probe, and one fit; features of the pool once, those of the live
        model each time.
    Limit:
        With one refresh it is `static`; with a sample of the whole pool and no surrogate it is `oracle`.
    """

    plugin_name: ClassVar[str] = "refresh"
    needs_model: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = True
    adapts: ClassVar[bool] = True
    redraws: ClassVar[bool] = False
