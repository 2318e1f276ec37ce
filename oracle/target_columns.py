"""The target sets as columns: tokenised and batched once, measured whole and in halves.

A target set's loss is its total in nats over its number of target tokens, so a long text counts for more,
as in perplexity. Each set is also split in two halves by content; both halves are measured in the same pass,
the whole is their token-weighted mean, and how well the halves agree tells how much of a label is noise of
the target set (`oracle.comparison.noise_ceiling`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oracle.encoding import Batch
from oracle.errors import InputError, NotFiniteError
from oracle.language_model import LanguageModel
from oracle.optimizers import require_trainable
from oracle.targets import TargetSet, split_halves


@dataclass(frozen=True)
class TargetColumns:
    """C target sets, in K parts: a set of two texts or more has two halves, a set of one text is one part.

    Attributes:
        names: C target names, in column order.
        parts: For each of the K parts, the index of its target set.
        part_tokens: (K,) target tokens in each part.
        batches: All target texts, batched for the model's device; a batch holds texts of one part only.
        batch_parts: The part of each batch.
        num_truncated: Target texts cut at the model's `max_tokens`.
    """

    names: list[str]
    parts: list[int]
    part_tokens: np.ndarray
    batches: list[Batch]
    batch_parts: list[int]
    num_truncated: int

    @property
    def num_tokens(self) -> int:
        """Tokens of one evaluation of all target sets, padding counted."""
        return sum(math.prod(batch.model_shape) for batch in self.batches)

    @property
    def shares(self) -> np.ndarray:
        """Each part's share of its target set's tokens: (K, C), columns add up to 1."""
        weights = np.zeros((len(self.parts), len(self.names)))
        for part, target in enumerate(self.parts):
            weights[part, target] = self.part_tokens[part]
        return weights / weights.sum(0)

    def combine(self, parts: np.ndarray) -> np.ndarray:
        """Turn values of the parts (..., K) into values of the target sets (..., C), weighted by tokens."""
        return parts @ self.shares

    def halves(self, parts: np.ndarray) -> np.ndarray:
        """Arrange values of the parts (..., K) as (2, ..., C); NaN for a target set that has no halves."""
        result = np.full((2, *parts.shape[:-1], len(self.names)), np.nan)
        for target in range(len(self.names)):
            own = [part for part, owner in enumerate(self.parts) if owner == target]
            if len(own) == 2:
                result[0, ..., target], result[1, ..., target] = parts[..., own[0]], parts[..., own[1]]
        return result

    def losses(self, lm: LanguageModel) -> np.ndarray:
        """Measure the loss of every part: (K,) float64, nats per target token."""
        totals = np.zeros(len(self.parts))
        with torch.no_grad():
            for batch, part in zip(self.batches, self.batch_parts, strict=True):
                losses, _ = lm.token_losses(batch)
                totals[part] += float(losses.double().sum())
        return totals / self.part_tokens

    def gradients(self, lm: LanguageModel) -> dict[str, Tensor]:
        """Return the gradient of every part's loss: name -> (K, *shape) float32, trainable parameters only.

        Raises:
            InputError: No parameter is trainable.
            NotFiniteError: A gradient is NaN or infinite.
        """
        require_trainable(lm, needed_by="a method that multiplies gradients")
        parameters = {name: p for name, p in lm.module.named_parameters() if p.requires_grad}
        result = {
            name: torch.zeros(len(self.parts), *p.shape, dtype=torch.float32, device=p.device) for name, p in parameters.items()
        }
        for batch, part in zip(self.batches, self.batch_parts, strict=True):
            losses, _ = lm.token_losses(batch)
            loss = losses.sum() / float(self.part_tokens[part])
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    result[name][part] += gradient.float()
        bad = [name for name, gradient in result.items() if not bool(torch.isfinite(gradient).all())]
        if bad:
            raise NotFiniteError(
                f"the target gradient of {bad[0]} (and {len(bad) - 1} more) is NaN or infinite.",
                "finite gradients",
                "check the checkpoint (did training diverge?) or load it in float32.",
            )
        return result


def prepare_targets(lm: LanguageModel, targets: Sequence[TargetSet], *, seed: int = 0, halves: bool = True) -> TargetColumns:
    """Tokenise and batch target sets once.

    Args:
        lm: The model whose loss on the targets is meant.
        targets: From `oracle.targets.read_targets`.
        seed: Decides which texts form which half.
        halves: Whether to measure halves at all; without them there is no noise ceiling.

    Raises:
        InputError: A target set has no token whose loss counts.
    """
    parts: list[int] = []
    part_tokens: list[int] = []
    batches: list[Batch] = []
    batch_parts: list[int] = []
    num_truncated = 0
    for target_index, target in enumerate(targets):
        encoded = lm.encode(target.texts)
        num_truncated += sum(text.was_truncated for text in encoded)
        in_first = split_halves(target, seed=seed) if halves else np.ones(len(encoded), dtype=bool)
        groups = [
            [text for text, first in zip(encoded, in_first, strict=True) if first == wanted and text.num_targets]
            for wanted in (True, False)
        ]
        groups = [group for group in groups if group]
        if not groups:
            raise InputError(
                f"target set {target.name!r}: none of its {len(encoded)} texts has a target token within {lm.max_tokens} tokens.",
                "texts of at least two tokens; for prompt and completion, a completion that is not cut off",
                "raise max_tokens, shorten the prompts, or check the columns of the target set.",
            )
        for group in groups:
            parts.append(target_index)
            part_tokens.append(sum(text.num_targets for text in group))
            group_batches = list(lm.batches(group))
            batches += group_batches
            batch_parts += [len(parts) - 1] * len(group_batches)
    return TargetColumns(
        [target.name for target in targets], parts, np.array(part_tokens, dtype=np.float64), batches, batch_parts, num_truncated
    )
