"""One rule per kind of module: how its output moves when its own parameters move along a direction.

`attach_rules` chooses by the module's kind: embeddings, linear layers, fused mixture-of-experts layers, routers,
and norms have rules of their own; everything else takes the general one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from oracle.gradients.expert_rules import ExpertsRule, is_fused_experts
from oracle.gradients.general_rule import GeneralRule, Rule, UncoveredModuleError

GRADIENT_BLOCK_BYTES = 2**27  # per-text gradients of one layer that exist at the same time


def make_root(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Start the graph at the embeddings: with all weights frozen nothing else would ask for a gradient.

    Returns:
        A copy, which the model may change in place, or None where there is a graph already.
    """
    return output.requires_grad_().clone() if torch.is_grad_enabled() and not output.requires_grad else None


def attach_rules(module: nn.Module, own: dict[str, str], inner: dict[str, str], *, engine: Any) -> list[Any]:
    """Hook the rules for a module and return the handles.

    Args:
        module: The module.
        own: The module's own parameters that have directions: key -> full name.
        inner: Parameters of modules inside it that the general rule is to take here.
        engine: Where the products go.

    Raises:
        UncoveredModuleError: What the module does depends on the whole batch.
    """
    rules: list[Rule] = [_choose_rule(module, own)(own, engine)] if own else []
    if inner and rules and isinstance(rules[0], GeneralRule):
        rules = [GeneralRule(own | inner, engine)]
    elif inner:
        rules.append(GeneralRule(inner, engine))
    return [module.register_forward_hook(rule, with_kwargs=True) for rule in rules]


def _choose_rule(module: nn.Module, names: dict[str, str]) -> type[Rule]:
    from transformers.pytorch_utils import Conv1D

    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, nn.Embedding) and set(own) == {"weight"}:
        if module.max_norm is not None or module.scale_grad_by_freq:
            option = "max_norm" if module.max_norm is not None else "scale_grad_by_freq"
            raise UncoveredModuleError(f"an embedding with {option} depends on the whole batch", names.values())
        return EmbeddingRule if type(module).forward is nn.Embedding.forward else OtherEmbeddingRule
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return LinearRule
    if isinstance(module, Conv1D):
        return TransposedLinearRule
    if is_fused_experts(module):
        return ExpertsRule
    if "weight" in own and set(own) <= {"weight", "bias"} and own["weight"].dim() == 2:
        return RouterRule
    return ElementwiseRule if all(p.dim() == 1 for p in own.values()) else GeneralRule


