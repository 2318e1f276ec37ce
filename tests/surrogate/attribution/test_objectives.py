"""Each formula against numerical derivatives and LightGBM's own predictions."""

from __future__ import annotations

import numpy as np
import pytest

from surrogate.attribution.ensemble import TreeEnsemble
from surrogate.attribution.objectives import Binary, Fair, Gamma, Huber, Multiclass, Objective, OneVersusAll, Poisson, Tweedie

OBJECTIVES = [
    Objective("regression"),
    Huber("huber", threshold=0.7),
    Fair("fair", c=1.3),
    Poisson("poisson", max_delta_step=0.7),
    Gamma("gamma"),
    Tweedie("tweedie", power=1.4),
    Binary("binary", sigmoid=1.7),
    Binary("cross_entropy"),
    Multiclass("multiclass", num_outputs=3),
    OneVersusAll("multiclassova", num_outputs=3, sigmoid=0.8),
]
STEP = 1e-5


def scores_and_targets(objective):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, objective.num_outputs))
    if objective.is_classification:
        return scores, rng.integers(0, objective.num_classes, 40).astype(float)
    return scores, rng.uniform(0.1, 0.9, 40) if objective.name == "cross_entropy" else rng.uniform(0.1, 3.0, 40)


def moved(scores, output, by):
    result = scores.copy()
    result[:, output] += by
    return result


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_gradients_are_the_slope_of_the_loss_and_slopes_that_of_the_gradients(objective):
    scores, y = scores_and_targets(objective)
    g, _ = objective.gradients(scores, y)
    of_gradient, of_hessian = objective.slopes(scores, y)
    for output in range(objective.num_outputs):
        up, down = moved(scores, output, STEP), moved(scores, output, -STEP)
        np.testing.assert_allclose(g[:, output], (objective.loss(up, y) - objective.loss(down, y)) / (2 * STEP), atol=1e-8)
        (g_up, h_up), (g_down, h_down) = objective.gradients(up, y), objective.gradients(down, y)
        factor = 1.5 if objective.name == "multiclass" else 1.0  # LightGBM's K / (K - 1), which the published code keeps
        np.testing.assert_allclose(of_gradient[:, output], factor * (g_up - g_down)[:, output] / (2 * STEP), atol=1e-8)
        np.testing.assert_allclose(of_hessian[:, output], (h_up - h_down)[:, output] / (2 * STEP), atol=1e-8)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_the_bias_has_the_least_loss_of_all_constant_scores(objective):
    _, y = scores_and_targets(objective)
    if objective.name in ("huber", "fair"):
        np.testing.assert_allclose(objective.bias(y, None), y.mean())  # as LightGBM has it, though not the least loss
        return
    weights = np.linspace(0.5, 2.0, len(y))
    g, _ = objective.gradients(np.tile(objective.bias(y, weights), (len(y), 1)), y)
    mean = weights @ g / weights.sum()
    np.testing.assert_allclose(mean, 0.0, atol=1e-12)


def test_predictions_are_lightgbms(case):
    ensemble = TreeEnsemble.read(case.estimator)
    found = ensemble.objective.predict(ensemble.final_scores(ensemble.leaves(case.X_test)))
    np.testing.assert_allclose(found, case.estimator.booster_.predict(case.X_test), rtol=1e-14)


def test_binary_gradients_keep_their_digits_where_the_probability_is_near_the_label():
    g, h = Binary("binary").gradients(np.array([[40.0], [-40.0]]), np.array([1.0, 0.0]))
    np.testing.assert_allclose(g[:, 0], [-np.exp(-40.0), np.exp(-40.0)], rtol=1e-12)
    np.testing.assert_allclose(h[:, 0], np.exp(-40.0), rtol=1e-12)
