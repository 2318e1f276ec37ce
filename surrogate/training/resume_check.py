"""Did resuming really load the checkpoint's weights? Compares the live model with the files.

The Hugging Face Trainer loads a checkpoint's weights by name and passes over names that it does not know. Where a model
saves a weight under another name than it has in memory (GPT-NeoX's output head in transformers 5.23, for one) or in another
form (the experts of a mixture, one by one), the weight stays as it was in the model that was passed, and training goes on
with it. What cannot be found among the stored tensors is therefore compared with the model as `from_pretrained` loads it.
Not checked: optimiser state, sharded checkpoints of FSDP or DeepSpeed, and weights in pickled files.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oracle.errors import MismatchError
from oracle.progress import without_bars

WEIGHT_FILE, ADAPTER_FILE = "model.safetensors", "adapter_model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NUM_NAMED = 3


class ResumeUncheckedWarning(UserWarning):
    """The checkpoint that was resumed from was not found, so its weights were not compared."""


def find_checkpoint(args: Any, step: int) -> Path | None:
    """Return the folder that training was resumed from: the one that the arguments name, or the output folder's of that step."""
    named = args.resume_from_checkpoint
    candidates = [Path(named)] if isinstance(named, str) else []
    candidates.append(Path(args.output_dir) / f"checkpoint-{step}")
    for folder in candidates:
        state = folder / "trainer_state.json"
        if state.is_file() and json.loads(state.read_text(encoding="utf-8"))["global_step"] == step:
            return folder
    return None


def check_resumed(module: nn.Module, args: Any, step: int) -> None:
    """Compare a resumed model with its checkpoint.

    Args:
        module: The model, after the checkpoint was loaded.
        args: `TrainingArguments`.
        step: The step that training goes on from.

    Raises:
        MismatchError: A weight is not the checkpoint's.
    """
    folder = find_checkpoint(args, step)
    adapter = str(getattr(module, "active_adapter", "default"))
    paths = [] if folder is None else _weight_files(folder, adapter)
    if folder is None or not paths:
        warnings.warn(
            f"training goes on at step {step}, and the weights of its checkpoint were not found in {folder or args.output_dir}, "
            "so they were not compared with the model's; name the folder in TrainingArguments(resume_from_checkpoint=...).",
            ResumeUncheckedWarning,
            stacklevel=3,
        )
        return
    wrong, not_found = _wrong_weights(module, paths, adapter)
    wrong += _not_as_loaded(module, not_found, folder)
    if wrong:
        more = f" and {len(wrong) - NUM_NAMED} more" if len(wrong) > NUM_NAMED else ""
        raise MismatchError(
            f"the model was resumed at step {step}, and its {', '.join(wrong[:NUM_NAMED])}{more} is not that of {folder}.",
            "a model with the weights of the checkpoint",
            f"load the model from there, AutoModelForCausalLM.from_pretrained({str(folder)!r}), and pass it to the Trainer; "
            "resuming alone passes over weights that are saved under another name. If you resumed from another folder, name "
            "it in TrainingArguments(resume_from_checkpoint=...).",
        )


def _weight_files(folder: Path, adapter: str) -> list[Path]:
    """All files of weights; an adapter that is not called "default" has a folder of its own."""
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    candidates = (folder / WEIGHT_FILE, folder / ADAPTER_FILE, folder / adapter / ADAPTER_FILE)
    return [path for path in candidates if path.is_file()]


def _stored(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)


def _wrong_weights(module: nn.Module, paths: list[Path], adapter: str) -> tuple[list[str], list[str]]:
    """Names of weights that differ from the stored ones of their name, and of those whose values no stored tensor has."""
    is_adapter = paths[0].name == ADAPTER_FILE
    live = {_plain_name(name, adapter): tensor.detach() for name, tensor in module.state_dict().items()}
    wrong: list[str] = []
    not_found: list[str] = []
    unknown: list[Tensor] = []
    seen: set[int] = set()
    for name, stored in _stored(paths):
        if name not in live:
            unknown.append(stored)
            continue
        seen.add(live[name].data_ptr())
        if not _equal(live[name], stored):
            wrong.append(name)
    trained = {_plain_name(name, adapter) for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name, tensor in live.items():
        is_expected = not is_adapter or name in trained
        if is_expected and tensor.data_ptr() not in seen and not any(_equal(tensor, stored) for stored in unknown):
            not_found.append(name)
    return wrong, not_found


def _not_as_loaded(module: nn.Module, names: list[str], folder: Path) -> list[str]:
    """Those of a model's weights that differ from what `from_pretrained` makes of the folder; all where it cannot."""
    inner = getattr(module, "_orig_mod", module)
    if not names or not isinstance(inner, PreTrainedModel) or (folder / ADAPTER_FILE).is_file():
        return names
    with without_bars():
        loaded = type(inner).from_pretrained(folder).state_dict()
    live = inner.state_dict()
    return [name for name in names if name not in loaded or not _equal(live[name], loaded[name])]


def _plain_name(name: str, adapter: str) -> str:
    """The name without what torch.compile and PEFT add to it in memory."""
    bare = name.replace("_orig_mod.", "")
    return re.sub(rf"\.(modules_to_save\.)?{re.escape(adapter)}(?=\.)", "", bare)


def _equal(live: Tensor, stored: Tensor) -> bool:
    return live.shape == stored.shape and torch.equal(live.cpu(), stored.to(live.dtype))
