"""Products of every text's gradient with fixed directions, from one forward and one backward pass.

For a text i with loss L_i and a direction D over the parameters, <grad L_i, D> is a sum over modules and
over the tokens of the text of <b, dy>: b the gradient of the summed loss at the module's output, dy how the
output would move if the module's own parameters moved along D with its input held fixed. For a linear layer
that is sum_t b_t' D a_t. Nothing has to be known about the rest of the network, and since the sum runs over
the *uses* of a parameter, tied weights and modules that are called twice need no special case.

The weights are frozen for the pass, so autograd skips their gradients and the time saved pays for the
products. With several directions, or when norms are wanted, a linear layer's per-text gradients are formed
one layer (and a few texts) at a time and multiplied with all directions at once.

Products are accumulated in float32 within a layer's block and in float64 across blocks and modules, also where the model
computes in bfloat16. `PerTextProducts` is the plain loop for models that mix texts or use weights outside of modules, and
the truth in tests. A compiled module runs uncompiled here, because compiled code does not call hooks that came after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from oracle.encoding import Batch
from oracle.gradients.coverage import holders
from oracle.gradients.general_rule import UncoveredModuleError
from oracle.gradients.module_rules import attach_rules, make_root
from oracle.gradients.text_layout import TextLayout
from oracle.gradients.tied_norms import TiedNorms

SUM_BLOCK = 2**16  # elements summed in float32 before going on in float64

LossFunction = Callable[[Batch], Tensor]
Observer = Callable[[Batch, Tensor], Tensor]


@dataclass(frozen=True)
class Products:
    """What one batch gave.

    Attributes:
        products: (B, K) float64, <grad loss of text, direction>.
        square_norms: (B,) float64 squared gradient norms, or None if they were not asked for.
        losses: (B,) the losses whose gradients were meant.
        observed: (B, S) what the observer made of the logits, or None without one.
    """

    products: Tensor
    square_norms: Tensor | None
    losses: Tensor
    observed: Tensor | None = None


class GradientProducts:
    """Every text's gradient product with K directions, without per-text gradients.

    Use as a context manager around any number of batches; hooks and `requires_grad` are put back at its end.

    Args:
        module: The language model.
        directions: Parameter name -> (K, *shape); all trainable parameters or some of them.
        losses: Batch -> (B,) differentiable losses, one per text, from one call of `module`.
        norms: Whether to also give each text's squared gradient norm over the parameters in `directions`.
        observe: Batch and its logits (B, L, V) -> (B, S) further numbers, from the same forward pass.

    Raises:
        UncoveredModuleError: While running, when a module's input is not ordered by text.
        ValueError: A direction names a parameter that no module holds.
    """

    def __init__(
        self,
        module: nn.Module,
        directions: Mapping[str, Tensor],
        losses: LossFunction,
        *,
        norms: bool = False,
        observe: Observer | None = None,
    ) -> None:
        self.module, self.directions, self.losses, self.norms, self.observe = module, directions, losses, norms, observe
        self.num_directions = next(iter(directions.values())).shape[0]
        self._requires_grad: list[tuple[nn.Parameter, bool]] = []
        self._handles: list[Any] = []
        self._holders = holders(module)
        self.moved_up: dict[str, str] = {}  # parameter -> path of the module that the general rule runs for it
        self.rerun: set[str] = set()  # the parameters that the general rule has been used for

    def __enter__(self) -> GradientProducts:
        self._requires_grad = [(p, p.requires_grad) for p in self.module.parameters()]
        try:
            self._attach_rules()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _attach_rules(self) -> None:
        missing = sorted(set(self.directions) - set(self._holders))
        if missing:
            raise ValueError(f"no module holds the parameters {missing[:3]}")
        own: dict[str, dict[str, str]] = {}  # module -> key of a parameter in it -> the parameter's name
        inner: dict[str, dict[str, str]] = {}
        for name in self.directions:
            for path, key in self._holders[name]:
                above = self.moved_up.get(name)
                if above is None:
                    own.setdefault(path, {})[key] = name
                else:
                    inner.setdefault(above, {})[f"{path}.{key}"[len(above) + 1 :]] = name
        for path, module in self.module.named_modules():
            self._handles += attach_rules(module, own.get(path, {}), inner.get(path, {}), engine=self)
        for parameter, _ in self._requires_grad:
            parameter.requires_grad_(False)
        embeddings = self.module.get_input_embeddings()  # type: ignore[operator]
        self._handles.append(embeddings.register_forward_hook(make_root))

    def move_up(self, names: Iterable[str]) -> bool:
        """Give parameters to the general rule of the next larger module; False where the next one is the model itself."""
        embeddings = self.module.get_input_embeddings()  # type: ignore[operator]
        for name in names:
            path = self.moved_up.get(name, self._holders[name][0][0])
            above = path.rpartition(".")[0]
            above_module = self.module.get_submodule(above)
            is_whole_model = above_module is not embeddings and any(part is embeddings for part in above_module.modules())
            if not path or is_whole_model or len(self._holders[name]) > 1:
                return False
            self.moved_up[name] = above
        return True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)
        self._handles.clear()

    def __call__(self, batch: Batch) -> Products:
        """Measure one batch."""
        self.layout, device = TextLayout(batch), batch.input_ids.device
        self.products = torch.zeros(self.layout.num_texts, self.num_directions, dtype=torch.float64, device=device)
        self.square_norms = torch.zeros(self.layout.num_texts, dtype=torch.float64, device=device)
        self.by_parameter: dict[str, Tensor] = {}
        self.uses: dict[str, int] = {}
        self.pending: dict[str, tuple[Tensor, Tensor]] = {}
        self.tied = TiedNorms(self.layout)
        self.refused: dict[str, str] = {}
        self.is_in_backward = self.is_rerunning = False
        with uncompiled(self.module):
            losses, observed = observed_losses(self.module, self.losses, batch, observe=self.observe)
            if self.refused:
                raise UncoveredModuleError("; ".join(sorted(set(self.refused.values()))), self.refused)
            self.is_in_backward = True
            with torch.autocast(device.type, enabled=False):  # the rules' products are summed in float32
                losses.sum().backward()
        for gradients, _ in self.pending.values():  # a use without a backward pass of its own
            self.square_norms += gradients.square().sum(1, dtype=torch.float64)
        return Products(self.products, self.square_norms if self.norms else None, losses.detach(), observed)

    # ------------------------------------------------------------------ called by the rules

    def count_use(self, names: Mapping[str, str]) -> None:
        """Note that a module with these parameters was called; gradient checkpointing's calls in the backward pass are no use."""
        for name in () if self.is_in_backward else names.values():
            self.uses[name] = self.uses.get(name, 0) + 1

    def refuse(self, names: Mapping[str, str], reason: str) -> None:
        """Note in the forward pass that no rule covers a module; the batch is then refused as a whole.

        Raises:
            UncoveredModuleError: In the backward pass, where gradient checkpointing calls modules again.
        """
        self.refused.update(dict.fromkeys(names.values(), reason))
        if self.is_in_backward:
            raise UncoveredModuleError(reason, self.refused)

    @contextmanager
    def rerunning(self) -> Iterator[None]:
        """A block in which a rule calls a module itself, and all rules stand still."""
        before, self.is_rerunning = self.is_rerunning, True
        try:
            yield
        finally:
            self.is_rerunning = before

    def add_products(self, name: str, products: Tensor, *, first: int = 0) -> None:
        """Add (b, K) products of one use of a parameter, for texts `first` to `first + b`."""
        products = products.double()
        self.products[first : first + len(products)] += products
        self.by_parameter[name] = self.by_parameter.get(name, 0.0) + products.sum(0)

    def add_gradients(self, name: str, gradients: Tensor, *, first: int = 0, part: int | None = None) -> None:
        """Add per-text gradients (b, P) of one use of a parameter: their products, and their share of the norms.

        Args:
            name: The parameter.
            gradients: (b, P) for texts `first` to `first + b`.
            first: The first text.
            part: The index along the parameter's first dimension that they belong to; None for the whole parameter.
        """
        directions = self.directions[name] if part is None else self.directions[name][:, part]
        gradients = gradients.float()
        self.add_products(name, dot_in_blocks(gradients, directions.reshape(self.num_directions, -1)), first=first)
        rows = slice(first, first + gradients.shape[0])
        if self.norms and part is not None:
            self.square_norms[rows] += gradients.square().sum(1, dtype=torch.float64)
        elif self.norms:
            self.add_norm(name, gradients, rows)

    def add_square_norms(self, square_norms: Tensor, *, first: int = 0) -> None:
        """Add (b,) squared norms of a parameter's per-text gradients, for texts `first` to `first + b`."""
        self.square_norms[first : first + len(square_norms)] += square_norms

    def add_norm(self, name: str, gradients: Tensor, rows: slice) -> None:
        """Add the squared norms of (b, P) gradients; those of a parameter used more than once only after its last use."""
        if self.uses[name] == 1 or self.tied.is_kept(name):
            self.square_norms[rows] += gradients.square().sum(1, dtype=torch.float64)
            return
        if name not in self.pending:
            self.pending[name] = (
                torch.zeros(self.layout.num_texts, gradients.shape[1], device=gradients.device),
                torch.zeros(self.layout.num_texts, dtype=torch.long, device=gradients.device),
            )
        total, count = self.pending[name]
        total[rows] += gradients
        count[rows] += 1
        if bool((count == self.uses[name]).all()):
            self.square_norms += self.pending.pop(name)[0].square().sum(1, dtype=torch.float64)


