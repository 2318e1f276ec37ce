"""Modules that are not whole on one device are refused: wrapped for parallel training, sharded, or spread out.

An oracle method steps single weights, hooks single modules and runs processes on texts of their own. With weights
sharded over processes (FSDP, tensor parallelism) every forward pass needs all processes at once, a weight is only a
part of itself, and a hash of the weights differs from process to process. A model spread over several devices by
`device_map` would be moved onto one. None of this was tried, so none of it is taken. Left out: pipeline parallelism.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from oracle.errors import InputError

_ACCEPTED = "a plain module, whole on one device"
_GATHER = (
    "gather it: save the full model with your trainer and load it on each process with LanguageModel.from_pretrained, "
    "or label in a process of its own before sharding."
)


def check_whole(module: nn.Module) -> None:
    """Refuse a module that is wrapped for data-parallel training, sharded, or spread over devices.

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
    devices = sorted({str(device) for device in (getattr(module, "hf_device_map", None) or {}).values()})
    if len(devices) > 1:
        raise InputError(
            f"{kind} is spread over the devices {', '.join(devices)} by its device_map.",
            _ACCEPTED,
            "load it without device_map, in bfloat16 if it is too large for one device, or label with a smaller model.",
        )


def _loaded(module_name: str, name: str) -> Any:
    return getattr(sys.modules.get(module_name), name, ())
