"""The first-order limit of `one_step`: the product of the text's gradient with the target's.

With the target's mean gradient fixed, one forward and backward pass over a batch gives every text's product
with every target set (`oracle.gradients.products`). Where the model comes with Adam's state, the target side
is preconditioned by the optimiser's own second moments, D = G / (sqrt(v) + eps): the part of an Adam step
that is linear in the text's gradient. In a trial this agreed with the effect of a text inside a real batch
better than the exact single-text Adam step did.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from oracle.encoding import Batch, EncodedText
from oracle.errors import InputError, check_at_least, check_choice
from oracle.gradients.module_rules import UncoveredModuleError
from oracle.gradients.products import GradientProducts, PerTextProducts, Products, self_check
from oracle.language_model import LanguageModel
from oracle.methods import Measured
from oracle.plugins import option
from oracle.target_columns import TargetColumns

SELF_CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative, see `self_check`
LOW_PRECISION_TOLERANCE = 5e-2


class SlowRouteWarning(UserWarning):
    """The batched identity does not cover the model, so every text takes a backward pass of its own."""


@dataclass(kw_only=True)
class GradDot:
    """Product of the text's gradient with each target's mean gradient, in the optimiser's own metric.

    Paper:
        TracIn, Pruthi et al. 2020, arXiv 2002.08484; the Adam metric after LESS, Xia et al. 2024, arXiv 2402.04333.
    Cost:
        One forward and backward pass per text for all target sets at once; K gradients of the model's size.
    Limit:
        With `preconditioner="none"` it is the limit of SGD `one_step` divided by the learning rate.

    The values are in nats per target token where the next step is one number times the (preconditioned) gradient:
    with SGD, and with Adam or AdamW in Adam's metric. Otherwise they are per unit of learning rate. With
    `maximize=True` the sign is that of the step, which then goes up the loss.
    """

    plugin_name: ClassVar[str] = "grad_dot"
    needs_optimizer: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False

    preconditioner: str = option(
        "auto", "'adam' divides by the root of the optimiser's second moments, 'none' does not, 'auto' does where there are any."
    )
    max_grad_norm: float | None = option(
        None, "Scale each text as a step on it alone would be clipped at this global norm; None does not clip."
    )
    similarity: str = option(
        "dot", "'dot' for the product, 'cosine' for the angle between the text's gradient and the direction."
    )
    per_text: bool = option(False, "Use one full backward pass per text instead of the batched identity; slow, for checking.")

    def __post_init__(self) -> None:
        check_choice("preconditioner", self.preconditioner, ("auto", "adam", "none"))
        check_choice("similarity", self.similarity, ("dot", "cosine"))
        if self.max_grad_norm is not None:
            check_at_least("max_grad_norm", self.max_grad_norm, 1e-30)
            if self.similarity == "cosine":
                raise InputError(
                    f"max_grad_norm={self.max_grad_norm} has no effect with similarity='cosine'.",
                    "one of the two",
                    "leave max_grad_norm out, or use similarity='dot'.",
                )

    @property
    def units(self) -> str:
        """Unit of the values, known after `prepare`."""
        if self.similarity == "cosine":
            return "cosine"
        return "nats per target token" if self.step_size_ is not None else "nats per target token per unit of learning rate"

    def prepare(self, lm: LanguageModel, columns: TargetColumns) -> None:
        """Measure the target gradients and precondition them."""
        self.lm_, self.columns_ = lm, columns
        self.route_ = "per_text" if self.per_text else "batched"
        self.self_check_: float | None = None
        directions = columns.gradients(lm)
        moments = adam_moments(lm) if self.preconditioner != "none" else None
        if self.preconditioner == "adam" and moments is None:
            raise InputError(
                "preconditioner='adam', and the model has no Adam state.",
                "a LanguageModel whose Adam or AdamW has taken a step",
                "pass the training run's optimizer, or use preconditioner='none'.",
            )
        self.is_adam_ = moments is not None
        self.step_size_ = _step_size(lm, is_adam=self.is_adam_)
        if moments is not None:
            for name, direction in directions.items():
                moments[name].precondition(direction, columns.shares)
        for name in maximised(lm) & set(directions):
            directions[name].neg_()
        self.direction_norms_ = _norms(columns, directions)  # whole (C,) and halves (2, C), for the cosine
        self.directions_ = directions
        needs_norms = self.max_grad_norm is not None or self.similarity == "cosine"
        self.fast_ = GradientProducts(lm.module, directions, lm.text_losses, norms=needs_norms)
        self.slow_ = PerTextProducts(lm.module, directions, lm.text_losses, norms=needs_norms)

    def measure(self, encoded: Sequence[EncodedText]) -> Measured:
        """One forward and backward pass over the texts, in as many batches as fit."""
        products = np.zeros((len(encoded), len(self.columns_.parts)))
        norms, losses = np.zeros(len(encoded)), np.zeros(len(encoded))
        for batch in self.lm_.batches(encoded):
            measured = self._products(batch)
            products[batch.positions] = measured.products.cpu().numpy()
            losses[batch.positions] = measured.losses.float().cpu().numpy()
            if measured.square_norms is not None:
                norms[batch.positions] = measured.square_norms.clamp_min(0).sqrt().cpu().numpy()
        columns = {"text_loss": losses}
        if self.max_grad_norm is not None or self.similarity == "cosine":
            columns["gradient_norm"] = norms
        return Measured(*self._scaled(products, norms), columns)

    def facts(self) -> dict[str, Any]:
        """How the products were made and how well they passed the self-check."""
        covered = sum(direction[0].numel() for direction in self.directions_.values())
        return {
            "route": self.route_,
            "preconditioner_used": "adam" if self.is_adam_ else "none",
            "step_size": self.step_size_,
            "self_check_relative_error": self.self_check_,
            "covered_parameters": covered,
            "parameters": self.lm_.num_parameters,
        }

    def prepare_flops(self, columns: TargetColumns) -> float:
        """Counted FLOPs of `prepare`: one forward and backward pass over all target sets."""
        return 3 * self.lm_.forward_flops_per_token * columns.num_tokens

    def flops(self, num_tokens: int, columns: TargetColumns) -> float:
        """Counted FLOPs for one text of `num_tokens`, the share of the target gradients left out."""
        return 3 * self.lm_.forward_flops_per_token * num_tokens

    def _products(self, batch: Batch) -> Products:
        if self.route_ == "batched" and self.self_check_ is None:
            self._choose_route(batch)
        if not self.route_.startswith("per_text"):
            try:
                with self.fast_ as engine:
                    return engine(batch)
            except UncoveredModuleError as error:  # of this batch alone: the next one takes the batched way again
                self._take_slow_route(f"batched, per_text for some batches ({error})")
        return self.slow_(batch)

    def _choose_route(self, batch: Batch) -> None:
        """Check the identity on the first batch; fall back to the plain loop where a module is not covered."""
        try:
            self.self_check_ = self_check(self.fast_, batch)
        except UncoveredModuleError as error:
            self._take_slow_route(f"per_text ({error})")
            return
        dtype = next(self.lm_.module.parameters()).dtype
        if not self.self_check_ <= SELF_CHECK_TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE):
            self._take_slow_route(
                f"per_text (self-check error {self.self_check_:.1e}: a weight is used outside its own module, "
                "or a module does something else than modules of its kind)"
            )

    def _take_slow_route(self, route: str) -> None:
        if self.route_ != route:
            warnings.warn(
                f"grad_dot takes one backward pass per text, several times the cost: {route}.", SlowRouteWarning, stacklevel=2
            )
        self.route_ = route

    def _scaled(self, products: np.ndarray, norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        whole, halves = self.columns_.combine(products), self.columns_.halves(products)  # (B, C), (2, B, C)
        if self.similarity == "cosine":
            own = np.where(norms > 0, norms, 1.0)[:, None]
            return whole / (own * self.direction_norms_[0]), halves / (own * self.direction_norms_[1][:, None, :])
        scale = np.full(len(norms), 1.0 if self.step_size_ is None else self.step_size_)
        if self.max_grad_norm is not None:
            scale *= np.minimum(1.0, self.max_grad_norm / (norms + 1e-6))  # torch.nn.utils.clip_grad_norm_ has the same 1e-6
        return whole * scale[:, None], halves * scale[None, :, None]


@dataclass(frozen=True)
class SecondMoments:
    """What Adam's next step divides one parameter's gradient by.

    Attributes:
        square: Bias-corrected second moments after the decay of that step, of the parameter's shape.
        new_weight: Weight of a new gradient's square in them.
        eps: The optimiser's own.
    """

    square: Tensor
    new_weight: float
    eps: float

    def precondition(self, directions: Tensor, shares: np.ndarray) -> None:
        """Divide target gradients (K, *shape) in place by the root of the moments after a step on the target itself.

        Where training has hardly touched a weight (the embedding of a rare token) its moments are near 0, and the bare
        division would blow the target's gradient up without bound, which a real step, squaring the new gradient too,
        never does. Elsewhere the target's square adds next to nothing.

        Args:
            directions: Gradients of K target parts.
            shares: (K, C) each part's share of its target set; parts of one set are divided by the same.
        """
        for share in torch.from_numpy(shares).to(directions).T:
            rows = share.nonzero().flatten()
            whole = torch.tensordot(share[rows], directions[rows], dims=1)
            directions[rows] /= (self.square + self.new_weight * whole.square()).sqrt() + self.eps


def adam_moments(lm: LanguageModel) -> dict[str, SecondMoments] | None:
    """Return what the next step divides each trainable parameter's gradient by (see `second_moments`).

    Returns:
        Parameter name -> moments of every trainable parameter; None if the optimiser has no Adam state.

    Raises:
        InputError: The optimiser has moments for some of the trainable parameters only.
    """
    trainable = {name for name, p in lm.module.named_parameters() if p.requires_grad}
    found = {name: moments for name, moments in second_moments(lm).items() if name in trainable}
    missing = trainable - set(found)
    if found and missing:
        raise InputError(
            f"the optimiser has no second moments for {sorted(missing)[:3]} and {max(len(missing) - 3, 0)} more parameters.",
            "an Adam state for every trainable parameter",
            "freeze those parameters, or use preconditioner='none'.",
        )
    return found or None


def second_moments(lm: LanguageModel) -> dict[str, SecondMoments]:
    """Return the second moments that the next Adam step divides by, this text's own square left out.

    With `amsgrad` that is the largest second moment so far.

    Returns:
        Parameter name -> moments of the parameters with Adam state, trainable or not.
    """
    found: dict[str, SecondMoments] = {}
    names = {p: name for name, p in lm.module.named_parameters()}
    for group in [] if lm.optimizer is None else lm.optimizer.param_groups:
        for parameter in group["params"]:
            slots = lm.optimizer.state.get(parameter, {}) if lm.optimizer is not None else {}
            if parameter not in names or "betas" not in group or slots.get("exp_avg_sq") is None or "step" not in slots:
                continue
            decay = group["betas"][1]
            correction = 1.0 - decay ** (float(slots["step"]) + 1)
            moments = slots["exp_avg_sq"].float() * decay
            if group.get("amsgrad"):
                moments = torch.maximum(slots["max_exp_avg_sq"].float(), moments)
            found[names[parameter]] = SecondMoments(moments / correction, (1.0 - decay) / correction, float(group["eps"]))
    return found


def maximised(lm: LanguageModel) -> set[str]:
    """Name the parameters whose optimiser goes up the loss (`maximize=True`)."""
    groups = [] if lm.optimizer is None else lm.optimizer.param_groups
    own = {parameter for group in groups if group.get("maximize") for parameter in group["params"]}
    return {name for name, parameter in lm.module.named_parameters() if parameter in own}


def _step_size(lm: LanguageModel, *, is_adam: bool) -> float | None:
    """What the next step multiplies the (preconditioned) gradient of this text by; None if that is not one known number.

    Known are SGD, and Adam and AdamW in Adam's metric; the number has to be the same for all trainable parameters.
    """
    optimizer = lm.optimizer
    if optimizer is None or type(optimizer) not in ((torch.optim.Adam, torch.optim.AdamW) if is_adam else (torch.optim.SGD,)):
        return None
    left = {parameter for parameter in lm.module.parameters() if parameter.requires_grad}
    sizes = set()
    for group in optimizer.param_groups:
        for parameter in left & set(group["params"]):
            slots = optimizer.state.get(parameter, {})
            sizes.add(float(group["lr"]) * (_adam_share(group, slots) if is_adam else _sgd_share(group, slots)))
        left -= set(group["params"])
    return sizes.pop() if len(sizes) == 1 and 0.0 not in sizes and not left else None


def _adam_share(group: dict[str, Any], slots: dict[str, Any]) -> float:
    """The share of this gradient in Adam's bias-corrected mean at the next step."""
    decay = float(group["betas"][0])
    return (1 - decay) / (1 - decay ** (float(slots["step"]) + 1))


def _sgd_share(group: dict[str, Any], slots: dict[str, Any]) -> float:
    """The share of this gradient in SGD's next step: the first one sets the momentum buffer without dampening."""
    momentum, is_first = float(group["momentum"]), slots.get("momentum_buffer") is None
    share = 1.0 if momentum == 0 or is_first else 1 - float(group["dampening"])
    return 1 + momentum * share if group["nesterov"] else share


def _norms(columns: TargetColumns, directions: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Norms of the whole directions (C,) and of their halves (2, C)."""
    num_parts = len(columns.parts)
    gram = torch.zeros(num_parts, num_parts, dtype=torch.float64)
    for direction in directions.values():
        flat = direction.reshape(num_parts, -1).double()
        gram += (flat @ flat.T).cpu()
    weights = columns.combine(np.eye(num_parts))  # (K, C)
    whole = np.sqrt(np.maximum(np.einsum("kc,kl,lc->c", weights, gram.numpy(), weights), 0))
    halves = columns.halves(np.sqrt(np.diag(gram.numpy())))
    return np.where(whole > 0, whole, 1.0), np.where(halves > 0, halves, 1.0)
