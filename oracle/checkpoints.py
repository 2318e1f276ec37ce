"""Checkpoints on disk: the model and tokenizer as transformers writes them, the optimiser beside them.

Our own optimiser files are `optimizer.safetensors` (tensors named `slot::parameter`) and `optimizer.json`
(class and hyper-parameters, with parameters by name). The Hugging Face Trainer writes `optimizer.pt`, whose
state is keyed by position in two groups, with and without weight decay; it is read with torch's
`weights_only` loader and matched to names by rebuilding those groups, every shape checked. Of a model with
an adapter (LoRA), only the adapter is written, and its base model is loaded from where it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oracle.adapters import add_adapter, base_of, check_saveable
from oracle.artifacts import atomic_folder, read_json, write_json
from oracle.errors import InputError, MismatchError, MissingFileError
from oracle.progress import without_bars

OPTIMIZERS: dict[str, Any] = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
}
_NO_DECAY_PATTERNS = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]  # transformers 5.23, Trainer


def load_checkpoint(path: str | Path, *, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Load a causal model and its tokenizer (None if the folder has none; then that of an adapter's base model).

    Raises:
        MissingPackageError: The folder has an adapter, and peft is not installed.
        MissingFileError: There is no such folder and the hub cannot give it.
        InputError: The folder holds no causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    is_folder = Path(path).is_dir()
    if not is_folder and (str(path).startswith((".", "/", "~")) or str(path).count("/") > 1):
        raise MissingFileError(
            f"there is no folder {str(path)!r}.",
            "a folder written by save_pretrained, the Trainer or LanguageModel.save, or a name on the Hugging Face hub",
            "check the path.",
        )
    base = base_of(Path(path))
    words = base if base is not None and not _has_tokenizer(path) else path
    try:
        with without_bars():
            whole: nn.Module = AutoModelForCausalLM.from_pretrained(str(base or path), dtype=dtype)
            module = whole if base is None else add_adapter(whole, Path(path))
        tokenizer = AutoTokenizer.from_pretrained(str(words)) if not Path(words).is_dir() or _has_tokenizer(words) else None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        kind = InputError if is_folder else MissingFileError
        of_base = "" if base is None else f" (the adapter's base model is {base!r})"
        raise kind(
            f"cannot load a causal language model from {str(path)!r}{of_base}: {reason}",
            "a folder written by save_pretrained, the Trainer or LanguageModel.save, or a name on the Hugging Face hub",
            "check the path; for a hub name check that the network reaches the hub.",
        ) from error
    if getattr(module, "_hf_peft_config_loaded", False):
        raise InputError(
            f"{str(path)!r} is an adapter, which would be loaded frozen.",
            "a folder that holds the adapter, or the name of a whole model",
            "download it (huggingface_hub.snapshot_download) and pass its folder.",
        )
    return module, tokenizer


def _has_tokenizer(folder: str | Path) -> bool:
    return any(Path(folder).glob("tokenizer*"))


def save_checkpoint(folder: Path, module: nn.Module, tokenizer: Any, *, optimizer: torch.optim.Optimizer | None) -> None:
    """Write everything `load_checkpoint` and `load_optimizer` read; the folder appears complete or not at all.

    Raises:
        InputError: The model has an adapter that could not be loaded again; the optimiser steps other parameters, too.
    """
    check_saveable(module)
    if optimizer is not None:
        _check_owned(module, optimizer)
    with atomic_folder(folder) as partial, without_bars():
        module.save_pretrained(partial)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if optimizer is not None:
            _save_optimizer(partial, module, optimizer)


def _check_owned(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser of parameters that have no name in the model, by which they are stored."""
    own = set(module.parameters())
    held = {*optimizer.state, *(parameter for group in optimizer.param_groups for parameter in group["params"])}
    foreign = sorted(str(tuple(parameter.shape)) for parameter in held - own)
    if foreign:
        raise InputError(
            f"the optimizer holds {len(foreign)} parameters that are not the model's, first of shape {foreign[0]}.",
            "an optimiser of the model's parameters alone",
            "save model and tokenizer without it, LanguageModel(module, tokenizer).save(folder), and the optimiser yourself.",
        )


