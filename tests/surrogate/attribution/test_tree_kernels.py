from __future__ import annotations

import numpy as np
import pytest

from surrogate.attribution.ensemble import TreeEnsemble
from surrogate.attribution.tree_kernels import KERNELS, TreeKernel


def slow_path(tree, row):
    """Node names from the root to the leaf, by LightGBM's JSON dump; numerical splits without missing values."""
    node, path = tree["tree_structure"], []
    while "leaf_index" not in node:
        path.append(f"inner {node['split_index']}")
        node = node["left_child"] if row[node["split_feature"]] <= node["threshold"] else node["right_child"]
    return [*path, f"leaf {node['leaf_index']}"]


def slow_features(case, steps, name, X, weights):
    """Per row a dict from (tree, node) to value, written from the description of the kernels."""
    trees = case.estimator.booster_.dump_model()["tree_info"]
    counts: dict[tuple[int, str], float] = {}
    for row, weight in zip(case.X, weights, strict=True):
        for number, tree in enumerate(trees):
            for node in slow_path(tree, row):
                counts[number, node] = counts.get((number, node), 0.0) + weight
    found = []
    for row in X:
        features = {}
        for number, tree in enumerate(trees):
            path = slow_path(tree, row)
            output = steps[number][int(path[-1].split()[1])]
            if name == "tree_output":
                features[number, "output"] = output
                continue
            for node in path if name.startswith("node") else path[-1:]:
                value = output if "output" in name and node.startswith("leaf") else 1.0
                features[number, node] = value / counts[number, node] if name.endswith("by_count") else value
        found.append(features)
    return found


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", ["regression", "multiclass"])
def test_products_of_features_are_those_of_the_nodes_on_both_paths(train_case, name, kind):
    case = train_case(kind)
    weights = np.random.default_rng(0).uniform(0.5, 2.0, 60)
    ensemble = TreeEnsemble.read(case.estimator).with_bias(case.y.astype(float), None, has_init_score=False)
    kernel = TreeKernel(name, ensemble, ensemble.leaves(case.X), weights)
    found = (kernel.features(ensemble.leaves(case.X)) @ kernel.features(ensemble.leaves(case.X_test)).T).toarray()
    train, test = (slow_features(case, ensemble.steps(), name, X, weights) for X in (case.X, case.X_test))
    truth = [[sum(value * b.get(key, 0.0) for key, value in a.items()) for b in test] for a in train]
    np.testing.assert_allclose(found, truth, rtol=1e-12, atol=1e-15)


def test_leaves_without_a_training_row_that_counts_have_no_feature(train_case):
    case = train_case("regression")
    ensemble = TreeEnsemble.read(case.estimator)
    leaves = ensemble.leaves(case.X)
    kernel = TreeKernel("leaf_path_by_count", ensemble, leaves, np.where(leaves[:, 0] == 1, 0.0, 1.0))
    features = kernel.features(leaves).toarray()
    assert np.isfinite(features).all() and not features[:, 1].any() and features[:, 0].any()


def test_trees_without_a_split_have_one_leaf_and_nothing_above_it(train_case):
    case = train_case("regression", min_child_samples=31, n_estimators=2)
    ensemble = TreeEnsemble.read(case.estimator)
    assert all(tree.is_constant for tree in ensemble.text.trees)
    for name in KERNELS:
        features = TreeKernel(name, ensemble, ensemble.leaves(case.X), np.ones(60)).features(ensemble.leaves(case.X)).toarray()
        assert features.shape[0] == 60 and (features == features[0]).all()
