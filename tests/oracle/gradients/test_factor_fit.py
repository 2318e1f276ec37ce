"""Labels that are drawn from the model."""

from __future__ import annotations

import numpy as np
import torch

from oracle.encoding import EncodedText
from oracle.gradients.factor_fit import draw_labels
from oracle.language_model import LanguageModel


def test_labels_are_drawn_from_the_model_and_do_not_depend_on_the_batch(make_module, make_token_texts):
    lm = LanguageModel(make_module("llama"), max_tokens=64)
    encoded = lm.encode(make_token_texts(3, seed=3))
    logits = torch.tensor([[[0.0, 1.0, -1.0, 2.0]]])
    text = EncodedText("a", [1, 2], [1, 2])
    counts = np.bincount([int(draw_labels(logits, [text], seed=seed)) for seed in range(3000)], minlength=4) / 3000
    np.testing.assert_allclose(counts, logits.softmax(-1)[0, 0].numpy(), atol=0.04)
    batch = next(lm.batches(encoded, batch_tokens=10**6))
    random = torch.randn(*batch.input_ids[:, 1:].shape, 11, generator=torch.Generator().manual_seed(0))
    ordered = [encoded[row] for row in batch.positions]
    together = draw_labels(random, ordered, seed=0)
    for row, one in enumerate(ordered):
        length = len(one.input_ids) - 1
        alone = draw_labels(random[row : row + 1, :length], [one], seed=0)
        assert torch.equal(alone[0], together[row, :length])
