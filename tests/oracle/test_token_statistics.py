"""Statistics of tokens and texts against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracle import token_statistics
from oracle.encoding import IGNORED
from oracle.token_statistics import STATISTICS, statistics_of_log_probabilities, statistics_of_logits, text_statistics


@pytest.fixture
def logits_and_labels():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 13, 29, generator=generator)
    labels = torch.randint(0, 29, (4, 13), generator=generator)
    labels[0, 5:], labels[1, ::2], labels[3] = IGNORED, IGNORED, IGNORED
    return logits, labels


def _plain_loop(logits, labels, min_k):
    rows = []
    for own, tokens in zip(logits.double().numpy(), labels.numpy(), strict=True):
        losses, entropies, errors = [], [], []
        for place in np.flatnonzero(tokens != IGNORED):
            p = np.exp(own[place] - own[place].max())
            p /= p.sum()
            losses.append(-np.log(p[tokens[place]]))
            entropies.append(-(p * np.log(p)).sum())
            p[tokens[place]] -= 1
            errors.append(np.sqrt((p**2).sum()))
        if not losses:
            rows.append([0.0] * 6 + [np.log(2.0)])  # as if it had one token
            continue
        worst = np.sort(losses)[::-1][: int(np.ceil(min_k * len(losses)))]
        rows.append(
            [
                np.mean(losses),
                np.std(losses),
                max(losses),
                -np.mean(worst),
                np.mean(entropies),
                np.mean(errors),
                np.log1p(len(losses)),
            ]
        )
    return np.array(rows)


@pytest.mark.parametrize("min_k", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("block_elements", [1, 100, 2**23])
def test_statistics_equal_a_plain_loop(min_k, block_elements, logits_and_labels, monkeypatch):
    monkeypatch.setattr(token_statistics, "BLOCK_ELEMENTS", block_elements)
    found = text_statistics(statistics_of_logits(*logits_and_labels), min_k=min_k)
    assert found.shape == (4, len(STATISTICS))
    np.testing.assert_allclose(found.numpy(), _plain_loop(*logits_and_labels, min_k), rtol=1e-5, atol=1e-6)


def test_blocks_of_logits_give_the_bits_of_all_log_probabilities_at_once(logits_and_labels):
    logits, labels = logits_and_labels
    whole = statistics_of_log_probabilities(torch.log_softmax(logits, dim=-1), labels)
    blocked = statistics_of_logits(logits, labels)
    for name in ("losses", "entropy", "error_norms", "mask"):
        assert torch.equal(getattr(whole, name), getattr(blocked, name)), name


def test_logits_of_low_precision_are_summed_in_float32(logits_and_labels):
    logits, labels = logits_and_labels
    low = statistics_of_logits(logits.bfloat16(), labels)
    assert low.losses.dtype == torch.float32
    assert torch.equal(low.entropy, statistics_of_logits(logits.bfloat16().float(), labels).entropy)
