"""`less` against torch's own Adam step in float64, its projection against the exact angle."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import oracle
from oracle.errors import InputError
from oracle.gradients.projections import RademacherProjection
from oracle.measure import UnlabelableTextWarning

OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {}),
    "adam with decay": (torch.optim.Adam, {"weight_decay": 0.3}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "other betas": (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-3}),
    "uphill": (torch.optim.AdamW, {"maximize": True}),
}


@pytest.fixture
def targets(make_token_texts):
    return {"several": make_token_texts(5, seed=11), "single": make_token_texts(1, seed=13)}


def _train(module, rows, optimizer):
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        module(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _lm(make_module, make_token_texts, *, kind="gpt2", optimizer="adamw"):
    module = make_module(kind)
    build, options = OPTIMIZERS[optimizer]
    trained = build([p for p in module.parameters() if p.requires_grad], lr=1e-3, **options)
    _train(module, make_token_texts(6, seed=0), trained)
    for slots in trained.state.values():
        if "max_exp_avg_sq" in slots:
            slots["max_exp_avg_sq"] *= 2  # as after a phase of larger gradients
    return oracle.LanguageModel(module, optimizer=trained, max_tokens=64)


def _real_updates(lm, sample, *, reduction="mean"):
    """Let torch's own optimiser step on each text in float64 with a learning rate of 1 and see where the weights went."""
    found = []
    for row in sample:
        module = copy.deepcopy(lm.module).double()
        pairs = list(zip(lm.module.parameters(), module.parameters(), strict=True))
        options = {key: value for key, value in lm.optimizer.param_groups[0].items() if key != "params"}
        decoupled = options.pop("decoupled_weight_decay", False)
        options |= {"lr": 1.0, **({"weight_decay": 0.0} if decoupled else {})}
        optimizer = torch.optim.Adam([new for old, new in pairs if old.requires_grad], **options)
        for old, new in pairs:
            if old.requires_grad:
                slots = lm.optimizer.state[old]
                optimizer.state[new] = {key: value.double() if value.dim() else value.clone() for key, value in slots.items()}
        before = [new.detach().clone() for old, new in pairs if old.requires_grad]
        ids = torch.tensor([row["input_ids"]])
        loss = module(input_ids=ids, labels=ids).loss
        (loss * (ids.shape[1] - 1) if reduction == "sum" else loss).backward()
        optimizer.step()
        after = [new.detach() for old, new in pairs if old.requires_grad]
        found.append(torch.cat([(a - b).flatten() for a, b in zip(before, after, strict=True)]))
    return torch.stack(found)


def _target_gradients(lm, targets):
    module, found = copy.deepcopy(lm.module).double(), []
    for rows in targets.values():
        total, count = 0.0, 0
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            total += module(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        gradients = torch.autograd.grad(total / count, [p for p in module.parameters() if p.requires_grad])
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(found)


def _close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_update_is_the_step_that_torchs_own_adam_takes(optimizer, make_module, make_token_texts, targets):
    lm, sample = _lm(make_module, make_token_texts, optimizer=optimizer), make_token_texts(5, seed=2)
    updates, goals = _real_updates(lm, sample), _target_gradients(lm, targets)
    dot = oracle.label(lm, sample, targets, method="less", similarity="dot")
    _close(dot.values, (updates @ goals.T).numpy())
    _close(dot.columns["update_norm"], updates.norm(dim=1).numpy())
    cosine = oracle.label(lm, sample, targets, method="less")
    _close(cosine.values, (nn.functional.normalize(updates) @ nn.functional.normalize(goals).T).numpy())
    assert cosine.units == "cosine" and dot.units.endswith("per unit of learning rate")


def test_another_architecture_and_a_summed_loss(make_module, make_token_texts, targets):
    lm, sample = _lm(make_module, make_token_texts, kind="llama"), make_token_texts(4, seed=2)
    for reduction in ("mean", "sum"):
        labels = oracle.label(lm, sample, targets, method="less", similarity="dot", text_loss=reduction)
        _close(labels.values, (_real_updates(lm, sample, reduction=reduction) @ _target_gradients(lm, targets).T).numpy())


def test_adam_one_step_over_its_learning_rate_tends_to_the_dot_product(make_module, make_token_texts, targets):
    errors = []
    for rate in (1e-4, 1e-5):
        module = make_module("gpt2").double()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.0)
        _train(module, make_token_texts(6, seed=0), optimizer)
        optimizer.param_groups[0]["lr"] = rate
        lm, sample = oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64), make_token_texts(5, seed=2)
        step = oracle.label(lm, sample, targets, method="one_step")
        slope = oracle.label(lm, sample, targets, method="less", similarity="dot")
        errors.append(np.abs(step.values / rate - slope.values).max() / np.abs(slope.values).max())
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 4


def test_halves_are_the_angles_with_either_half(make_module, make_token_texts):
    lm, sample, rows = _lm(make_module, make_token_texts), make_token_texts(4, seed=2), make_token_texts(2, seed=11)
    labels = oracle.label(lm, sample, {"pair": rows}, method="less")
    alone = [oracle.label(lm, sample, {"one": [row]}, method="less").values[:, 0] for row in rows]
    found = sorted(labels.halves[:, :, 0].tolist())
    np.testing.assert_allclose(found, sorted(half.tolist() for half in alone), atol=1e-6)


