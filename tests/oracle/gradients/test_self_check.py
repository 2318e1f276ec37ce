"""What the check on the first batch catches, and that it names what is wrong."""

from __future__ import annotations

from dataclasses import replace

import torch

from oracle.gradients.products import GradientProducts
from oracle.gradients.self_check import check_products, self_check
from oracle.language_model import LanguageModel


def _setting(kind, make_module, make_token_texts):
    lm = LanguageModel(make_module(kind), max_tokens=64, device="cpu")
    generator = torch.Generator().manual_seed(1)
    directions = {name: torch.randn(2, *p.shape, generator=generator) for name, p in lm.module.named_parameters()}
    return lm, directions, next(lm.batches(lm.encode(make_token_texts(7, seed=3)), batch_tokens=10_000))


def test_a_weight_used_outside_its_module_is_seen_and_named(make_module, make_token_texts):
    lm, directions, batch = _setting("llama", make_module, make_token_texts)
    assert self_check(GradientProducts(lm.module, directions, lm.text_losses), batch) < 1e-5

    def losses(batch):
        weight = lm.module.get_input_embeddings().weight
        return lm.text_losses(batch) + weight[batch.input_ids].square().mean((1, 2))

    check = check_products(GradientProducts(lm.module, directions, losses), batch)
    assert check.error > 1e-3
    assert max(check.by_parameter, key=check.by_parameter.get) == "model.embed_tokens.weight"
    assert sorted(check.by_parameter.values())[-2] < 1e-6
    assert not check.unused


def test_a_module_that_is_not_called_is_named(make_module, make_token_texts):
    lm, directions, batch = _setting("mamba", make_module, make_token_texts)
    check = check_products(GradientProducts(lm.module, directions, lm.text_losses), batch)
    expected = {f"backbone.layers.{number}.mixer.conv1d.{key}" for number in range(2) for key in ("weight", "bias")}
    assert expected <= set(check.unused)


def test_a_batch_without_any_gradient_is_no_check(make_module, make_token_texts):
    lm, directions, batch = _setting("llama", make_module, make_token_texts)
    engine = GradientProducts(lm.module, directions, lm.text_losses)
    assert not check_products(engine, batch).is_empty
    cut = replace(batch, labels=torch.full_like(batch.labels, -100))
    assert check_products(engine, cut).is_empty
    cut.labels[3, 1] = 5
    assert not check_products(engine, cut).is_empty

    def missed(batch):  # no product, and a gradient
        return lm.text_losses(batch) * 0 + lm.module.get_input_embeddings().weight.square().mean()

    assert not check_products(GradientProducts(lm.module, directions, missed), batch).is_empty


def test_products_given_to_the_wrong_text_are_seen(make_module, make_token_texts, monkeypatch):
    lm, directions, batch = _setting("llama", make_module, make_token_texts)
    add = GradientProducts.add_gradients

    def add_reversed(engine, name, gradients, *, first=0):
        add(engine, name, gradients.flip(0), first=first)

    monkeypatch.setattr(GradientProducts, "add_gradients", add_reversed)
    assert self_check(GradientProducts(lm.module, directions, lm.text_losses), batch) > 1e-2
