"""Forward mode against one float32 backward pass per text, on every architecture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from oracle.gradients.forward_mode import ForwardMode
from oracle.gradients.products import PerTextProducts

KINDS = [
    *("gpt2", "neox", "llama", "mistral", "qwen2", "qwen3", "opt", "phi", "cohere", "gemma", "gemma2", "gemma3", "mamba"),
    *("mixtral", "qwen2_moe", "gpt_oss", "llama4"),
]


def _directions(module, count=2):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(count, *p.shape, generator=generator) for name, p in module.named_parameters()}


def _along(lm, rows, directions, **options):
    encoded = lm.encode(rows)
    products, losses = np.zeros((len(encoded), 2)), np.zeros(len(encoded))
    forward = ForwardMode(lm, directions, **options)
    for batch in lm.batches(encoded):
        for index in range(2):
            along, own = forward.measure(batch, index)
            products[batch.positions, index], losses[batch.positions] = along.numpy(), own.numpy()
    return products, losses


def _expected(lm, rows, directions):
    engine, products = PerTextProducts(lm.module, directions, lm.text_losses), np.zeros((len(rows), 2))
    for batch in lm.batches(lm.encode(rows), packing=False):
        products[batch.positions] = engine(batch).products.numpy()
    return products


def _error(found, expected):
    return (np.abs(found - expected).max(0) / np.abs(expected).max(0)).max()


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_one_backward_pass_per_text(kind, make_module, make_token_texts):
    lm = oracle.LanguageModel(make_module(kind), max_tokens=64)
    rows, directions, before = make_token_texts(8, seed=2), _directions(lm.module), lm.fingerprint()
    products, losses = _along(lm, rows, directions)
    assert _error(products, _expected(lm, rows, directions)) < 5e-6
    np.testing.assert_allclose(losses, lm.losses(oracle.read_texts(rows)), rtol=1e-5)
    assert lm.fingerprint() == before and all(p.grad is None for p in lm.module.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral"])
def test_texts_that_share_rows_are_kept_apart(kind, make_module, make_token_texts):
    lm = oracle.LanguageModel(make_module(kind), max_tokens=64, packing=True)
    rows, directions = make_token_texts(8, seed=2), _directions(lm.module)
    assert _error(_along(lm, rows, directions)[0], _expected(lm, rows, directions)) < 5e-6


def test_only_the_weights_that_have_a_direction_count(make_module, make_token_texts):
    lm = oracle.LanguageModel(make_module("neox"), max_tokens=64)
    rows, directions = make_token_texts(8, seed=2), _directions(lm.module)
    own = {name: direction for name, direction in directions.items() if "layers.1" in name}
    rest = {name: direction for name, direction in directions.items() if name not in own}
    parts = _along(lm, rows, own)[0] + _along(lm, rows, rest)[0]
    assert _error(parts, _along(lm, rows, directions)[0]) < 5e-6


def test_a_text_counts_by_its_mean_or_by_its_tokens(make_module, make_token_texts):
    lm = oracle.LanguageModel(make_module("llama"), max_tokens=64)
    rows, directions = make_token_texts(8, seed=2), _directions(lm.module)
    lengths = np.array([len(row["input_ids"]) - 1 for row in rows])
    mean, summed = (_along(lm, rows, directions, reduction=reduction)[0] for reduction in ("mean", "sum"))
    np.testing.assert_allclose(summed, mean * lengths[:, None], rtol=1e-9)


def test_a_compiled_module_is_measured_too(make_module, make_token_texts):
    plain, compiled = (oracle.LanguageModel(make_module("neox"), max_tokens=64) for _ in range(2))
    compiled.module.compile(backend="eager")
    rows, directions = make_token_texts(4, seed=2), _directions(plain.module)
    assert _error(_along(compiled, rows, directions)[0], _along(plain, rows, directions)[0]) < 5e-6
