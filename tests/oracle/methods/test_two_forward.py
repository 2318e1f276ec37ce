"""`two_forward` against `grad_dot`'s plain loop; what its step and its checks refuse; when forward mode takes over."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from oracle.comparison import spearman
from oracle.errors import InputError
from oracle.gradients import central_difference
from oracle.gradients.central_difference import (
    TOLERANCE,
    CentralDifference,
    HeldChoices,
    InexactDifferencesWarning,
)
from oracle.gradients.forward_mode import ForwardMode, NoForwardModeError
from oracle.gradients.metric import prepare_directions
from oracle.methods.two_forward import TwoForward, _largest_error
from oracle.target_columns import prepare_targets
from oracle.targets import read_targets

FLOAT32_ERROR = 1e-4  # of the largest value
DIFFERENCES_ERROR = 1e-3  # where random weights and random texts make the sample's slopes flat beside a target's own


@pytest.fixture
def targets(make_token_texts):
    return {"several": make_token_texts(6, seed=5), "single": make_token_texts(1, seed=6)}


@pytest.fixture
def make_lm(make_module, make_token_texts, make_adamw):
    def make_lm(kind, *, dtype=torch.float32, **options):
        module = make_module(kind, **options).to(dtype)
        return oracle.LanguageModel(module, optimizer=make_adamw(module, make_token_texts(4, seed=0)), max_tokens=64)

    return make_lm


def _both(lm, sample, targets, **options):
    """The labels, and those of one backward pass per text."""
    settings = {"halves": options.pop("halves", True), **options}
    own = {name: settings.pop(name) for name in ("relative_step", "tolerance") if name in settings}
    labels = oracle.label(lm, sample, targets, method="two_forward", **own, **settings)
    return labels, oracle.label(lm, sample, targets, method="grad_dot", per_text=True, **settings)


def _error(found, expected):
    """The largest error of a column, relative to the column's largest value."""
    return float((np.abs(found - expected).max(-2) / np.abs(expected).max(-2)).max())


def _chains(num_texts, *, seed, rule=0):
    """Texts in which a token has three likely followers."""
    followers = np.random.default_rng(rule).integers(3, 211, size=(211, 3))
    generator, rows = np.random.default_rng(seed), []
    for length in generator.integers(2, 41, size=num_texts):
        ids = [int(generator.integers(3, 211))]
        while len(ids) < length:
            ids.append(int(followers[ids[-1], generator.integers(3)] if generator.random() < 0.9 else generator.integers(3, 211)))
        rows.append({"input_ids": ids})
    return rows


def _trained(module):
    lm = oracle.LanguageModel(module, optimizer=torch.optim.AdamW(module.parameters(), lr=3e-3), max_tokens=64)
    for step in range(60):
        for batch in lm.batches(lm.encode(_chains(16, seed=1000 + step)), batch_tokens=10_000):
            lm.text_losses(batch).mean().backward()
        lm.optimizer.step()
        lm.optimizer.zero_grad()
    return lm


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("preconditioner", ["none", "adam"])
@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "qwen2", "qwen3", "mistral", "mixtral"])
def test_values_are_those_of_grad_dot(kind, preconditioner, packing, make_lm, make_token_texts, targets):
    lm = make_lm(kind)
    lm.packing = packing
    labels, expected = _both(lm, make_token_texts(20, seed=2), targets, preconditioner=preconditioner)
    assert _error(labels.values, expected.values) < FLOAT32_ERROR
    assert _error(labels.halves[:, :, :1], expected.halves[:, :, :1]) < FLOAT32_ERROR  # "single" has no halves
    assert labels.units == expected.units
    np.testing.assert_allclose(labels.columns["text_loss"], expected.columns["text_loss"], rtol=1e-5)
    assert labels.meta["facts"]["forward_mode"]
    assert labels.meta["facts"]["rehearsal_relative_error"] < 5e-3


