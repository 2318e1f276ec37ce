"""`ekfac` against explicit sums, its limit, its inverse, and what it refuses."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import oracle
from oracle.errors import InputError, MismatchError, MissingFileError, NotFiniteError
from oracle.gradients.curvature import KroneckerFactors, fit_factors

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture
def fit_texts(make_token_texts):
    return make_token_texts(8, seed=31)


@pytest.fixture
def targets(make_token_texts):
    return {"a": make_token_texts(4, seed=21), "b": make_token_texts(3, seed=22)}


@pytest.fixture
def lm(make_module):
    return oracle.LanguageModel(make_module("llama"), max_tokens=64)


def _gradient(lm, rows, *, divisor):
    """Gradient of the summed loss of some texts over `divisor`, in float64, by an ordinary backward pass per text."""
    names, parameters = zip(*lm.module.named_parameters(), strict=True)
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        loss = lm.module(input_ids=ids, labels=ids).loss * ((ids.shape[1] - 1) / divisor)
        for into, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            into += gradient.double()
    return {name: gradient.unsqueeze(0) for name, gradient in zip(names, total, strict=True)}


def _explicit_value(factors, text, target, *, damping):
    """<g_i, (G + damping)^-1 g_c> from the dense inverse of every layer's curvature."""
    value = 0.0
    for layer in factors.layers:
        widths = {"outputs": layer.num_outputs, "inputs": layer.num_inputs}
        u_s, u_a = (
            factors.vectors.get(f"{layer.weight}::{side}", torch.eye(n)).double().contiguous() for side, n in widths.items()
        )
        vectors, eigenvalues = torch.kron(u_s, u_a), factors.curvature[layer.weight].double().flatten()  # (O * I, O * I)
        scale = 0.1 * eigenvalues.mean() if damping is None else damping
        whole = vectors @ torch.diag(eigenvalues) @ vectors.T + scale * torch.eye(len(vectors)).double()
        own, goal = (layer.join(side)[0].flatten() for side in (text, target))
        value += float(own @ torch.linalg.solve(whole, goal))
    return value


