"""The ladder of methods at one checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from oracle.calibration import calibrate
from oracle.errors import InputError


@pytest.fixture
def lm(make_module):
    module = make_module("gpt2").double()
    return oracle.LanguageModel(module, optimizer=torch.optim.SGD(module.parameters(), lr=1e-4), max_tokens=64)


@pytest.fixture
def sample(make_token_texts):
    return [{**row, "kind": "ab"[number % 2]} for number, row in enumerate(make_token_texts(30, seed=1))]


def test_a_cheap_method_is_compared_with_real_steps_on_the_same_texts(lm, sample, make_token_texts, tmp_path):
    targets = {"one": make_token_texts(6, seed=2), "two": make_token_texts(6, seed=3)}
    methods = {"grad_dot": {}, "cosine": {"method": "grad_dot", "similarity": "cosine"}}
    found = calibrate(lm, sample, targets, methods=methods, num_texts=24, groups="kind", workdir=tmp_path)
    reference, slope, cosine = found.rungs
    assert [rung.method for rung in found.rungs] == ["one_step", "grad_dot", "cosine"]
    assert reference.labels.text_ids == slope.labels.text_ids and len(slope.labels) == 24
    for row in slope.targets.values():
        assert row.spearman > 0.99 and row.spearman_within > 0.99
    assert cosine.mean("spearman") < slope.mean("spearman")
    assert slope.passes_per_text == pytest.approx(1.0) and reference.passes_per_text > 2
    table = found.table().splitlines()
    assert len(table) == 4 and table[0].split()[0] == "method" and table[2].startswith("grad_dot")
    assert found.as_dict()["grad_dot"]["targets"]["one"]["num_texts"] == 24
    again = calibrate(lm, sample, targets, methods=methods, num_texts=24, groups="kind", workdir=tmp_path)
    np.testing.assert_array_equal(again.rungs[0].labels.values, reference.labels.values)


def test_a_grouping_by_a_column_that_is_not_there_is_refused(lm, sample, make_token_texts):
    with pytest.raises(InputError, match="no column 'source'"):
        calibrate(lm, sample, {"t": make_token_texts(4, seed=2)}, groups="source")


def test_which_texts_are_drawn_is_a_matter_of_content(lm, sample, make_token_texts):
    targets = {"t": make_token_texts(4, seed=2)}
    drawn, turned = (calibrate(lm, rows, targets, num_texts=12).rungs[0].labels for rows in (sample, sample[::-1]))
    assert sorted(drawn.text_ids) == sorted(turned.text_ids)
    other = calibrate(lm, sample, targets, num_texts=12, seed=1).rungs[0].labels
    assert sorted(other.text_ids) != sorted(drawn.text_ids)


@pytest.mark.parametrize(("methods", "given"), [(["one_step"], "'one_step' is among"), (["self_rating"], "at no target set")])
def test_a_method_that_cannot_be_a_rung_is_refused_before_anything_is_measured(methods, given, lm, sample, make_token_texts):
    lm.optimizer.step = None
    with pytest.raises(InputError, match=given):
        calibrate(lm, sample, {"t": make_token_texts(4, seed=2)}, methods=methods)
    with pytest.raises(InputError, match="num_texts=2"):
        calibrate(lm, sample, {"t": make_token_texts(4, seed=2)}, num_texts=2)