@pytest.mark.parametrize("preconditioner", ["none", "adam"])
@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "qwen3", "mixtral"])
def test_differences_alone_keep_the_ranking(kind, preconditioner, make_lm, make_token_texts, targets):
    sample = make_token_texts(20, seed=2)
    labels, expected = _both(make_lm(kind), sample, targets, preconditioner=preconditioner, tolerance=np.inf)
    assert _error(labels.values, expected.values) < DIFFERENCES_ERROR
    assert _error(labels.halves[:, :, :1], expected.halves[:, :, :1]) < 2 * DIFFERENCES_ERROR
    assert min(spearman(labels.values[:, c], expected.values[:, c]) for c in range(2)) > 0.999
    np.testing.assert_allclose(labels.columns["text_loss"], expected.columns["text_loss"], rtol=1e-5)
    assert not labels.meta["facts"]["forward_mode"]
    assert labels.meta["facts"]["holds_routing"] == (kind == "mixtral")


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama"])
def test_differences_measure_a_trained_model_more_exactly(kind, make_module):
    lm = _trained(make_module(kind))
    targets = {"same": _chains(6, seed=7), "other": _chains(4, seed=8, rule=1)}
    for packing in (False, True):
        lm.packing = packing
        labels, expected = _both(lm, _chains(40, seed=5), targets, halves=False, tolerance=np.inf)
        assert _error(labels.values, expected.values) < 2.5e-4
        assert max(labels.meta["facts"]["self_check_relative_errors"]) < central_difference.AIM


@pytest.mark.parametrize("preconditioner", ["none", "adam"])
@pytest.mark.parametrize("kind", ["gpt2", "neox"])  # the norms of the others compute in float32 at any precision
def test_in_float64_only_the_rounding_of_labels_is_left(kind, preconditioner, make_lm, make_token_texts, targets):
    lm = make_lm(kind, dtype=torch.float64)
    labels, expected = _both(lm, make_token_texts(12, seed=2), targets, preconditioner=preconditioner)
    assert _error(labels.values, expected.values) < 1e-6
    assert not labels.meta["facts"]["forward_mode"]


def test_a_float64_model_with_layers_in_float32_takes_the_step_of_float32(make_lm, make_token_texts, targets):
    sample = make_token_texts(12, seed=2)
    labels, expected = _both(make_lm("llama", dtype=torch.float64), sample, targets, tolerance=np.inf)
    assert _error(labels.values, expected.values) < DIFFERENCES_ERROR
    assert min(labels.meta["facts"]["relative_steps"]) > 1e-5


def test_the_error_falls_as_the_square_of_the_step(make_lm, make_token_texts, targets):
    lm, sample = make_lm("gpt2", dtype=torch.float64), make_token_texts(8, seed=2)
    options = {"preconditioner": "none", "tolerance": np.inf}
    pairs = [_both(lm, sample, targets, relative_step=step, **options) for step in (4e-4, 2e-4, 1e-4)]
    errors = [_error(labels.values, expected.values) for labels, expected in pairs]
    assert errors[0] > 1e-5
    np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 4.0, rtol=0.05)


@pytest.mark.parametrize("text_loss", ["mean", "sum"])
def test_a_text_counts_by_its_mean_or_by_its_tokens(text_loss, make_lm, make_token_texts, targets):
    lm, sample = make_lm("neox", dtype=torch.float64), make_token_texts(8, seed=2)
    labels, expected = _both(lm, sample, targets, text_loss=text_loss)
    mean = labels if text_loss == "mean" else oracle.label(lm, sample, targets, method="two_forward")
    lengths = np.array([len(row["input_ids"]) - 1 for row in sample])[:, None] if text_loss == "sum" else 1
    assert _error(labels.values, expected.values) < 1e-6
    np.testing.assert_allclose(labels.values, mean.values * lengths, rtol=1e-5, atol=1e-7 * np.abs(labels.values).max())


def test_a_text_does_not_feel_its_batch(make_lm, make_token_texts, targets):
    lm, sample = make_lm("llama"), make_token_texts(20, seed=2)
    together = oracle.label(lm, sample, targets, method="two_forward")
    alone = oracle.label(lm, sample[::-1], targets, method="two_forward", block_size=1).take(together.text_ids)
    assert _error(alone.values, together.values) < FLOAT32_ERROR
    assert alone.meta["facts"]["rehearsal_relative_error"] == together.meta["facts"]["rehearsal_relative_error"] > 0


def test_dropout_is_off_and_frozen_weights_stay(make_lm, make_token_texts, targets):
    lm = make_lm("neox", hidden_dropout=0.3)
    lm.module.get_input_embeddings().weight.requires_grad_(False)
    lm.module.train()
    labels, expected = _both(lm, make_token_texts(8, seed=2), targets)
    assert _error(labels.values, expected.values) < FLOAT32_ERROR
    assert lm.module.training


