"""Modules that are not whole on one device: wrapped for parallel training, sharded, or spread out by `device_map`.

An oracle method steps single weights, hooks single modules and runs processes on texts of their own. With weights sharded
over processes (FSDP, tensor parallelism) every forward pass needs all processes at once, a weight is only a part of itself,
and a hash of the weights differs from process to process: such a module is refused. One that `device_map` spreads over
several devices, memory or disk reads texts like any other, so it serves methods that only read; its weights may not be
there between two passes, so those that need gradients refuse it. Left out: pipeline parallelism.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from oracle.errors import InputError

_ACCEPTED = "a plain module, whole on one device"
_GATHER = (
    "gather it: save the full model with your trainer and load it on each process with LanguageModel.from_pretrained, "
    "or label in a process of its own before sharding."
)


def check_whole(module: nn.Module) -> None:
    """Refuse a module that is wrapped for data-parallel training or sharded over processes.

    Raises:
        InputError: It is; the message says how to get at the plain module.
    """
    kind = type(module).__name__
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        raise InputError(
            f"module is a {kind}, which wraps the model for training on several devices.",
            _ACCEPTED,
            "pass module.module, which is the model itself; label shares the texts among the processes by itself.",
        )
    # Whoever has such a module has loaded where its class is from; nobody else needs to.
    fsdp = tuple(_loaded("torch.distributed.fsdp", name) for name in ("FullyShardedDataParallel", "FSDPModule"))
    if any(isinstance(part, fsdp) for part in module.modules()):
        raise InputError(f"{kind} is sharded over processes by FSDP.", _ACCEPTED, _GATHER)
    sharded = _loaded("torch.distributed.tensor", "DTensor")
    name = next((name for name, parameter in module.named_parameters() if isinstance(parameter, sharded)), None)
    if name is not None:
        raise InputError(f"{kind} is distributed over processes: {name} is a DTensor.", _ACCEPTED, _GATHER)


def devices_of_map(module: nn.Module) -> list[str]:
    """Return the devices ("0", "cpu", "disk") that a `device_map` spreads a module over; none if it is whole on one."""
    devices = list(dict.fromkeys(str(device) for device in (getattr(module, "hf_device_map", None) or {}).values()))
    return devices if len(devices) > 1 else []


def entrance(module: nn.Module) -> torch.device:
    """Return the device to give inputs on to a module that is spread out; it gives its outputs back there."""
    main = next((name for name in devices_of_map(module) if name not in ("cpu", "disk")), "cpu")
    return torch.device(int(main) if main.isdigit() else main)


def whole_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield `module.state_dict()` tensor by tensor; what `device_map` keeps elsewhere is fetched part by part."""
    tensors = module.state_dict()
    if not any(tensor.is_meta for tensor in tensors.values()):
        yield from tensors.items()
        return
    from accelerate.utils import align_module_device  # whoever has such a module has it

    for name in tensors:
        part = module.get_submodule(name.rpartition(".")[0])
        with align_module_device(part):
            yield name, part.state_dict()[name.rpartition(".")[2]]


def check_undivided(module: nn.Module, *, needed_by: str) -> None:
    """Refuse a module that `device_map` spreads over several devices.

    Args:
        module: The model.
        needed_by: What needs its weights to be in one place, for the message.

    Raises:
        InputError: It is spread out.
    """
    devices = devices_of_map(module)
    if devices:
        raise InputError(
            f"{needed_by} needs gradients, and the {type(module).__name__} is spread over the devices {', '.join(devices)} "
            "by its device_map.",
            f"{_ACCEPTED}, or a method that only reads texts, such as in_context or self_rating",
            "load it without device_map, in bfloat16 if it is too large for one device, or label with a smaller model.",
        )


def _loaded(module_name: str, name: str) -> Any:
    return getattr(sys.modules.get(module_name), name, ())