def _save_optimizer(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    from safetensors.torch import save_file

    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            if value is not None:
                tensors[f"{slot}::{names[parameter]}"] = torch.as_tensor(value).detach().cpu().contiguous().clone()
    save_file(tensors, folder / "optimizer.safetensors")
    write_json(folder / "optimizer.json", {"class": type(optimizer).__name__, "groups": describe_groups(optimizer, names)})


def describe_groups(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> list[dict[str, Any]]:
    """Return the parameter groups as JSON-like values: parameters by name ("" for one without), tensors as numbers."""
    return [
        {key: [names.get(p, "") for p in value] if key == "params" else _plain(value) for key, value in group.items()}
        for group in optimizer.param_groups
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def place_state(optimizer: torch.optim.Optimizer) -> None:
    """Move the state of every parameter to the parameter's device, where the next step expects it.

    The count `step` and other scalars stay on the CPU, as torch keeps them, unless the optimiser is fused or capturable.
    """
    for group in optimizer.param_groups:
        is_step_on_device = bool(group.get("fused") or group.get("capturable"))
        for parameter in group["params"]:
            slots = optimizer.state.get(parameter, {})
            for slot, value in slots.items():
                if not isinstance(value, Tensor):
                    continue
                is_moved = is_step_on_device if slot == "step" else value.dim() > 0 or value.shape == parameter.shape
                if is_moved:
                    slots[slot] = value.to(parameter.device)


def load_optimizer(folder: Path, module: nn.Module) -> torch.optim.Optimizer | None:
    """Rebuild the optimiser saved in a checkpoint folder, with its state; None if the folder has none.

    Raises:
        InputError: The optimiser's class is not one that can be rebuilt; `optimizer.pt` is not of Adam or AdamW.
        MismatchError: Its state does not fit the parameters of `module`.
    """
    if (folder / "optimizer.json").exists():
        return _load_own(folder, module)
    if (folder / "optimizer.pt").exists():
        return _load_trainer_state(folder / "optimizer.pt", module)
    return None


def _load_own(folder: Path, module: nn.Module) -> torch.optim.Optimizer:
    from safetensors.torch import load_file

    description = read_json(folder / "optimizer.json")
    name = description["class"]
    if name not in OPTIMIZERS:
        raise InputError(
            f"{folder} was trained with {name}.",
            ", ".join(OPTIMIZERS),
            "build the optimizer yourself and pass it to LanguageModel.",
        )
    parameters = dict(module.named_parameters())
    missing = [key for group in description["groups"] for key in group["params"] if key not in parameters]
    if missing:
        raise MismatchError(
            f"{folder} has optimizer state for {missing[:3]}, which the model lacks.",
            "the model that was saved with it",
            "load the model from the same folder.",
        )
    groups = [{**group, "params": [parameters[key] for key in group["params"]]} for group in description["groups"]]
    lr = groups[0].get("lr", 1e-3)
    optimizer: torch.optim.Optimizer = OPTIMIZERS[name](groups, lr=lr)
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        slot, parameter_name = key.split("::", 1)
        parameter = parameters[parameter_name]
        is_moment = slot != "step" and tensor.is_floating_point() and parameter.is_floating_point()
        optimizer.state[parameter][slot] = tensor.to(parameter.dtype) if is_moment else tensor  # as torch's load_state_dict does
    place_state(optimizer)
    return optimizer


def _load_trainer_state(file: Path, module: nn.Module) -> torch.optim.Optimizer:
    from transformers.trainer_pt_utils import get_parameter_names

    stored = torch.load(file, map_location="cpu", weights_only=True)
    _check_is_adam(file, stored)
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    order = [list(parameters.values())]
    if len(stored["param_groups"]) == 2:
        decayed = set(get_parameter_names(module, [nn.LayerNorm], _NO_DECAY_PATTERNS))
        order = [[p for name, p in parameters.items() if (name in decayed) is wanted] for wanted in (True, False)]
    sizes, expected = [len(group["params"]) for group in stored["param_groups"]], [len(group) for group in order]
    flat = [parameter for group in order for parameter in group]
    fits = sizes == expected and all(
        slots["exp_avg"].shape == flat[int(index)].shape for index, slots in stored["state"].items() if slots
    )
    if not fits:
        raise MismatchError(
            f"{file} has parameter groups of {sizes} tensors, the model gives {expected}, or shapes differ.",
            "optimizer.pt as the Trainer writes it for this model on one process, unsharded",
            "load the optimizer state yourself and pass optimizer=... to LanguageModel.",
        )
    optimizer = torch.optim.AdamW([{"params": group} for group in order if group], lr=1e-3)
    optimizer.load_state_dict({**stored, "param_groups": [group for group in stored["param_groups"] if group["params"]]})
    return optimizer


def _check_is_adam(file: Path, stored: dict[str, Any]) -> None:
    slots = sorted({slot for slots in stored["state"].values() for slot in slots})
    has_moments = all({"step", "exp_avg", "exp_avg_sq"} <= set(slots) for slots in stored["state"].values() if slots)
    if not has_moments or not all("betas" in group for group in stored["param_groups"]):
        raise InputError(
            f"{file} is not the state of Adam or AdamW: it keeps {slots or 'nothing'} for its parameters.",
            "the Trainer's default optimiser, AdamW",
            "load model and tokenizer with transformers, build the optimizer that trained them, and pass all three to "
            "LanguageModel.",
        )
