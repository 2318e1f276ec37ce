"""The ladder of methods at one checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from oracle.calibration import calibrate, folder_name
from oracle.errors import InputError, MismatchError


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


def test_every_method_takes_the_same_step_as_the_reference(lm, sample, make_token_texts):
    methods = {"grad_dot": {}, "own": {"method": "grad_dot", "text_loss": "mean"}, "cosine": {"method": "grad_dot"}}
    methods["cosine"] |= {"similarity": "cosine", "max_grad_norm": None}
    options = {"max_grad_norm": 0.01, "text_loss": "sum"}
    found = calibrate(lm, sample, {"t": make_token_texts(4, seed=2)}, methods=methods, num_texts=8, **options)
    taken = {name: row["options"] for name, row in found.as_dict().items()}
    assert [taken[name]["max_grad_norm"] for name in taken] == [0.01, 0.01, 0.01, None]
    assert [taken[name]["text_loss"] for name in taken] == ["sum", "sum", "mean", "sum"]
    assert found.rungs[1].mean("spearman") > 0.99
    assert "grad_dot: max_grad_norm=0.01, text_loss='sum' as one_step" in found.table()
    assert "own: max_grad_norm=0.01 as one_step" in found.table()


def test_a_shared_option_that_a_method_cannot_take_is_refused_before_anything_is_measured(lm, sample, make_token_texts):
    lm.optimizer.step = None
    methods = {"cosine": {"method": "grad_dot", "similarity": "cosine"}}
    with pytest.raises(InputError, match="'cosine' with max_grad_norm as one_step") as caught:
        calibrate(lm, sample, {"t": make_token_texts(4, seed=2)}, methods=methods, max_grad_norm=1.0)
    assert "max_grad_norm=None" in caught.value.remedy
    with pytest.raises(InputError, match="ekfac has neither"):
        calibrate(lm, sample, {"t": make_token_texts(4, seed=2)}, methods=["grad_dot", "ekfac"])
    with pytest.raises(InputError, match="max_target_texts=0"):
        calibrate(lm, sample, {"t": make_token_texts(4, seed=2)}, max_target_texts=0)


def test_a_method_that_refuses_leaves_the_others_compared(lm, sample, make_token_texts, tmp_path):
    methods = ["less", "grad_dot"]  # less needs Adam
    found = calibrate(lm, sample, {"t": make_token_texts(4, seed=2)}, methods=methods, num_texts=8, workdir=tmp_path)
    _, refused, slope = found.rungs
    assert refused.labels is None and slope.mean("spearman") > 0.99
    lines = found.table().splitlines()
    assert lines[2].split() == ["less", *"------"] and lines[4].startswith("less refused: ")
    row = found.as_dict()["less"]
    assert row["refused"]["given"] == refused.refused.given and row["targets"] == {} and row["flops_per_text"] is None
    others = {"grad_dot": {"similarity": "cosine"}}
    with pytest.raises(MismatchError):  # a folder of other labels is no refusal of the method
        calibrate(lm, sample, {"t": make_token_texts(4, seed=2)}, methods=others, num_texts=8, workdir=tmp_path)


def test_one_method_is_named_by_a_string(lm, sample, make_token_texts):
    found = calibrate(lm, sample, {"t": make_token_texts(4, seed=2)}, methods="grad_dot", num_texts=8)
    assert [rung.method for rung in found.rungs] == ["one_step", "grad_dot"] and found.num_texts == 8


def test_names_with_signs_of_paths_have_folders_of_their_own():
    assert folder_name("grad_dot") == "grad_dot"
    names = ["ekfac:factors=/a/b", "ekfac:factors=-a-b", "..", "x" * 10 + "/" * 300]
    folders = [folder_name(name) for name in names]
    assert len(set(folders)) == 4 and all("/" not in folder and ":" not in folder and len(folder) < 80 for folder in folders)
    assert ".." not in folders


def test_passes_are_those_of_the_texts_that_a_folder_has_and_none_without_a_model(lm, sample, make_token_texts, tmp_path):
    targets = {"t": make_token_texts(4, seed=2)}
    calibrate(lm, sample, targets, num_texts=20, methods=["grad_dot"], workdir=tmp_path)
    methods = {"grad_dot": {}, "cosine": {"method": "grad_dot", "similarity": "cosine"}, "target_similarity": {}}
    rungs = calibrate(lm, sample, targets, num_texts=10, methods=methods, workdir=tmp_path).rungs
    passes = {rung.method: rung.passes_per_text for rung in rungs}
    assert passes["grad_dot"] == pytest.approx(1.0) and passes["cosine"] == pytest.approx(1.0)
    assert passes["target_similarity"] is None
