"""The rule for the fused experts of transformers 5: two linear layers per expert, all experts in one module.

Tokens are gathered by expert inside the module, where no hook sees them. The module's inputs say which token goes
to which expert, so what its two linear layers get is computed again, expert by expert, and each token's product is
given to its own text. That is the identity of a linear layer, and holds for every implementation of the experts.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from oracle.gradients.general_rule import GeneralRule, Rule, UncoveredModuleError, is_close

_LAYOUT = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate", "down_proj")


def is_fused_experts(module: Any) -> bool:
    """Whether a module has the layout that transformers' fused experts share, whatever they are called."""
    is_known = all(hasattr(module, key) for key in _LAYOUT) and not getattr(module, "has_post_expert_norm", False)
    return bool(is_known and hasattr(module, _up_key(module)) and module.down_proj.dim() == 3)


def _up_key(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


class ExpertsRule(Rule):
    """y_t = sum_e w_te W2_e act(W1_e x_t): each expert's two layers move as linear layers do."""

    def attach(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Leave a hook on the output of one use of the module."""
        inputs = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())
        are_tensors = len(inputs) == 3 and all(isinstance(tensor, Tensor) for tensor in (*inputs, output))
        if not are_tensors or len(inputs[0]) != len(self.engine.layout.owners):
            return GeneralRule(self.names, self.engine).attach(module, args, kwargs, output)
        hidden, index, weights = (tensor.detach() for tensor in inputs)  # (T, H), (T, A), (T, A) for A experts per token
        if output.requires_grad and self.is_by_text(module, output) and self.is_by_text(module, hidden):
            result = output.detach()
            output.register_hook(lambda b: self.backward(module, (hidden, index, weights), result, b))
        return None

    def backward(self, module: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor, b: Tensor) -> None:
        """Add the products of b (T, H), one expert after the other."""
        hidden, index, weights = inputs
        if self.engine.norms and any(self.engine.uses[name] > 1 for name in self.names.values()):
            raise UncoveredModuleError("fused experts are used more than once", self.names.values())
        texts = self.engine.layout.owners  # (T,)
        rebuilt = torch.zeros_like(output, dtype=torch.float32)  # (T, H)
        for expert in index.unique().tolist():
            if expert >= module.num_experts:  # stands for no expert
                continue
            tokens, slots = torch.where(index == expert)  # (n,), tokens ascending
            share = weights[tokens, slots].unsqueeze(1)  # (n, 1)
            out = self.add_expert(module, expert, x=hidden[tokens], b=b[tokens] * share, texts=texts[tokens])
            rebuilt[tokens] += out * share
        if not is_close(rebuilt.to(output.dtype), output):
            reason = f"a {type(module).__name__} does something else than fused experts do"
            raise UncoveredModuleError(reason, self.names.values())

    def add_expert(self, module: Any, expert: int, *, x: Tensor, b: Tensor, texts: Tensor) -> Tensor:
        """Add one expert's products for its n tokens, with x (n, H) and b (n, H); return what the expert gives (n, H)."""
        up, down = _up_key(module), "down_proj"
        with torch.enable_grad():
            inner = _layer(module, up, expert, x).requires_grad_()  # (n, 2 I)
            gated = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)  # (n, I)
        weight = _weight(module, down, expert)  # (H, I)
        (b_inner,) = torch.autograd.grad(gated, inner, (b.to(weight.dtype) @ weight).to(gated.dtype))
        gated = gated.detach()
        self.add_layer(up, expert, x=x, b=b_inner, texts=texts, is_transposed=module.is_transposed)
        self.add_layer(down, expert, x=gated, b=b, texts=texts, is_transposed=module.is_transposed)
        return _layer(module, down, expert, gated).float()

    def add_layer(self, key: str, expert: int, *, x: Tensor, b: Tensor, texts: Tensor, is_transposed: bool) -> None:
        """Add the products of one expert's layer.

        Args:
            key: The layer's weight in the module; its bias is called after it.
            expert: Which expert.
            x: (n, I) what enters the layer.
            b: (n, O) the gradient of the summed loss at what leaves it.
            texts: (n,) the text of each token, all of a text's side by side; B for none.
            is_transposed: Whether the weight is stored (I, O).
        """
        engine, num_texts, x = self.engine, self.engine.layout.num_texts, x.to(b.dtype)
        weight, bias = self.names.get(key), self.names.get(f"{key}_bias")
        if engine.norms:
            present, counts = torch.unique_consecutive(texts, return_counts=True)
            for text, own_x, own_b in zip(present.tolist(), x.split(counts.tolist()), b.split(counts.tolist()), strict=True):
                if text == num_texts:
                    continue
                if bias is not None:
                    engine.add_gradients(bias, own_b.sum(0, keepdim=True, dtype=torch.float32), first=text, part=expert)
                if weight is not None:
                    gradient = own_x.T @ own_b if is_transposed else own_b.T @ own_x
                    engine.add_gradients(weight, gradient.reshape(1, -1), first=text, part=expert)
            return
        owner = functional.one_hot(texts, num_texts + 1)[:, :num_texts].double().T  # (B, n)
        if bias is not None:
            engine.add_products(bias, owner @ (b.float() @ engine.directions[bias][:, expert].T).double())
        if weight is not None:
            directions = [direction[expert].to(b.dtype) for direction in engine.directions[weight]]
            moved = (x @ (direction if is_transposed else direction.T) for direction in directions)  # K of (n, O)
            products = torch.stack([torch.linalg.vecdot(rows.float(), b.float()) for rows in moved], dim=1)  # (n, K)
            engine.add_products(weight, owner @ products.double())


def _weight(module: Any, key: str, expert: int) -> Tensor:
    weight = getattr(module, key)[expert].detach()
    return weight.T if module.is_transposed else weight  # (O, I)


def _layer(module: Any, key: str, expert: int, x: Tensor) -> Tensor:
    weight = _weight(module, key, expert)
    bias = getattr(module, f"{key}_bias")[expert].detach() if module.has_bias else None
    return functional.linear(x.to(weight.dtype), weight, bias)
