"""Products of every text's gradient with fixed directions, from one forward and one backward pass.

For a text i with loss L_i and a direction D over the parameters, <grad L_i, D> is a sum over modules and
over the tokens of the text of <b, dy>: b the gradient of the summed loss at the module's output, dy how the
output would move if the module's own parameters moved along D with its input held fixed. For a linear layer
that is sum_t b_t' D a_t. Nothing has to be known about the rest of the network, and since the sum runs over
the *uses* of a parameter, tied weights and modules that are called twice need no special case.

The weights are frozen for the pass, so autograd skips their gradients and the time saved pays for the
products. With several directions, or when norms are wanted, a linear layer's per-text gradients are formed
one layer (and a few texts) at a time and multiplied with all directions at once.

Products are accumulated in float32 within a layer's block and in float64 across blocks and modules.
Left out: modules that permute or gather tokens across texts (fused mixture-of-experts layers), and weights
used outside their own module. `PerTextProducts` is the plain loop that covers those, and the truth in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from oracle.encoding import Batch
from oracle.gradients.module_rules import UncoveredModuleError, attach_rule, make_root

SUM_BLOCK = 2**16  # elements summed in float32 before going on in float64


@dataclass(frozen=True)
class Products:
    """What one batch gave.

    Attributes:
        products: (B, K) float64, <grad loss of text, direction>.
        square_norms: (B,) float64 squared gradient norms, or None if they were not asked for.
        losses: (B,) float32 mean loss per target token.
    """

    products: Tensor
    square_norms: Tensor | None
    losses: Tensor


LossFunction = Callable[[Batch], Tensor]


class GradientProducts:
    """Every text's gradient product with K directions, without per-text gradients.

    Use as a context manager around any number of batches; hooks and `requires_grad` are put back at its end.

    Args:
        module: The language model.
        directions: Parameter name -> (K, *shape); all trainable parameters or some of them.
        losses: Batch -> (B,) differentiable losses, one per text.
        norms: Whether to also give each text's squared gradient norm over the parameters in `directions`.

    Raises:
        UncoveredModuleError: While running, when a module's input is not ordered by text.
        ValueError: A direction names a parameter that no module holds.
    """

    def __init__(self, module: nn.Module, directions: Mapping[str, Tensor], losses: LossFunction, *, norms: bool = False) -> None:
        self.module, self.directions, self.losses, self.norms = module, directions, losses, norms
        self.num_directions = next(iter(directions.values())).shape[0]
        self._handles: list[Any] = []
        self._requires_grad: list[tuple[nn.Parameter, bool]] = []
        self._canonical = _canonical_names(module)

    def __enter__(self) -> GradientProducts:
        self._requires_grad = [(p, p.requires_grad) for p in self.module.parameters()]
        try:
            self._attach_rules()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _attach_rules(self) -> None:
        reached: set[str] = set()
        for module in self.module.modules():
            own = {
                key: self._canonical[p]
                for key, p in module.named_parameters(recurse=False)
                if self._canonical[p] in self.directions
            }
            if own:
                reached |= set(own.values())
                self._handles.append(attach_rule(module, own, self))
        for parameter, _ in self._requires_grad:
            parameter.requires_grad_(False)
        embeddings = self.module.get_input_embeddings()  # type: ignore[operator]
        self._handles.append(embeddings.register_forward_hook(make_root))
        missing = set(self.directions) - reached
        if missing:
            raise ValueError(f"no module holds the parameters {sorted(missing)[:3]}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)
        self._handles.clear()

    def __call__(self, batch: Batch) -> Products:
        """Measure one batch."""
        self.num_texts, self.num_positions = batch.input_ids.shape
        device = batch.input_ids.device
        self.products = torch.zeros(self.num_texts, self.num_directions, dtype=torch.float64, device=device)
        self.square_norms = torch.zeros(self.num_texts, dtype=torch.float64, device=device)
        self.uses: dict[str, int] = {}
        self.pending: dict[str, Tensor] = {}
        losses = self.losses(batch)
        losses.sum().backward()
        assert not self.pending, "a use of a shared parameter had no backward pass"
        return Products(self.products, self.square_norms if self.norms else None, losses.detach())

    # ------------------------------------------------------------------ called by the rules

    def count_use(self, names: Mapping[str, str]) -> None:
        """Note in the forward pass that a module with these parameters was called."""
        for name in names.values():
            self.uses[name] = self.uses.get(name, 0) + 1

    def by_text(self, tensor: Tensor) -> Tensor:
        """View a module's input or output (B, L, ..., F) or (B * L, F) as (B, T, F).

        Raises:
            UncoveredModuleError: Its first dimension is neither B nor B * L.
        """
        rows = tensor.shape[0]
        if rows not in (self.num_texts, self.num_texts * self.num_positions):
            raise UncoveredModuleError(
                f"a module sees {rows} rows; the batch has {self.num_texts} texts of {self.num_positions} positions"
            )
        return tensor.reshape(self.num_texts, -1, tensor.shape[-1])

    def add_products(self, products: Tensor) -> None:
        """Add (B, K) products of one use of a module."""
        self.products += products

    def add_gradients(self, name: str, gradients: Tensor, *, first: int = 0) -> None:
        """Add per-text gradients (b, P) of one use of a parameter: their products, and their share of the norms.

        Args:
            name: The parameter.
            gradients: (b, P) for texts `first` to `first + b`.
            first: The first text.
        """
        rows = slice(first, first + gradients.shape[0])
        gradients = gradients.float()
        self.products[rows] += dot_in_blocks(gradients, self.directions[name].reshape(self.num_directions, -1))
        if self.norms:
            self.add_norm(name, gradients, rows)

    def add_norm(self, name: str, gradients: Tensor, rows: slice) -> None:
        """Add the squared norms of (b, P) gradients; those of a parameter used more than once only after its last use."""
        if self.uses[name] == 1:
            self.square_norms[rows] += gradients.square().sum(1, dtype=torch.float64)
            return
        if name not in self.pending:
            self.pending[name] = torch.zeros(self.num_texts, gradients.shape[1], device=gradients.device)
            self.pending[f"{name} count"] = torch.zeros(self.num_texts, dtype=torch.long, device=gradients.device)
        self.pending[name][rows] += gradients
        self.pending[f"{name} count"][rows] += 1
        if bool((self.pending[f"{name} count"] == self.uses[name]).all()):
            self.square_norms += self.pending.pop(name).square().sum(1, dtype=torch.float64)
            del self.pending[f"{name} count"]


class PerTextProducts:
    """The same numbers from one full backward pass per text: slow, and covers every parameter of any model."""

    def __init__(self, module: nn.Module, directions: Mapping[str, Tensor], losses: LossFunction, *, norms: bool = False) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if name in directions}
        self.directions, self.losses, self.norms = directions, losses, norms

    def __enter__(self) -> PerTextProducts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def __call__(self, batch: Batch) -> Products:
        """Measure one batch, text by text."""
        products, square_norms, all_losses = [], [], []
        for row in range(batch.input_ids.shape[0]):
            losses = self.losses(Batch(batch.input_ids[row : row + 1], batch.labels[row : row + 1], [row]))
            gradients = torch.autograd.grad(losses.sum(), list(self.parameters.values()), allow_unused=True)
            pairs = [(name, g.double()) for name, g in zip(self.parameters, gradients, strict=True) if g is not None]
            products.append(torch.stack([(self.directions[name].double() * g).flatten(1).sum(1) for name, g in pairs]).sum(0))
            square_norms.append(torch.stack([g.square().sum() for _, g in pairs]).sum())
            all_losses.append(losses.detach())
        return Products(torch.stack(products), torch.stack(square_norms) if self.norms else None, torch.cat(all_losses))


def self_check(engine: GradientProducts, batch: Batch) -> float:
    """Compare a batch's products with one ordinary gradient, and one of its texts with the same text alone.

    The sum has to agree, sum_i <grad L_i, D> = <grad sum_i L_i, D>, which catches what no hook can see, such as a
    weight that is used outside its own module. The text alone catches products given to the wrong text, which
    leave the sum as it is. Call it outside the engine's `with` block.

    Returns:
        The largest error over the K directions: of the sum, relative to the sum of the absolute products, and of
        the single text (the one with the largest products), relative to the largest absolute product.

    Raises:
        UncoveredModuleError: A module's input is not ordered by text.
    """
    parameters = {name: p for name, p in engine.module.named_parameters() if name in engine.directions}
    gradients = torch.autograd.grad(engine.losses(batch).sum(), list(parameters.values()), allow_unused=True)
    with engine:
        measured = engine(batch).products  # (B, K)
        tiny = torch.finfo(torch.float32).tiny
        largest = measured.abs().amax(0).clamp_min(tiny)  # (K,)
        row = int((measured.abs() / largest).sum(1).argmax())
        single = Batch(batch.input_ids[row : row + 1], batch.labels[row : row + 1], [0])
        alone = engine(single).products[0] if len(measured) > 1 else measured[0]
    expected = torch.zeros_like(measured[0])
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            expected += dot_in_blocks(
                gradient.float().reshape(1, -1), engine.directions[name].reshape(engine.num_directions, -1)
            )[0]
    error_of_sum = (measured.sum(0) - expected).abs() / measured.abs().sum(0).clamp_min(tiny)
    error_of_single = (measured[row] - alone).abs() / largest
    return float(torch.maximum(error_of_sum, error_of_single).max())


def dot_in_blocks(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right' for (b, P) and (K, P) float32 matrices as (b, K) float64, summed in blocks.

    A single float32 sum over millions of elements loses four digits; blocks keep the error near that of one block.
    """
    size = left.shape[1]
    whole = size - size % SUM_BLOCK
    result = torch.zeros(left.shape[0], right.shape[0], dtype=torch.float64, device=left.device)
    if whole:
        blocks = torch.bmm(
            left[:, :whole].reshape(left.shape[0], -1, SUM_BLOCK).transpose(0, 1),
            right[:, :whole].reshape(right.shape[0], -1, SUM_BLOCK).permute(1, 2, 0),
        )  # (blocks, b, K)
        result += blocks.double().sum(0)
    if size > whole:
        result += (left[:, whole:] @ right[:, whole:].T).double()
    return result


def _canonical_names(module: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in module.named_parameters()}
