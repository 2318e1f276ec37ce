"""Held-out scores: no text is predicted by a surrogate that saw it or its group."""

from __future__ import annotations

import numpy as np
import pytest

from oracle.errors import InputError
from surrogate.cross_fitting import cross_predict
from surrogate.fidelity import above_chance, measure_fidelity
from surrogate.models.ridge import RidgeSurrogate
from surrogate.splits import grouped_folds


class Memory:
    """Remembers what it was fitted on and refuses to predict it."""

    def fit(self, X, y, *, groups=None):
        self.seen, self.groups, self.width = {row.tobytes() for row in X}, set(groups), y.shape[1]
        return self

    def predict(self, X):
        assert not self.seen & {row.tobytes() for row in X}
        return np.full((len(X), self.width), len(self.seen), dtype=np.float32)


def test_cross_prediction_never_shows_a_text_or_its_group():
    rng = np.random.default_rng(0)
    X, y, groups = rng.normal(size=(30, 3)), rng.normal(size=(30, 2)), np.arange(30) // 2
    folds = grouped_folds(groups, num_folds=4, seed=0)
    scores, baseline = cross_predict(Memory, X, y, folds=folds, groups=groups)
    for fold in range(4):
        out = folds == fold
        np.testing.assert_array_equal(scores[out], (~out).sum())
        np.testing.assert_allclose(baseline[out], np.broadcast_to(y[~out].mean(axis=0), (out.sum(), 2)), rtol=1e-6)
    with pytest.raises(InputError, match="more than one fold"):
        cross_predict(Memory, X, y, folds=np.arange(30) % 2, groups=groups)
    with pytest.raises(InputError, match="two folds"):
        cross_predict(Memory, X, y, folds=np.zeros(30, dtype=int), groups=groups)


def test_cross_prediction_finds_signal_and_no_noise():
    rng = np.random.default_rng(1)
    X = rng.normal(size=(120, 10))
    y = np.stack([X[:, 0] + 0.3 * rng.normal(size=120), rng.normal(size=120)], axis=1)
    folds = grouped_folds(np.arange(120), num_folds=5, seed=0)
    scores, baseline = cross_predict(RidgeSurrogate, X, y, folds=folds, groups=np.arange(120))
    signal, noise = measure_fidelity(scores, y, target_names=["signal", "noise"], baseline=baseline, num_bootstrap=50)
    assert signal.spearman > 0.8 and signal.r2 > 0.7 and above_chance(signal)
    assert abs(noise.spearman) < 0.25 and noise.r2 < 0.1
