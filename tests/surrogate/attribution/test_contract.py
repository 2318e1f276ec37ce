"""What every method of attribution keeps to."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from oracle.errors import InputError
from surrogate.attribution import contract
from surrogate.attribution.boostin import BoostIn
from surrogate.attribution.leaf_contributions import LeafContributions
from surrogate.attribution.leaf_influence import LeafInfluence
from surrogate.attribution.leaf_refit import LeafRefit
from surrogate.attribution.leaf_similarity import LeafSimilarity
from surrogate.attribution.leave_one_out import LeaveOneOut
from surrogate.attribution.top_rows import TopRows
from surrogate.attribution.trex import TREX

METHODS = {
    "BoostIn": BoostIn,
    "LeafSimilarity": LeafSimilarity,
    "LeafInfluence": LeafInfluence,
    "LeafInfluence-single-point": lambda model: LeafInfluence(model, single_point=True),
    "LeafContributions": LeafContributions,
    "LeafRefit": LeafRefit,
    "LeaveOneOut": LeaveOneOut,
    "TREX": TREX,
}


@pytest.fixture(params=METHODS)
def make(request):
    return METHODS[request.param]


@pytest.mark.parametrize("of", ["loss", "prediction"])
def test_blocks_of_test_rows_change_nothing(make, train_case, monkeypatch, of):
    case = train_case("multiclass")
    method, labels = case.fit(make(case.estimator)), case.y_test
    whole = method.attribute(case.X_test, labels, of=of)
    monkeypatch.setattr(contract, "BLOCK_BYTES", 2 * contract.BYTES_PER_LEAF * 18)
    blocks = method.attribute(case.X_test, labels, of=of)
    assert whole.shape == (60, 9) and whole.dtype == np.float64 and np.isfinite(whole).all()
    np.testing.assert_allclose(blocks, whole, rtol=0, atol=1e-14)
    one = method.attribute(case.X_test[4:5], labels[4:5], of=of)
    np.testing.assert_allclose(one[:, 0], whole[:, 4], rtol=0, atol=1e-14)


def test_beside_a_whole_matrix_only_a_block_of_it_is_held(train_case, monkeypatch):
    case = train_case("regression")
    method, sizes = case.fit(BoostIn(case.estimator)), []
    influence = method._influence
    monkeypatch.setattr(method, "_influence", lambda test: sizes.append(len(test.leaves)) or influence(test))
    method.attribute(case.X_test, case.y_test)
    monkeypatch.setattr(contract, "BLOCK_BYTES", 8 * contract.BYTES_PER_LEAF * 6)
    method.attribute(case.X_test, case.y_test)
    assert sizes == [9, 3, 3, 3]  # 3 rows are 3 (8 * 60 + 64 * 6) bytes


@pytest.mark.parametrize("k", [1, 5, 1000])
def test_top_k_is_the_top_of_the_full_matrix(make, train_case, monkeypatch, k):
    case = train_case("regression")
    method = case.fit(make(case.estimator))
    whole = method.attribute(case.X_test, case.y_test)
    monkeypatch.setattr(contract, "BLOCK_BYTES", 3000)
    found, truth = method.attribute(case.X_test, case.y_test, top_k=k), TopRows.of(whole, min(k, 60))
    np.testing.assert_allclose(found.positive_values, truth.positive_values, rtol=0, atol=1e-13)
    np.testing.assert_allclose(found.negative_values, truth.negative_values, rtol=0, atol=1e-13)
    np.testing.assert_allclose(
        np.take_along_axis(whole.T, found.positive_indices, axis=1), found.positive_values, rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("published", ["BoostIn", "LeafSimilarity", "LeafInfluence", "LeafInfluence-single-point"])
def test_trees_without_a_split_count_as_one_leaf_as_in_the_published_code(published, train_case, slow_truth):
    make = METHODS[published]
    case = train_case("multiclass", n_estimators=9, learning_rate=0.9, min_child_weight=2.5)
    method, slow = case.fit(make(case.estimator)), slow_truth(case)
    assert any(tree.is_constant for tree in method.rows_.ensemble.text.trees)
    if isinstance(method, BoostIn):
        truth = slow.boostin()
    elif isinstance(method, LeafInfluence):
        truth = slow.leaf_influence(single_point=method.single_point)
    else:
        truth = slow.similarity() * np.where(case.y[:, None] == case.y_test, 1, -1)
    np.testing.assert_allclose(method.attribute(case.X_test, case.y_test), truth, rtol=0, atol=1e-11 * np.abs(truth).max())


def test_no_test_rows_give_an_empty_result(make, train_case):
    case = train_case("binary")
    method = case.fit(make(case.estimator))
    assert method.attribute(case.X_test[:0], case.y_test[:0]).shape == (60, 0)
    assert method.attribute(case.X_test[:0], case.y_test[:0], top_k=3).positive_indices.shape == (0, 3)


def test_a_positive_row_lowers_the_loss(make, train_case):
    """Copies of a test row in the training data, with its label, are positive; with the wrong label, negative."""
    case = train_case("binary", num_rows=80)
    for label, sign in ((1, 1), (0, -1)):
        X, y = case.X.copy(), case.y.copy()
        X[:6], y[:6] = X[6], label
        model = type(case.estimator)(**{**case.settings, "reg_lambda": 1.0}).fit(X, y)
        found = make(model).fit(X, y).attribute(X[:1], [1])[:6]
        assert (np.sign(found) == sign).all()


def test_the_model_and_the_rows_are_left_alone(make, train_case):
    case = train_case("multiclass", missing=True)
    before, X, y = case.estimator.booster_.model_to_string(), case.X.copy(), case.y.copy()
    method = case.fit(make(case.estimator))
    method.attribute(case.X_test, case.y_test)
    method.self_influence()
    assert case.estimator.booster_.model_to_string() == before
    np.testing.assert_array_equal(case.X, X)
    np.testing.assert_array_equal(case.y, y)


def test_what_is_missing_or_without_effect_is_refused(train_case):
    case = train_case("binary")
    method = BoostIn(case.estimator)
    with pytest.raises(InputError, match="not been fitted"):
        method.attribute(case.X_test, case.y_test)
    with pytest.raises(InputError, match="not been fitted"):
        method.self_influence()
    case.fit(method)
    with pytest.raises(InputError, match="no y_test"):
        method.attribute(case.X_test)
    with pytest.raises(InputError, match="no effect"):
        method.attribute(case.X_test, case.y_test, of="prediction")
    with pytest.raises(InputError, match="of='losses'"):
        method.attribute(case.X_test, case.y_test, of="losses")
    with pytest.raises(InputError, match="top_k"):
        method.attribute(case.X_test, case.y_test, top_k=0)
    with pytest.raises(InputError, match="8 targets"):
        method.attribute(case.X_test, case.y_test[:8])
    with pytest.raises(InputError, match="init_score"):
        method.attribute(case.X_test, case.y_test, init_score=np.zeros(9))
    with pytest.raises(InputError, match="60 rows and 59 targets"):
        BoostIn(case.estimator).fit(case.X, case.y[1:])
    with pytest.raises(InputError, match="59"):
        BoostIn(case.estimator).fit(case.X, case.y, sample_weight=np.ones(59))


def test_init_scores_move_the_test_rows_gradients(make, train_case):
    start = np.random.default_rng(3).normal(size=60)
    case = train_case("binary", fit={"init_score": start})
    method = make(case.estimator).fit(case.X, case.y, init_score=start)
    with pytest.raises(InputError, match=r"(not|no) .*init scores|not given for the test rows"):
        method.attribute(case.X_test, case.y_test)
    far, near = (method.attribute(case.X_test, np.ones(9, int), init_score=np.full(9, score)) for score in (-9.0, 9.0))
    if make is not LeafSimilarity:
        assert np.abs(near).max() < 0.01 * np.abs(far).max()


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, surrogate.attribution; heavy = {'torch', 'lightgbm', 'sklearn', 'scipy', 'pandas'};"
        "sys.exit(','.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_attribution_by_gradients_needs_no_torch():
    code = (
        "import sys; from surrogate.attribution import BoostIn, LeafInfluence, LeafSimilarity; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
