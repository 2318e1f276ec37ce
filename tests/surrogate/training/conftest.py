"""A strategy that tells whether a model is bit for bit the same."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from oracle.errors import NotFiniteError
from surrogate.scores import Scores
from surrogate.training.strategies import Ranking


@dataclass(kw_only=True)
class ByFingerprint:
    """Ranks by a hash of text and live model, so that one bit of difference in the model changes the selection."""

    fails_in: int = -1
    plugin_name: ClassVar[str] = "by_fingerprint"
    needs_model: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = False
    adapts: ClassVar[bool] = True
    redraws: ClassVar[bool] = False

    def rank(self, context: Any) -> Ranking:
        if context.folder.parent.name == f"round-{self.fails_in:05d}":
            raise NotFiniteError("the influence of a text is NaN.", "finite labels", "lower the learning rate.")
        state = context.lm.fingerprint(optimizer=True)
        ids = [context.pool["text_id"][row] for row in context.candidates]
        values = [int(hashlib.sha256((state + text_id).encode()).hexdigest()[:8], 16) for text_id in ids]
        return Ranking(scores=Scores(np.array(values, dtype=np.float32)[:, None], text_ids=ids, target_names=["hash"]))
