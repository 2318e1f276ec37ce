"""What identifies a model and its tokenizer: hashes of their content, which stored labels and features are compared by."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from oracle.artifacts import fingerprint
from oracle.checkpoints import describe_groups

STEP_NEUTRAL_KEYS = ("foreach", "fused", "capturable", "differentiable", "initial_lr", "param_names")  # no step depends on them


def model_fingerprint(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> str:
    """Return 16 hex digits that identify the weights bit for bit, and the optimiser where there is one.

    Of the optimiser count its class, state and hyper-parameters, and which parameters they hold for: the learning rate,
    but not `STEP_NEUTRAL_KEYS`.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        _hash_tensor(digest, name, tensor)
    if optimizer is not None:
        names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        groups = [
            {key: value for key, value in {**group, "params": sorted(group["params"])}.items() if key not in STEP_NEUTRAL_KEYS}
            for group in describe_groups(optimizer, names)
        ]
        digest.update(fingerprint([type(optimizer).__name__, groups]).encode())
        for parameter, slots in sorted(optimizer.state.items(), key=lambda item: names.get(item[0], "")):
            for slot, value in sorted(slots.items()):
                if value is not None:
                    _hash_tensor(digest, f"{names.get(parameter, '')} {slot}", torch.as_tensor(value))
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return 16 hex digits that identify how a tokenizer turns texts and chats into ids; "" for None.

    They cover the vocabulary, the merges and every other rule of a fast tokenizer, the special tokens and
    the chat template. Truncation and padding, which a call sets, do not count.
    """
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    return fingerprint(
        {
            "vocabulary": tokenizer.get_vocab(),
            "rules": {key: value for key, value in rules.items() if key not in ("truncation", "padding")},
            "special_tokens": tokenizer.special_tokens_map,
            "chat_template": getattr(tokenizer, "chat_template", None),
        }
    )


def _hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