@pytest.mark.parametrize(("widest", "damping", "text_loss"), [(4096, None, "sum"), (20, 0.3, "mean")])
def test_values_equal_the_inverse_written_out(widest, damping, text_loss, make_token_texts):
    import transformers as tf

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, vocab_size=60, max_position_embeddings=64))
    lm = oracle.LanguageModel(module, max_tokens=64)
    fit_texts, sample, rows = (
        [{"input_ids": [token % 60 for token in row["input_ids"]]} for row in make_token_texts(count, seed=seed)]
        for count, seed in ((6, 31), (3, 2), (3, 21))
    )
    options = {"fit_texts": fit_texts, "max_factor_dim": widest, "damping": damping, "text_loss": text_loss}
    labels = oracle.label(lm, sample, {"t": rows}, method="ekfac", **options)
    factors = fit_factors(lm, fit_texts, max_factor_dim=widest)
    assert len(factors.layers) == 8
    target = _gradient(lm, rows, divisor=sum(len(row["input_ids"]) - 1 for row in rows))
    for row, value in zip(sample, labels.values[:, 0], strict=True):
        own = _gradient(lm, [row], divisor=len(row["input_ids"]) - 1 if text_loss == "mean" else 1)
        assert value == pytest.approx(_explicit_value(factors, own, target, damping=damping), rel=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_times_a_large_damping_it_is_the_plain_product(kind, make_module, make_token_texts, targets, fit_texts):
    lm, sample = oracle.LanguageModel(make_module(kind), max_tokens=64), make_token_texts(5, seed=2)
    plain = oracle.label(lm, sample, targets, method="grad_dot", preconditioner="none")
    errors = []
    for damping in (1e2, 1e6):
        labels = oracle.label(
            lm, sample, targets, method="ekfac", fit_texts=fit_texts, damping=damping, other_parameters="damped"
        )
        errors.append(np.abs(labels.values * damping - plain.values).max() / np.abs(plain.values).max())
    assert errors[1] < 1e-4 and errors[1] < errors[0] / 100
    assert labels.meta["facts"]["coverage"]["left_out"] == 0


def test_left_out_parameters_are_left_out_of_the_limit_too(lm, make_token_texts, targets, fit_texts):
    sample = make_token_texts(5, seed=2)
    labels = oracle.label(lm, sample, targets, method="ekfac", fit_texts=fit_texts, damping=1e6)
    for name, parameter in lm.module.named_parameters():
        parameter.requires_grad_("norm" not in name and "embed" not in name)
    plain = oracle.label(lm, sample, targets, method="grad_dot", preconditioner="none")
    np.testing.assert_allclose(labels.values * 1e6, plain.values, rtol=1e-3, atol=1e-4 * np.abs(plain.values).max())


def test_more_curvature_means_less_influence(lm, make_token_texts, targets, fit_texts, tmp_path):
    """Values fall as the curvature rises; multiplied by it instead of divided, they would rise."""
    sample = make_token_texts(5, seed=2)
    factors = fit_factors(lm, fit_texts, tmp_path / "own")
    steep = replace(factors, curvature={name: 4 * tensor for name, tensor in factors.curvature.items()})
    steep.save(tmp_path / "steep")
    for options in ({}, {"other_parameters": "damped"}):
        own, less = (
            oracle.label(lm, sample, targets, method="ekfac", factors=str(tmp_path / name), **options)
            for name in ("own", "steep")
        )
        np.testing.assert_allclose(less.values, own.values / 4, rtol=1e-3, atol=1e-5 * np.abs(own.values).max())


def test_attention_is_covered_and_what_is_left_out_is_named(lm, make_token_texts, targets, fit_texts):
    facts = oracle.label(lm, make_token_texts(3, seed=2), targets, method="ekfac", fit_texts=fit_texts).meta["facts"]
    assert facts["num_layers"] == 2 * (4 + 3) + 1 and facts["route"] == "batched"
    assert facts["left_out_parameters"] == sorted(
        name for name, _ in lm.module.named_parameters() if "norm" in name or "embed" in name
    )
    sizes = {name: p.numel() for name, p in lm.module.named_parameters()}
    left_out = sum(sizes[name] for name in facts["left_out_parameters"]) / sum(sizes.values())
    assert facts["coverage"] == pytest.approx({"factors": 1 - left_out, "scalar": 0.0, "left_out": left_out})
    assert facts["diagonal_sides"] == [] and facts["tied_to_embeddings"] == []
    assert facts["damping"]["lowest"] < facts["damping"]["median"] < facts["damping"]["highest"]
    assert facts["fit"]["num_texts"] == 8 and facts["fit"]["fisher"] == "sampled"


def test_a_tied_head_covers_the_embeddings_and_a_wide_side_is_told(make_module, make_token_texts, targets, fit_texts):
    lm = oracle.LanguageModel(make_module("gpt2"), max_tokens=64)
    options = {"fit_texts": fit_texts, "max_factor_dim": 200, "other_parameters": "damped"}
    facts = oracle.label(lm, make_token_texts(3, seed=2), targets, method="ekfac", **options).meta["facts"]
    assert facts["tied_to_embeddings"] == ["transformer.wte.weight"]
    assert facts["diagonal_sides"] == ["transformer.wte.weight::outputs (211)"]
    assert facts["coverage"]["factors"] + facts["coverage"]["scalar"] == pytest.approx(1)


def test_a_text_helps_itself(lm, make_token_texts, fit_texts):
    rows = make_token_texts(1, seed=7)
    for options in ({}, {"other_parameters": "damped"}, {"damping": 1.0}):
        assert oracle.label(lm, rows, {"itself": rows}, method="ekfac", fit_texts=fit_texts, **options).values[0, 0] > 0


def test_factors_in_a_folder_give_the_labels_of_those_fitted_on_the_way(lm, make_token_texts, targets, fit_texts, tmp_path):
    sample, folder = make_token_texts(4, seed=2), str(tmp_path / "factors")
    on_the_way = oracle.label(lm, sample, targets, method="ekfac", fit_texts=fit_texts)
    kept = oracle.label(lm, sample, targets, method="ekfac", fit_texts=fit_texts, factors=folder)
    read = oracle.label(lm, sample, targets, method="ekfac", factors=folder)
    assert on_the_way.values.tobytes() == kept.values.tobytes() == read.values.tobytes()
    fit_flops = KroneckerFactors.load(folder).meta["cost"]["fit_flops"]
    costs = [labels.meta["cost"]["prepare_flops"] for labels in (on_the_way, kept, read)]
    assert costs[0] == costs[1] == costs[2] + fit_flops and costs[2] > 0
    assert read.meta["facts"]["fit"]["cost"]["fit_flops"] == fit_flops


def test_labels_with_other_factors_are_not_gone_on_with(lm, make_token_texts, targets, fit_texts, tmp_path):
    sample, workdir = make_token_texts(4, seed=2), tmp_path / "labels"
    fit_factors(lm, fit_texts, tmp_path / "one")
    fit_factors(lm, fit_texts[:5], tmp_path / "two")
    oracle.label(lm, sample, targets, method="ekfac", factors=str(tmp_path / "one"), workdir=workdir)
    oracle.label(lm, sample, targets, method="ekfac", fit_texts=fit_texts, workdir=workdir)  # the same ones
    with pytest.raises(MismatchError, match="factors"):
        oracle.label(lm, sample, targets, method="ekfac", factors=str(tmp_path / "two"), workdir=workdir)


def test_factors_of_another_checkpoint_or_of_other_options_are_refused(lm, make_token_texts, targets, fit_texts, tmp_path):
    sample, folder = make_token_texts(3, seed=2), str(tmp_path)
    fit_factors(lm, fit_texts, folder, fisher="empirical")
    oracle.label(lm, sample, targets, method="ekfac", factors=folder, fisher="empirical")
    with pytest.raises(MismatchError, match="fisher: stored 'empirical', asked 'sampled'"):
        oracle.label(lm, sample, targets, method="ekfac", factors=folder, fisher="sampled")
    with pytest.raises(MismatchError, match="fisher"):
        oracle.label(lm, sample, targets, method="ekfac", factors=folder, fit_texts=fit_texts)
    with torch.no_grad():
        next(lm.module.parameters()).add_(1e-3)
    with pytest.raises(MismatchError, match="checkpoint: fitted"):
        oracle.label(lm, sample, targets, method="ekfac", factors=folder)


def test_what_has_no_effect_or_no_meaning_is_refused(lm, make_token_texts, targets, fit_texts, tmp_path):
    sample = make_token_texts(3, seed=2)
    for options, message in (
        ({}, "neither factors nor texts"),
        ({"fit_texts": fit_texts, "damping": 1.0, "damping_scale": 0.5}, "no effect"),
        ({"fit_texts": fit_texts, "damping": 0.0}, "too small"),
        ({"fit_texts": fit_texts, "other_parameters": "left_out"}, "did you mean 'leave_out'"),
    ):
        with pytest.raises(InputError, match=message):
            oracle.label(lm, sample, targets, method="ekfac", **options)
    with pytest.raises(MissingFileError):
        oracle.label(lm, sample, targets, method="ekfac", factors=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"curvature of .*q_proj.weight is 0"):  # texts of two tokens have nothing to attend to
        oracle.label(lm, sample, targets, method="ekfac", fit_texts=[{"input_ids": [5, 6]}, {"input_ids": [5, 7]}])


def test_texts_of_two_tokens_can_be_fitted_on_with_a_damping(lm, make_token_texts, targets):
    texts = [{"input_ids": [5, 6]}, {"input_ids": [5, 7]}]
    labels = oracle.label(lm, make_token_texts(3, seed=2), targets, method="ekfac", fit_texts=texts, damping=0.1)
    assert np.isfinite(labels.values).all()


def test_a_diverged_model_is_refused(lm, make_token_texts, targets, fit_texts):
    with torch.no_grad():
        lm.module.lm_head.weight[3] = float("nan")
    with pytest.raises(NotFiniteError, match="NaN"):
        oracle.label(lm, make_token_texts(3, seed=2), targets, method="ekfac", fit_texts=fit_texts)


def test_a_mixture_of_experts_keeps_the_batched_way(make_module, make_token_texts, targets, fit_texts):
    """Experts have no factors and are left out, so that the layers that are covered need no pass per text."""
    lm = oracle.LanguageModel(make_module("mixtral"), max_tokens=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        facts = oracle.label(lm, make_token_texts(4, seed=2), targets, method="ekfac", fit_texts=fit_texts).meta["facts"]
    assert facts["route"] == "batched" and any("experts" in name for name in facts["left_out_parameters"])
