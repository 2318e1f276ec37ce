"""Label, fit and score once, and go down that one ranking: what refreshing is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from oracle.plugins import option
from surrogate.training.labelled_ranking import LabelledRanking


@dataclass(kw_only=True)
class Static(LabelledRanking):
    """Labels of a sample and a surrogate's scores, once, at the first checkpoint.

    Paper:
        The static variant of MATES, Yu et al. 2024, arXiv 2406.06046.
    Cost:
        Labels of `sample_size` texts, features of the pool, one fit.
    Limit:
        `refresh` with a drift threshold that never fires.
    """

    plugin_name: ClassVar[str] = "static"
    needs_model: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = True
    adapts: ClassVar[bool] = False
    redraws: ClassVar[bool] = False

    num_probe: int = option(0, "Texts of the probe set, kept out of training; of no use here, as nothing is refreshed.")
