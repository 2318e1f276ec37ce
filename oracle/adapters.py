"""Adapters (LoRA and the others of the package peft): saved alone, and loaded trainable on the model they were made for.

A folder that peft writes has the adapter's weights and the name or path of the base model, which is loaded from there.
transformers opens such a folder as well, but frozen, and nothing would be left to train. Left out: several adapters at
once, and a base model that was never loaded from anywhere. That the base model lies there unchanged is not checked.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from torch import nn

from oracle.artifacts import read_json
from oracle.errors import InputError, MissingFileError, MissingPackageError

ADAPTER_FILE = "adapter_config.json"
ADAPTER_NAME = "default"  # peft writes it into the folder itself, and an adapter of another name into a folder of its own


def base_of(folder: Path) -> str | None:
    """Return where the base model of an adapter's folder lies; None for a folder without an adapter.

    Raises:
        MissingPackageError: There is an adapter, and peft is not installed.
        MissingFileError: The folder does not say where the base model lies.
    """
    if not (folder / ADAPTER_FILE).exists():
        return None
    if importlib.util.find_spec("peft") is None:
        raise MissingPackageError(
            f"{folder} has an adapter, and the package peft is not installed.",
            "an installed peft, or a folder with a whole model",
            "install it: pip install peft",
        )
    base = read_json(folder / ADAPTER_FILE).get("base_model_name_or_path")
    if not base:
        raise MissingFileError(
            f"{folder} has an adapter, and does not say which model it belongs to.",
            f"base_model_name_or_path in {ADAPTER_FILE}: a folder, or a name on the Hugging Face hub",
            "write it there, or load both with peft (is_trainable=True) and pass the module to LanguageModel.",
        )
    return str(base)


def add_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """Put the adapter of a folder on its base model, in eval mode; its weights are trainable, the others frozen."""
    from peft import PeftModel

    module: nn.Module = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    return module.eval()


def check_saveable(module: nn.Module) -> None:
    """Refuse a module with an adapter that could not be loaded from the folder that it would be saved to.

    Raises:
        InputError: There are several adapters, they were added without peft's own model around them, or the base model
            was not loaded from anywhere.
    """
    if getattr(module, "_hf_peft_config_loaded", False):
        raise InputError(
            f"the {type(module).__name__} has an adapter that was added to it by transformers.",
            "a model that peft.get_peft_model or PeftModel.from_pretrained made, or one without an adapter",
            "make the model with peft.get_peft_model.",
        )
    # Whoever has such a module has loaded where its class is from; nobody else needs to.
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(module, peft.PeftModel):
        return
    names = list(module.peft_config)
    if names != [ADAPTER_NAME]:
        raise InputError(
            f"the model has the adapters {', '.join(map(repr, names))}.",
            f"one adapter, called {ADAPTER_NAME!r} as peft does by itself",
            "merge those that are trained already (merge_and_unload), and save the model with the one that is trained.",
        )
    if not (module.peft_config[ADAPTER_NAME].base_model_name_or_path or module.base_model.model.config.name_or_path):
        raise InputError(
            "the adapter's base model was not loaded from anywhere, so the saved adapter would have nothing to be put on.",
            "a base model loaded by from_pretrained from a folder or the Hugging Face hub",
            "save the base model with save_pretrained and load it from there before adding the adapter, or call "
            "merge_and_unload and save the whole model.",
        )
