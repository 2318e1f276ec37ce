"""A running average of the weights, at which labels are measured.

At a constant learning rate a model's weights jump about: the gradients of one checkpoint say as much about its last steps
as about the texts. In a trial (0.5 million parameters, Adam at 2e-3, 2,048 tokens a step) labels of two checkpoints agreed
at 0.65 after 8 steps and 0.56 after 256, those at the average of about the last 20 weights at 0.98 and 0.75: most of what had
looked like drift was noise (`benchmarks/label_decay.py`). Learning rates that fall to 0 have the same effect at the end of a
training; before, the average is the cheap way to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from oracle.errors import InputError, MismatchError, MissingFileError

AVERAGE_FILE = "influence_average.safetensors"


class WeightAverage:
    """Exponential average of a model's trainable weights, kept beside them in float32.

    Over the first steps it is their plain mean, so it does not remember where it began.

    Args:
        module: The plain module that is trained, not what wraps it for several processes.
        decay: Weight of the average before, at each step; 1 / (1 - decay) steps count. Refreshes ought to be at least so far
            apart.

    Attributes:
        num_updates: Weights that were averaged so far.

    Paper:
        Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv 1803.05407.

    Raises:
        InputError: `decay` is no share below 1, or no weight is trainable.

    Example:
        >>> average = WeightAverage(model)                                   # doctest: +SKIP
        >>> average.watch(optimizer)     # from now on every optimizer.step() counts  # doctest: +SKIP
        >>> refresher.next_round(lm, num_texts=1024, average=average)        # doctest: +SKIP
    """

    def __init__(self, module: nn.Module, *, decay: float = 0.95) -> None:
        if not (isinstance(decay, (int, float)) and 0 <= decay < 1):
            raise InputError(f"decay={decay!r}.", "a share from 0 to below 1", "pass for example decay=0.95.")
        self.decay, self.num_updates = float(decay), 0
        self._live = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        if not self._live:
            raise InputError("a module without a trainable weight.", "a module in training", "unfreeze it first.")
        self._mean = {name: parameter.detach().float().clone() for name, parameter in self._live.items()}

    def watch(self, optimizer: torch.optim.Optimizer) -> Any:
        """Count the weights after every step of an optimiser; `.remove()` of what is returned ends it."""
        return optimizer.register_step_post_hook(lambda *_: self.update())

    @torch.no_grad()
    def update(self) -> None:
        """Count the present weights."""
        self.num_updates += 1
        share = max(1 - self.decay, 1 / self.num_updates)
        live = [parameter.detach().float() for parameter in self._live.values()]
        torch._foreach_lerp_(list(self._mean.values()), live, share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A block in which the module has the averaged weights; after it, the live ones again, bit for bit."""
        if not self.num_updates:
            yield
            return
        saved = {name: parameter.detach().clone() for name, parameter in self._live.items()}
        try:
            self._put(self._mean)
            yield
        finally:
            self._put(saved)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._live.items():
            parameter.copy_(weights[name])

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: tensors by the weights' names, and the count."""
        return {"num_updates": self.num_updates, "decay": self.decay, "mean": {k: v.clone() for k, v in self._mean.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            MismatchError: It is of other weights, or of another decay.
        """
        mean = state["mean"]
        shapes = {name: tuple(tensor.shape) for name, tensor in mean.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in self._mean.items()} or state["decay"] != self.decay:
            raise MismatchError(
                f"an average of {len(shapes)} weights at decay {state['decay']}, for {len(self._mean)} at {self.decay}.",
                "the average of this model, with the same decay",
                "load the checkpoint that belongs to the model.",
            )
        for name, tensor in mean.items():
            self._mean[name].copy_(tensor)
        self.num_updates = int(state["num_updates"])

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint's folder."""
        partial = folder / f"{AVERAGE_FILE}.partial"
        save_file({name: tensor.cpu() for name, tensor in self._mean.items()}, partial, metadata=self._told())
        os.replace(partial, folder / AVERAGE_FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            MissingFileError: The checkpoint was saved without an average.
            MismatchError: It is of other weights, or of another decay.
        """
        path = folder / AVERAGE_FILE
        if not path.is_file():
            raise MissingFileError(
                f"{folder} has no {AVERAGE_FILE}.",
                "a checkpoint of a training with this running average",
                "resume from the checkpoint before it (a kill while saving leaves one like this), or leave the average out.",
            )
        with safe_open(path, framework="pt") as stored:
            told = stored.metadata()
            mean = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
        self.load_state_dict({"num_updates": int(told["num_updates"]), "decay": float(told["decay"]), "mean": mean})

    def _told(self) -> dict[str, str]:
        return {"num_updates": str(self.num_updates), "decay": repr(self.decay)}
