"""Norms of a weight that the embedding and the head share, against one backward pass per text."""

from __future__ import annotations

import pytest
import torch

from oracle.gradients.general_rule import UncoveredModuleError
from oracle.gradients.products import GradientProducts, PerTextProducts
from oracle.language_model import LanguageModel


class _Shifted(torch.nn.Embedding):
    """Looks up the row behind the one that was asked for."""

    def forward(self, input):
        return super().forward((input + 1) % self.num_embeddings)


class _ScaledEmbedding(torch.nn.Embedding):
    def forward(self, input):
        return 3.0 * super().forward(input)


class _Twice(torch.nn.Module):
    """A head that is called two times."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + self.inner(2 * x)


def _tied(make_module, kind="llama", **options):
    return make_module(kind, tie_word_embeddings=True, **options)


def _with_embedding(make_module, kind):
    module = _tied(make_module)
    weight = module.get_input_embeddings().weight
    embedding = kind(*weight.shape)
    embedding.weight = weight
    module.set_input_embeddings(embedding)
    return module.eval()


def _setting(module, make_token_texts, *, packing=False):
    lm = LanguageModel(module, max_tokens=64, packing=packing, device="cpu")
    generator = torch.Generator().manual_seed(1)
    directions = {name: torch.randn(2, *p.shape, generator=generator) for name, p in module.named_parameters()}
    rows = [{"input_ids": [token % 9 + 3 for token in row["input_ids"]]} for row in make_token_texts(9, seed=3)]  # many repeated
    return lm, directions, next(lm.batches(lm.encode(rows), batch_tokens=10_000))


def _compare(lm, directions, batch):
    with GradientProducts(lm.module, directions, lm.text_losses, norms=True) as engine:
        found = engine(batch)
    expected = PerTextProducts(lm.module, directions, lm.text_losses, norms=True)(batch)
    torch.testing.assert_close(found.square_norms, expected.square_norms, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.products, expected.products, rtol=1e-4, atol=1e-4 * float(expected.products.abs().max()))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["plain", "padding_idx", "scaled", "gpt2", "gemma", "gemma3", "cohere"])
def test_no_texts_gradient_of_the_shared_weight_is_kept(kind, packing, make_module, make_token_texts, monkeypatch):
    make = {
        "plain": lambda: _tied(make_module),
        "padding_idx": lambda: _tied(make_module, pad_token_id=5),
        "scaled": lambda: _with_embedding(make_module, _ScaledEmbedding),
    }
    module = make.get(kind, lambda: _tied(make_module, kind))()
    assert module.lm_head.weight is module.get_input_embeddings().weight
    lm, directions, batch = _setting(module, make_token_texts, packing=packing)
    assert (batch.packed is not None) == packing
    add_norm, kept = GradientProducts.add_norm, []

    def watched(engine, name, gradients, rows):
        add_norm(engine, name, gradients, rows)
        kept.append(sum(total.numel() for total, _ in engine.pending.values()))

    monkeypatch.setattr(GradientProducts, "add_norm", watched)
    _compare(lm, directions, batch)
    assert kept and max(kept) == 0


@pytest.mark.parametrize("packing", [False, True])
def test_a_weight_with_three_uses_is_added_up_as_before(packing, make_module, make_token_texts):
    module = _tied(make_module)
    module.lm_head = _Twice(module.lm_head)
    _compare(*_setting(module, make_token_texts, packing=packing))


def test_a_head_that_has_no_gradient_leaves_the_embeddings_norm(make_module, make_token_texts):
    module = _tied(make_module)
    _, directions, batch = _setting(module, make_token_texts)

    def losses(batch):
        return module(input_ids=batch.input_ids, output_hidden_states=True).hidden_states[-1].square().mean((1, 2))

    with GradientProducts(module, directions, losses, norms=True) as engine:
        found = engine(batch).square_norms
    expected = PerTextProducts(module, directions, losses, norms=True)(batch).square_norms
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_an_embedding_that_looks_up_other_rows_is_refused(make_module, make_token_texts):
    lm, directions, batch = _setting(_with_embedding(make_module, _Shifted), make_token_texts)
    with (
        pytest.raises(UncoveredModuleError, match="rows that were not asked for"),
        GradientProducts(lm.module, directions, lm.text_losses, norms=True) as engine,
    ):
        engine(batch)
