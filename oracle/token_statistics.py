"""What a model's logits say about the tokens of a text, and what that comes to for the whole text.

Min-K% is the mean log-probability of the least likely tokens (Shi et al. 2024, arXiv 2310.16789); the error norm is
that of p - y, the gradient of a token's loss with respect to its logits (Paul et al. 2021, arXiv 2107.07075).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oracle.encoding import IGNORED

STATISTICS = ("mean_loss", "std_loss", "max_loss", "min_k", "entropy", "error_norm", "log_num_tokens")
MIN_K = 0.2  # the share that Shi et al. found best
BLOCK_ELEMENTS = 2**23  # float32 log-probabilities that exist beside the logits at the same time: 32 MiB


@dataclass(frozen=True)
class TokenStatistics:
    """What one batch says about each predicted token, all (B, T) and zero where none is predicted."""

    losses: Tensor
    entropy: Tensor
    error_norms: Tensor
    mask: Tensor


def statistics_of_log_probabilities(log_p: Tensor, labels: Tensor) -> TokenStatistics:
    """Return the statistics of tokens.

    Args:
        log_p: (..., V) log-probabilities, without a graph.
        labels: (...) the tokens that came, `IGNORED` where none is predicted.
    """
    mask = labels != IGNORED
    safe = labels.clamp_min(0).unsqueeze(-1)
    losses = -log_p.gather(-1, safe).squeeze(-1) * mask
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1) * mask
    error_norms = p.scatter_add_(-1, safe, torch.full_like(safe, -1, dtype=p.dtype)).norm(dim=-1) * mask
    return TokenStatistics(losses, entropy, error_norms, mask)


def statistics_of_logits(logits: Tensor, labels: Tensor) -> TokenStatistics:
    """Return the statistics of tokens, a few of them at a time, so that no second tensor of the logits' size is made.

    Args:
        logits: (B, T, V) the logits for each token of `labels`, without a graph.
        labels: (B, T) the tokens that came, `IGNORED` where none is predicted.
    """
    rows, columns = torch.nonzero(labels != IGNORED, as_tuple=True)  # only the predicted ones are looked at
    values = torch.zeros(3, *labels.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    step = max(1, BLOCK_ELEMENTS // logits.shape[-1])
    for first in range(0, len(rows), step):
        row, column = rows[first : first + step], columns[first : first + step]
        log_p = torch.log_softmax(logits[row, column].to(values.dtype), dim=-1)  # (n, V)
        tokens = statistics_of_log_probabilities(log_p, labels[row, column])
        values[:, row, column] = torch.stack([tokens.losses, tokens.entropy, tokens.error_norms])
    return TokenStatistics(values[0], values[1], values[2], labels != IGNORED)


def text_statistics(tokens: TokenStatistics, *, min_k: float = MIN_K) -> Tensor:
    """Return (B, 7) statistics of texts in the order of `STATISTICS`.

    Args:
        tokens: What is known of their tokens.
        min_k: Share of the least likely tokens in Min-K%.
    """
    losses, mask = tokens.losses, tokens.mask
    count = mask.sum(1).clamp_min(1).float()
    mean = losses.sum(1) / count
    spread = (((losses - mean.unsqueeze(1)).square() * mask).sum(1) / count).sqrt()
    worst = losses.masked_fill(~mask, -1.0).sort(dim=1, descending=True).values  # losses are never below 0
    num_worst = (count * min_k).ceil().clamp_min(1)  # (B,)
    is_worst = torch.arange(worst.shape[1], device=worst.device) < num_worst.unsqueeze(1)
    min_k_mean = -(worst.clamp_min(0) * is_worst).sum(1) / num_worst
    entropy, error_norm = tokens.entropy.sum(1) / count, tokens.error_norms.sum(1) / count
    return torch.stack([mean, spread, worst[:, 0].clamp_min(0), min_k_mean, entropy, error_norm, count.log1p()], dim=1)
