"""What all rules share, and the rule for a module that no other rule knows: the module is run again for each text.

A rule is a forward hook that leaves a hook on the module's output; that one runs in the backward pass, where the
gradient b of the summed loss at the output is at hand, and hands the engine the text's products (or per-text
gradients of this one module).

The general rule takes the module's inputs apart by text, runs it on each text with its own parameters, and pulls
b back through it. That is exact for any module that keeps the texts apart; that the outputs of the text alone are
those that the batch gave is checked every time. It costs another forward and backward pass through this module,
one text at a time, so what is large has a rule of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from oracle.gradients.products import GradientProducts

OUTPUT_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest output, between a text alone and in its batch
LOW_PRECISION_OUTPUT_TOLERANCE = 5e-2


class UncoveredModuleError(RuntimeError):
    """A module mixes texts in a way that no rule covers; use `PerTextProducts`.

    Args:
        reason: What the module does.
        parameters: The names of the parameters that no rule covers.
    """

    def __init__(self, reason: str, parameters: Iterable[str] = ()) -> None:
        self.parameters = sorted(parameters)
        super().__init__(reason)


class Rule:
    """A forward hook on a module with parameters of its own.

    Args:
        names: The module's own parameters that have directions: key in the module -> full name. The general rule also
            takes those of modules inside it.
        engine: Where the products go.
    """

    def __init__(self, names: dict[str, str], engine: GradientProducts) -> None:
        self.names, self.engine = names, engine

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Count the use; where gradients are on, attach to the output, and return what replaces it (None: nothing)."""
        if self.engine.is_rerunning:
            return None
        self.engine.count_use(self.names)
        return self.attach(module, args, kwargs, output) if torch.is_grad_enabled() else None

    def attach(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Leave a hook on the output of one use of the module."""
        raise NotImplementedError

    def is_by_text(self, module: nn.Module, tensor: Tensor) -> bool:
        """Whether a tensor's rows are texts or tokens in their order; if not, the batch is refused after the forward pass."""
        layout = self.engine.layout
        if layout.holds_texts(tensor):
            return True
        held = f"the batch has {layout.num_texts} texts in {layout.num_rows} rows of {layout.row_tokens} positions"
        self.engine.refuse(self.names, f"a {type(module).__name__} sees a tensor {tuple(tensor.shape)}; {held}")
        return False


class GeneralRule(Rule):
    """Any module that keeps texts apart: run it again on each text, with gradients for its own parameters."""

    def attach(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Leave a hook on the outputs of one use of the module."""
        if not any(_needs_gradient(leaf) for leaf in pytree.tree_leaves(output)):  # nothing below it has one: a root
            output = pytree.tree_map_only(Tensor, lambda t: t.clone().requires_grad_() if t.is_floating_point() else t, output)
        # An output may be made of another one: what reaches a view of it comes from outside the module alone.
        output = pytree.tree_map_only(Tensor, lambda t: t.view_as(t) if t.requires_grad else t, output)
        leaves = {index: leaf for index, leaf in enumerate(pytree.tree_leaves(output)) if _needs_gradient(leaf)}
        if not leaves or not all(self.is_by_text(module, leaf) for leaf in leaves.values()):
            return None
        self.engine.rerun.update(self.names.values())
        inputs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        outputs = {index: leaf.detach() for index, leaf in leaves.items()}
        autocast = same_autocast(next(module.parameters()).device.type)

        def backward(gradients: Sequence[Tensor | None]) -> None:
            found = {index: b for index, b in zip(outputs, gradients, strict=True) if b is not None}
            with autocast:
                layout = self.engine.layout
                for text in range(layout.num_texts):
                    self.add_text(module, text, inputs, own_outputs=layout.own(outputs, text), b=layout.own(found, text))

        torch.autograd.graph.register_multi_grad_hook(list(leaves.values()), backward, mode="all")
        return output

    def add_text(
        self, module: nn.Module, text: int, inputs: Any, *, own_outputs: dict[int, Tensor], b: dict[int, Tensor]
    ) -> None:
        """Add one text's gradients of the module's own parameters.

        Args:
            module: The module.
            text: Which text.
            inputs: Positional and keyword arguments of the whole batch.
            own_outputs: What the module gave for this text in the batch, by number of the output.
            b: The gradients of the summed loss at those outputs that have one.
        """
        parameters = {key: module.get_parameter(key).detach().requires_grad_() for key in self.names}
        found = self._run(module, parameters, self.engine.layout.own(inputs, text))
        if not all(is_close(found[index], expected) for index, expected in own_outputs.items()):
            reason = f"a {type(module).__name__} gives a text something else alone than in a batch"
            raise UncoveredModuleError(reason, self.names.values())
        reached = [index for index in b if found[index].requires_grad]
        gradients = torch.autograd.grad(
            [found[index] for index in reached],
            list(parameters.values()),
            [b[index].to(found[index].dtype).reshape(found[index].shape) for index in reached],
            allow_unused=True,
        )
        for name, gradient in zip(self.names.values(), gradients, strict=True):
            if gradient is not None:
                self.engine.add_gradients(name, gradient.reshape(1, -1), first=text)

    def _run(self, module: nn.Module, parameters: dict[str, Tensor], inputs: Any) -> list[Any]:
        args, kwargs = inputs
        try:
            with self.engine.rerunning(), torch.enable_grad():
                return pytree.tree_leaves(torch.func.functional_call(module, parameters, args, kwargs))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:  # what it was given does not come apart by text
            raise UncoveredModuleError(f"a {type(module).__name__} does not run on a text alone", self.names.values()) from error


def same_autocast(device_type: str) -> AbstractContextManager[Any]:
    """The automatic mixed precision of this moment, to be entered again later (the backward pass runs without it)."""
    return torch.autocast(
        device_type, dtype=torch.get_autocast_dtype(device_type), enabled=torch.is_autocast_enabled(device_type)
    )


def _needs_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def is_close(found: Any, expected: Tensor) -> bool:
    """Whether two outputs of the same rows agree within rounding."""
    if not isinstance(found, Tensor) or found.numel() != expected.numel():
        return False
    tolerance = OUTPUT_TOLERANCE.get(expected.dtype, LOW_PRECISION_OUTPUT_TOLERANCE)
    if not expected.numel():
        return True
    error = (found.detach().reshape(expected.shape) - expected).abs().max()
    return bool(error <= tolerance * expected.abs().max())
