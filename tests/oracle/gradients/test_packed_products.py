"""Products of texts in packed rows against plain loops in float64, and labels with and without packing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

import oracle
from oracle.encoding import IGNORED
from oracle.gradients import module_rules
from oracle.gradients.central_difference import CentralDifference
from oracle.gradients.curvature import fit_factors
from oracle.gradients.products import GradientProducts, PerTextProducts
from oracle.gradients.text_layout import TextLayout
from oracle.gradients.text_products import TextProducts, UnpackedWarning
from oracle.language_model import LanguageModel

ARCHITECTURES = [
    ("gpt2", {}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("neox", {}),
    ("neox", {"tie_word_embeddings": True}),
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("mixtral", {}),
    ("mixtral", {"experts_implementation": "batched_mm", "tie_word_embeddings": True}),
    ("qwen2_moe", {}),
    ("gemma", {}),
    ("gemma3", {}),
    ("phi", {}),
    ("phi", {"qk_layernorm": True}),  # norms that see (rows, heads, positions, features)
]


def _masked(rows):
    """As a chat is masked: the first third of every text is not predicted."""
    return [
        {**row, "labels": [IGNORED] * (len(row["input_ids"]) // 3) + row["input_ids"][len(row["input_ids"]) // 3 :]}
        for row in rows
    ]


def _rows(make_token_texts, seed=3):
    """Texts of very different lengths."""
    return [*make_token_texts(4, seed=seed), *make_token_texts(8, seed=seed + 20, longest=15)]


def _lm(module, **options):
    return LanguageModel(module, max_tokens=64, device="cpu", **options)


def _directions(module, num_directions=2):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(num_directions, *p.shape, generator=generator) for name, p in module.named_parameters()}


def _packed_batch(lm, rows):
    (batch,) = lm.batches(lm.encode(rows), packing=True)
    assert batch.packed is not None and len(batch.packed.input_ids) < len(batch.input_ids) / 1.5
    return batch


def _plain_loop(lm, directions, batch):
    """Products and squared norms in float64: each text alone, without its padding, by one ordinary backward pass."""
    module = copy.deepcopy(lm.module).double()
    module.config._experts_implementation = "eager"  # the others take no float64
    parameters = {name: p for name, p in module.named_parameters() if name in directions}
    products, square_norms = [], []
    for ids, labels, length in zip(batch.input_ids, batch.labels, batch.packed.lengths, strict=True):
        logits = module(input_ids=ids[None, :length], use_cache=False).logits[0, :-1]
        losses = functional.cross_entropy(logits.double(), labels[1:length], ignore_index=IGNORED, reduction="none")
        loss = losses.sum() / max(int((labels[1:length] != IGNORED).sum()), 1)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        pairs = [(directions[name].double(), g) for name, g in zip(parameters, found, strict=True) if g is not None]
        products.append(sum((direction * g).flatten(1).sum(1) for direction, g in pairs))
        square_norms.append(sum(g.square().sum() for _, g in pairs))
    return torch.stack(products), torch.stack(square_norms)


def _error(found, expected):
    return float(((found - expected).abs() / expected.abs().amax(0)).max())


def _compare(products, encoded):
    """See whether products, norms and losses of texts are those of the plain loop."""
    found = products.measure(encoded)
    expected = TextProducts(products.lm, products.directions, norms=True, per_text=True).measure(encoded)
    assert _error(torch.from_numpy(found.products), torch.from_numpy(expected.products)) < 1e-4
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-4)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)


@pytest.mark.parametrize(("kind", "options"), ARCHITECTURES, ids=str)
def test_products_and_norms_equal_a_plain_loop_in_float64(kind, options, make_module, make_token_texts):
    lm = _lm(make_module(kind, **options))
    batch = _packed_batch(
        lm, [{"labels": r["input_ids"], **r} for r in [*_rows(make_token_texts), *_masked(_rows(make_token_texts, 5))]]
    )
    directions = _directions(lm.module, 3)
    products, square_norms = _plain_loop(lm, directions, batch)
    for num_directions, norms in ((1, False), (3, False), (3, True)):
        some = {name: direction[:num_directions] for name, direction in directions.items()}
        with GradientProducts(lm.module, some, lm.text_losses, norms=norms) as engine:
            fast = engine(batch)
        assert _error(fast.products, products[:, :num_directions]) < 1e-4
        if norms:
            torch.testing.assert_close(fast.square_norms, square_norms, rtol=1e-4, atol=0)
    slow = PerTextProducts(lm.module, directions, lm.text_losses, norms=True)(batch)
    assert _error(slow.products, products) < 1e-4
    torch.testing.assert_close(slow.square_norms, square_norms, rtol=1e-4, atol=0)
    torch.testing.assert_close(fast.losses, slow.losses)


def test_small_blocks_change_nothing(make_module, make_token_texts, monkeypatch):
    lm = _lm(make_module("llama"))
    batch, directions = _packed_batch(lm, _rows(make_token_texts)), _directions(lm.module)
    with GradientProducts(lm.module, directions, lm.text_losses, norms=True) as engine:
        whole = engine(batch)
    monkeypatch.setattr(module_rules, "GRADIENT_BLOCK_BYTES", 1)  # one text of one layer at a time
    with GradientProducts(lm.module, directions, lm.text_losses, norms=True) as engine:
        blocked = engine(batch)
    assert _error(blocked.products, whole.products) < 1e-5
    torch.testing.assert_close(blocked.square_norms, whole.square_norms, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "mixtral"])
def test_a_product_does_not_depend_on_which_texts_share_the_row(kind, make_module, make_token_texts):
    lm, found = _lm(make_module(kind)), []
    directions, (text,) = _directions(lm.module), make_token_texts(1, seed=7)
    for seed in (3, 4):
        batch = _packed_batch(lm, [text, *_rows(make_token_texts, seed)])
        with GradientProducts(lm.module, directions, lm.text_losses) as engine:
            found.append(engine(batch).products[batch.positions.index(0)])
    assert float((found[0] - found[1]).abs().max() / found[0].abs().max()) < 1e-5


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_the_row_of_the_padding_token_has_no_gradient(kind, norms, make_module, make_token_texts):
    lm = _lm(make_module(kind, tie_word_embeddings=False, pad_token_id=5))
    rows = _rows(make_token_texts)
    for row in rows:
        row["input_ids"][0] = 5
    batch, directions = _packed_batch(lm, rows), _directions(lm.module)
    with GradientProducts(lm.module, directions, lm.text_losses, norms=norms) as engine:
        fast = engine(batch)
    truth = PerTextProducts(lm.module, directions, lm.text_losses, norms=norms)(batch)
    assert _error(fast.products, truth.products) < 1e-4
    if norms:
        torch.testing.assert_close(fast.square_norms, truth.square_norms, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_bfloat16_is_as_good_as_one_bfloat16_backward_pass_per_text(kind, make_module, make_token_texts):
    lm = _lm(make_module(kind).bfloat16())
    batch, directions = _packed_batch(lm, _rows(make_token_texts)), _directions(lm.module)
    slow = PerTextProducts(lm.module, directions, lm.text_losses)(batch).products
    with GradientProducts(lm.module, directions, lm.text_losses, norms=True) as engine:
        assert _error(engine(batch).products, slow) < 2e-2


def test_the_padded_copy_of_a_tensor_is_never_larger_than_the_tensor(make_module):
    lm = _lm(make_module("llama"))
    rows = [{"input_ids": [7 + number] * length} for number, length in enumerate((60, *range(1, 30), *[2] * 20))]
    batch = _packed_batch(lm, rows)
    layout, tensor = TextLayout(batch), torch.randn(*batch.model_shape, 3)
    assert batch.input_ids.numel() > 4 * batch.packed.input_ids.numel()
    parts = [layout.by_text(tensor, texts) for texts in layout.groups()]
    assert all(part.numel() <= tensor.numel() for part in parts)
    assert sum(len(part) for part in parts) == len(rows)
    total = torch.stack([tensor.reshape(-1, 3)[layout.owners == text].sum(0) for text in range(len(rows))])
    torch.testing.assert_close(layout.sum_by_text(tensor, dtype=torch.float32), total)


LABELS = [
    *(
        (kind, method, options)
        for kind in ("gpt2", "neox", "llama", "qwen2", "mistral", "mixtral")
        for method, options in (
            ("grad_dot", {"statistics": True}),
            ("two_forward", {}),
            ("ekfac", {}),
            ("less", {}),
        )
    ),
    ("gpt2", "grad_dot", {"max_grad_norm": 0.5, "text_loss": "sum"}),
    ("gpt2", "grad_dot", {"update": "adam"}),
    ("gpt2", "grad_dot", {"per_text": True}),
    ("gpt2", "one_step", {}),
    ("gpt2", "in_context", {"separator": "none"}),
]


@pytest.mark.filterwarnings("error::oracle.gradients.text_products.SlowRouteWarning")
@pytest.mark.filterwarnings("error::oracle.gradients.text_products.UnpackedWarning")
@pytest.mark.parametrize(("kind", "method", "options"), LABELS, ids=str)
def test_labels_are_those_without_packing(kind, method, options, make_module, make_token_texts, make_adamw, tmp_path):
    module = make_module(kind)
    optimizer = make_adamw(module, make_token_texts(4, seed=11))
    sample = [{"labels": r["input_ids"], **r} for r in [*make_token_texts(8, seed=3), *_masked(make_token_texts(5, seed=5))]]
    targets = {"one": make_token_texts(6, seed=8), "two": _masked(make_token_texts(5, seed=9))}
    if method == "ekfac":
        fit_factors(_lm(module), make_token_texts(10, seed=12), tmp_path / "factors")
        options = {"factors": str(tmp_path / "factors")}
    is_divisible = method not in ("less", "one_step") and options.get("similarity") != "cosine"
    found = []
    for packing in (False, True):
        lm = _lm(module, optimizer=optimizer, packing=packing)
        found.append(oracle.label(lm, sample, targets, method=method, per="token" if is_divisible else "text", **options))
    plain, packed = found
    assert packed.text_ids == plain.text_ids and packed.units == plain.units
    scale = np.abs(plain.values).max(0)
    assert (np.abs(packed.values - plain.values) / scale).max() < 1e-4
    assert (np.abs(packed.halves - plain.halves) / scale).max() < 2e-4
    assert not np.array_equal(packed.values, plain.values)  # other batches, so other rounding: rows were packed
    for name, column in plain.columns.items():
        np.testing.assert_allclose(packed.columns[name], column, rtol=1e-4, atol=1e-4 * np.abs(column).max())


def test_the_blocks_of_a_stored_run_may_be_packed_or_not(make_module, make_token_texts, tmp_path):
    module, sample, targets = make_module("llama"), make_token_texts(8, seed=3), {"one": make_token_texts(4, seed=8)}
    first = oracle.label(_lm(module), sample[:4], targets, method="grad_dot", workdir=tmp_path)
    again = oracle.label(_lm(module, packing=True), sample, targets, method="grad_dot", workdir=tmp_path)
    assert np.array_equal(again.values[:4], first.values)


def test_factors_are_those_without_packing(make_module, make_token_texts):
    module, texts = make_module("gpt2"), make_token_texts(12, seed=3)
    plain, packed = (fit_factors(_lm(module, packing=packing), texts) for packing in (False, True))
    assert [layer.weight for layer in packed.layers] == [layer.weight for layer in plain.layers]
    for name, curvature in plain.curvature.items():
        torch.testing.assert_close(packed.curvature[name].sum(), curvature.sum(), rtol=1e-4, atol=0)
    for layer in plain.layers:
        probe = torch.randn(1, layer.num_outputs, layer.num_inputs, generator=torch.Generator().manual_seed(0))
        expected = plain.precondition(layer, probe, 1e-2)
        torch.testing.assert_close(
            packed.precondition(layer, probe, 1e-2), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )


def test_differences_of_losses_in_packed_rows_are_those_of_each_text_alone_in_float64(make_module, make_token_texts):
    lm = _lm(make_module("gpt2").double(), packing=True)
    rows = _rows(make_token_texts)
    directions = {name: direction.double() for name, direction in _directions(lm.module, 1).items()}
    batch = _packed_batch(lm, rows)
    differences = CentralDifference(lm, directions)
    differences.add_step(batch, name="own")
    found, _ = differences.measure(lm.encode(rows))
    expected, _ = _plain_loop(lm, directions, batch)
    assert _error(torch.from_numpy(found)[batch.positions], expected) < 1e-5


class _Unused(torch.nn.Module):
    """The weight of an inner module is used, and the module is not called."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return functional.linear(x, self.inner.weight)


