"""Few target texts, corrected by slopes on all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from oracle.control_variate import corrected, corrected_values
from oracle.errors import MismatchError


def test_steps_on_few_target_texts_come_nearer_to_those_on_all(make_module, make_token_texts):
    module = make_module("gpt2").double()
    lm = oracle.LanguageModel(module, optimizer=torch.optim.SGD(module.parameters(), lr=1e-3), max_tokens=64)
    sample, targets = make_token_texts(30, seed=1), {"t": make_token_texts(24, seed=2)}

    def measured(method, **options):
        return oracle.label(lm, sample, targets, method=method, seed=3, **options)

    whole, few = measured("one_step"), measured("one_step", max_target_texts=4)
    slopes = measured("grad_dot", max_target_texts=4), measured("grad_dot")
    better = corrected(few, *slopes)
    assert better.text_ids == few.text_ids and better.units == few.units
    error = np.abs(few.values - whole.values).max()
    assert np.abs(better.values - whole.values).max() < 0.2 * error  # what is left is curvature
    assert not np.allclose(slopes[0].values, slopes[1].values, rtol=0.1)
    with pytest.raises(MismatchError, match="on the target texts"):
        corrected(few, slopes[1], slopes[1])
    with pytest.raises(MismatchError, match="lack the targets"):
        corrected(few, *(oracle.Labels.from_values(each.values, each.text_ids, ["other"]) for each in slopes))


def test_the_correction_is_scaled_to_the_steps():
    rng = np.random.default_rng(0)
    few, everything = rng.normal(size=(2, 50))
    np.testing.assert_allclose(corrected_values(3 * few, few, everything), 3 * everything)
    np.testing.assert_array_equal(corrected_values(few, np.ones(50), everything), few)
