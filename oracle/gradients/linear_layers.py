"""What passes through a model's linear layers: their inputs, and the gradients at their outputs, token by token.

A layer is a weight and everything that uses it as the matrix of a linear layer. Layers that are never called, or that see
tokens gathered in another order than the texts', are left out; a forward pass shows which those are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from oracle.encoding import IGNORED, Batch
from oracle.errors import InputError
from oracle.gradients.module_rules import make_root
from oracle.gradients.products import uncompiled
from oracle.gradients.text_layout import TextLayout
from oracle.language_model import LanguageModel


@dataclass(frozen=True)
class Layer:
    """A linear layer, or several that share one weight, as the factors see it.

    Attributes:
        weight: Its weight's name; that of the embeddings where they are tied.
        bias: Its trainable bias, taken as the weight of a constant input; "" without one.
        modules: Names of the modules that use the weight as a linear layer.
        num_outputs: O, rows of its gradient.
        num_inputs: I, columns of its gradient, the constant input counted.
        is_transposed: Whether the weight is stored as (inputs, outputs), as transformers' Conv1D does.
        is_tied: Whether an embedding uses the weight too.
    """

    weight: str
    bias: str
    modules: list[str]
    num_outputs: int
    num_inputs: int
    is_transposed: bool
    is_tied: bool

    def join(self, tensors: dict[str, Tensor]) -> Tensor:
        """Arrange gradients (K, *shape) of weight and bias as (K, O, I)."""
        weight = tensors[self.weight]
        weight = weight.transpose(1, 2) if self.is_transposed else weight
        return torch.cat([weight, tensors[self.bias].unsqueeze(2)], 2) if self.bias else weight

    def part(self, joined: Tensor) -> dict[str, Tensor]:
        """Undo `join`."""
        weight = joined[:, :, :-1] if self.bias else joined
        parts = {self.weight: (weight.transpose(1, 2) if self.is_transposed else weight).contiguous()}
        return parts | {self.bias: joined[:, :, -1].contiguous()} if self.bias else parts


Part = tuple[Tensor, Tensor, Tensor]  # of B texts: a (B, T, I), b (B, T, O), tokens that count (B, T)
Take = Callable[[Layer, Tensor, Tensor, Tensor], None]  # of some or all texts of a batch: layer, and the three of `Part`


class LayerHooks:
    """Hands each layer's inputs a (B, T, I), output gradients b (B, T, O) and which tokens count (B, T) to `take`, backwards.

    All weights are frozen meanwhile; hooks and `requires_grad` are put back at the end.
    """

    def __init__(self, lm: LanguageModel, layers: list[Layer], take: Take) -> None:
        self.module, self.layers, self.take = lm.module, layers, take

    def __enter__(self) -> LayerHooks:
        self._requires_grad = [(p, p.requires_grad) for p in self.module.parameters()]
        for parameter, _ in self._requires_grad:
            parameter.requires_grad_(False)
        embeddings = self.module.get_input_embeddings()  # type: ignore[operator]
        self._handles = [embeddings.register_forward_hook(make_root)]
        for layer in self.layers:
            for name in layer.modules:
                self._handles.append(self.module.get_submodule(name).register_forward_hook(self._forward(layer)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)

    def run(self, batch: Batch, loss: Callable[[], Tensor]) -> None:
        """Call `loss`, which calls the model once with the batch, and go back from it."""
        self._layout = TextLayout(batch)
        is_predicted = (batch.labels != IGNORED).long()
        self._counts = is_predicted.flip(1).cumsum(1).flip(1).roll(-1, 1) > 0  # (B, L): a target stands behind
        self._counts[:, -1] = False
        self._uses = {layer.weight: 0 for layer in self.layers}
        self._waiting: dict[str, list[list[Part]]] = {layer.weight: [] for layer in self.layers}
        self._is_in_backward = False
        with uncompiled(self.module):
            value = loss()
            self._is_in_backward = True
            with torch.autocast(batch.input_ids.device.type, enabled=False):
                value.backward()
        for layer in self.layers:  # several uses add up to one gradient, as if they were further tokens
            for uses in zip(*self._waiting[layer.weight], strict=True):
                self.take(layer, *(torch.cat(tensors, 1) for tensors in zip(*uses, strict=True)))

    def _forward(self, layer: Layer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                self._uses[layer.weight] += not self._is_in_backward  # gradient checkpointing calls modules again
                x = args[0].detach()
                output.register_hook(lambda b: self._backward(layer, x, b))

        return hook

    def _backward(self, layer: Layer, x: Tensor, b: Tensor) -> None:
        shape = (self._layout.num_rows, self._layout.row_tokens)
        if not _is_by_text(x, shape):
            raise InputError(
                f"{layer.modules[0]} saw texts in order, and now rows {tuple(x.shape[:-1])} for a batch of {shape}.",
                "a layer that sees every text's positions in order, or never does",
                "freeze the layer's weight, so that it takes no part.",
            )
        parts = (self._part(layer, x, b, texts) for texts in self._layout.groups())
        if self._uses[layer.weight] == 1:
            for part in parts:
                self.take(layer, *part)
        else:
            self._waiting[layer.weight].append(list(parts))

    def _part(self, layer: Layer, x: Tensor, b: Tensor, texts: slice) -> Part:
        """What `take` gets of some of the texts."""
        a, b = (self._layout.by_text(tensor, texts).float() for tensor in (x, b))  # (b, T, I), (b, T, O)
        if layer.bias:
            a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2)
        length = self._layout.longest(texts)
        return a, b, self._counts[texts, :length].repeat_interleave(a.shape[1] // length, 1)


def find_layers(lm: LanguageModel, batch: Batch) -> list[Layer]:
    """Describe all trainable linear layers that see the texts of a batch in order, as a forward pass shows.

    Raises:
        InputError: There is none.
    """
    from transformers.pytorch_utils import Conv1D

    names = {p: name for name, p in lm.module.named_parameters() if p.requires_grad}
    users: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for name, module in lm.module.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, []).append((name, module))
    linear = {
        parameter: [
            (name, module) for name, module in modules if isinstance(module, (nn.Linear, Conv1D)) and module.weight is parameter
        ]
        for parameter, modules in users.items()
        if parameter in names
    }
    in_order = _modules_by_text(lm, batch, [pair for modules in linear.values() for pair in modules])
    layers = []
    for parameter, modules in linear.items():
        if not modules or not all(name in in_order for name, _ in modules):
            continue
        is_transposed = isinstance(modules[0][1], Conv1D)
        bias: Any = getattr(modules[0][1], "bias", None)
        has_bias = bias in names and len(modules) == 1 and len(users[bias]) == 1
        outputs, inputs = parameter.shape[::-1] if is_transposed else parameter.shape
        layers.append(
            Layer(
                weight=names[parameter],
                bias=names[bias] if has_bias else "",
                modules=[name for name, _ in modules],
                num_outputs=outputs,
                num_inputs=inputs + has_bias,
                is_transposed=is_transposed,
                is_tied=any(isinstance(module, nn.Embedding) for _, module in users[parameter]),
            )
        )
    if not layers:
        raise InputError(
            f"no linear layer of {type(lm.module).__name__} is trainable.",
            "a model with nn.Linear or Conv1D layers, some of them with requires_grad",
            "unfreeze the layers whose curvature is meant.",
        )
    return layers


def _modules_by_text(lm: LanguageModel, batch: Batch, modules: list[tuple[str, nn.Module]]) -> set[str]:
    """Name the modules that are called, and only with rows in the order of the texts."""
    seen: dict[str, bool] = {}

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen[name] = seen.get(name, True) and bool(args) and _is_by_text(args[0], tuple(batch.input_ids.shape))

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in modules]
    try:
        with torch.no_grad(), uncompiled(lm.module):
            lm.module(input_ids=batch.input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, is_by_text in seen.items() if is_by_text}


def _is_by_text(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether rows (B, L, ..., F) or (B * L, F) stand in the order of B texts of L positions."""
    return tuple(x.shape[:2]) == shape if x.dim() > 2 else x.shape[0] == shape[0] * shape[1]
