from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.sparse import csr_array

from oracle.errors import NotFiniteError
from surrogate.attribution.objectives import Binary, Fair, Objective, Poisson
from surrogate.attribution.trex_solvers import SeparateOutputs, SoftmaxLoss, conjugate_gradients, fit_representer

RNG = np.random.default_rng(0)
FEATURES = csr_array(RNG.normal(size=(40, 7)) * (RNG.random((40, 7)) < 0.5))
WEIGHTS = RNG.uniform(0.2, 2.0, 40)
TARGETS = RNG.normal(size=40)
LOSSES = {
    "squared": SeparateOutputs(Objective("regression"), TARGETS, scale=2.0),
    "logistic": SeparateOutputs(Binary("binary"), (TARGETS > 0).astype(float)),
    "fair": SeparateOutputs(Fair("fair"), TARGETS),
    "poisson": SeparateOutputs(Poisson("poisson"), np.abs(TARGETS)),
    "softmax": SoftmaxLoss(np.eye(3)[np.digitize(TARGETS, [-0.5, 0.5])]),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_the_minimum_is_that_of_a_general_optimiser(name, ridge):
    loss, num_outputs = LOSSES[name], 3 if name == "softmax" else 1
    offset = RNG.normal(size=num_outputs)
    dense = FEATURES.toarray()

    def value(flat):
        W = flat.reshape(7, num_outputs)
        return (WEIGHTS @ loss.values(offset + dense @ W)) / WEIGHTS.sum() + ridge * (W**2).sum()

    truth = minimize(value, np.zeros(7 * num_outputs), method="BFGS", options={"gtol": 1e-9}).x.reshape(7, num_outputs)
    fitted = fit_representer(FEATURES, loss, weights=WEIGHTS, offset=offset, ridge=ridge)
    np.testing.assert_allclose(dense.T @ fitted.alphas, truth, rtol=0, atol=2e-5 * np.abs(truth).max())
    assert fitted.gradient_ratio < 1e-10


def test_squared_loss_solves_the_kernel_system():
    ridge = 0.01
    fitted = fit_representer(FEATURES, LOSSES["squared"], weights=np.ones(40), offset=np.zeros(1), ridge=ridge)
    kernel = (FEATURES @ FEATURES.T).toarray()
    np.testing.assert_allclose(fitted.alphas[:, 0], np.linalg.solve(kernel + ridge * 40 * np.eye(40), TARGETS), rtol=1e-9)
    assert fitted.num_newton_steps == 1


def test_a_row_of_weight_two_is_two_rows():
    twice = csr_array(np.vstack([FEATURES.toarray(), FEATURES.toarray()[:5]]))
    loss = SeparateOutputs(Binary("binary"), np.concatenate([TARGETS, TARGETS[:5]]) > 0)
    doubled = fit_representer(twice, loss, weights=np.ones(45), offset=np.zeros(1), ridge=0.01).alphas
    doubled[:5] += doubled[40:]
    weights = np.where(np.arange(40) < 5, 2.0, 1.0)
    weighted = fit_representer(FEATURES, LOSSES["logistic"], weights=weights, offset=np.zeros(1), ridge=0.01).alphas
    np.testing.assert_allclose(weighted, doubled[:40], rtol=1e-8)


@pytest.mark.parametrize("name", ["logistic", "fair", "poisson", "softmax"])
def test_curvature_is_the_slope_of_the_gradient(name):
    loss, num_outputs = LOSSES[name], 3 if name == "softmax" else 1
    scores, direction = RNG.normal(size=(2, 40, num_outputs))
    step = 1e-6
    slope = (loss.gradients(scores + step * direction) - loss.gradients(scores - step * direction)) / (2 * step)
    np.testing.assert_allclose(loss.curvature(scores)(direction), slope, rtol=0, atol=1e-8)


def test_conjugate_gradients_solve_a_system_of_several_columns():
    A = RNG.normal(size=(6, 6))
    A = A @ A.T + np.eye(6)
    truth = RNG.normal(size=(6, 2))
    found, num_products = conjugate_gradients(lambda d: A @ d, A @ truth, tolerance=1e-12)
    np.testing.assert_allclose(found, truth, atol=1e-9)
    assert 0 < num_products <= 30
    assert conjugate_gradients(lambda d: A @ d, np.zeros((6, 2)), tolerance=1e-12)[1] == 0


def test_a_loss_that_is_not_finite_is_refused():
    loss = SeparateOutputs(Poisson("poisson"), np.abs(TARGETS))
    with pytest.raises(NotFiniteError, match="minimum was not found"), np.errstate(all="ignore"):
        fit_representer(FEATURES, loss, weights=np.ones(40), offset=np.array([800.0]), ridge=0.01)
