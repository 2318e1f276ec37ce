"""The batched identity against one backward pass per text."""

from __future__ import annotations

import pytest
import torch

from oracle.gradients.module_rules import UncoveredModuleError
from oracle.gradients.products import GradientProducts, PerTextProducts, dot_in_blocks, self_check
from oracle.language_model import LanguageModel

ARCHITECTURES = [
    ("neox", {}),
    ("neox", {"tie_word_embeddings": True}),
    ("neox", {"use_parallel_residual": False}),
    ("gpt2", {}),
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    ("qwen3", {}),
    ("opt", {}),
    ("opt", {"tie_word_embeddings": False}),
    ("gemma", {}),
    ("gemma", {"tie_word_embeddings": False}),
    ("gemma2", {}),
    ("gemma3", {}),
    ("phi", {}),
    ("cohere", {}),
]


def _setting(kind, options, make_module, make_token_texts, *, num_directions):
    module = make_module(kind, **options)
    lm = LanguageModel(module, max_tokens=64, device="cpu")
    generator = torch.Generator().manual_seed(1)
    directions = {name: torch.randn(num_directions, *p.shape, generator=generator) for name, p in module.named_parameters()}
    batch = next(lm.batches(lm.encode(make_token_texts(7, seed=3)), batch_tokens=10_000))
    return lm, directions, batch


@pytest.mark.parametrize(("kind", "options"), ARCHITECTURES, ids=str)
@pytest.mark.parametrize("num_directions", [1, 3])
def test_products_equal_one_backward_pass_per_text(kind, options, num_directions, make_module, make_token_texts):
    lm, directions, batch = _setting(kind, options, make_module, make_token_texts, num_directions=num_directions)
    with GradientProducts(lm.module, directions, lm.text_losses) as engine:
        fast = engine(batch)
    truth = PerTextProducts(lm.module, directions, lm.text_losses)(batch)
    scale = truth.products.abs().amax(0)
    assert ((fast.products - truth.products).abs() / scale).max() < 1e-4
    torch.testing.assert_close(fast.losses, truth.losses)


@pytest.mark.parametrize(("kind", "options"), ARCHITECTURES, ids=str)
def test_norms_equal_one_backward_pass_per_text(kind, options, make_module, make_token_texts):
    lm, directions, batch = _setting(kind, options, make_module, make_token_texts, num_directions=2)
    with GradientProducts(lm.module, directions, lm.text_losses, norms=True) as engine:
        fast = engine(batch)
    truth = PerTextProducts(lm.module, directions, lm.text_losses, norms=True)(batch)
    torch.testing.assert_close(fast.square_norms, truth.square_norms, rtol=1e-4, atol=0)


def test_a_text_does_not_depend_on_its_batch(make_module, make_token_texts):
    lm, directions, batch = _setting("gpt2", {}, make_module, make_token_texts, num_directions=2)
    encoded = lm.encode(make_token_texts(7, seed=3))
    with GradientProducts(lm.module, directions, lm.text_losses) as engine:
        together = engine(batch).products
        alone = torch.cat([engine(next(lm.batches([encoded[position]]))).products for position in batch.positions])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_the_pass_leaves_hooks_and_requires_grad_as_they_were(make_module, make_token_texts):
    lm, directions, batch = _setting("llama", {}, make_module, make_token_texts, num_directions=1)
    frozen = next(lm.module.parameters())
    frozen.requires_grad_(False)
    before = [p.requires_grad for p in lm.module.parameters()]
    with pytest.raises(RuntimeError, match="stop"), GradientProducts(lm.module, directions, lm.text_losses) as engine:
        engine(batch)
        raise RuntimeError("stop")
    assert [p.requires_grad for p in lm.module.parameters()] == before
    assert not any(module._forward_hooks for module in lm.module.modules())
    assert all(p.grad is None for p in lm.module.parameters())


def test_the_self_check_sees_a_weight_used_outside_its_module(make_module, make_token_texts):
    lm, directions, batch = _setting("llama", {}, make_module, make_token_texts, num_directions=2)
    assert self_check(GradientProducts(lm.module, directions, lm.text_losses), batch) < 1e-5

    def losses(batch):
        weight = lm.module.get_input_embeddings().weight
        return lm.text_losses(batch) + weight[batch.input_ids].square().mean((1, 2))

    assert self_check(GradientProducts(lm.module, directions, losses), batch) > 1e-3


def test_the_self_check_sees_products_given_to_the_wrong_text(make_module, make_token_texts, monkeypatch):
    lm, directions, batch = _setting("llama", {}, make_module, make_token_texts, num_directions=2)
    add = GradientProducts.add_gradients

    def add_reversed(engine, name, gradients, *, first=0):
        add(engine, name, gradients.flip(0), first=first)

    monkeypatch.setattr(GradientProducts, "add_gradients", add_reversed)
    assert self_check(GradientProducts(lm.module, directions, lm.text_losses), batch) > 1e-2


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_the_row_of_the_padding_token_has_no_gradient(kind, norms, make_module, make_token_texts):
    options = {"tie_word_embeddings": False, "pad_token_id": 5}
    lm, directions, batch = _setting(kind, options, make_module, make_token_texts, num_directions=2)
    batch.input_ids[:, 0] = 5
    with GradientProducts(lm.module, directions, lm.text_losses, norms=norms) as engine:
        fast = engine(batch)
    truth = PerTextProducts(lm.module, directions, lm.text_losses, norms=norms)(batch)
    torch.testing.assert_close(fast.products, truth.products, rtol=1e-4, atol=1e-4 * float(truth.products.abs().max()))
    if norms:
        torch.testing.assert_close(fast.square_norms, truth.square_norms, rtol=1e-4, atol=0)


def test_a_module_that_gathers_tokens_is_refused(make_module, make_token_texts):
    lm, directions, batch = _setting("mixtral", {}, make_module, make_token_texts, num_directions=1)
    with pytest.raises(UncoveredModuleError), GradientProducts(lm.module, directions, lm.text_losses) as engine:
        engine(batch)
    assert not any(module._forward_hooks for module in lm.module.modules())


def test_blocked_dot_products_keep_float64_accuracy_over_a_million_elements():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.rand(2, 1_100_003, generator=generator), torch.rand(3, 1_100_003, generator=generator)
    exact = left.double() @ right.double().T
    assert ((dot_in_blocks(left, right) - exact).abs() / exact).max() < 1e-6


@pytest.mark.parametrize("kind", ["neox", "llama"])
def test_bfloat16_products_stay_close_to_float32(kind, make_module, make_token_texts):
    lm, directions, batch = _setting(kind, {}, make_module, make_token_texts, num_directions=2)
    truth = PerTextProducts(lm.module, directions, lm.text_losses)(batch).products
    lm.module.to(torch.bfloat16)
    with GradientProducts(lm.module, directions, lm.text_losses) as engine:
        low = engine(batch).products
    assert ((low - truth).abs() / truth.abs().amax(0)).max() < 0.1