@pytest.mark.parametrize("options", [{}, {"preconditioner": "none"}, {"text_loss": "sum"}], ids=str)
def test_layers_are_those_of_grad_dot(options, make_lm, make_token_texts, targets):
    lm, sample = make_lm("neox"), make_token_texts(12, seed=2)
    before = lm.fingerprint()
    labels, expected = _both(lm, sample, targets, layers=r"layers\.1\.|embed_out", **options)
    assert _error(labels.values, expected.values) < FLOAT32_ERROR
    whole = oracle.label(lm, sample, targets, method="two_forward", **options)
    assert _error(labels.values, whole.values) > 0.01
    assert labels.units == expected.units
    facts = labels.meta["facts"]
    assert facts["covered_parameters"] == expected.meta["facts"]["covered_parameters"] < facts["parameters"]
    assert lm.fingerprint() == before and all(p.requires_grad for p in lm.module.parameters())


def test_only_the_layers_asked_for_must_be_precise(make_module, make_token_texts, targets):
    module = make_module("neox")
    module.get_input_embeddings().to(torch.bfloat16).register_forward_hook(lambda module, args, output: output.float())
    lm, sample = oracle.LanguageModel(module, max_tokens=64), make_token_texts(8, seed=2)
    with pytest.raises(InputError, match=r"embed_in\.weight are bfloat16"):
        oracle.label(lm, sample, targets, method="two_forward")
    labels, expected = _both(lm, sample, targets, layers=r"layers\.")
    assert _error(labels.values, expected.values) < FLOAT32_ERROR


def test_a_pattern_that_finds_no_layer_is_refused(make_lm, make_token_texts, targets):
    with pytest.raises(InputError, match="finds none"):
        oracle.label(make_lm("neox"), make_token_texts(2, seed=2), targets, method="two_forward", layers="layer.7")


# ---------------------------------------------------------------------- routing


def test_a_choice_of_experts_that_would_flip_is_held(make_lm, make_token_texts, targets, monkeypatch):
    lm, sample = make_lm("mixtral"), make_token_texts(20, seed=2)
    options = {"preconditioner": "none", "relative_step": 6e-4, "tolerance": np.inf}
    labels, expected = _both(lm, sample, targets, **options)
    assert _error(labels.values, expected.values) < 5e-3
    monkeypatch.setattr(
        HeldChoices, "__torch_function__", lambda self, func, types, args=(), kwargs=None: func(*args, **kwargs or {})
    )
    with pytest.raises(InputError, match="off by too much"):
        oracle.label(lm, sample, targets, method="two_forward", **options)


def test_held_choices_are_those_of_the_first_pass():
    held, first, second = HeldChoices(), torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[0.0, 5.0, 4.0]])
    with held:
        torch.topk(first, 2, dim=-1), first.argmax(-1)
    for _ in range(2):
        with held:
            values, indices = second.topk(2)
            best = torch.argmax(second, dim=-1)
        assert (values.tolist(), indices.tolist(), best.tolist()) == ([[0.0, 4.0]], [[0, 2]], [0])
    assert second.topk(2).indices.tolist() == [[1, 2]]


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_low_precision_are_refused_before_anything_is_measured(dtype, make_module, make_token_texts, monkeypatch):
    lm = oracle.LanguageModel(make_module("llama").to(dtype), max_tokens=64)
    monkeypatch.setattr(lm, "token_losses", None)
    with pytest.raises(InputError, match=r"(?s)float16, where rounding eats.*load the model in float32.*grad_dot"):
        oracle.label(lm, make_token_texts(3, seed=2), {"t": make_token_texts(3, seed=5)}, method="two_forward")


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "mixtral"])
def test_forward_mode_takes_bfloat16_and_is_about_as_good_as_a_backward_pass(kind, make_module, make_token_texts):
    module, fine = make_module(kind).bfloat16(), make_module(kind).bfloat16().float()
    rows, targets = make_token_texts(12, seed=2), {"t": make_token_texts(6, seed=5)}
    expected = oracle.label(oracle.LanguageModel(fine, max_tokens=64), rows, targets, method="grad_dot", halves=False)
    lm = oracle.LanguageModel(module, max_tokens=64)
    labels = oracle.label(lm, rows, targets, method="two_forward", halves=False, tolerance=0)
    assert _error(labels.values, expected.values) < 0.1