@pytest.mark.parametrize(("kind", "rerun"), [("llama4", 2), ("llama", 1)])
def test_a_module_that_no_rule_covers_is_run_again_for_each_text_of_a_row(kind, rerun, make_module, make_token_texts):
    module = make_module(kind)
    lm, encoded = _lm(module, packing=True), _lm(module).encode(_rows(make_token_texts))
    name = "model.layers.1.self_attn.q_proj.weight"
    if kind == "llama":
        module.model.layers[1].self_attn.q_proj = _Unused(module.model.layers[1].self_attn.q_proj)
        name = name.replace("q_proj", "q_proj.inner")
    products = TextProducts(lm, _directions(module), norms=True)
    while products._fast.moved_up.get(name) != "model.layers.1.self_attn":  # the attention itself, with mask and positions
        assert products._fast.move_up([name])
    _compare(products, encoded)
    facts = products.facts()
    assert facts["route"] == "batched" and not facts["unpacked_because"] and facts["self_check_relative_error"] < 1e-5
    assert name in facts["rerun_per_text"]["names"] and facts["rerun_per_text"]["num_tensors"] >= rerun


class _Mixer(torch.nn.Module):
    """Sums over the tokens before, of which a matrix for each pair of tokens tells; no rule knows its weight."""

    def __init__(self, size, generator):
        super().__init__()
        self.weight = torch.nn.Parameter(0.3 * torch.randn(1, size, size, generator=generator))

    def forward(self, x, sees):  # (R, M, F), (R, M, M)
        return x + sees @ x @ self.weight[0]