def test_without_momentum_only_the_texts_own_part_is_left(make_module, make_token_texts, targets):
    lm = _lm(make_module, make_token_texts)
    nothing = [{"input_ids": [5]}, {"input_ids": [5, 6, 7]}]
    with pytest.warns(UnlabelableTextWarning):
        with_momentum = oracle.label(lm, nothing, targets, method="less")
        without = oracle.label(lm, nothing, targets, method="less", include_momentum=False)
    names = [name for name, p in lm.module.named_parameters() if p.requires_grad]
    parameters = dict(lm.module.named_parameters())
    momentum = torch.cat(
        [
            (0.9 * s["exp_avg"].double() / ((0.999 * s["exp_avg_sq"].double() / (1 - 0.999**7)).sqrt() + 1e-8)).flatten()
            for s in (lm.optimizer.state[parameters[name]] for name in names)
        ]
    )
    goals = nn.functional.normalize(_target_gradients(lm, targets))
    _close(with_momentum.values[0], (goals @ nn.functional.normalize(momentum, dim=0)).numpy())
    np.testing.assert_allclose(with_momentum.meta["facts"]["shared_part"], with_momentum.values[0], atol=1e-6)
    assert (without.values[0] == 0).all() and (without.values[1] != 0).all()
    assert without.meta["facts"]["shared_part"] == [0.0, 0.0]


class LowRank(nn.Module):
    """A frozen layer plus a trainable product of two thin matrices."""

    def __init__(self, base: nn.Module, *, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base = base
        self.A = nn.Parameter(torch.randn(3, base.in_features, generator=generator) * 0.1)
        self.B = nn.Parameter(torch.randn(base.out_features, 3, generator=generator) * 0.1)

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


def test_adapters_on_frozen_weights_give_the_adapters_angles(make_module, make_token_texts, targets):
    module = make_module("llama").requires_grad_(False)
    for number, layer in enumerate(module.model.layers):
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj, seed=number)
        layer.mlp.up_proj = LowRank(layer.mlp.up_proj, seed=10 + number)
    lm = _lm(lambda kind: module, make_token_texts, kind="llama")
    sample = make_token_texts(4, seed=2)
    labels = oracle.label(lm, sample, targets, method="less")
    updates, goals = _real_updates(lm, sample), _target_gradients(lm, targets)
    num_adapted = sum(p.numel() for name, p in module.named_parameters() if name.endswith((".A", ".B")))
    assert updates.shape[1] == labels.meta["facts"]["covered_parameters"] == num_adapted
    _close(labels.values, (nn.functional.normalize(updates) @ nn.functional.normalize(goals).T).numpy())


def test_the_projected_angle_tends_to_the_exact_one_as_dimensions_grow(make_module, make_token_texts, targets):
    lm, sample = _lm(make_module, make_token_texts), make_token_texts(4, seed=2)
    exact = oracle.label(lm, sample, targets, method="less")
    errors = {}
    for dim in (64, 1024):
        labels = [oracle.label(lm, sample, targets, method="less", projection_dim=dim, projection_seed=seed) for seed in range(2)]
        assert not np.allclose(labels[0].values, labels[1].values, atol=1e-6)
        errors[dim] = np.sqrt(np.mean([(found.values - exact.values) ** 2 for found in labels]))
    assert errors[64] < 3 * 64**-0.5
    assert errors[1024] < 1.5 * 1024**-0.5 < errors[64]
    many = oracle.label(lm, sample, targets, method="less", projection_dim=1024, similarity="dot")
    product = oracle.label(lm, sample, targets, method="less", similarity="dot")
    assert np.corrcoef(many.values.ravel(), product.values.ravel())[0, 1] > 0.9


def test_both_sides_go_through_the_same_projection(make_module, make_token_texts, targets, monkeypatch):
    """A text's update and a target's gradient are projected by the same signs, so equal vectors stay equal."""
    lm, seen = _lm(make_module, make_token_texts), []
    original = RademacherProjection.project

    def notes(self, name, vectors, *, shape):
        seen.append((self, name, tuple(shape)))
        return original(self, name, vectors, shape=shape)

    monkeypatch.setattr(RademacherProjection, "project", notes)
    oracle.label(lm, make_token_texts(2, seed=2), targets, method="less", projection_dim=16)
    num_parts, num_parameters = 3, len(list(lm.module.parameters()))
    passes = num_parts + 1 + 2  # of the target parts, of the momentum alone, of two texts
    assert len(seen) == passes * num_parameters
    assert {seen.count(call) for call in seen} == {passes}


@pytest.mark.parametrize("optimizer", [None, "sgd", "fresh", "partly"])
def test_what_lacks_adams_state_is_refused(optimizer, make_module, make_token_texts, make_adamw, targets):
    module = make_module("gpt2")
    made = {
        None: lambda: None,
        "sgd": lambda: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
        "fresh": lambda: torch.optim.AdamW(module.parameters(), lr=0.1),
        "partly": lambda: make_adamw(module, make_token_texts(4, seed=0)),
    }[optimizer]()
    if optimizer == "partly":
        del made.state[next(module.parameters())]
    lm = oracle.LanguageModel(module, optimizer=made, max_tokens=64)
    with pytest.raises(InputError, match="Adam's own step" if optimizer in (None, "sgd") else "no Adam state") as raised:
        oracle.label(lm, make_token_texts(2, seed=2), targets, method="less")
    assert raised.value.accepted and "grad_dot" in raised.value.remedy


def test_options_without_effect_are_refused(make_module, make_token_texts, targets):
    lm = _lm(make_module, make_token_texts)
    with pytest.raises(InputError, match="projection_seed=3 has no effect"):
        oracle.label(lm, make_token_texts(2, seed=2), targets, method="less", projection_seed=3)
    with pytest.raises(InputError, match="projection_dim=0"):
        oracle.label(lm, make_token_texts(2, seed=2), targets, method="less", projection_dim=0)
