"""Each method against its definition: plain loops, limits and signs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from oracle.errors import InputError
from oracle.gradients.general_rule import UncoveredModuleError
from oracle.gradients.products import GradientProducts
from oracle.gradients.text_products import SlowRouteWarning
from oracle.targets import read_targets, split_halves


def _lm(make_module, kind="llama", optimizer=None, **options):
    return oracle.LanguageModel(make_module(kind, **options), optimizer=optimizer, max_tokens=64)


@pytest.fixture
def targets(make_token_texts):
    return {"first": make_token_texts(5, seed=11), "second": make_token_texts(4, seed=12), "single": make_token_texts(1, seed=13)}


def _target_loss(lm, rows):
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        total += lm.module(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def _share_of_first_half(rows):
    """The share of a target set's tokens that are in its first half."""
    (target,) = read_targets({"t": rows}, max_texts=None, seed=0)
    tokens = np.array([len(ids) - 1 for ids in target.texts["input_ids"]])
    return tokens[split_halves(target, seed=0)].sum() / tokens.sum()


def test_grad_dot_equals_the_product_of_two_ordinary_gradients(make_module, make_token_texts, targets):
    lm, sample = _lm(make_module), make_token_texts(9, seed=2)
    labels = oracle.label(lm, sample, targets, method="grad_dot")
    parameters = list(lm.module.parameters())
    for column, rows in enumerate(targets.values()):
        goal = torch.autograd.grad(_target_loss(lm, rows), parameters)
        expected = []
        for row in sample:
            ids = torch.tensor([row["input_ids"]])
            own = torch.autograd.grad(lm.module(input_ids=ids, labels=ids).loss, parameters)
            expected.append(sum((a.double() * b.double()).sum() for a, b in zip(own, goal, strict=True)))
        expected = np.array(expected)
        assert np.abs(labels.values[:, column] - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_sgd_one_step_over_its_learning_rate_tends_to_grad_dot(kind, max_grad_norm, make_module, make_token_texts, targets):
    errors = []
    for rate in (1e-2, 1e-3):
        module = make_module(kind).double()
        lm = oracle.LanguageModel(module, optimizer=torch.optim.SGD(module.parameters(), lr=rate), max_tokens=64)
        sample = make_token_texts(6, seed=2)
        step = oracle.label(lm, sample, targets, method="one_step", max_grad_norm=max_grad_norm)
        slope = oracle.label(lm, sample, targets, method="grad_dot", max_grad_norm=max_grad_norm)
        errors.append(np.abs(step.values - slope.values).max() / np.abs(slope.values).max())
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 4  # the gap shrinks with the step


def test_adam_grad_dot_is_the_part_of_a_small_adam_step_that_is_linear_in_the_text(make_module, make_token_texts, make_adamw):
    module = make_module("gpt2").double()  # Llama norms go through float32, too coarse for steps this small
    optimizer = make_adamw(module, make_token_texts(8, seed=4), num_steps=8, lr=1e-6)
    for slots in optimizer.state.values():
        slots["exp_avg_sq"].add_(1.0)  # moments so large that one text does not change them
    lm = oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64)
    sample, targets = make_token_texts(12, seed=2), {"t": make_token_texts(6, seed=5)}
    step = oracle.label(lm, sample, targets, method="one_step", subtract_shared=True)
    slope = oracle.label(lm, sample, targets, method="grad_dot")
    assert slope.meta["facts"]["preconditioner_used"] == "adam"
    assert slope.units == step.units == "nats per target token"
    np.testing.assert_allclose(slope.values, step.values, rtol=0.02, atol=0.02 * np.abs(step.values).max())


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "dampening": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "sgd_maximize": (torch.optim.SGD, {"maximize": True}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "adamw_maximize": (torch.optim.AdamW, {"maximize": True}),
    "radam": (torch.optim.RAdam, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
}


@pytest.mark.parametrize("preconditioner", ["auto", "none"])
@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_values_in_nats_are_what_a_small_step_does(name, num_steps, preconditioner, make_module, make_token_texts):
    module = make_module("gpt2").double()
    kind, options = OPTIMIZERS[name]
    optimizer = kind(module.parameters(), lr=1e-6, **options)
    for row in make_token_texts(num_steps, seed=4):
        ids = torch.tensor([row["input_ids"]])
        module(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for slots in optimizer.state.values():
        for scale, slot in ((1.0, "exp_avg_sq"), (3.0, "max_exp_avg_sq")):
            if slot in slots:
                slots[slot].add_(scale)  # moments so large that one text does not change them
    lm = oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64)
    sample, targets = make_token_texts(8, seed=2), {"t": make_token_texts(6, seed=5)}
    slope = oracle.label(lm, sample, targets, method="grad_dot", preconditioner=preconditioner)
    step = oracle.label(lm, sample, targets, method="one_step", subtract_shared=num_steps > 0)
    is_adam = name in ("adam", "adamw", "amsgrad", "adamw_maximize")
    is_known = (is_adam and num_steps > 0 and preconditioner == "auto") or kind is torch.optim.SGD
    assert slope.units == "nats per target token" + ("" if is_known else " per unit of learning rate")
    if is_known:
        np.testing.assert_allclose(slope.values, step.values, rtol=0.02, atol=0.02 * np.abs(step.values).max())
    else:
        assert np.corrcoef(slope.values[:, 0], step.values[:, 0])[0, 1] > 0.3  # the sign is right in any case


def test_no_nats_are_claimed_where_parameters_step_differently(make_module, make_token_texts):
    module = make_module("gpt2")
    first, *others = module.parameters()
    sample, targets = make_token_texts(3, seed=2), {"t": make_token_texts(3, seed=5)}
    groups = [
        [{"params": [first], "lr": 1e-3}, {"params": others, "lr": 1e-2}],
        [{"params": others, "lr": 1e-2}],  # the first parameter does not step at all
    ]
    for own in groups:
        lm = oracle.LanguageModel(module, optimizer=torch.optim.SGD(own), max_tokens=64)
        assert oracle.label(lm, sample, targets, method="grad_dot").units.endswith("per unit of learning rate")


def test_a_frozen_parameter_without_adam_state_is_no_obstacle(make_module, make_token_texts, make_adamw):
    module = make_module("gpt2")
    optimizer = make_adamw(module, make_token_texts(4, seed=0))
    first = next(module.parameters())
    first.requires_grad_(False)
    optimizer.state[first] = {}
    lm = oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64)
    labels = oracle.label(lm, make_token_texts(3, seed=2), {"t": make_token_texts(3, seed=5)}, method="grad_dot")
    assert labels.meta["facts"]["preconditioner_used"] == "adam"
    assert labels.units == "nats per target token"


