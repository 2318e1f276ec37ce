from __future__ import annotations

import numpy as np

from surrogate.attribution.leaf_similarity import LeafSimilarity


def agreement(case):
    """(n, m): whether the training row speaks for the test row's label."""
    if case.kind != "regression":
        return case.y[:, None] == case.y_test
    prediction = case.estimator.predict(case.X_test)
    return (case.y[:, None] >= prediction) == (case.y_test > prediction)


def test_it_equals_the_loop_over_rows_and_trees(case, slow):
    found = case.fit(LeafSimilarity(case.estimator)).attribute(case.X_test, case.given(case.y_test))
    truth = np.where(agreement(case), 1, -1) * slow.similarity()
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-13 * np.abs(truth).max())


def test_of_a_prediction_is_positive_for_rows_of_the_predicted_class_or_above_the_prediction(case, slow):
    found = case.fit(LeafSimilarity(case.estimator)).attribute(case.X_test, of="prediction")
    if case.kind == "multiclass":
        speaks = case.y[:, None] == slow.F[slow.n :].argmax(axis=1)
    elif case.kind == "binary":
        speaks = np.repeat(case.y[:, None] == 1, len(case.X_test), axis=1)
    else:
        speaks = case.y[:, None] >= case.estimator.predict(case.X_test)
    truth = np.where(speaks, 1, -1) * slow.similarity()
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-13 * np.abs(truth).max())


def test_the_self_influence_is_the_diagonal(case):
    method = case.fit(LeafSimilarity(case.estimator))
    np.testing.assert_allclose(
        method.self_influence(), np.diag(method.attribute(case.X, case.given(case.y))), rtol=1e-12, atol=1e-15
    )


def test_limit_in_one_tree_it_is_the_sign_over_the_squared_size_of_the_leaf(train_case):
    case = train_case("binary", n_estimators=1)
    found = case.fit(LeafSimilarity(case.estimator)).attribute(case.X_test, case.y_test)
    leaves = case.estimator.booster_.predict(np.vstack([case.X, case.X_test]), pred_leaf=True).ravel()
    mine, theirs = leaves[: len(case.X)], leaves[len(case.X) :]
    sizes = np.array([(mine == leaf).sum() for leaf in mine])
    truth = (mine[:, None] == theirs) * np.where(case.y[:, None] == case.y_test, 1, -1) / sizes[:, None] ** 2
    np.testing.assert_allclose(found, truth, rtol=1e-12, atol=0)
