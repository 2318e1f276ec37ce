from __future__ import annotations

import numpy as np
import pytest

from oracle.errors import InputError
from surrogate.attribution.model_text import NO_SPLIT, ModelText, is_cut_off


def test_leaf_values_counts_and_shrinkage_are_those_of_the_dump(case):
    booster = case.estimator.booster_
    text = ModelText.parse(booster.model_to_string())
    for number, (tree, dumped) in enumerate(zip(text.trees, booster.dump_model()["tree_info"], strict=True)):
        assert len(tree.leaf_values) == dumped["num_leaves"] and tree.shrinkage == dumped["shrinkage"]
        for leaf, value in enumerate(tree.leaf_values):
            assert value == booster.get_leaf_output(number, leaf)


def test_the_feature_above_each_leaf_is_known_where_its_split_is_categorical(train_case):
    booster = train_case("regression", categories=True, min_data_per_group=1, cat_smooth=1.0).estimator.booster_
    found = [tree.categorical_parents for tree in ModelText.parse(booster.model_to_string()).trees]
    truth = [np.full(len(parents), NO_SPLIT) for parents in found]

    def visit(node, number):
        for child in (node["left_child"], node["right_child"]):
            if "split_feature" in child:
                visit(child, number)
            elif node["decision_type"] == "==":
                truth[number][child["leaf_index"]] = node["split_feature"]

    for number, tree in enumerate(booster.dump_model()["tree_info"]):
        visit(tree["tree_structure"], number)
    assert any((parents == 3).any() for parents in truth)
    for parents, expected in zip(found, truth, strict=True):
        np.testing.assert_array_equal(parents, expected)


def test_digits_that_were_not_printed_come_from_the_known_numbers(train_case):
    text = train_case("regression", reg_lambda=1 / 3).estimator.booster_.model_to_string()
    assert ModelText.parse(text).number("lambda_l2") == 0.333333
    assert ModelText.parse(text, [0.25, 1 / 3]).number("lambda_l2") == 1 / 3
    assert ModelText.parse(text, [1 / 3, 0.33333334]).number("lambda_l2") == 0.333333  # either may be meant


@pytest.mark.parametrize(
    "number, expected", [(0.1, False), (0.03, False), (0.333333, True), (1e-05, False), (123456.0, True), (1 / 3, False)]
)
def test_numbers_with_all_printed_digits_may_be_cut_off(number, expected):
    assert is_cut_off(number) is expected


@pytest.mark.parametrize("text", ["", "tree\nversion=v4\n", "some text"])
def test_text_that_is_no_model_is_refused(text):
    with pytest.raises(InputError, match="model text"):
        ModelText.parse(text)