def test_a_batch_that_a_rule_refuses_goes_the_plain_way(make_module, make_token_texts, targets, monkeypatch):
    lm, sample = _lm(make_module), make_token_texts(40, seed=2)
    monkeypatch.setattr(oracle.LanguageModel, "default_batch_tokens", 200)
    expected = oracle.label(lm, sample, targets, method="grad_dot")
    measure, calls = GradientProducts.__call__, []

    def refuses_the_fourth(engine, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise UncoveredModuleError("seen only now")
        return measure(engine, batch)

    monkeypatch.setattr(GradientProducts, "__call__", refuses_the_fourth)
    with pytest.warns(SlowRouteWarning, match="seen only now"):
        labels = oracle.label(lm, sample, targets, method="grad_dot")
    assert len(calls) > 4
    assert "seen only now" in labels.meta["facts"]["route"]
    np.testing.assert_allclose(labels.values, expected.values, rtol=1e-3, atol=1e-5 * np.abs(expected.values).max())


@pytest.mark.parametrize(
    "kind",
    [
        "opt",
        "gemma",
        "gemma2",
        "gemma3",
        "phi",
        "cohere",
        "mistral",
        "qwen2",
        "mixtral",
        "qwen2_moe",
        "gpt_oss",
        "llama4",
        "mamba",
    ],
)
def test_common_architectures_take_the_batched_way(kind, make_module, make_token_texts, targets):
    labels = oracle.label(_lm(make_module, kind), make_token_texts(6, seed=2), targets, method="grad_dot")
    assert labels.meta["facts"]["route"] == "batched"
    assert labels.meta["facts"]["self_check_relative_error"] < 1e-4


def test_without_adam_state_auto_is_the_plain_product(make_module, make_token_texts):
    module = make_module("llama")
    lm = oracle.LanguageModel(module, optimizer=torch.optim.AdamW(module.parameters(), lr=1e-3), max_tokens=64)
    labels = oracle.label(lm, make_token_texts(3, seed=2), {"t": make_token_texts(3, seed=5)}, method="grad_dot")
    assert labels.meta["facts"]["preconditioner_used"] == "none"


def test_positive_means_that_training_on_the_text_lowers_the_loss(make_module, make_token_texts):
    rows = make_token_texts(3, seed=7)
    module = make_module("neox")
    lm = oracle.LanguageModel(module, optimizer=torch.optim.SGD(module.parameters(), lr=0.05), max_tokens=64)
    for method in ("one_step", "grad_dot"):
        labels = oracle.label(lm, rows, {"itself": rows}, method=method)
        assert (labels.values > 0).all(), method
    step = oracle.label(lm, rows, {"itself": rows}, method="one_step")
    before = np.array(step.meta["facts"]["before"])
    np.testing.assert_allclose(step.values[:, 0], before - step.columns["after.itself"], atol=1e-6)


def test_one_step_does_what_a_real_training_step_does(make_module, make_token_texts, make_adamw):
    rows, targets = make_token_texts(3, seed=7), {"t": make_token_texts(6, seed=8)}
    module = make_module("llama")
    lm = oracle.LanguageModel(module, optimizer=make_adamw(module, make_token_texts(4, seed=0)), max_tokens=64)
    labels = oracle.label(lm, rows, targets, method="one_step", max_grad_norm=1.0)
    for row, value in zip(rows, labels.values[:, 0], strict=True):
        with lm.preserved():
            before = float(_target_loss(lm, targets["t"]).detach())
            ids = torch.tensor([row["input_ids"]])
            lm.optimizer.zero_grad()
            module(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            lm.optimizer.step()
            assert value == pytest.approx(before - float(_target_loss(lm, targets["t"]).detach()), abs=2e-6)


def test_the_shared_part_is_the_effect_of_a_step_without_gradient(make_module, make_token_texts, make_adamw):
    rows, targets = make_token_texts(3, seed=7), {"t": make_token_texts(6, seed=8)}
    module = make_module("llama")
    lm = oracle.LanguageModel(module, optimizer=make_adamw(module, make_token_texts(4, seed=0)), max_tokens=64)
    whole = oracle.label(lm, rows, targets, method="one_step")
    own = oracle.label(lm, rows, targets, method="one_step", subtract_shared=True)
    shared = whole.meta["facts"]["shared_part"][0]
    assert abs(shared) > 1e-5
    np.testing.assert_allclose(whole.values - own.values, shared, atol=1e-7)
    of_halves = whole.halves[:, :, 0] - own.halves[:, :, 0]  # (2, S)
    np.testing.assert_allclose(of_halves, np.broadcast_to(of_halves[:, :1], (2, 3)), atol=1e-7)
    assert abs(of_halves[0, 0] - of_halves[1, 0]) > 1e-6
    share = _share_of_first_half(targets["t"])
    np.testing.assert_allclose(share * of_halves[0] + (1 - share) * of_halves[1], shared, atol=1e-7)


def test_cosine_is_the_angle_and_ignores_length_of_the_gradient(make_module, make_token_texts, targets):
    lm, sample = _lm(make_module), make_token_texts(6, seed=2)
    cosine = oracle.label(lm, sample, targets, method="grad_dot", similarity="cosine")
    assert np.abs(cosine.values).max() <= 1
    same = oracle.label(lm, targets["single"], targets, method="grad_dot", similarity="cosine")
    assert same.target("single")[0] == pytest.approx(1.0, abs=1e-5)
    assert cosine.units == "cosine"


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_a_mixture_of_experts_is_labelled_as_one_backward_pass_per_text_does_it(
    similarity, make_module, make_token_texts, targets
):
    lm, sample = _lm(make_module, "mixtral"), make_token_texts(4, seed=2)
    labels = oracle.label(lm, sample, targets, method="grad_dot", similarity=similarity)
    slow = oracle.label(lm, sample, targets, method="grad_dot", similarity=similarity, per_text=True)
    assert labels.meta["facts"]["route"] == "batched" and slow.meta["facts"]["route"] == "per_text"
    np.testing.assert_allclose(labels.values, slow.values, rtol=1e-4, atol=1e-5 * np.abs(slow.values).max())


def test_a_model_that_no_rule_covers_goes_the_plain_way_and_says_so(make_module, make_token_texts, without_first_token, targets):
    lm, sample = _lm(make_module), make_token_texts(4, seed=2)
    lm.module.lm_head = without_first_token(lm.module.lm_head)
    with pytest.warns(SlowRouteWarning, match="one backward pass per text"):
        labels = oracle.label(lm, sample, targets, method="grad_dot")
    facts = labels.meta["facts"]
    assert facts["route"].startswith("per_text")
    assert facts["forced_the_slow_route"]["names"] == ["lm_head.inner.weight"]
    slow = oracle.label(lm, sample, targets, method="grad_dot", per_text=True)
    np.testing.assert_array_equal(labels.values, slow.values)


def test_halves_average_to_the_whole_by_tokens(make_module, make_token_texts):
    lm, rows = _lm(make_module), make_token_texts(6, seed=3)
    labels = oracle.label(lm, make_token_texts(5, seed=2), {"t": rows}, method="grad_dot")
    share, (first, second) = _share_of_first_half(rows), labels.halves[:, :, 0]
    assert abs(share - 0.5) > 0.02 and np.abs(first - second).max() > 1e-2 * np.abs(labels.values).max()
    largest = np.abs(labels.values).max()
    np.testing.assert_allclose(labels.values[:, 0], share * first + (1 - share) * second, rtol=0, atol=1e-5 * largest)
    single = oracle.label(lm, make_token_texts(5, seed=2), {"t": rows[:1]}, method="grad_dot")
    assert np.isnan(single.halves).all()
    assert oracle.noise_ceiling(single) == {"t": None}


def test_methods_say_what_they_lack(make_module, make_token_texts, targets):
    lm = _lm(make_module)
    with pytest.raises(InputError, match="optimiser"):
        oracle.label(lm, make_token_texts(2, seed=1), targets, method="one_step")
    with pytest.raises(InputError, match="no Adam state"):
        oracle.label(lm, make_token_texts(2, seed=1), targets, method="grad_dot", preconditioner="adam")
    with pytest.raises(InputError, match="did you mean 'grad_dot'"):
        oracle.label(lm, make_token_texts(2, seed=1), targets, method="graddot")
    with pytest.raises(InputError, match="did you mean 'similarity'"):
        oracle.label(lm, make_token_texts(2, seed=1), targets, method="grad_dot", similarty="dot")
    with pytest.raises(InputError, match="no effect"):
        oracle.label(lm, make_token_texts(2, seed=1), targets, method="grad_dot", similarity="cosine", max_grad_norm=1.0)


def test_weights_that_training_never_touched_do_not_blow_labels_up(make_module, make_token_texts, make_adamw):
    """The embedding rows of unseen tokens have second moments of exactly 0."""
    module = make_module("gpt2", tie_word_embeddings=False)
    seen = [{"input_ids": [token % 50 + 3 for token in row["input_ids"]]} for row in make_token_texts(60, seed=4)]
    optimizer = make_adamw(module, seen, num_steps=20, lr=1e-4, texts_per_step=3)
    lm = oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64)
    sample, targets = make_token_texts(30, seed=2), {"t": make_token_texts(10, seed=5)}
    unseen = module.transformer.wte.weight[150]
    assert float(optimizer.state[module.transformer.wte.weight]["exp_avg_sq"][150].abs().max()) == 0.0 and unseen.numel()
    step = oracle.label(lm, sample, targets, method="one_step", subtract_shared=True)
    slope = oracle.label(lm, sample, targets, method="grad_dot")
    assert np.abs(slope.values).max() < 10 * np.abs(step.values).max()
    assert oracle.agreement(step, slope)["t"].spearman > 0.5


@pytest.mark.parametrize("method", ["grad_dot", "one_step"])
def test_a_summed_text_loss_counts_every_target_token(method, make_module, make_token_texts, targets):
    module = make_module("llama").double()
    lm = oracle.LanguageModel(module, optimizer=torch.optim.SGD(module.parameters(), lr=1e-5), max_tokens=64)
    sample = make_token_texts(6, seed=2)
    mean, total = (oracle.label(lm, sample, targets, method=method, text_loss=reduction) for reduction in ("mean", "sum"))
    lengths = np.array([len(row["input_ids"]) - 1 for row in sample])[:, None]
    np.testing.assert_allclose(total.values, mean.values * lengths, rtol=1e-2, atol=1e-2 * np.abs(total.values).max())
