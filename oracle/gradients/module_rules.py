"""One rule per kind of module: how its output moves when its own parameters move along a direction.

A rule is a forward hook that leaves a hook on the module's output; that one runs in the backward pass, where the
gradient b of the summed loss at the output is at hand, and hands the engine the text's products (or per-text
gradients of this one layer). `attach_rule` chooses by the module's kind and refuses what no rule covers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from oracle.gradients.products import GradientProducts

GRADIENT_BLOCK_BYTES = 2**27  # per-text gradients of one layer that exist at the same time


class UncoveredModuleError(RuntimeError):
    """A module mixes texts in a way that no rule covers; use `PerTextProducts`."""


def make_root(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Start the graph at the embeddings: with all weights frozen nothing else would ask for a gradient."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


def attach_rule(module: nn.Module, names: dict[str, str], engine: GradientProducts) -> Any:
    """Hook the rule for a module's own parameters (key -> full name) and return the handle.

    Raises:
        UncoveredModuleError: No rule covers this kind of module.
    """
    from transformers.pytorch_utils import Conv1D

    if (
        isinstance(module, nn.Embedding)
        and set(names) == {"weight"}
        and module.max_norm is None
        and not module.scale_grad_by_freq
    ):
        rule = _EmbeddingRule if type(module).forward is nn.Embedding.forward else _OtherEmbeddingRule
        return module.register_forward_hook(rule(names["weight"], engine), with_kwargs=True)
    if isinstance(module, (nn.Linear, Conv1D)):
        return module.register_forward_hook(_LinearRule(names, engine, is_transposed=isinstance(module, Conv1D)))
    if all(p.dim() == 1 for p in module.parameters(recurse=False)):
        return module.register_forward_hook(_ElementwiseRule(names, engine))
    raise UncoveredModuleError(f"no rule for a {type(module).__name__} with parameters {sorted(names)}")


class _EmbeddingRule:
    """A looked-up row moves by the same row of the direction."""

    def __init__(self, name: str, engine: GradientProducts) -> None:
        self.name, self.engine = name, engine
        self.is_running = False

    def __call__(self, module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if self.is_running or not torch.is_grad_enabled():
            return None
        engine = self.engine
        if output.shape[0] == 1 and engine.num_texts > 1:  # learned positions, broadcast over the batch later on:
            output = output.expand(engine.num_texts, *output.shape[1:]).clone()  # without a copy per text b would be a sum
        if not output.requires_grad:
            output.requires_grad_()
        engine.count_use({"weight": self.name})
        output.register_hook(lambda b: self.backward(module, args, kwargs, engine.by_text(b).float()))
        return output

    def backward(self, module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any], b: Tensor) -> None:
        engine = self.engine
        ids = args[0] if args else kwargs["input"]
        if ids.shape[0] == 1:
            ids = ids.expand(engine.num_texts, *ids.shape[1:])
        ids = ids.reshape(engine.num_texts, -1)  # (B, L)
        if module.padding_idx is not None:  # torch gives that row no gradient
            b = b * (ids != module.padding_idx).unsqueeze(-1)  # (B, L, F)
        for k in range(engine.num_directions):
            moved = functional.embedding(ids, engine.directions[self.name][k])  # (B, L, F)
            engine.products[:, k] += (moved * b).sum((1, 2), dtype=torch.float64)
        if engine.norms and engine.uses[self.name] == 1:
            same = (ids.unsqueeze(1) == ids.unsqueeze(2)).double()  # (B, L, L): a row used twice adds up before squaring
            engine.square_norms += ((b @ b.transpose(1, 2)).double() * same).sum((1, 2))
        elif engine.norms:
            for row in range(engine.num_texts):
                gradient = torch.zeros_like(module.weight, dtype=torch.float32).index_add_(0, ids[row], b[row])
                engine.add_norm(self.name, gradient.reshape(1, -1), slice(row, row + 1))


class _OtherEmbeddingRule(_EmbeddingRule):
    """An embedding with a forward of its own (scaled rows, shifted positions): the module is differentiated itself."""

    def backward(self, module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any], b: Tensor) -> None:
        engine, weight = self.engine, module.weight.detach()

        def output(weight: Tensor) -> Tensor:
            self.is_running = True
            try:
                rows = torch.func.functional_call(module, {"weight": weight}, args, kwargs)
            finally:
                self.is_running = False
            return rows.reshape(engine.num_texts if rows.numel() == b.numel() else 1, -1, rows.shape[-1])

        for k in range(engine.num_directions):
            direction = engine.directions[self.name][k].to(weight.dtype)
            if module.padding_idx is not None:  # torch gives that row no gradient
                direction = direction.index_fill(0, torch.tensor(module.padding_idx, device=direction.device), 0.0)
            moved = torch.func.jvp(output, (weight,), (direction,))[1]  # (B or 1, L, F)
            engine.products[:, k] += (moved.float() * b).sum((1, 2), dtype=torch.float64)
        if engine.norms:
            with torch.enable_grad():
                rows = output(weight.requires_grad_())
            for row in range(engine.num_texts):
                own = torch.zeros_like(rows)
                own[row if len(rows) > 1 else 0] = b[row].to(rows.dtype)
                (gradient,) = torch.autograd.grad(rows, weight, own, retain_graph=True)
                engine.add_norm(self.name, gradient.float().reshape(1, -1), slice(row, row + 1))


class _LinearRule:
    """y = x W' + c moves by x D_W' + D_c."""

    def __init__(self, names: dict[str, str], engine: GradientProducts, *, is_transposed: bool) -> None:
        self.names, self.engine, self.is_transposed = names, engine, is_transposed

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            self.engine.count_use(self.names)
            x = args[0].detach()
            output.register_hook(lambda b: self.backward(x, b))

    def backward(self, x: Tensor, b: Tensor) -> None:
        engine = self.engine
        x, b = engine.by_text(x), engine.by_text(b)  # (B, T, I), (B, T, O)
        if "bias" in self.names:
            engine.add_gradients(self.names["bias"], b.sum(1, dtype=torch.float32))
        if "weight" not in self.names:
            return
        if engine.num_directions == 1 and not engine.norms:
            self.add_by_tangent(x, b)
        else:
            self.add_by_gradients(x, b)

    def add_by_tangent(self, x: Tensor, b: Tensor) -> None:
        """One direction: a single matrix product with D, on the side that makes the smaller result."""
        direction = self.engine.directions[self.names["weight"]][0]
        direction = direction.T if self.is_transposed else direction  # (O, I)
        outputs, inputs = direction.shape
        direction = direction.to(b.dtype)
        moved, other = (x.to(b.dtype) @ direction.T, b) if inputs >= outputs else (b @ direction, x)  # (B, T, min(O, I))
        products = torch.linalg.vecdot(moved.float(), other.float()).sum(1, dtype=torch.float64)  # (B,)
        self.engine.add_products(products.unsqueeze(1))

    def add_by_gradients(self, x: Tensor, b: Tensor) -> None:
        """Several directions or norms: form the layer's gradients for a few texts at a time."""
        left, right = (x, b) if self.is_transposed else (b, x)
        bytes_per_text = left.shape[-1] * right.shape[-1] * 4
        step = max(1, GRADIENT_BLOCK_BYTES // bytes_per_text)
        for first in range(0, x.shape[0], step):
            gradients = torch.bmm(left[first : first + step].to(b.dtype).transpose(1, 2), right[first : first + step].to(b.dtype))
            self.engine.add_gradients(self.names["weight"], gradients.flatten(1), first=first)


class _ElementwiseRule:
    """Norms: every output feature is its own input times a weight, plus a bias (LayerNorm, RMSNorm, 1 + weight, ...).

    The normalised input is read off the module itself, as its output for weights of one less that for weights
    of zero, so any such norm is covered whatever it is called; that it is elementwise is checked on its first use.
    """

    def __init__(self, names: dict[str, str], engine: GradientProducts) -> None:
        self.names, self.engine = names, engine
        self.is_running = self.is_checked = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.is_running or not (isinstance(output, Tensor) and output.requires_grad):
            return
        self.engine.count_use(self.names)
        x = args[0].detach()
        output.register_hook(lambda b: self.backward(module, x, b))

    def backward(self, module: nn.Module, x: Tensor, b: Tensor) -> None:
        for key, name in self.names.items():
            per_feature = b.float()
            if key != "bias":
                per_feature = per_feature * self.normalised(module, key, x).float()
            self.engine.add_gradients(name, self.engine.by_text(per_feature).sum(1))

    def normalised(self, module: nn.Module, key: str, x: Tensor) -> Tensor:
        if isinstance(module, nn.LayerNorm):
            return functional.layer_norm(x, module.normalized_shape, eps=module.eps)
        parameter = getattr(module, key)
        one, zero = (self._output(module, key, value, x) for value in (torch.ones_like(parameter), torch.zeros_like(parameter)))
        unit = one - zero
        if not self.is_checked:
            probe = torch.linspace(-1.0, 1.0, parameter.numel(), device=x.device, dtype=parameter.dtype)
            moved = self._output(module, key, probe, x) - zero
            tolerance = 1e-4 if x.dtype == torch.float32 else 5e-2
            if moved.shape != x.shape or not torch.allclose(
                moved.float(), (unit * probe).float(), rtol=tolerance, atol=tolerance
            ):
                raise UncoveredModuleError(f"{type(module).__name__} is not elementwise in its {key}")
            self.is_checked = True
        return unit

    def _output(self, module: nn.Module, key: str, value: Tensor, x: Tensor) -> Tensor:
        self.is_running = True
        try:
            with torch.no_grad():
                return torch.func.functional_call(module, {key: value}, (x,))
        finally:
            self.is_running = False
