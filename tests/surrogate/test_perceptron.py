from __future__ import annotations

import numpy as np
import pytest
import torch

from surrogate.perceptron import Perceptron, PerceptronTraining
from surrogate.scaling import FeatureScaler

TRAINING = PerceptronTraining(dropout=0.0, learning_rate=0.01, weight_decay=0.0, max_epochs=60, patience=60, batch_size=32)


def trained(weights, *, training=TRAINING, num_texts=200):
    """Train on two halves that contradict each other; return outputs for all texts and the first half's labels."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(num_texts, 4)).astype(np.float32)
    labels = X[:, :1].astype(np.float64)
    given = np.where(np.arange(num_texts)[:, None] % 2, -labels, labels)
    start = Perceptron.new(FeatureScaler().fit(X), [4, 8, 1], torch.Generator().manual_seed(0))
    held_out = np.arange(num_texts) < num_texts // 5
    best, output = training.run(
        start, X, given, held_out=held_out, sample_weight=weights, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        scores = best.output(torch.from_numpy(best.scaler.transform(X)))
    torch.testing.assert_close(scores[held_out], output.detach())
    return scores.numpy(), labels


@pytest.mark.parametrize(("even", "odd", "sign"), [(1.0, 0.01, 1), (0.01, 1.0, -1)])
def test_training_and_stopping_follow_the_texts_of_great_weight(even, odd, sign):
    scores, labels = trained(np.where(np.arange(200) % 2, odd, even))
    assert sign * np.corrcoef(scores[:, 0], labels[:, 0])[0, 1] > 0.9


def test_only_held_out_texts_of_weight_decide_about_stopping():
    """The training texts say one thing, the weighty held-out texts the contrary: the first epoch stays the best."""
    weights = np.ones(200)
    weights[:40] = np.where(np.arange(40) % 2, 1.0, 1e-6)  # held out: only those that contradict
    weights[40:] = np.where(np.arange(160) % 2, 1e-6, 1.0)
    stopped, _ = trained(weights)
    weights[:40] = weights[:40][::-1]
    went_on, _ = trained(weights)
    assert np.abs(stopped).mean() < 0.2 * np.abs(went_on).mean()


def test_no_weights_are_equal_weights():
    np.testing.assert_array_equal(trained(None)[0], trained(np.full(200, 0.5))[0])
