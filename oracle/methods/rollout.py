"""The marginal effect of a text inside a short training run, against the companion whose place it takes.

Group-MATES (Yu et al. 2025, arXiv 2502.14709) labels a text by what it adds to a run of steps on other texts, because a
text's effect depends on what is trained on beside it. It takes the difference of the losses before and after the
text's step, so its labels compare texts that stood at different places behind different texts. Here every text is
put into the same place of the same run, and the run with that place's own companion is measured once for all.

The companions of a run are drawn by hashes of their text_ids, and so is the place: neither the order of the companions
nor the sample nor a text's position in it decides anything. The learning rate stays what it is at the checkpoint.
Left out: the effect of the text on later texts' labels, which Group-MATES models from pairs of embeddings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from oracle.artifacts import fingerprint
from oracle.encoding import EncodedText
from oracle.errors import InputError, NotFiniteError, check_at_least, check_choice, check_count
from oracle.language_model import REDUCTIONS, LanguageModel
from oracle.methods import Measured
from oracle.optimizers import require_optimizer
from oracle.plugins import option
from oracle.snapshot import Snapshot
from oracle.target_columns import TargetColumns
from oracle.texts import list_text_ids, read_texts

if TYPE_CHECKING:
    from datasets import Dataset

EMPTY = EncodedText("", [], [])  # what an empty place holds


@dataclass(frozen=True)
class Plan:
    """One rollout: what its batches hold, and which companion gives up its place.

    Attributes:
        batches: `num_steps` lists of `batch_size` companions.
        step: The step in which the text takes a place; it is the last of that step's batch.
    """

    batches: list[list[EncodedText]]
    step: int

    def num_tokens(self, *, start: int = 0) -> int:
        """Tokens of the batches from step `start` on."""
        return sum(len(text.input_ids) for batch in self.batches[start:] for text in batch)


@dataclass(kw_only=True)
class Rollout:
    """What a text adds to a short run of real optimiser steps on random companions, compared with one of them.

    Paper:
        Group-MATES, Yu et al. 2025, arXiv 2502.14709.
    Cost:
        Per text and rollout, the training steps from the text's place on (half of them on average) and one evaluation
        of all target sets; three copies of weights and optimiser state: for the way back, at the start and before the place.
    Limit:
        With `num_steps=1` and `batch_size=1` it is `one_step` of the text minus `one_step` of the companion.

    The value is the loss after the run in which a fixed place holds a companion, minus the loss after the same run in which
    it holds the text, averaged over the rollouts. So it is relative: positive means that the text helps more than the
    companion does, and the companion's own effect shifts all texts alike. `facts` has as `shared_part` the value of a
    place left empty; subtract it to compare with nothing in place of the companion.
    """

    plugin_name: ClassVar[str] = "rollout"
    needs_optimizer: ClassVar[bool] = True
    changes_weights: ClassVar[bool] = True

    companions: Any = field(  # not among the options that stored labels name: `inputs` has what it holds
        default=None,
        repr=False,
        metadata={"help": "The texts that fill the batches, usually the pool: a path, or whatever read_texts takes; needed."},
    )
    num_steps: int = option(4, "Optimiser steps of a rollout.")
    batch_size: int = option(8, "Texts per step, the one in question among them.")
    num_rollouts: int = option(1, "Average over so many rollouts with other companions and another place.")
    rollout_seed: int = option(0, "Decides which companions are drawn and which place the text takes.")
    max_grad_norm: float | None = option(
        None, "Clip each step's gradient at this global norm, as the training run does; None does not clip."
    )
    text_loss: str = option("mean", "A batch's loss averaged over its texts ('mean'), or over the target tokens of all ('sum').")

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "num_rollouts"):
            check_count(name, getattr(self, name))
        check_choice("text_loss", self.text_loss, REDUCTIONS)
        if self.max_grad_norm is not None:
            check_at_least("max_grad_norm", self.max_grad_norm, 1e-30)
        if self.companions is None:
            raise InputError(
                "rollout has no companions to fill its batches with.",
                "companions=... with the pool, or a random part of it: a path, or whatever read_texts takes",
                "pass companions='pool.jsonl', or use method='one_step', which takes the text alone.",
            )

    def inputs(self) -> dict[str, str]:
        """Read the companions; return what identifies them, whatever their order."""
        self.texts_: Dataset = read_texts(self.companions)
        return {"companions": fingerprint(sorted(list_text_ids(self.texts_)))}

    @property
    def units(self) -> str:
        """Unit of the values."""
        return "nats per target token"

    def prepare(self, lm: LanguageModel, columns: TargetColumns) -> None:
        """Plan the rollouts and measure each with its own companion in the place, and with nothing there."""
        require_optimizer(lm, needed_by=self.plugin_name, otherwise="use method='grad_dot'")
        self.lm_, self.columns_ = lm, columns
        self.start_: Snapshot = lm.start_of_steps()
        self.plans_ = self._plans()
        self.before_place_: tuple[int, Snapshot] | None = None  # a rollout and the state in which its place is reached
        self.base_ = np.stack([self._losses_after(index, plan.batches[plan.step][-1]) for index, plan in enumerate(self.plans_)])
        bad = {columns.names[columns.parts[part]] for part in np.flatnonzero(~np.isfinite(self.base_).all(0))}
        if bad:
            raise NotFiniteError(
                f"the loss after a rollout of companions is NaN or infinite on the target sets {sorted(bad)}.",
                "finite losses",
                "check the checkpoint (did training diverge?) or load it in float32; try fewer steps or a lower learning rate.",
            )
        empty = np.stack([self._losses_after(index, EMPTY) for index in range(len(self.plans_))])  # (R, K)
        self.shared_ = (self.base_ - empty).mean(0)  # (K,)

    def measure(self, encoded: Sequence[EncodedText]) -> Measured:
        """Run every rollout with each text in the place, from the same state."""
        after = np.zeros((self.num_rollouts, len(encoded), len(self.columns_.parts)))  # (R, B, K)
        losses = np.zeros((self.num_rollouts, len(encoded)))
        for index in range(self.num_rollouts):
            for row, text in enumerate(encoded):
                after[index, row] = self._losses_after(index, text)
                losses[index, row] = self.last_loss_
        gains = self.base_[:, None] - after  # (R, B, K)
        values = gains.mean(0)
        columns = {"after": self.columns_.combine(after.mean(0)), "text_loss": losses.mean(0)}
        if self.num_rollouts > 1:
            columns["spread"] = self.columns_.combine(gains).std(0)
        return Measured(self.columns_.combine(values), self.columns_.halves(values), columns)

    def facts(self) -> dict[str, Any]:
        """The losses after the rollouts of companions, the value of an empty place, and where the places are."""
        return {
            "base": self.columns_.combine(self.base_.mean(0)).tolist(),
            "shared_part": self.columns_.combine(self.shared_).tolist(),
            "steps_of_places": [plan.step for plan in self.plans_],
            "replaced_companions": [plan.batches[plan.step][-1].text_id for plan in self.plans_],
            "num_companions_truncated": self.num_truncated_,
        }

    def prepare_flops(self, columns: TargetColumns) -> float:
        """Counted FLOPs of `prepare`: every rollout with its companion, and from the place on once more without it."""
        tokens = sum(3 * (plan.num_tokens() + plan.num_tokens(start=plan.step)) for plan in self.plans_)
        replaced = sum(3 * len(plan.batches[plan.step][-1].input_ids) for plan in self.plans_)
        return self.lm_.forward_flops_per_token * (tokens - replaced + 2 * self.num_rollouts * columns.num_tokens)

    def flops(self, num_tokens: int, columns: TargetColumns) -> float:
        """Counted FLOPs for one text of `num_tokens`; the steps before the place, shared by a block of texts, are left out."""
        total = 0
        for plan in self.plans_:
            others = plan.num_tokens(start=plan.step) - len(plan.batches[plan.step][-1].input_ids)
            total += 3 * (others + num_tokens) + columns.num_tokens
        return self.lm_.forward_flops_per_token * total

    def _plans(self) -> list[Plan]:
        """Draw the companions and the place of every rollout, by content and seed."""
        encoded = [text for text in self.lm_.encode(self.texts_) if text.num_targets]
        self.num_truncated_ = sum(text.was_truncated for text in encoded)
        needed = self.num_steps * self.batch_size
        if len(encoded) < needed:
            raise InputError(
                f"a rollout of {self.num_steps} steps of {self.batch_size} texts takes {needed} companions, "
                f"and {len(encoded)} of the {len(self.texts_)} given have a target token.",
                f"at least {needed} companions",
                "give more companions, or lower num_steps or batch_size.",
            )
        plans = []
        for index in range(self.num_rollouts):
            salt = f"rollout:{self.rollout_seed}:{index}"
            order = np.argsort([_hash(f"{salt}:{text.text_id}") for text in encoded])[:needed].reshape(self.num_steps, -1)
            batches = [[encoded[number] for number in row] for row in order]
            plans.append(Plan(batches, _hash(f"{salt}:place") % self.num_steps))
        return plans

    def _losses_after(self, index: int, text: EncodedText) -> np.ndarray:
        """Run rollout `index` with `text` in the place: (K,) losses after it; the state is put back."""
        plan = self.plans_[index]
        try:
            self._go_to_place(index)
            self.last_loss_ = self._step([*plan.batches[plan.step][:-1], text])
            for batch in plan.batches[plan.step + 1 :]:
                self._step(batch)
            return self.columns_.losses(self.lm_)
        finally:
            self.lm_.restore_weights(self.start_)
            self.lm_.module.zero_grad(set_to_none=True)

    def _go_to_place(self, index: int) -> None:
        """Bring the model to where the place of rollout `index` is reached; one such state is kept."""
        if self.before_place_ is not None and self.before_place_[0] == index:
            self.lm_.restore_weights(self.before_place_[1])
            return
        plan = self.plans_[index]
        if plan.step == 0:
            return
        self.before_place_ = None
        for batch in plan.batches[: plan.step]:
            self._step(batch)
        self.before_place_ = (index, self.lm_.snapshot())

    def _step(self, texts: list[EncodedText]) -> float:
        """Take one optimiser step on a batch; return the loss of its last text, by itself."""
        lm = self.lm_
        assert lm.optimizer is not None
        parameters = [p for p in lm.module.parameters() if p.requires_grad]
        num_targets = sum(text.num_targets for text in texts)
        last_loss = 0.0
        for parameter in parameters:  # without a target token the step still has momentum and decay
            parameter.grad = None if num_targets else torch.zeros_like(parameter)
        divisor = len(texts) if self.text_loss == "mean" else num_targets
        trained = [text for text in texts if text.num_targets]
        for batch in lm.batches(trained):
            losses = lm.text_losses(batch, reduction=self.text_loss)
            (losses.sum() / divisor).backward()
            if texts[-1].num_targets and len(trained) - 1 in batch.positions:
                last_loss = float(losses[batch.positions.index(len(trained) - 1)].detach())
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        lm.optimizer.step()
        return last_loss


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
