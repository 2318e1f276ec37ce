"""Packed rows: every text is in one, its loss is what it is alone, and a model that mixes texts is refused."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from oracle.encoding import IGNORED, EncodedText
from oracle.errors import InputError
from oracle.language_model import LanguageModel
from oracle.memory import split_batches
from oracle.packing import fill_rows, unpacked
from oracle.target_columns import prepare_targets
from oracle.targets import read_targets

KEEPING_APART = [
    *((kind, attention) for kind in ("neox", "gpt2", "llama", "mistral", "qwen2", "mixtral") for attention in ("sdpa", "eager")),
    *((kind, "eager") for kind in ("qwen3", "qwen2_moe", "llama4", "gemma", "gemma2", "gemma3", "phi", "cohere")),
]


def _texts(lengths, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 211, (length,), generator=generator).tolist() for length in lengths]
    return [EncodedText(f"{number:03d}", row, row) for number, row in enumerate(rows)]


def _masked(rows):
    """As a chat is masked: the first third of every text is not predicted."""
    return [{**row, "labels": _tail(row["input_ids"])} for row in rows]


def _tail(ids):
    first = len(ids) // 3
    return [IGNORED] * first + ids[first:]


def _packed_lm(module, **options):
    return LanguageModel(module, max_tokens=64, device="cpu", packing=True, **options)


def _exact_losses(lm, encoded):
    """Summed losses in float64, each text alone."""
    module = copy.deepcopy(lm.module).double()
    module.config._experts_implementation = "eager"  # the others take no float64
    losses = []
    for text in encoded:
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([text.input_ids]), use_cache=False).logits[0, :-1].double()
        losses.append(
            functional.cross_entropy(
                logits, torch.tensor(text.labels[1:], dtype=torch.long), ignore_index=IGNORED, reduction="sum"
            )
        )
    return torch.stack(losses).numpy()


@pytest.mark.parametrize("lengths", [[5], [7, 7, 7], [9, 5, 4, 3, 3, 2, 1, 1], [0, 3, 2, 1, 0]])
def test_every_text_is_in_one_row_and_no_row_is_longer_than_the_longest_text(lengths):
    rows = fill_rows(_texts(lengths))
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(sum(max(lengths[index], 1) for index in row) for row in rows) == max(lengths)


def test_rows_are_filled_nearly_as_well_as_can_be():
    lengths = np.random.default_rng(0).integers(1, 513, 5_000).tolist()
    rows = fill_rows([EncodedText(f"{number:05d}", [1] * length, [1] * length) for number, length in enumerate(lengths)])
    assert len(rows) <= 1.02 * sum(lengths) / max(lengths)


def test_which_texts_share_a_row_follows_from_the_texts_and_not_from_their_order():
    texts = _texts([9, 5, 5, 5, 4, 4, 3, 3, 2, 1, 1])
    shuffled = [texts[index] for index in np.random.default_rng(1).permutation(len(texts))]
    shared = [[[group[index].text_id for index in row] for row in fill_rows(group)] for group in (texts, shuffled)]
    assert shared[0] == shared[1]


def test_a_packed_batch_holds_each_text_at_its_place_and_predicts_no_first_token(make_module):
    lm = _packed_lm(make_module("llama"))
    texts = _texts([20, 11, 9, 8, 6, 5, 4, 3, 1])
    (batch,) = lm.batches(texts)
    rows = batch.packed
    assert sorted(batch.positions) == list(range(9)) and batch.model_shape == (4, 20)
    for text, (row, start), length in zip(batch.positions, rows.places, rows.lengths, strict=True):
        own = slice(start, start + length)
        assert rows.input_ids[row, own].tolist() == texts[text].input_ids
        assert rows.labels[row, own].tolist() == [IGNORED, *texts[text].labels[1:]]
        assert rows.position_ids[row, own].tolist() == list(range(length))
    assert torch.equal(rows.by_text(rows.input_ids), batch.input_ids)
    assert (rows.labels != IGNORED).sum() == sum(text.num_targets for text in texts)
    parts = unpacked(batch)
    assert [position for part in parts for position in part.positions] == batch.positions
    assert len(parts) > 1 and all(part.input_ids.numel() <= rows.input_ids.numel() for part in parts)


def test_batches_keep_to_their_size_and_padding_is_taken_where_it_is_as_good(make_module):
    lm = _packed_lm(make_module("llama"))
    texts = _texts([30, *range(1, 31), 29, 28])
    batches = list(lm.batches(texts, batch_tokens=90))
    assert sorted(position for batch in batches for position in batch.positions) == list(range(len(texts)))
    assert all(math.prod(batch.model_shape) <= 90 for batch in batches)
    assert sum(batch.packed is not None for batch in batches) > 1
    assert all(batch.packed is None for batch in lm.batches(_texts([7] * 20), batch_tokens=90))
    assert all(batch.packed is None for batch in lm.batches(_texts([6, 6, 3, 3]), batch_tokens=6))  # 18 tokens either way
    assert all(batch.packed is None for batch in lm.batches(texts, batch_tokens=90, packing=False))
    plain = LanguageModel(lm.module, max_tokens=64, device="cpu")
    assert all(batch.packed is None for batch in plain.batches(texts))
    assert any(batch.packed is not None for batch in plain.batches(texts, packing=True))


@pytest.mark.parametrize(("kind", "attention"), KEEPING_APART, ids=str)
def test_a_texts_loss_in_a_packed_row_is_its_loss_alone(kind, attention, make_module, make_token_texts):
    lm = _packed_lm(make_module(kind, attn_implementation=attention))
    rows = [*make_token_texts(12, seed=4), *_masked(make_token_texts(6, seed=5)), {"input_ids": [9]}]
    rows = [{"labels": row["input_ids"], **row} for row in rows]
    encoded = lm.encode(rows)
    expected, found = _exact_losses(lm, encoded), np.zeros(len(encoded))
    (batch,) = lm.batches(encoded)
    assert batch.packed is not None and len(batch.packed.input_ids) < len(encoded) / 1.5
    with torch.no_grad():
        found[batch.positions] = lm.text_losses(batch, reduction="sum").double().numpy()
        means = lm.text_losses(batch).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    counts = np.array([max(encoded[position].num_targets, 1) for position in batch.positions])
    np.testing.assert_allclose(means, expected[batch.positions] / counts, rtol=1e-5, atol=1e-7)


def test_a_loss_does_not_depend_on_which_texts_share_the_row(make_module):
    lm = _packed_lm(make_module("mistral"))
    text = _texts([9])[0]
    losses = []
    for seed, lengths in ((1, [20, 11]), (2, [16, 3, 4]), (3, [29])):
        others = [EncodedText(f"a{other.text_id}", other.input_ids, other.labels) for other in _texts(lengths, seed=seed)]
        (batch,) = lm.batches([text, *others])
        row = batch.positions.index(0)
        assert batch.packed is not None or seed == 3
        losses.append(lm.text_losses(batch)[row].item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_the_models_losses_of_texts_are_the_same(make_module, make_token_texts):
    rows = make_token_texts(20, seed=6)
    module = make_module("gpt2")
    np.testing.assert_allclose(
        _packed_lm(module).losses(rows), LanguageModel(module, max_tokens=64, device="cpu").losses(rows), rtol=1e-5
    )


class _WithoutPositions(torch.nn.Module):
    """A model whose forward takes no position_ids."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, use_cache=False):
        return self.inner(input_ids=input_ids, use_cache=use_cache)