class _Model(torch.nn.Module):
    """A small model that keeps the texts of a row apart by a mask (R, M, M), which cannot be told from other tensors."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.embed, self.mixer, self.head = torch.nn.Embedding(211, 16), _Mixer(16, generator), torch.nn.Linear(16, 211)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, position_ids=None, use_cache=False):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        text = (position_ids == 0).cumsum(1)
        sees = (text.unsqueeze(1) == text.unsqueeze(2)).float().tril()
        return type("Output", (), {"logits": self.head(self.mixer(self.embed(input_ids), sees / sees.sum(2, keepdim=True)))})()


def test_where_a_module_is_not_covered_in_packed_rows_they_are_unpacked_with_a_warning(make_token_texts):
    torch.manual_seed(0)
    lm = _lm(_Model(), packing=True)
    products, encoded = TextProducts(lm, _directions(lm.module), norms=True), lm.encode(_rows(make_token_texts))
    with pytest.warns(UnpackedWarning, match="one per row"):
        _compare(products, encoded)
    facts = products.facts()
    assert facts["route"] == "batched" and "_Mixer" in facts["unpacked_because"]


def test_products_given_to_the_wrong_text_of_a_row_are_seen(make_module, make_token_texts, monkeypatch):
    lm, gather = _lm(make_module("llama"), packing=True), TextLayout.by_text

    def swapped(self, tensor, texts=None):
        found = gather(self, tensor, texts)
        return found if self.packed is None else found.flip(0)

    monkeypatch.setattr(TextLayout, "by_text", swapped)
    products = TextProducts(lm, _directions(lm.module))
    with pytest.warns(UnpackedWarning):
        products.measure(lm.encode(_rows(make_token_texts)))
    assert "self-check error" in products.facts()["unpacked_because"]


@pytest.mark.parametrize(("kind", "options"), [("qwen3", {}), ("phi", {"qk_layernorm": True})])
def test_as_many_heads_as_positions_are_no_reason_for_wrong_products(kind, options, make_module, make_token_texts):
    lm = _lm(make_module(kind, **options), packing=True)  # four heads; qwen3's norms see them behind the positions, phi's before
    rows, short = _rows(make_token_texts), [{"input_ids": [number, 3, 4, 5][: 2 + number % 3]} for number in range(7, 19)]
    products = TextProducts(lm, _directions(lm.module), norms=True)
    for texts in (rows, short):  # the first batch is checked, the second is not
        _compare(products, lm.encode(texts))
    assert next(lm.batches(lm.encode(short))).packed.input_ids.shape[1] == 4 and products.facts()["route"] == "batched"
