"""A bit-exact copy of everything that labelling could disturb, and the way back.

Weights, buffers, gradients, optimiser state and hyper-parameters, the random state of Python, NumPy and
torch (every device), train or eval mode, `requires_grad`, and the modules' hooks. Weights, buffers and
optimiser state are copied back into place, so references that others hold to them stay valid; gradients come
back as new tensors, since a step in between may have dropped the old ones. `optimizer.load_state_dict` is not used: it
keeps references to the tensors it is given, and the next step would then change the saved state itself.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True)
class Snapshot:
    """What `take_snapshot` saved. `weights` and `optimizer` are None when only the surroundings were saved."""

    weights: dict[str, Tensor] | None
    optimizer: tuple[dict[Tensor, dict[str, Any]], list[dict[str, Any]]] | None
    gradients: dict[str, Tensor | None]
    requires_grad: dict[str, bool]
    modes: dict[str, bool]
    hooks: dict[tuple[str, str], dict[Any, Any]]
    random_state: dict[str, Any]


def take_snapshot(module: nn.Module, optimizer: torch.optim.Optimizer | None, *, weights: bool = True) -> Snapshot:
    """Copy the state of a model, its optimiser and the random generators.

    Args:
        module: The model.
        optimizer: Its optimiser, if there is one.
        weights: False leaves weights, buffers and optimiser state out: for work that only reads them.
    """
    saved_weights = {name: tensor.detach().clone() for name, tensor in _tensors(module)} if weights else None
    saved_optimizer = None
    if optimizer is not None and weights:
        state = {parameter: {key: _clone(value) for key, value in slots.items()} for parameter, slots in optimizer.state.items()}
        groups = [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
        saved_optimizer = (state, groups)
    parameters = dict(module.named_parameters())
    return Snapshot(
        weights=saved_weights,
        optimizer=saved_optimizer,
        gradients={name: None if p.grad is None else p.grad.detach().clone() for name, p in parameters.items()},
        requires_grad={name: p.requires_grad for name, p in parameters.items()},
        modes={name: child.training for name, child in module.named_modules()},
        hooks={(name, table): dict(getattr(child, table)) for name, child in module.named_modules() for table in _HOOK_TABLES},
        random_state=_random_state(),
    )


def restore_snapshot(snapshot: Snapshot, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Put everything back, bit for bit."""
    with torch.no_grad():
        restore_weights(snapshot, module, optimizer)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(snapshot.requires_grad[name])
            saved = snapshot.gradients[name]
            parameter.grad = None if saved is None else saved.clone()
    for name, child in module.named_modules():
        child.training = snapshot.modes[name]
        for table in _HOOK_TABLES:
            current, wanted = getattr(child, table), snapshot.hooks[(name, table)]
            if list(current.items()) != list(wanted.items()):
                current.clear()
                current.update(wanted)
    _set_random_state(snapshot.random_state)


def restore_weights(snapshot: Snapshot, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Put back weights, buffers and optimiser state only: what one optimiser step changes."""
    if snapshot.weights is not None:
        pairs = [(tensor, snapshot.weights[name]) for name, tensor in _tensors(module)]
        torch._foreach_copy_([live.detach() for live, _ in pairs], [saved for _, saved in pairs])
    if snapshot.optimizer is not None and optimizer is not None:
        state, groups = snapshot.optimizer
        for parameter in [p for p in optimizer.state if p not in state]:
            del optimizer.state[parameter]
        for parameter, slots in state.items():
            _restore_slots(optimizer.state[parameter], slots)
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group.update(copy.deepcopy(saved))


def _restore_slots(live: dict[str, Any], saved: dict[str, Any]) -> None:
    for key in [key for key in live if key not in saved]:
        del live[key]
    for key, value in saved.items():
        if isinstance(value, Tensor) and isinstance(live.get(key), Tensor) and live[key].shape == value.shape:
            live[key].copy_(value)
        else:
            live[key] = _clone(value)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *((f"buffer {name}", buffer) for name, buffer in module.named_buffers())]


def _clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _random_state() -> dict[str, Any]:
    has_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if has_cuda else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state_all(state["cuda"])
