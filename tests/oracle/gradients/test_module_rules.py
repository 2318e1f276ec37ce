"""Which rule a module takes, and what the rules check before they are believed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from oracle.gradients.general_rule import GeneralRule, UncoveredModuleError
from oracle.gradients.module_rules import attach_rules
from oracle.gradients.products import GradientProducts, PerTextProducts
from oracle.language_model import LanguageModel


class _Scaled(torch.nn.Linear):
    """A linear layer by class, with a forward of its own."""

    def forward(self, x):
        return 2.0 * super().forward(x)


class _Gated(torch.nn.Module):
    """A parameter of three dimensions, two outputs of which one is made of the other, and a keyword argument."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.mix = inner, torch.nn.Parameter(0.1 * torch.ones(2, 1, inner.out_features))

    def forward(self, x, *, power):
        first = self.inner(x) * (1 + self.mix[0]) ** power
        return first, first + self.mix[1]


class _TakesFirst(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.gated = _Gated(inner)

    def forward(self, x):
        first, second = self.gated(x, power=2)
        return first + 3 * second


class _Unused(torch.nn.Module):
    """The weight of an inner module is used, and the module is not called."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return functional.linear(x, self.inner.weight).tanh()


class _Norm(torch.nn.Module):
    """One-dimensional and not elementwise: every feature sees the whole weight."""

    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.0, size))

    def forward(self, x):
        return x * self.weight.cumsum(0) / len(self.weight)


class _Mixing(torch.nn.Module):
    """Every text sees the mean of all texts."""

    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, size))

    def forward(self, x):
        return x * self.weight[0] + x.mean(0, keepdim=True) * self.weight[1]


class _InPlace(torch.nn.Module):
    """A norm that changes what it is given: at the first layer that is the output of the embeddings."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.mul_(1.5))


class _Twice(torch.nn.Module):
    """A layer that is called twice, and from one of the calls no gradient comes back."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + self.inner(-x).detach() ** 2


def _scaled(layer):
    own = _Scaled(layer.mlp.up_proj.in_features, layer.mlp.up_proj.out_features, bias=False)
    own.load_state_dict(layer.mlp.up_proj.state_dict())
    layer.mlp.up_proj = own


def _gated(layer):
    layer.mlp.up_proj = _TakesFirst(layer.mlp.up_proj)


def _norm(layer):
    layer.input_layernorm = _Norm(len(layer.input_layernorm.weight))


def _mixing(layer):
    layer.input_layernorm = _Mixing(len(layer.input_layernorm.weight))


def _setting(change, make_module, make_token_texts, num_directions=2):
    module, generator = make_module("llama"), torch.Generator().manual_seed(1)
    change(module.model.layers[1])
    lm = LanguageModel(module, max_tokens=64, device="cpu")
    directions = {name: torch.randn(num_directions, *p.shape, generator=generator) for name, p in module.named_parameters()}
    return lm, directions, next(lm.batches(lm.encode(make_token_texts(6, seed=3)), batch_tokens=10_000))


def _assert_exact(lm, directions, batch):
    expected = PerTextProducts(lm.module, directions, lm.text_losses, norms=True)(batch)
    with GradientProducts(lm.module, directions, lm.text_losses, norms=True) as engine:
        found = engine(batch)
    assert ((found.products - expected.products).abs() / expected.products.abs().amax(0)).max() < 1e-5
    torch.testing.assert_close(found.square_norms, expected.square_norms, rtol=1e-5, atol=0)
    return engine.rerun


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (_scaled, {"model.layers.1.mlp.up_proj.weight"}),
        (_gated, {"model.layers.1.mlp.up_proj.gated.mix"}),
        (_norm, {"model.layers.1.input_layernorm.weight"}),
    ],
)
def test_a_module_of_no_known_kind_is_run_again_for_each_text(change, names, make_module, make_token_texts):
    assert _assert_exact(*_setting(change, make_module, make_token_texts)) == names


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_embeddings_may_be_changed_in_place(kind, make_module, make_token_texts):
    module = make_module(kind)
    if kind == "llama":
        module.model.layers[0].input_layernorm = _InPlace(module.model.layers[0].input_layernorm)
    else:
        module.transformer.h[0].ln_1 = _InPlace(module.transformer.h[0].ln_1)
    lm = LanguageModel(module, max_tokens=64, device="cpu")
    batch = next(lm.batches(lm.encode(make_token_texts(6, seed=3)), batch_tokens=10_000))
    for wanted in ("", "head" if kind == "llama" else "ln_f"):  # with and without a direction for the embeddings
        directions = {name: torch.randn(2, *p.shape) for name, p in module.named_parameters() if wanted in name}
        assert _assert_exact(lm, directions, batch) == set()


def test_a_use_without_a_gradient_does_not_spoil_the_norms(make_module, make_token_texts):
    def twice(layer):
        layer.mlp.up_proj = _Twice(layer.mlp.up_proj)

    lm, directions, batch = _setting(twice, make_module, make_token_texts)
    assert _assert_exact(lm, directions, batch) == set()


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_routers_and_fused_experts_are_not_run_again(kind, make_module, make_token_texts):
    lm = LanguageModel(make_module(kind), max_tokens=64, device="cpu")
    directions = {name: torch.randn(2, *p.shape) for name, p in lm.module.named_parameters()}
    batch = next(lm.batches(lm.encode(make_token_texts(6, seed=3)), batch_tokens=10_000))
    assert _assert_exact(lm, directions, batch) == set()


def test_experts_that_compute_something_else_are_refused(make_module, make_token_texts, monkeypatch):
    lm = LanguageModel(make_module("mixtral"), max_tokens=64, device="cpu")
    experts = type(lm.module.model.layers[0].mlp.experts)
    monkeypatch.setattr(experts, "forward", lambda self, x, index, weights: x * self.gate_up_proj.mean())
    directions = {name: torch.randn(2, *p.shape) for name, p in lm.module.named_parameters()}
    batch = next(lm.batches(lm.encode(make_token_texts(6, seed=3)), batch_tokens=10_000))
    with (
        pytest.raises(UncoveredModuleError, match="something else than fused experts"),
        GradientProducts(lm.module, directions, lm.text_losses) as engine,
    ):
        engine(batch)


def test_a_module_that_mixes_texts_is_refused(make_module, make_token_texts):
    lm, directions, batch = _setting(_mixing, make_module, make_token_texts)
    with (
        pytest.raises(UncoveredModuleError, match="something else alone") as caught,
        GradientProducts(lm.module, directions, lm.text_losses) as engine,
    ):
        engine(batch)
    assert caught.value.parameters == ["model.layers.1.input_layernorm.weight"]


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embeddings_that_look_at_the_whole_batch_are_refused(option):
    with pytest.raises(UncoveredModuleError, match=next(iter(option))):
        attach_rules(torch.nn.Embedding(5, 3, **option), {"weight": "w"}, {}, engine=None)


def test_moving_up_ends_below_the_whole_model(make_module, make_token_texts):
    def unused(layer):
        layer.mlp.up_proj = _Unused(layer.mlp.up_proj)

    lm, directions, batch = _setting(unused, make_module, make_token_texts)
    engine = GradientProducts(lm.module, directions, lm.text_losses, norms=True)
    name = "model.layers.1.mlp.up_proj.inner.weight"
    expected = PerTextProducts(lm.module, directions, lm.text_losses, norms=True)(batch)
    moved = 0
    while engine.move_up([name]):
        moved += 1
        with engine:
            found = engine(batch) if moved < 4 else None  # layers.1.mlp.up_proj, layers.1.mlp, layers.1
        if found is not None:
            assert ((found.products - expected.products).abs() / expected.products.abs().amax(0)).max() < 1e-5
            torch.testing.assert_close(found.square_norms, expected.square_norms, rtol=1e-5, atol=0)
    assert moved == 4  # the list of layers, which is never called itself
    assert not engine.move_up(["model.embed_tokens.weight"])


def test_no_rule_runs_inside_another_ones_rerun(make_module, make_token_texts, monkeypatch):
    lm, directions, batch = _setting(_gated, make_module, make_token_texts)
    calls, attach = [], GeneralRule.attach

    def counting(rule, module, args, kwargs, output):
        calls.append(type(module).__name__)
        return attach(rule, module, args, kwargs, output)

    monkeypatch.setattr(GeneralRule, "attach", counting)
    with GradientProducts(lm.module, directions, lm.text_losses) as engine:
        engine(batch)
    assert calls == ["_Gated"]
    assert engine.uses["model.layers.1.mlp.up_proj.gated.inner.weight"] == 1