class EmbeddingRule(Rule):
    """A looked-up row moves by the same row of the direction."""

    def attach(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Leave a hook on the output of one use of the module."""
        num_rows = self.engine.layout.num_rows
        if output.shape[0] == 1 and num_rows > 1:  # learned positions, broadcast over the batch later on: b would
            output = output.expand(num_rows, *output.shape[1:])  # be a sum over the texts
        output = output if output.requires_grad else output.requires_grad_().clone()  # the model may change it in place
        if self.is_by_text(module, output):
            ids = args[0] if args else kwargs.get("input")
            if self.engine.norms and not self.engine.is_in_backward and isinstance(ids, Tensor) and ids.dtype == torch.long:
                self.engine.tied.note_ids(self.names["weight"], looked_up(args, kwargs, output))
            output.register_hook(lambda b: self.backward(module, args, kwargs, b.float()))
        return output

    def backward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], b: Tensor) -> None:
        """Add the products of b (R, M, F)."""
        engine, layout, name = self.engine, self.engine.layout, self.names["weight"]
        ids = looked_up(args, kwargs, b)  # (R, M, 1)
        if module.padding_idx is not None:  # torch gives that row no gradient
            b = b * (ids != module.padding_idx)  # (R, M, F)
        moved = (functional.embedding(ids.squeeze(-1), direction) for direction in engine.directions[name])  # K of (R, M, F)
        products = torch.stack([(rows * b).sum(-1, dtype=torch.float64) for rows in moved], dim=-1)  # (R, M, K)
        engine.add_products(name, layout.sum_by_text(products, dtype=torch.float64))
        is_kept = engine.tied.is_kept(name)
        for texts, of_both in engine.tied.products(name, b) if is_kept else []:
            engine.add_square_norms(2 * of_both, first=texts.start)
        for texts in layout.groups() if engine.norms else []:
            own_ids, own_b = layout.by_text(ids, texts).squeeze(-1), layout.by_text(b, texts)  # (b, T), (b, T, F)
            if engine.uses[name] == 1 or is_kept:
                same = (own_ids.unsqueeze(1) == own_ids.unsqueeze(2)).double()  # (b, T, T): a row used twice adds up first
                engine.add_square_norms(((own_b @ own_b.transpose(1, 2)).double() * same).sum((1, 2)), first=texts.start)
                continue
            for text, row in enumerate(range(texts.start, texts.stop)):
                gradient = torch.zeros_like(module.weight, dtype=torch.float32).index_add_(0, own_ids[text], own_b[text])
                engine.add_norm(name, gradient.reshape(1, -1), slice(row, row + 1))


class OtherEmbeddingRule(EmbeddingRule):
    """An embedding with a forward of its own (scaled rows, shifted positions): the module is differentiated itself."""

    def backward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], b: Tensor) -> None:
        """Add the products of b (R, M, F)."""
        engine, layout, name, weight = self.engine, self.engine.layout, self.names["weight"], module.weight.detach()

        def output(weight: Tensor) -> Tensor:
            with engine.rerunning():
                return torch.func.functional_call(module, {"weight": weight}, args, kwargs).expand_as(b)

        products = []
        for direction in engine.directions[name]:
            tangent = direction.to(weight.dtype)
            if module.padding_idx is not None:  # torch gives that row no gradient
                tangent = tangent.index_fill(0, torch.tensor(module.padding_idx, device=tangent.device), 0.0)
            moved = torch.func.jvp(output, (weight,), (tangent,))[1]  # (R, M, F)
            products.append((moved.float() * b).sum(-1, dtype=torch.float64))
        engine.add_products(name, layout.sum_by_text(torch.stack(products, dim=-1), dtype=torch.float64))
        if engine.norms:
            with torch.enable_grad():
                rows = output(weight.requires_grad_())
            owners = layout.owners.reshape(*b.shape[:-1], 1)  # (R, M, 1)
            is_kept, firsts = engine.tied.is_kept(name), torch.zeros_like(b)  # every id's row, where it stands first
            for text in range(layout.num_texts):
                is_own = owners == text
                (gradient,) = torch.autograd.grad(rows, weight, (b * is_own).to(rows.dtype), retain_graph=True)
                engine.add_norm(name, gradient.float().reshape(1, -1), slice(text, text + 1))
                if is_kept:
                    self.put_rows(firsts, gradient.float(), ids=looked_up(args, kwargs, b), is_own=is_own)
            for texts, of_both in engine.tied.products(name, firsts) if is_kept else []:
                engine.add_square_norms(2 * of_both, first=texts.start)

    def put_rows(self, firsts: Tensor, gradient: Tensor, *, ids: Tensor, is_own: Tensor) -> None:
        """Put the rows of a text's gradient (V, F) into `firsts` (R, M, F), each at the first of its own tokens with that id."""
        places = is_own.reshape(-1).nonzero().squeeze(1)  # (T,)
        own_ids = ids.reshape(-1)[places]
        if bool(gradient.index_fill(0, own_ids, 0.0).any()):
            raise UncoveredModuleError(
                "an embedding shares its weight and moves rows that were not asked for", self.names.values()
            )
        is_first = ~(own_ids.unsqueeze(0) == own_ids.unsqueeze(1)).tril(-1).any(1)
        firsts.reshape(-1, firsts.shape[-1])[places[is_first]] = gradient[own_ids[is_first]]


class LinearRule(Rule):
    """y = x W' + c moves by x D_W' + D_c."""

    is_transposed = False

    def attach(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Leave a hook on the output of one use of the module."""
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        if output.requires_grad and self.is_by_text(module, output):
            output.register_hook(lambda b: self.backward(x, b))

    def backward(self, x: Tensor, b: Tensor) -> None:
        """Add the products of b at y and x."""
        engine = self.engine
        if "bias" in self.names:
            engine.add_gradients(self.names["bias"], engine.layout.sum_by_text(b, dtype=torch.float32))
        if "weight" not in self.names:
            return
        if engine.num_directions == 1 and not engine.norms:
            self.add_by_tangent(x, b)
        else:
            self.add_by_gradients(x, b)

    def add_by_tangent(self, x: Tensor, b: Tensor) -> None:
        """One direction: a single matrix product with D, on the side that makes the smaller result."""
        name = self.names["weight"]
        direction = self.engine.directions[name][0]
        direction = direction.T if self.is_transposed else direction  # (O, I)
        outputs, inputs = direction.shape
        direction = direction.to(b.dtype)
        moved, other = (x.to(b.dtype) @ direction.T, b) if inputs >= outputs else (b @ direction, x)  # (R, M, min(O, I))
        of_tokens = torch.linalg.vecdot(moved.float(), other.float()).unsqueeze(-1)  # (R, M, 1)
        self.engine.add_products(name, self.engine.layout.sum_by_text(of_tokens, dtype=torch.float64))

    def add_by_gradients(self, x: Tensor, b: Tensor) -> None:
        """Several directions or norms: form the layer's gradients for a few texts at a time."""
        left, right = (x, b) if self.is_transposed else (b, x)
        engine, name = self.engine, self.names["weight"]
        layout, bytes_per_text = engine.layout, left.shape[-1] * right.shape[-1] * 4
        is_pair = engine.norms and not self.is_transposed and engine.tied.is_pair(name, engine.uses[name])
        is_pair = is_pair and name not in engine.pending
        for texts in layout.groups(at_most=max(1, GRADIENT_BLOCK_BYTES // bytes_per_text)):
            own_left, own_right = (layout.by_text(tensor, texts).to(b.dtype) for tensor in (left, right))  # (b, T, .)
            if is_pair:
                engine.tied.keep(name, texts, x=own_right, b=own_left)
            gradients = torch.bmm(own_left.transpose(1, 2), own_right)
            engine.add_gradients(name, gradients.flatten(1), first=texts.start)


class TransposedLinearRule(LinearRule):
    """A linear layer whose weight is stored (I, O), such as GPT-2's Conv1D."""

    is_transposed = True


class RouterRule(LinearRule):
    """A module whose first output is x W' + c, whatever it makes of that: the router of a mixture of experts.

    All that it gives flows through that output, so the gradient there is the whole one.
    """

    def attach(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Leave a hook on the output of one use of the module."""
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        x = args[0] if args else None
        if isinstance(x, Tensor) and isinstance(first, Tensor) and x.shape[-1] == module.weight.shape[1]:
            with torch.no_grad():
                is_linear = _holds_rows(first, functional.linear(x, module.weight, getattr(module, "bias", None)))
            if is_linear:
                return super().attach(module, args, {}, first)
        return GeneralRule(self.names, self.engine).attach(module, args, kwargs, output)


class ElementwiseRule(Rule):
    """Norms: every output feature is its own input times a weight, plus a bias (LayerNorm, RMSNorm, 1 + weight, ...).

    The normalised input is read off the module itself, as its output for weights of one less that for weights
    of zero, so any such norm is covered whatever it is called. That it is elementwise is checked on its first use;
    a module that is not takes the general rule.
    """

    is_elementwise: bool | None = None

    def attach(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Leave a hook on the output of one use of the module."""
        if self.is_elementwise is None:
            self.is_elementwise = self.check(module, args, kwargs, output)
        if not self.is_elementwise:
            return GeneralRule(self.names, self.engine).attach(module, args, kwargs, output)
        x = args[0].detach()
        if output.requires_grad and self.is_by_text(module, output):
            output.register_hook(lambda b: self.backward(module, x, b))
        return None

    def backward(self, module: nn.Module, x: Tensor, b: Tensor) -> None:
        """Add the products of b at the output for x."""
        for key, name in self.names.items():
            per_feature = b.float()
            if key != "bias":
                per_feature = per_feature * self.normalised(module, key, x).float()
            self.engine.add_gradients(name, self.engine.layout.sum_by_text(per_feature, dtype=torch.float32))

    def normalised(self, module: Any, key: str, x: Tensor) -> Tensor:
        """What the parameter `key` is multiplied with in every output feature."""
        if _is_layer_norm(module):
            return functional.layer_norm(x, module.normalized_shape, eps=module.eps)
        parameter = getattr(module, key)
        one, zero = (self._output(module, key, value, x) for value in (torch.ones_like(parameter), torch.zeros_like(parameter)))
        return one - zero

    def check(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
        """Whether the module takes one tensor and every output feature is linear in its own element of each parameter."""
        if _is_layer_norm(module):
            return len(module.normalized_shape) == 1
        if kwargs or len(args) != 1 or not (isinstance(args[0], Tensor) and isinstance(output, Tensor)):
            return False
        x = args[0].detach()
        if output.shape != x.shape or any(getattr(module, key).shape != x.shape[-1:] for key in self.names):
            return False
        tolerance = 1e-4 if output.dtype in (torch.float32, torch.float64) else 5e-2
        for key in self.names:
            parameter = getattr(module, key)
            probe = torch.linspace(-1.0, 1.0, parameter.numel(), device=x.device, dtype=parameter.dtype)
            moved = self._output(module, key, probe, x) - self._output(module, key, torch.zeros_like(parameter), x)
            expected = probe.expand_as(x) if key == "bias" else self.normalised(module, key, x) * probe
            if not torch.allclose(moved.float(), expected.float(), rtol=tolerance, atol=tolerance):
                return False
        return True

    def _output(self, module: nn.Module, key: str, value: Tensor, x: Tensor) -> Tensor:
        with self.engine.rerunning(), torch.no_grad():
            return torch.func.functional_call(module, {key: value}, (x,))


def looked_up(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Return the ids (R, M, 1) that an embedding was asked for, each beside its row of the output (R, M, F)."""
    return (args[0] if args else kwargs["input"]).unsqueeze(-1).expand(*output.shape[:-1], 1)


def _is_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward


def _holds_rows(tensor: Tensor, expected: Tensor) -> bool:
    return tensor.numel() == expected.numel() and torch.equal(tensor.detach().reshape(expected.shape), expected)
