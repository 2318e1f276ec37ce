"""The first-order limit of `one_step`: the product of the text's gradient with the target's.

With the target's mean gradient fixed, one forward and backward pass over a batch gives every text's product
with every target set (`oracle.gradients.products`). Where the model comes with Adam's state, the target side
is preconditioned by the optimiser's own second moments, D = G / (sqrt(v) + eps): the part of an Adam step
that is linear in the text's gradient. In a trial this agreed with the effect of a text inside a real batch
better than the exact single-text Adam step did; the first order of that one is `update="adam"`.

Inside a batch all texts are clipped by one factor, which a text moves with its own gradient, the less the larger the
batch. So there are two limits here: a text alone (`max_grad_norm`), or no clipping at all. The exact effect in a batch
of B that is clipped together is `rollout(num_steps=1, batch_size=B, max_grad_norm=...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from oracle.encoding import Batch, EncodedText
from oracle.errors import InputError, check_at_least, check_choice
from oracle.gradients.adam_update import AdamUpdateProducts
from oracle.gradients.coverage import match_parameters, only_trainable
from oracle.gradients.metric import PRECONDITIONERS, Directions, direction_norms, prepare_directions
from oracle.gradients.text_products import TextProducts
from oracle.language_model import REDUCTIONS, LanguageModel
from oracle.methods import Measured
from oracle.plugins import option
from oracle.target_columns import TargetColumns
from oracle.token_statistics import STATISTICS, statistics_of_logits, text_statistics

UPDATES = ("linear", "adam")
COLUMNS = ("mean_loss", "error_norm", "min_k", "entropy")  # of `STATISTICS`, beside the gradient norm


@dataclass(kw_only=True)
class GradDot:
    """Product of the text's gradient with each target's mean gradient, in the optimiser's own metric.

    Paper:
        TracIn, Pruthi et al. 2020, arXiv 2002.08484; the Adam metric after LESS, Xia et al. 2024, arXiv 2402.04333.
    Cost:
        One forward and backward pass per text for all target sets at once; K gradients of the model's size. The few modules
        that no rule knows (facts: `rerun_per_text`) are run once more. With `update="adam"`, texts go one by one.
    Limit:
        With `preconditioner="none"` it is the limit of SGD `one_step` divided by the learning rate; with `update="adam"`
        that of Adam's or AdamW's `one_step` with `subtract_shared=True` as the learning rate tends to 0.

    The values are in nats per target token where the next step is one number times the (preconditioned) gradient:
    with SGD, and with Adam or AdamW in Adam's metric. Otherwise they are per unit of learning rate. With
    `maximize=True` the sign is that of the step, which then goes up the loss.

    With weights in bfloat16, values of small models were off by at most 0.03 of the largest one from those of the same
    weights in float64 (0.07 where queries and keys are normed, as in Qwen3), cosines by 0.05, and values of a single
    direction (one target without halves) by 0.07.
    """

    plugin_name: ClassVar[str] = "grad_dot"
    needs_optimizer: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False

    preconditioner: str = option(
        "auto", "'adam' divides by the root of the optimiser's second moments, 'none' does not, 'auto' does where there are any."
    )
    update: str = option(
        "linear", "'linear' for the part of a step that is linear in the text, 'adam' for Adam's whole step on the text alone."
    )
    text_loss: str = option(
        "mean", "A text's loss as 'mean' over its target tokens, or as their 'sum', as a batch averaged over tokens weighs it."
    )
    max_grad_norm: float | None = option(
        None, "Scale each text as a step on it alone would be clipped at this global norm; None does not clip."
    )
    similarity: str = option(
        "dot", "'dot' for the product, 'cosine' for the angle between the text's gradient and the direction."
    )
    layers: str | None = option(
        None, "A regular expression; only parameters in whose names it is found count, as if the others were frozen."
    )
    statistics: bool = option(
        False, "Also give each text's loss, gradient norm, error norm |p - y|, Min-K% and entropy, from the same pass."
    )
    per_text: bool = option(False, "Use one full backward pass per text instead of the batched identity; slow, for checking.")

    def __post_init__(self) -> None:
        check_choice("update", self.update, UPDATES)
        check_choice("preconditioner", self.preconditioner, PRECONDITIONERS)
        check_choice("text_loss", self.text_loss, REDUCTIONS)
        check_choice("similarity", self.similarity, ("dot", "cosine"))
        if self.max_grad_norm is not None:
            check_at_least("max_grad_norm", self.max_grad_norm, 1e-30)
            if self.similarity == "cosine":
                raise InputError(
                    f"max_grad_norm={self.max_grad_norm} has no effect with similarity='cosine'.",
                    "one of the two",
                    "leave max_grad_norm out, or use similarity='dot'.",
                )

        if self.update == "adam":
            self._check_update()

    def _check_update(self) -> None:
        for name, value, default in (
            ("preconditioner", self.preconditioner, "auto"),
            ("similarity", self.similarity, "dot"),
            ("per_text", self.per_text, False),
        ):
            if value != default:
                raise InputError(
                    f"{name}={value!r} has no effect with update='adam', which takes Adam's whole step, text by text.",
                    f"{name}={default!r}",
                    f"leave {name} out, or use update='linear'.",
                )

    @property
    def units(self) -> str:
        """Unit of the values, known after `prepare`."""
        if self.update == "adam":
            return "nats per target token"
        return "cosine" if self.similarity == "cosine" else self.directions_.units

    def prepare(self, lm: LanguageModel, columns: TargetColumns) -> None:
        """Measure the target gradients and precondition them."""
        self.lm_, self.columns_ = lm, columns
        losses, observe = partial(lm.text_losses, reduction=self.text_loss), _observe if self.statistics else None
        self.products_: TextProducts | AdamUpdateProducts
        with only_trainable(lm.module, match_parameters(lm.module, self.layers)):
            if self.update == "adam":
                self.products_ = AdamUpdateProducts(
                    lm, columns.gradients(lm), losses=losses, max_grad_norm=self.max_grad_norm, observe=observe
                )
                return
            self.directions_: Directions = prepare_directions(lm, columns, preconditioner=self.preconditioner)
        if self.similarity == "cosine":
            self.direction_norms_ = direction_norms(columns, self.directions_.tensors)  # whole (C,) and halves (2, C)
        self.products_ = TextProducts(
            lm,
            self.directions_.tensors,
            losses=losses,
            norms=self.max_grad_norm is not None or self.similarity == "cosine" or self.statistics,
            observe=observe,
            per_text=self.per_text,
            method=self.plugin_name,
        )

    def measure(self, encoded: Sequence[EncodedText]) -> Measured:
        """One forward and backward pass over the texts, in as many batches as fit."""
        measured = self.products_.measure(encoded)
        columns = {"text_loss": measured.losses}
        if measured.norms is not None:
            columns["gradient_norm"] = measured.norms
        if measured.observed is not None:
            columns.update(zip(COLUMNS, measured.observed.T, strict=True))
        return Measured(*self._scaled(measured.products, measured.norms), columns)

    def facts(self) -> dict[str, Any]:
        """How the products were made, what they cover, and how well they passed the self-check."""
        if self.update == "adam":
            return self.products_.facts()
        return {
            **self.products_.facts(),
            "preconditioner_used": "adam" if self.directions_.is_adam else "none",
            "step_size": self.directions_.step_size,
        }

    def prepare_flops(self, columns: TargetColumns) -> float:
        """Counted FLOPs of `prepare`: one forward and backward pass over all target sets."""
        return 3 * self.lm_.forward_flops_per_token * columns.num_tokens

    def flops(self, num_tokens: int, columns: TargetColumns) -> float:
        """Counted FLOPs for one text of `num_tokens`, the share of the target gradients left out."""
        return 3 * self.lm_.forward_flops_per_token * num_tokens

    def _scaled(self, products: np.ndarray, norms: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        whole, halves = self.columns_.combine(products), self.columns_.halves(products)  # (B, C), (2, B, C)
        if self.update == "adam":
            return whole, halves
        if self.similarity == "cosine":
            assert norms is not None
            own = np.where(norms > 0, norms, 1.0)[:, None]
            return whole / (own * self.direction_norms_[0]), halves / (own * self.direction_norms_[1][:, None, :])
        scale = np.full(len(products), 1.0 if self.directions_.step_size is None else self.directions_.step_size)
        if self.max_grad_norm is not None:
            assert norms is not None
            scale *= np.minimum(1.0, self.max_grad_norm / (norms + 1e-6))  # torch.nn.utils.clip_grad_norm_ has the same 1e-6
        return whole * scale[:, None], halves * scale[None, :, None]


def _observe(batch: Batch, logits: Tensor) -> Tensor:
    """(B, 4) statistics of texts in the order of `COLUMNS`."""
    found = text_statistics(statistics_of_logits(logits[:, :-1], batch.labels[:, 1:]))
    return found[:, [STATISTICS.index(name) for name in COLUMNS]]
