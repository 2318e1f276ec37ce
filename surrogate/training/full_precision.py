"""Run a model without the mixed precision that Accelerate has put around its `forward`, and put it back.

`accelerator.prepare` (and with it the Hugging Face Trainer under `bf16=True` or `fp16=True`) sets a `forward` of its own on
the module, which runs the class's under autocast. Labels that are differences of two losses drown in the rounding of
bfloat16; gradients do not. The weights are those of training, in float32, either way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class MixedPrecisionWarning(UserWarning):
    """A module's forward was replaced by something that cannot be looked through."""


@contextmanager
def without_autocast(module: nn.Module) -> Iterator[None]:
    """Run a block with the forward of the module's class, where its own only wraps that one; restored also when it raises.

    Of a module that `torch.compile` has made, that is the module inside.
    """
    module = getattr(module, "_orig_mod", module)
    own = vars(module).get("forward")
    if own is None:
        yield
        return
    if not _wraps(own, type(module).forward):
        warnings.warn(
            f"{type(module).__name__} has a forward of its own, not its class's in mixed precision; labels use it as it is.",
            MixedPrecisionWarning,
            stacklevel=4,
        )
        yield
        return
    del module.forward
    try:
        yield
    finally:
        module.forward = own


def _wraps(outer: Any, inner: Any) -> bool:
    """Whether `outer` is `inner` behind decorators that tell what they wrap."""
    while outer is not None:
        function = getattr(outer, "__func__", outer)
        if function is inner:
            return True
        outer = getattr(function, "__wrapped__", None)
    return False