def test_rounding_inside_a_float32_model_is_noticed(make_lm, make_token_texts, targets):
    lm = make_lm("llama")
    lm.module.forward = torch.autocast("cpu", dtype=torch.bfloat16)(lm.module.forward)
    with pytest.raises(InputError, match=r"(?s)'several' itself are off.*autocast"):
        oracle.label(lm, make_token_texts(3, seed=2), targets, method="two_forward")


@pytest.mark.parametrize("step", [0.03, 1e-9])
def test_a_step_that_is_too_large_or_too_small_is_refused(step, make_lm, make_token_texts, targets):
    lm, sample = make_lm("neox"), make_token_texts(8, seed=2)
    with pytest.raises(InputError, match=r"(?s)off by too much.*leave relative_step out"):
        oracle.label(lm, sample, targets, method="two_forward", relative_step=step, tolerance=np.inf)


@pytest.mark.parametrize("step", [0.0, -1e-4, float("nan")])
def test_a_step_is_a_positive_number(step):
    with pytest.raises(InputError, match="relative_step"):
        TwoForward(relative_step=step)


def test_kinks_are_noticed_on_the_sample_and_gone_in_forward_mode_or_in_float64(make_lm, make_token_texts, targets):
    sample, options = make_token_texts(20, seed=2), {"preconditioner": "none"}
    with pytest.warns(InexactDifferencesWarning, match=r"(?s)on texts of the sample.*ReLU.*float64"):
        found = oracle.label(make_lm("opt"), sample, targets, method="two_forward", tolerance=np.inf, **options)
    assert found.meta["facts"]["rehearsal_relative_error"] > TOLERANCE
    for lm in (make_lm("opt"), make_lm("opt", dtype=torch.float64)):
        labels, expected = _both(lm, sample, targets, **options)
        assert _error(labels.values, expected.values) < FLOAT32_ERROR


def test_texts_whose_targets_were_cut_off_are_no_check(make_lm, make_token_texts, targets):
    """They are the longest ones, and come first."""
    lm = make_lm("opt")
    cut = [{"input_ids": [*range(3, 72), i], "labels": [-100] * 69 + [5]} for i in range(3, 6)]
    rest = [{**row, "labels": row["input_ids"]} for row in make_token_texts(20, seed=2)]
    options = {"preconditioner": "none", "tolerance": np.inf}
    with pytest.warns(InexactDifferencesWarning, match="on texts of the sample"):
        labels = oracle.label(lm, [*rest, *cut], targets, method="two_forward", block_size=3, **options)
    assert not labels.values[-3:].any()
    alone = oracle.label(lm, cut, targets, method="two_forward", **options)
    assert alone.meta["facts"]["rehearsal_relative_error"] == 0


def test_passes_that_do_not_feel_the_weights_are_noticed(make_lm, make_token_texts, targets, monkeypatch):
    lm, seen = make_lm("neox"), {}
    original = lm.token_losses

    def stale(batch, **options):
        if torch.is_grad_enabled():
            return original(batch, **options)
        return seen.setdefault(batch.input_ids.shape, original(batch, **options))

    monkeypatch.setattr(lm, "token_losses", stale)
    with pytest.raises(InputError, match="off by too much"):
        oracle.label(lm, make_token_texts(3, seed=2), targets, method="two_forward")


def test_noise_that_cancels_in_the_sum_is_noticed(make_lm, make_token_texts, monkeypatch):
    lm, calls = make_lm("neox"), []
    columns = prepare_targets(lm, read_targets({"t": make_token_texts(4, seed=5)}, max_texts=None, seed=0), halves=False)
    directions = prepare_directions(lm, columns).tensors
    CentralDifference(lm, directions, reduction="sum").add_step(columns.batches[0], name="t")
    original = lm.token_losses

    def noisy(batch, **options):
        losses, mask = original(batch, **options)
        if not torch.is_grad_enabled():
            calls.append(batch)
            losses[:, 0] += 1e-2 * (-1) ** (torch.arange(len(losses)) + len(calls))
        return losses, mask

    monkeypatch.setattr(lm, "token_losses", noisy)
    with pytest.raises(InputError, match="'t' itself are off"):
        CentralDifference(lm, directions, reduction="sum").add_step(columns.batches[0], name="t")