class PerTextProducts:
    """The same numbers from one full backward pass per text: slow, and covers every parameter of any model."""

    def __init__(
        self,
        module: nn.Module,
        directions: Mapping[str, Tensor],
        losses: LossFunction,
        *,
        norms: bool = False,
        observe: Observer | None = None,
    ) -> None:
        self.module, self.directions, self.losses, self.norms, self.observe = module, directions, losses, norms, observe
        self.num_directions = next(iter(directions.values())).shape[0]

    def __enter__(self) -> PerTextProducts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def __call__(self, batch: Batch) -> Products:
        """Measure one batch, text by text."""
        device = batch.input_ids.device
        products = torch.zeros(len(batch.input_ids), self.num_directions, dtype=torch.float64, device=device)
        square_norms = torch.zeros(len(batch.input_ids), dtype=torch.float64, device=device)
        losses, observed = [], []
        for row, text in enumerate(each_text(self.module, self.directions, self.losses, batch, observe=self.observe)):
            for name, gradient in text.gradients.items():
                own = gradient.double()
                for k, direction in enumerate(self.directions[name]):
                    products[row, k] += (direction.double() * own).sum()
                if self.norms:
                    square_norms[row] += own.square().sum()
            losses.append(text.loss)
            observed.append(text.observed)
        return Products(products, square_norms if self.norms else None, torch.cat(losses), joined(observed))


