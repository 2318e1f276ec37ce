"""The definition of influence: take one real optimiser step on the text alone and look at the target losses.

MATES (Yu et al. 2024, arXiv 2406.06046) labels this way. Its released code reloads the checkpoint from disk
for each text and evaluates a thousand reference texts after it, about 97 % of its cost; here the state is put
back from memory, the target sets are tokenised and batched once and may be subsampled, and both losses,
before and after, are kept. MATES stores the loss after the step (lower is better); here positive is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from oracle.encoding import EncodedText, make_batch
from oracle.errors import NotFiniteError, check_at_least, check_choice
from oracle.language_model import REDUCTIONS, LanguageModel
from oracle.methods import Measured
from oracle.optimizers import require_optimizer
from oracle.plugins import option
from oracle.snapshot import Snapshot
from oracle.target_columns import TargetColumns


@dataclass(kw_only=True)
class OneStep:
    """Loss of each target set before and after one real step of the optimiser on the text alone.

    Paper:
        MATES, Yu et al. 2024, arXiv 2406.06046.
    Cost:
        One training step and one evaluation of all target sets per text; two copies of weights and optimiser state, one of
        them for the way back after an error.
    Limit:
        With SGD, divided by its learning rate, it tends to `grad_dot` as the learning rate tends to 0.

    The text is a batch of its own, and `max_grad_norm` clips it as such. What it does inside a batch of B that is clipped
    together is `rollout(num_steps=1, batch_size=B, max_grad_norm=...)`. With weights in bfloat16 the step itself is
    rounded: values of small models were off by 0.4 to 1.3 of the largest one (Spearman 0.7 to 0.9), so load them in float32.
    """

    plugin_name: ClassVar[str] = "one_step"
    needs_optimizer: ClassVar[bool] = True
    changes_weights: ClassVar[bool] = True

    max_grad_norm: float | None = option(
        None, "Clip the step's gradient at this global norm, as the training run does; None does not clip."
    )
    text_loss: str = option(
        "mean", "A text's loss as 'mean' over its target tokens, or as their 'sum', as a batch averaged over tokens weighs it."
    )
    subtract_shared: bool = option(
        False, "Subtract what a step without any gradient does (momentum, weight decay), measured once."
    )

    def __post_init__(self) -> None:
        check_choice("text_loss", self.text_loss, REDUCTIONS)
        if self.max_grad_norm is not None:
            check_at_least("max_grad_norm", self.max_grad_norm, 1e-30)

    @property
    def units(self) -> str:
        """Unit of the values."""
        return "nats per target token"

    def prepare(self, lm: LanguageModel, columns: TargetColumns) -> None:
        """Copy the state, measure the losses before, and what a step with a zero gradient does to them."""
        require_optimizer(lm, needed_by=self.plugin_name, otherwise="use method='grad_dot'")
        self.lm_, self.columns_ = lm, columns
        self.snapshot_: Snapshot = lm.start_of_steps()
        self.before_ = columns.losses(lm)  # (K,)
        if not np.isfinite(self.before_).all():
            bad = sorted({columns.names[columns.parts[index]] for index in np.flatnonzero(~np.isfinite(self.before_))})
            raise NotFiniteError(
                f"the loss before the step is NaN or infinite on the target sets {bad}.",
                "finite losses",
                "check the checkpoint (did training diverge?) or load it in float32.",
            )
        self.shared_ = self.before_ - self._losses_after(None)  # (K,)

    def measure(self, encoded: Sequence[EncodedText]) -> Measured:
        """Step on each text in turn from the same state."""
        after = np.zeros((len(encoded), len(self.columns_.parts)))
        losses, norms = np.zeros(len(encoded)), np.zeros(len(encoded))
        for row, text in enumerate(encoded):
            after[row] = self._losses_after(text)
            losses[row], norms[row] = self.last_loss_, self.last_norm_
        values = self.before_ - after - (self.shared_ if self.subtract_shared else 0.0)  # (B, K)
        columns = {"after": self.columns_.combine(after), "text_loss": losses, "gradient_norm": norms}
        return Measured(self.columns_.combine(values), self.columns_.halves(values), columns)

    def facts(self) -> dict[str, Any]:
        """Losses before the step and the shared part, per target set."""
        return {
            "before": self.columns_.combine(self.before_).tolist(),
            "shared_part": self.columns_.combine(self.shared_).tolist(),
        }

    def prepare_flops(self, columns: TargetColumns) -> float:
        """Counted FLOPs of `prepare`: two evaluations of all target sets, before and after the step without a gradient."""
        return 2 * self.lm_.forward_flops_per_token * columns.num_tokens

    def flops(self, num_tokens: int, columns: TargetColumns) -> float:
        """Counted FLOPs for one text of `num_tokens`."""
        return self.lm_.forward_flops_per_token * (3 * num_tokens + columns.num_tokens)

    def _losses_after(self, text: EncodedText | None) -> np.ndarray:
        """Step on a text (None: with zero gradients), measure all parts, put the state back."""
        lm = self.lm_
        assert lm.optimizer is not None
        parameters = [p for p in lm.module.parameters() if p.requires_grad]
        self.last_loss_ = self.last_norm_ = 0.0
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if text is None or not text.num_targets else None
        try:
            if text is not None and text.num_targets:
                batch = make_batch([text], positions=[0], device=lm.device)
                loss = lm.text_losses(batch, reduction=self.text_loss).sum()
                loss.backward()
                self.last_loss_ = float(loss.detach())
                limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
                self.last_norm_ = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
            lm.optimizer.step()
            return self.columns_.losses(lm)
        finally:
            lm.restore_weights(self.snapshot_)
            for parameter in parameters:
                parameter.grad = None
