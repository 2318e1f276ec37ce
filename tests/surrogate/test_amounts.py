"""Amounts of every surrogate: they add up, they are what slow loops say, and a near-duplicate weighs most."""

from __future__ import annotations

import numpy as np
import pytest

from oracle.errors import InputError
from surrogate.models import training_data
from surrogate.models.network import InfluenceNetwork
from surrogate.models.ridge import RidgeSurrogate
from surrogate.models.trees import InfluenceTrees

SURROGATES = {
    "ridge": RidgeSurrogate,
    "trees": lambda: InfluenceTrees(num_threads=1, num_trees=40, min_trees=20, validation_folds=2, min_leaf_size=5),
    "network": lambda: InfluenceNetwork(ensemble=2, max_epochs=30, hidden="16"),
}
WEIGHTS = np.random.default_rng(5).choice([0.0, 0.5, 1.0, 2.0], size=120)


def table(seed=0, num_texts=120):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(num_texts, 12)).astype(np.float32)
    y = np.stack([X[:, 0] + X[:, 1] ** 2, X[:, 2] * X[:, 3] - X[:, 0]], axis=1) + 0.3 * rng.normal(size=(num_texts, 2))
    return X, y


def explained(surrogate, X, y, new, *, sample_weight=None, method="contributions"):
    data = training_data(X, y, None, sample_weight=sample_weight)
    return data, surrogate.explainer(data, method).amounts(new)


@pytest.mark.parametrize("sample_weight", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", ["ridge", "trees"])
def test_amounts_add_up_to_the_score(name, is_warm, sample_weight):
    (X, y), new = table(), table(seed=9, num_texts=7)[0]
    earlier = SURROGATES[name]().fit(*table(seed=3)) if is_warm else None
    surrogate = SURROGATES[name]().fit(X, y, sample_weight=sample_weight, warm_start=earlier)
    data, amounts = explained(surrogate, X, y, new, sample_weight=sample_weight)
    for text in range(7):  # slow loops over rows and columns
        for target in range(2):
            by_rows = amounts.bias[target] + amounts.earlier[text, target]
            by_columns = amounts.column_bias[target] + amounts.earlier[text, target]
            for row in range(len(data.rows)):
                by_rows += amounts.rows[target, row, text]
            for column in range(12):
                by_columns += amounts.columns[target, text, column]
            assert by_rows == pytest.approx(amounts.scores[text, target], abs=1e-6)
            assert by_columns == pytest.approx(amounts.scores[text, target], abs=1e-6)
    np.testing.assert_array_equal(surrogate.from_label_scale(amounts.scores), surrogate.predict(new))
    assert np.abs(amounts.rows).max() > 1e-6 and (np.abs(amounts.earlier).max() > 0.01) == is_warm


def test_a_ridge_amount_is_the_labels_weight_times_the_label():
    """A label that is moved by one moves the score by its weight, with penalty and scales as they are."""
    X, y = table()
    new = table(seed=9, num_texts=3)[0]
    options = {"alpha": 20.0, "weigh_features": False, "label_scale": "none"}
    surrogate = RidgeSurrogate(**options).fit(X, y)
    data, amounts = explained(surrogate, X, y, new)
    scores = surrogate.predict(new).astype(np.float64)
    for place in (0, 17):
        row = data.rows[place]
        moved = y.copy()
        moved[row] += 1.0
        change = RidgeSurrogate(**options).fit(X, moved).predict(new) - scores  # (B, C)
        weight = amounts.rows[:, place].T / (y[row] - y.mean(axis=0))
        np.testing.assert_allclose(change, weight + 1 / len(y), rtol=0, atol=1e-5)


def test_a_networks_remainder_is_small_and_its_linear_part_is_exact():
    (X, y), new = table(num_texts=300), table(seed=9, num_texts=40)[0]
    network = SURROGATES["network"]().fit(X, y)
    _, amounts = explained(network, X, y, new)
    np.testing.assert_allclose(network.from_label_scale(amounts.scores), network.predict(new), rtol=0, atol=1e-5)
    assert (amounts.remainder.std(axis=0) < 0.3 * amounts.scores.std(axis=0)).all()
    np.testing.assert_allclose(amounts.column_remainder, 0.0, atol=1e-4)
    network.gate_ = network.gate_ * 0
    _, amounts = explained(network, X, y, new)
    np.testing.assert_allclose(amounts.remainder, 0.0, atol=1e-5)
    assert np.abs(amounts.rows).max() > 0.01


def test_texts_that_only_stopped_a_member_have_no_part_in_it():
    X, y = table()
    network = InfluenceNetwork(ensemble=1, max_epochs=20, hidden="8", linear_path=False).fit(X, y)
    data, amounts = explained(network, X, y, X[:5])
    held_out = network._held_out(data, 0)
    assert not amounts.rows[:, held_out].any() and np.abs(amounts.rows[:, ~held_out]).max() > 1e-3


@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_the_copy_of_a_text_with_an_outstanding_label_comes_first(name):
    X, y = table()
    row = 31
    X[row, :] *= 3.0
    y[row] = 9.0
    surrogate = SURROGATES[name]().fit(X, y)
    if name == "trees":  # leaves hold five texts at least, and all have a share
        surrogate = InfluenceTrees(num_threads=1, num_trees=60, min_trees=60, validation_folds=0, min_leaf_size=2, bagging=1.0)
        surrogate.fit(X, y)
    data, amounts = explained(surrogate, X, y, X[[row]] + np.float32(0.01))
    for target in range(2):
        assert data.rows[np.argmax(amounts.rows[target, :, 0])] == row


def test_boostin_leaves_a_remainder_and_other_rows_are_refused():
    X, y = table()
    trees = SURROGATES["trees"]().fit(X, y)
    _, amounts = explained(trees, X, y, X[:5], method="boostin")
    assert np.abs(amounts.remainder).max() > 1e-3
    with pytest.raises(InputError):
        explained(trees, X[:-1], y[:-1], X[:5])
