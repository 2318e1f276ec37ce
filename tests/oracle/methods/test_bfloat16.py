"""Labels of a model in bfloat16 against plain float64 loops over the same weights: how far rounding takes each method.

The bounds are about twice the largest error that each method's docstring tells, which was measured over these
architectures and three draws of texts. Errors are shares of a column's largest value.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import oracle
from oracle.comparison import spearman
from oracle.gradients.curvature import fit_factors

ARCHITECTURES = ["gpt2", "neox", "llama", "mistral", "qwen3", "mixtral"]
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # AdamW's own


class Setting:
    """A model in bfloat16, its weights in float64, and every gradient by an ordinary backward pass over one text."""

    def __init__(self, kind, make_module, make_token_texts, make_adamw, *, with_adam=False):
        module = make_module(kind).to(torch.bfloat16)
        optimizer = make_adamw(module, make_token_texts(6, seed=1), num_steps=6) if with_adam else None
        self.lm = oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64, device="cpu")
        self.exact = copy.deepcopy(module).double()
        self.exact.config._experts_implementation = "eager"  # the others take no float64
        self.sample = make_token_texts(16, seed=101)
        self.targets = {"several": make_token_texts(6, seed=201), "others": make_token_texts(4, seed=301)}
        self.fit_texts = make_token_texts(24, seed=401)
        self.own = [self._gradient([row]) for row in self.sample]
        self.goals = [self._gradient(rows) for rows in self.targets.values()]

    def label(self, method, **options):
        labels = oracle.label(self.lm, self.sample, self.targets, method=method, **options)
        assert next(self.lm.module.parameters()).dtype == torch.bfloat16
        return labels

    def moments(self):
        """Parameter name -> first and second moment before the next step, in float64, and what corrects their bias."""
        found = {}
        for name, parameter in self.lm.module.named_parameters():
            slots = self.lm.optimizer.state[parameter]
            step = float(slots["step"]) + 1
            found[name] = slots["exp_avg"].double(), slots["exp_avg_sq"].double(), 1 - BETA1**step, 1 - BETA2**step
        return found

    def _gradient(self, rows):
        total, count = 0.0, 0
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            total += self.exact(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        names, parameters = zip(*self.exact.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(total / count, parameters), strict=True))


@pytest.fixture
def make_setting(make_module, make_token_texts, make_adamw):
    return lambda kind, **options: Setting(kind, make_module, make_token_texts, make_adamw, **options)


def _products(texts, targets):
    return np.array([[float(sum((text[name] * goal[name]).sum() for name in goal)) for goal in targets] for text in texts])


def _cosines(texts, targets):
    norms = [np.sqrt([_products([side], [side])[0, 0] for side in sides]) for sides in (texts, targets)]
    return _products(texts, targets) / np.outer(*norms)


def _root(gradient, square, correction):
    """What Adam divides by at a step with this gradient."""
    return ((BETA2 * square + (1 - BETA2) * gradient.square()) / correction).sqrt() + EPS


def _error(found, expected):
    return float((np.abs(found - expected).max(0) / np.abs(expected).max(0)).max())


def _spearman(found, expected):
    return min(spearman(found[:, column], expected[:, column]) for column in range(expected.shape[1]))


@pytest.mark.parametrize("preconditioner", ["none", "adam"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_grad_dot_is_off_by_little(kind, preconditioner, make_setting):
    setting = make_setting(kind, with_adam=preconditioner == "adam")
    goals, scale = setting.goals, 1.0
    if preconditioner == "adam":
        moments = setting.moments()
        goals = [{name: g / _root(g, *moments[name][1::2]) for name, g in goal.items()} for goal in goals]
        scale = 1e-3 * (1 - BETA1) / next(iter(moments.values()))[2]
    expected = scale * _products(setting.own, goals)
    labels = setting.label("grad_dot", preconditioner=preconditioner)
    assert labels.meta["facts"]["route"] == "batched"
    assert 1e-4 < _error(labels.values, expected) < (0.15 if kind == "qwen3" else 0.045)  # it norms queries and keys too
    assert _spearman(labels.values, expected) > 0.98
    one = oracle.label(  # with one direction and no norms a layer's products are made of its activations
        setting.lm, setting.sample, setting.targets["several"], method="grad_dot", preconditioner=preconditioner, halves=False
    )
    assert 1e-4 < _error(one.values, expected[:, :1]) < 0.13
    cosines = setting.label("grad_dot", preconditioner=preconditioner, similarity="cosine")
    assert 1e-4 < _error(cosines.values, _cosines(setting.own, goals)) < 0.1


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_less_is_off_by_little(kind, make_setting):
    setting = make_setting(kind, with_adam=True)
    updates = []
    for text in setting.own:
        update = {}
        for name, (mean, square, mean_correction, square_correction) in setting.moments().items():
            g = text[name]
            update[name] = (BETA1 * mean + (1 - BETA1) * g) / mean_correction / _root(g, square, square_correction)
        updates.append(update)
    for similarity, expected in (("dot", _products(updates, setting.goals)), ("cosine", _cosines(updates, setting.goals))):
        labels = setting.label("less", similarity=similarity)
        assert 1e-4 < _error(labels.values, expected) < 0.06
        assert _spearman(labels.values, expected) > 0.98


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_ekfac_is_off_by_little_beyond_its_factors(kind, make_setting, tmp_path):
    setting = make_setting(kind)
    fitted = fit_factors(setting.lm, setting.fit_texts, tmp_path)
    labels = setting.label("ekfac", factors=str(tmp_path))
    in_float64 = fit_factors(oracle.LanguageModel(setting.exact, max_tokens=64, device="cpu"), setting.fit_texts)
    for factors, bound, order in ((fitted, 0.04, 0.98), (in_float64, 0.7, 0.8)):
        goals = []
        for goal in setting.goals:
            directions, single = {}, {name: g.unsqueeze(0) for name, g in goal.items()}
            for layer in factors.layers:
                damping = 0.1 * float(factors.curvature[layer.weight].double().mean())
                directions |= layer.part(factors.precondition(layer, layer.join(single), damping))
            goals.append({name: direction[0] for name, direction in directions.items()})
        expected = _products(setting.own, goals)
        assert 1e-4 < _error(labels.values, expected) < bound
        assert _spearman(labels.values, expected) > order


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_one_step_runs_and_puts_the_bits_back_but_is_rough(kind, make_setting):
    setting = make_setting(kind, with_adam=True)
    before = setting.lm.fingerprint(optimizer=True)
    rough = setting.label("one_step", max_grad_norm=1.0, subtract_shared=True)
    assert setting.lm.fingerprint(optimizer=True) == before
    optimizer = torch.optim.AdamW(setting.exact.parameters(), lr=1e-3, weight_decay=0.1)
    for (name, parameter), slots in zip(setting.exact.named_parameters(), setting.lm.optimizer.state.values(), strict=True):
        mean, square, *_ = setting.moments()[name]
        optimizer.state[parameter] = {"step": slots["step"].clone(), "exp_avg": mean, "exp_avg_sq": square}
    setting.lm = oracle.LanguageModel(setting.exact, optimizer=optimizer, max_tokens=64, device="cpu")
    exact = oracle.label(setting.lm, setting.sample, setting.targets, method="one_step", max_grad_norm=1.0, subtract_shared=True)
    assert np.isfinite(rough.values).all()
    assert _spearman(rough.values, exact.values) > 0.4
    assert 0.1 < _error(rough.values, exact.values) < 2.5
