from __future__ import annotations

import numpy as np
import pytest

from surrogate.attribution.bagging import bags
from surrogate.attribution.ensemble import TreeEnsemble


def slow_bag(seed, num_rows, fraction, draws_before):
    """LightGBM's generators, number by number."""
    mask = []
    for row in range(num_rows):
        block, place = divmod(row, 1024)
        size = min(1024, num_rows - block * 1024)
        state = (seed + block) % 2**32
        for _ in range(draws_before * size + place + 1):
            state = (214013 * state + 2531011) % 2**32
        mask.append(((state >> 16) & 0x7FFF) / 32768 < fraction)
    return np.array(mask)


def test_masks_are_those_of_the_generators_drawn_number_by_number(train_case):
    case = train_case("regression", num_rows=1100, subsample=0.35, subsample_freq=2, n_estimators=4, random_state=11)
    text = TreeEnsemble.read(case.estimator).text
    found = [
        mask for _, mask in zip(range(4), bags(text, case.y, TreeEnsemble.read(case.estimator).leaves(case.X)), strict=False)
    ]
    seed = int(text.number("bagging_seed"))
    np.testing.assert_array_equal(found[0], slow_bag(seed, 1100, 0.35, 0))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2][1000:], slow_bag(seed, 1100, 0.35, 1)[1000:])


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("regression", {"subsample": 0.5, "subsample_freq": 1}),
        ("regression", {"subsample": 0.9, "subsample_freq": 4}),
        ("binary", {"pos_bagging_fraction": 0.3, "neg_bagging_fraction": 0.8, "bagging_freq": 2}),
        ("multiclass", {"subsample": 0.5, "subsample_freq": 2}),
    ],
)
def test_every_leaf_was_grown_on_the_rows_of_the_mask(train_case, kind, settings):
    case = train_case(kind, num_rows=2100, n_estimators=5, random_state=4, **settings)
    ensemble = TreeEnsemble.read(case.estimator)
    leaves = ensemble.leaves(case.X)
    for number, mask in zip(range(5), bags(ensemble.text, case.y, leaves), strict=False):
        for tree in range(number * ensemble.num_outputs, (number + 1) * ensemble.num_outputs):
            counts = np.bincount(leaves[mask, tree], minlength=len(ensemble.leaf_values[tree]))
            np.testing.assert_array_equal(counts, ensemble.text.trees[tree].leaf_counts)


def test_a_bag_of_all_rows_is_the_last_one(train_case):
    case = train_case(
        "regression", num_rows=30, min_child_samples=2, n_estimators=20, subsample=0.9, subsample_freq=1, random_state=5
    )
    ensemble = TreeEnsemble.read(case.estimator)
    masks = list(bags(ensemble.text, case.y, ensemble.leaves(case.X)))
    first = next(number for number, mask in enumerate(masks) if mask.all())
    assert 0 < first < 15 and all(mask.all() for mask in masks[first:])
    for tree, mask in zip(ensemble.text.trees, masks, strict=True):
        assert tree.is_constant or tree.leaf_counts.sum() == mask.sum()


def test_without_bagging_there_is_no_mask(train_case):
    for settings in ({}, {"subsample": 0.5}, {"subsample_freq": 1}):
        case = train_case("regression", **settings)
        ensemble = TreeEnsemble.read(case.estimator)
        assert list(bags(ensemble.text, case.y, ensemble.leaves(case.X))) == [None] * 6


def test_bags_of_rounds_that_lightgbm_dropped_are_passed_over(train_case):
    """A third of few rows leaves too few for two leaves in most rounds."""
    case = train_case("regression", num_rows=24, min_child_samples=5, n_estimators=40, subsample=0.4, subsample_freq=1)
    ensemble = TreeEnsemble.read(case.estimator)
    assert 5 < ensemble.num_rounds < 30
    leaves = ensemble.leaves(case.X)
    for tree, mask in enumerate(bags(ensemble.text, case.y, leaves)):
        if not ensemble.text.trees[tree].is_constant:
            counts = np.bincount(leaves[mask, tree], minlength=len(ensemble.leaf_values[tree]))
            np.testing.assert_array_equal(counts, ensemble.text.trees[tree].leaf_counts)