class _ApartInOneRow(_WithoutPositions):
    """A model that keeps texts apart in a batch of one row only, as some fast kinds of attention do."""

    def forward(self, input_ids, position_ids=None, use_cache=False):
        position_ids = position_ids if len(input_ids) == 1 else None
        return self.inner(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)


@pytest.mark.parametrize("kind", ["mamba", "opt", "gpt_oss", _WithoutPositions, _ApartInOneRow])
def test_a_model_that_mixes_the_texts_of_a_row_is_refused(kind, make_module, make_token_texts):
    module = make_module(kind) if isinstance(kind, str) else kind(make_module("llama"))
    module.train()
    lm = _packed_lm(module)
    with pytest.raises(InputError, match="packing=False") as caught:
        list(lm.batches(_texts([20, 10, 10])))
    assert type(module).__name__ in str(caught.value)
    assert all(part.training for part in module.modules())
    assert np.isfinite(LanguageModel(module, max_tokens=64, device="cpu").losses(make_token_texts(4, seed=1))).all()


def test_the_check_leaves_modes_gradients_and_random_state_alone(make_module):
    module = make_module("llama").train()
    module.model.layers[0].eval()
    modes = [part.training for part in module.modules()]
    next(module.parameters()).grad = torch.ones_like(next(module.parameters()))
    state = torch.get_rng_state()
    assert next(_packed_lm(module).batches(_texts([20, 10, 10]))).packed is not None
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, p in module.named_parameters() if p.grad is not None] == [next(iter(dict(module.named_parameters())))]


def test_a_text_with_a_loss_that_is_not_finite_is_no_reason_to_refuse_the_model(make_module):
    module = make_module("llama")
    with torch.no_grad():
        module.model.embed_tokens.weight[5] = float("nan")
    lm = _packed_lm(module)
    broken = [EncodedText("b", [5] * 10, [5] * 10), EncodedText("c", [5] * 9, [5] * 9)]
    assert len(list(lm.batches([*broken, *_texts([19])]))) == 1


def test_bfloat16_is_held_against_a_text_alone_as_well(make_module):
    lm = _packed_lm(make_module("llama").bfloat16())
    assert next(lm.batches(_texts([20, 10, 10]))).packed is not None
    mixing = _packed_lm(make_module("opt").bfloat16())
    with pytest.raises(InputError, match="packing=False"):
        next(mixing.batches(_texts([20, 10, 10])))


def test_target_sets_are_packed_and_measured_the_same(make_module, make_token_texts):
    module = make_module("qwen2")
    targets = read_targets({"one": make_token_texts(14, seed=8), "two": _masked(make_token_texts(9, seed=9))}, max_texts=None)
    columns = {}
    for packing in (False, True):
        lm = LanguageModel(module, max_tokens=64, device="cpu", packing=packing)
        columns[packing] = prepare_targets(lm, targets)
    assert any(batch.packed is not None for batch in columns[True].batches)
    assert columns[True].num_tokens < 0.9 * columns[False].num_tokens
    expected = columns[False].losses(lm)
    np.testing.assert_allclose(columns[True].losses(lm), expected, rtol=1e-6)
    gradients = [found.gradients(lm) for found in columns.values()]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    split_batches(columns[True], batch_tokens=50)
    assert all(math.prod(batch.model_shape) <= 50 for batch in columns[True].batches)
    np.testing.assert_allclose(columns[True].losses(lm), expected, rtol=1e-6)
