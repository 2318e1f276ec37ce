"""What decides a round, as JSON values: a round on disk with the same identity is read and not made again.

And what a training that is resumed has in common with the one before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from oracle.errors import MismatchError

if TYPE_CHECKING:
    from oracle.language_model import LanguageModel


class RoundIdentity:
    """Makes identities of one run's rounds.

    Args:
        options: Fingerprint of what decides the run (see `describe_run`).
    """

    def __init__(self, options: str) -> None:
        self.options = options
        self._tokenizer: tuple[Any, str] | None = None  # the last one, and its fingerprint, which reads the whole vocabulary

    def of(
        self, index: int, *, before: str, lm: LanguageModel | None, looks_at_model: bool, size: Mapping[str, int]
    ) -> dict[str, Any]:
        """Return the identity of a round.

        Args:
            index: Its number.
            before: The chain of the rounds before.
            lm: The live model; how it reads texts counts always, its state where the round looks at it.
            looks_at_model: Whether the pool may be ranked anew by the model. Reading all weights takes time, and a round that
                goes down a ranking is the same whatever they are.
            size: `num_texts` or `num_tokens`.
        """
        model = reading = None
        if lm is not None:
            reading = [self._tokenizer_of(lm), lm.max_tokens]
            if looks_at_model:
                is_mixed = "forward" in vars(lm.module) or torch.is_autocast_enabled(lm.device.type)
                model = [lm.fingerprint(optimizer=True), is_mixed]
        return {"options": self.options, "before": before, "index": index, "model": model, "reading": reading, **size}

    def _tokenizer_of(self, lm: LanguageModel) -> str:
        if self._tokenizer is None or self._tokenizer[0] is not lm.tokenizer:
            self._tokenizer = lm.tokenizer, lm.tokenizer_fingerprint()
        return self._tokenizer[1]


def require_as_before(state: Mapping[str, Any], present: Mapping[str, Any], *, what: str) -> None:
    """Refuse to resume a training with settings that its checkpoint has otherwise.

    Args:
        state: The checkpoint's state, with these settings among others; one that it lacks, of an older version, is not compared.
        present: The settings now.
        what: What they decide, for the error: "order of batches".

    Raises:
        MismatchError: Some differ; all of them are listed.
    """
    changed = [
        f"{name}={state[name]!r}, and now {name}={value!r}" for name, value in present.items() if state.get(name, value) != value
    ]
    if changed:
        raise MismatchError(
            f"the checkpoint has {'; '.join(changed)}.",
            f"the same {what} as before",
            "go on with the old values, or begin a new training.",
        )