def test_a_step_over_which_the_loss_bends_is_made_smaller(make_lm, make_token_texts, targets, monkeypatch):
    lm, sample = make_lm("neox"), make_token_texts(8, seed=2)
    usual = oracle.label(lm, sample, targets, method="two_forward", tolerance=np.inf)
    monkeypatch.setattr(central_difference, "LARGEST_FACTOR", 2**4 * central_difference.LARGEST_FACTOR)
    again = oracle.label(lm, sample, targets, method="two_forward", tolerance=np.inf)
    assert again.values.tobytes() == usual.values.tobytes()
    assert again.meta["cost"]["prepare_flops"] > usual.meta["cost"]["prepare_flops"]


@pytest.mark.filterwarnings("ignore::oracle.gradients.central_difference.InexactDifferencesWarning")
def test_the_step_along_a_very_flat_loss_is_halved_further_before_it_is_refused(make_module, make_token_texts, monkeypatch):
    module = make_module("gpt2")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.03)
    lm, sample, target = oracle.LanguageModel(module, max_tokens=64), make_token_texts(8, seed=2), make_token_texts(6, seed=20)
    labels, expected = _both(lm, sample, {"t": target}, tolerance=np.inf)
    assert _error(labels.values, expected.values) < 2 * TOLERANCE
    monkeypatch.setattr(central_difference, "MAX_HALVINGS", 8)
    with pytest.raises(InputError, match=r"(?s)'t' itself are off.*pass a relative_step smaller than these"):
        oracle.label(lm, sample, {"t": target}, method="two_forward", tolerance=np.inf)


def test_a_target_without_a_slope_is_refused_by_name(make_module, make_token_texts, targets):
    module = make_module("llama").requires_grad_(False)
    module.unused = torch.nn.Parameter(torch.ones(3))

    def depends_in_vain(module, args, output):
        output.logits = output.logits + 0 * module.unused.sum()

    module.register_forward_hook(depends_in_vain)
    lm = oracle.LanguageModel(module, max_tokens=64)
    with pytest.raises(InputError, match="'several' is flat"):
        oracle.label(lm, make_token_texts(3, seed=2), targets, method="two_forward")


# ---------------------------------------------------------------------- forward mode


def test_differences_that_are_good_enough_are_kept(make_module):
    """So the labels are those of differences alone, bit for bit."""
    lm = _trained(make_module("neox"))
    sample, targets = _chains(40, seed=5), {"same": _chains(6, seed=7)}
    labels, expected = _both(lm, sample, targets, halves=False, tolerance=1e-3)
    alone = oracle.label(lm, sample, targets, method="two_forward", halves=False, tolerance=np.inf)
    assert not labels.meta["facts"]["forward_mode"]
    assert labels.values.tobytes() == alone.values.tobytes()
    assert 0 < _error(labels.values, expected.values) < 1e-3
    error = labels.meta["facts"]["rehearsal_relative_error"]
    for factor, is_exact in ((1.9, True), (2.1, False)):
        labels = oracle.label(lm, sample, targets, method="two_forward", halves=False, tolerance=factor * error)
        assert labels.meta["facts"]["forward_mode"] == is_exact


def test_without_differences_no_step_is_chosen(make_lm, make_token_texts, targets):
    lm = make_lm("opt")
    labels, expected = _both(lm, make_token_texts(8, seed=2), targets, tolerance=0)
    assert _error(labels.values, expected.values) < 1e-6
    facts = labels.meta["facts"]
    assert facts["forward_mode"] and facts["relative_steps"] == [] and facts["rehearsal_relative_error"] is None


def test_a_model_without_a_forward_mode_is_measured_by_differences(make_lm, make_token_texts, targets, monkeypatch):
    lm, sample = make_lm("neox"), make_token_texts(8, seed=2)
    usual = oracle.label(lm, sample, targets, method="two_forward", tolerance=np.inf)

    class NoTangent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs):
            return inputs.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    lm.module.gpt_neox.final_layer_norm.register_forward_hook(lambda module, args, output: NoTangent.apply(output))
    with pytest.raises(NoForwardModeError):
        columns = prepare_targets(lm, read_targets(targets))
        ForwardMode(lm, prepare_directions(lm, columns).tensors).measure(columns.batches[0], 0)
    labels = oracle.label(lm, sample, targets, method="two_forward")
    assert labels.values.tobytes() == usual.values.tobytes()
    assert not labels.meta["facts"]["forward_mode"]
    assert labels.meta["facts"]["rehearsal_relative_error"] == usual.meta["facts"]["rehearsal_relative_error"] > 0
    with pytest.raises(InputError, match=r"(?s)tolerance=0.*cannot be measured in forward mode.*tolerance=inf"):
        oracle.label(lm, sample, targets, method="two_forward", tolerance=0)


