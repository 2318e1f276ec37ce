from __future__ import annotations

import numpy as np
import pytest

from oracle.errors import InputError
from surrogate.attribution.label_suspects import label_suspects


def slow_losses(slow, case):
    """Row by row and tree by tree: the leaf's value from its other rows, then the loss, by round."""
    weight = np.ones(slow.n) if case.sample_weight is None else case.sample_weight
    found = []
    for i in range(slow.n):
        scores = slow.F[i] - slow.v[:, :, i].sum(axis=0)
        of_rounds = []
        for t in range(slow.T):
            for k in range(slow.K):
                others = [j for j in range(slow.n) if j != i and slow.leaf[t][k][j] == slow.leaf[t][k][i]]
                G, H = sum(slow.g[t, k, j] for j in others), sum(slow.h[t, k, j] for j in others)
                if others and len(set(slow.leaf[t][k])) > 1:  # LightGBM gives trees without a split no value
                    scores[k] -= slow.eta * G / (H + slow.lam)
            of_rounds.append(slow_loss(slow, scores, slow.y[i]))
        found.append(of_rounds[-1] if slow.kind == "regression" else np.mean(of_rounds))
    assert weight.min() > 0
    return np.array(found)


def slow_loss(slow, scores, y):
    if slow.kind == "regression":
        return 0.5 * (scores[0] - y) ** 2
    if slow.kind == "binary":
        return np.log1p(np.exp(scores[0])) - y * scores[0]
    return np.log(np.exp(scores).sum()) - scores[y]


def test_losses_are_those_of_leaves_without_the_row(case, slow):
    found = label_suspects(case.estimator, case.X, case.given(case.y), sample_weight=case.sample_weight)
    truth = slow_losses(slow, case)
    np.testing.assert_allclose(found.losses, truth, rtol=0, atol=1e-10 * truth.max())
    assert (np.diff(found.losses[found.order]) <= 0).all() and sorted(found.order) == list(range(slow.n))


@pytest.mark.parametrize("kind", ["regression", "binary", "multiclass"])
def test_planted_wrong_labels_come_first(train_case, make_table, kind):
    X, y, _, _ = make_table(kind, num_rows=400)
    rng = np.random.default_rng(0)
    wrong = rng.choice(400, 20, replace=False)
    y = y.copy()
    y[wrong] = (
        y[wrong] + 6.0 * rng.choice([-1, 1], 20) if kind == "regression" else (y[wrong] + 1) % (2 if kind == "binary" else 3)
    )
    case = train_case(kind)
    model = type(case.estimator)(**{**case.settings, "n_estimators": 40, "num_leaves": 8}).fit(X, y)
    found = label_suspects(model, X, y)
    assert np.isin(found.order[:20], wrong).mean() > (0.8 if kind == "regression" else 0.45)
    assert np.isin(found.order[-200:], wrong).sum() <= 2


def test_a_row_alone_in_its_leaves_is_judged_by_the_init_score(train_case):
    case = train_case("regression", num_leaves=60, min_child_samples=1, n_estimators=1, min_child_weight=0.0)
    leaves = case.estimator.booster_.predict(case.X, pred_leaf=True).ravel()
    alone = np.bincount(leaves)[leaves] == 1
    found = label_suspects(case.estimator, case.X, case.y)
    assert alone.sum() > 5
    np.testing.assert_allclose(found.losses[alone], 0.5 * (case.y[alone] - case.y.mean()) ** 2, rtol=1e-5)


def test_rows_outside_the_bag_have_no_part_to_take_off(train_case):
    case = train_case("regression", n_estimators=1, subsample=0.5, subsample_freq=1)
    found = label_suspects(case.estimator, case.X, case.y)
    same = np.isclose(found.losses, found.training_losses, rtol=1e-5)
    assert 20 < same.sum() < 40


def test_training_losses_are_those_of_the_model(train_case):
    case = train_case("binary")
    p = case.estimator.predict_proba(case.X)[np.arange(60), case.y]
    np.testing.assert_allclose(label_suspects(case.estimator, case.X, case.y).training_losses, -np.log(p), rtol=1e-9)


def test_an_objective_without_a_loss_is_refused(train_case, make_table):
    X, y, _, _ = make_table("regression")
    case = train_case("regression")
    model = type(case.estimator)(**{**case.settings, "objective": lambda y, s: (s - y, np.ones_like(y))}).fit(X, y)
    with pytest.raises(InputError, match="custom objective"):
        label_suspects(model, X, y)
