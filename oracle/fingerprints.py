"""What identifies a model and its tokenizer: hashes of their content, which stored labels and features are compared by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from oracle.artifacts import fingerprint
from oracle.checkpoints import describe_groups
from oracle.wrappers import whole_tensors

STEP_NEUTRAL_KEYS = ("foreach", "fused", "capturable", "differentiable", "initial_lr", "param_names")  # no step depends on them
LOSS_NEUTRAL_CONFIG_KEYS = (  # no loss at given weights depends on them, or another part of the identity has them
    "_name_or_path",
    "transformers_version",
    "architectures",  # set when the model is saved
    "dtype",  # the weights have theirs
    "torch_dtype",
    "attn_implementation",  # implementations differ by rounding
    "_attn_implementation",
    "_attn_implementation_autoset",
    "experts_implementation",
    "_experts_implementation",
    "use_cache",  # never used here
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "initializer_range",
    "id2label",
    "label2id",
    "problem_type",
    "bos_token_id",  # of generation; trainers set them to the tokenizer's
    "eos_token_id",
    "base_model_name_or_path",  # of an adapter
    "revision",
    "inference_mode",  # which parameters are trainable is told apart
    "auto_mapping",
    "peft_version",
)


def model_fingerprint(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> str:
    """Return 16 hex digits that identify the weights bit for bit, and the optimiser where there is one.

    Of the optimiser count its class, state and hyper-parameters, and which parameters they hold for: the learning rate,
    but not `STEP_NEUTRAL_KEYS`.
    """
    digest = hashlib.sha256()
    for name, tensor in whole_tensors(module):
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


def config_fingerprint(module: nn.Module) -> str:
    """Return 16 hex digits that identify what a model computes with its weights; "" for a module without a config.

    Rotary frequencies, epsilons, windows and the like stand in the config alone, an adapter's scale in its own.
    `LOSS_NEUTRAL_CONFIG_KEYS` do not count.
    """
    configs = {"": getattr(module, "config", None), **(getattr(module, "peft_config", None) or {})}
    known = {name: _what_counts(config.to_dict()) for name, config in configs.items() if hasattr(config, "to_dict")}
    return fingerprint(known) if known else ""


def _what_counts(value: Any) -> Any:
    """Return a config, and those inside it, without the keys that do not count; sets in order."""
    if isinstance(value, Mapping):
        return {key: _what_counts(inner) for key, inner in value.items() if key not in LOSS_NEUTRAL_CONFIG_KEYS}
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else value


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