@pytest.mark.parametrize("tolerance", [1e-4, 0])
def test_a_model_that_loses_tangents_without_a_word_is_found_out(tolerance, make_lm, make_token_texts, targets):
    """Custom operators pass no tangent on; those of the residual path survive."""

    @torch.library.custom_op(f"tests::lossy_{'always' if tolerance == 0 else 'by_choice'}", mutates_args=())
    def lossy(inputs: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(inputs)

    def backward(context, gradient):
        (inputs,) = context.saved_tensors
        with torch.enable_grad():
            inputs = inputs.detach().requires_grad_()
            return torch.autograd.grad(torch.nn.functional.gelu(inputs), inputs, gradient)[0]

    lossy.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    lm, sample = make_lm("neox"), make_token_texts(8, seed=2)
    for layer in lm.module.gpt_neox.layers:
        layer.mlp.act.forward = lossy
    if tolerance == 0:
        with pytest.raises(InputError, match=r"(?s)miss those of an ordinary gradient by.*tolerance=inf"):
            oracle.label(lm, sample, targets, method="two_forward", tolerance=0)
        return
    labels, expected = _both(lm, sample, targets)
    assert _error(labels.values, expected.values) < DIFFERENCES_ERROR
    assert not labels.meta["facts"]["forward_mode"]


def test_what_an_ordinary_gradient_holds_is_no_reason_to_refuse(make_lm, make_token_texts, targets):
    """As the norms of DoRA, which differences feel and gradients do not."""
    lm, sample = make_lm("neox"), make_token_texts(8, seed=2)
    lm.module.gpt_neox.final_layer_norm.register_forward_hook(lambda module, args, output: output * output.detach())
    with pytest.raises(InputError, match="off by too much"):
        oracle.label(lm, sample, targets, method="two_forward", tolerance=np.inf)
    labels, expected = _both(lm, sample, targets)
    assert _error(labels.values, expected.values) < 1e-6


def test_too_little_memory_for_forward_mode_leaves_differences(make_lm, make_token_texts, targets, monkeypatch):
    lm, sample = make_lm("neox"), make_token_texts(20, seed=2)
    original = ForwardMode.measure

    def fails_on_the_sample(forward, batch, index):
        if len(batch.positions) > 1:  # of targets
            return original(forward, batch, index)
        raise torch.OutOfMemoryError

    columns = prepare_targets(lm, read_targets({"several": targets["several"]}), halves=False)
    assert all(len(batch.positions) > 1 for batch in columns.batches)
    few = {"several": targets["several"]}
    usual = oracle.label(lm, sample, few, method="two_forward", tolerance=np.inf, halves=False)
    monkeypatch.setattr(ForwardMode, "measure", fails_on_the_sample)
    labels = oracle.label(lm, sample, few, method="two_forward", halves=False)
    assert labels.values.tobytes() == usual.values.tobytes()
    assert not labels.meta["facts"]["forward_mode"]


def test_a_folder_keeps_to_the_way_that_was_chosen_first(make_lm, make_token_texts, targets, tmp_path, monkeypatch):
    lm, rows = make_lm("neox"), sorted(make_token_texts(40, seed=2), key=lambda row: -len(row["input_ids"]))
    settings = {"method": "two_forward", "block_size": 3}
    for is_exact in (True, False):
        choice = {"forward_mode": is_exact, "error": 1e-3}
        monkeypatch.setattr(TwoForward, "rehearse", lambda method, encoded, choice=choice: choice)
        usual = oracle.label(lm, rows, targets, **settings)
        first = oracle.label(lm, rows[:3], targets, workdir=tmp_path / str(is_exact), **settings)
        monkeypatch.setattr(TwoForward, "rehearse", lambda method, encoded: pytest.fail("it was chosen before"))
        again = oracle.label(lm, rows[::-1], targets, workdir=tmp_path / str(is_exact), **settings).take(usual.text_ids)
        assert again.values.tobytes() == usual.values.tobytes()
        assert again.meta["facts"]["forward_mode"] == first.meta["facts"]["forward_mode"] == is_exact


def test_values_that_only_one_way_has_decide():
    nan, values = np.array([[1.0, np.nan], [2.0, 3.0]]), np.array([[1.0, 2.0], [2.0, 3.0]])
    assert _largest_error(nan, values) == np.inf and _largest_error(values, nan) == 0
    assert _largest_error(values, 0 * values) == np.inf and _largest_error(0 * values, 0 * values) == 0
    gone = np.full((1, 2), np.nan)
    assert _largest_error(np.concatenate([values, gone]), np.concatenate([1.1 * values, gone])) == pytest.approx(0.1 / 1.1)


def test_fewer_texts_are_rehearsed_than_measured(make_lm, make_token_texts, targets, monkeypatch):
    lm, seen = make_lm("neox"), []
    rehearse = TwoForward.rehearse
    monkeypatch.setattr(TwoForward, "rehearse", lambda method, encoded: seen.append(encoded) or rehearse(method, encoded))
    oracle.label(lm, make_token_texts(40, seed=2), targets, method="two_forward")
    lengths = [len(text.input_ids) for text in seen[0]]
    assert len(lengths) == 16 and lengths == sorted(lengths, reverse=True)
    assert lengths[0] == max(len(row["input_ids"]) for row in make_token_texts(40, seed=2))


# ---------------------------------------------------------------------- state and cost


def test_weights_come_back_bit_for_bit_also_from_the_middle_of_a_pass(make_lm, make_token_texts, targets):
    lm = make_lm("gpt2")
    columns = prepare_targets(lm, read_targets(targets, max_texts=None, seed=0))
    differences = CentralDifference(lm, prepare_directions(lm, columns).tensors)
    before = lm.fingerprint()
    for batch in columns.batches:
        differences.add_step(batch, name="target")
    assert lm.fingerprint() == before
    sample = lm.encode(make_token_texts(8, seed=2))
    products, _ = differences.measure(sample)
    assert lm.fingerprint() == before
    moved = []

    def fails_in_the_third_pass(module, args, kwargs):
        moved.append(lm.fingerprint())
        if len(moved) == 3:
            raise RuntimeError("out of memory")

    with (
        lm.module.register_forward_pre_hook(fails_in_the_third_pass, with_kwargs=True),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        differences.measure(sample)
    assert len({before, *moved}) == 4
    assert lm.fingerprint() == before
    np.testing.assert_array_equal(differences.measure(sample)[0], products)


@pytest.mark.parametrize(("kind", "extra"), [("gpt2", 0), ("mixtral", 1)])
@pytest.mark.parametrize("halves", [False, True])
def test_counted_flops_are_those_of_the_passes_made(kind, extra, halves, make_lm, make_token_texts):
    lm = make_lm(kind)
    columns = prepare_targets(lm, read_targets({"t": make_token_texts(6, seed=5)}, max_texts=None, seed=0), halves=halves)
    first, second = lm.encode(make_token_texts(8, seed=2)), lm.encode(make_token_texts(1, seed=3))
    method, seen = TwoForward(), []
    with lm.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    ):
        method.prepare(lm, columns)
        method.measure(first)
        seen.clear()
        method.measure(second)
    num_tokens = len(second[0].input_ids)
    assert len(seen) == (4 if halves else 2) + extra
    assert method.flops(num_tokens, columns) == sum(seen) * lm.forward_flops_per_token
    method.choose({"forward_mode": True, "error": 1.0})
    assert method.flops(num_tokens, columns) == (6 if halves else 3) * num_tokens * lm.forward_flops_per_token


def test_one_direction_costs_two_thirds_of_grad_dot(make_lm, make_token_texts):
    lm, sample, targets = make_lm("neox"), make_token_texts(8, seed=2), {"t": make_token_texts(6, seed=5)}
    labels, expected = _both(lm, sample, targets, halves=False, tolerance=np.inf)
    assert labels.meta["cost"]["label_flops"] == pytest.approx(expected.meta["cost"]["label_flops"] * 2 / 3)
    assert labels.meta["cost"]["prepare_flops"] > expected.meta["cost"]["prepare_flops"]
    whole = oracle.label(lm, sample, targets, method="two_forward", tolerance=np.inf)
    assert whole.meta["cost"]["label_flops"] == 2 * labels.meta["cost"]["label_flops"]
    exact = oracle.label(lm, sample, targets, method="two_forward", halves=False, tolerance=1e-6)
    assert exact.meta["cost"]["label_flops"] == expected.meta["cost"]["label_flops"]
    assert exact.meta["cost"]["prepare_flops"] > labels.meta["cost"]["prepare_flops"]
