"""What stored results have to share with a model to be gone on with: weights, what is computed with them, and how it is read."""

from __future__ import annotations

from typing import Any

import torch

from oracle.artifacts import fingerprint
from oracle.fingerprints import config_fingerprint
from oracle.language_model import LanguageModel


def reading_identity(lm: LanguageModel) -> dict[str, Any]:
    """Return what decides the ids that the model is given of a text."""
    return {"tokenizer": lm.tokenizer_fingerprint(), "max_tokens": lm.max_tokens}


def checkpoint_identity(lm: LanguageModel, *, optimizer: bool = True, autocast: bool = True) -> dict[str, Any]:
    """Return what decides the values that are measured on given ids, up to rounding by batches.

    Args:
        lm: The model.
        optimizer: Whether the values depend on the optimiser.
        autocast: Whether they are measured inside the caller's `torch.autocast`; False where it is switched off.
    """
    return {
        "checkpoint": lm.fingerprint(optimizer=optimizer),
        "config": config_fingerprint(lm.module),
        "trainable_parameters": fingerprint(sorted(name for name, p in lm.module.named_parameters() if p.requires_grad)),
        "device": lm.device.type,
        "autocast": _autocast_dtype(lm.device.type) if autocast else "",
    }


def _autocast_dtype(device: str) -> str:
    """Return the type that the caller's `torch.autocast` computes in on a device; "" outside one."""
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.") if torch.is_autocast_enabled(device) else ""