@dataclass(frozen=True)
class TextGradient:
    """One text's own gradient.

    Attributes:
        gradients: Parameter name -> gradient of its shape; a parameter that the loss does not reach is left out.
        loss: (1,) the loss whose gradient was meant.
        observed: (1, S) what the observer made of the logits, or None without one.
    """

    gradients: dict[str, Tensor]
    loss: Tensor
    observed: Tensor | None


def each_text(
    module: nn.Module, names: Iterable[str], losses: LossFunction, batch: Batch, *, observe: Observer | None = None
) -> Iterator[TextGradient]:
    """Yield every text's own gradient with respect to the named parameters, from one backward pass each."""
    wanted = set(names)
    parameters = {name: p for name, p in module.named_parameters() if name in wanted}
    for row in range(len(batch.input_ids)):
        with uncompiled(module):
            loss, observed = observed_losses(module, losses, batch.some(slice(row, row + 1)), observe=observe)
            found = torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
        yield TextGradient(gradients, loss.detach(), observed)


def joined(observed: list[Tensor | None]) -> Tensor | None:
    """Join what an observer said of single texts to (B, S); None without an observer."""
    found = [rows for rows in observed if rows is not None]
    return torch.cat(found) if found else None


def observed_losses(
    module: nn.Module, losses: LossFunction, batch: Batch, *, observe: Observer | None
) -> tuple[Tensor, Tensor | None]:
    """Return a batch's losses, and what `observe` makes of the logits that they came from, a few texts at a time where packed."""
    if observe is None:
        return losses(batch), None
    logits: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _args, output: logits.append(output.logits.detach()))
    try:
        found = losses(batch)
    finally:
        handle.remove()
    layout = TextLayout(batch)
    with torch.no_grad():
        return found, torch.cat([observe(batch.some(texts), layout.by_text(logits[-1], texts)) for texts in layout.groups()])


def uncompiled(module: nn.Module) -> AbstractContextManager[Any]:
    """A block in which a module that went through `torch.compile` runs as it is written."""
    is_compiled = any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in module.modules())
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


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
