"""The batched identity against plain loops in float64, one text at a time and without padding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from oracle.encoding import IGNORED
from oracle.gradients import module_rules
from oracle.gradients.general_rule import UncoveredModuleError
from oracle.gradients.products import GradientProducts, PerTextProducts, dot_in_blocks
from oracle.language_model import LanguageModel

ARCHITECTURES = [
    ("neox", {}),
    ("neox", {"tie_word_embeddings": True}),
    ("neox", {"use_parallel_residual": False}),
    ("gpt2", {}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("mixtral", {}),
    ("mixtral", {"experts_implementation": "eager", "tie_word_embeddings": True}),
    ("mixtral", {"experts_implementation": "batched_mm"}),
    ("qwen2_moe", {}),
    ("gpt_oss", {}),
    ("opt", {}),
    ("opt", {"tie_word_embeddings": False}),
    ("gemma", {}),
    ("gemma", {"tie_word_embeddings": False}),
    ("gemma2", {}),
    ("gemma3", {}),
    ("phi", {}),
    ("cohere", {}),
]


def _setting(kind, options, make_module, make_token_texts, *, num_directions, wanted=""):
    lm = LanguageModel(make_module(kind, **options), max_tokens=64, device="cpu")
    generator = torch.Generator().manual_seed(1)
    directions = {
        name: torch.randn(num_directions, *p.shape, generator=generator)
        for name, p in lm.module.named_parameters()
        if wanted in name
    }
    batch = next(lm.batches(lm.encode(make_token_texts(7, seed=3)), batch_tokens=10_000))
    return lm, directions, batch


def _plain_loop(lm, directions, batch):
    """Products and squared norms in float64: each text alone, without its padding, by one ordinary backward pass."""
    module = copy.deepcopy(lm.module).double()
    module.config._experts_implementation = "eager"  # the others take no float64
    parameters = {name: p for name, p in module.named_parameters() if name in directions}
    products, square_norms = [], []
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        length = max([1, *((labels != IGNORED).nonzero().flatten() + 1).tolist()])
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


@pytest.mark.parametrize(("kind", "options"), ARCHITECTURES, ids=str)
def test_products_and_norms_equal_a_plain_loop_in_float64(kind, options, make_module, make_token_texts):
    lm, directions, batch = _setting(kind, options, make_module, make_token_texts, num_directions=3)
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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["neox", "llama", "mistral"])
def test_the_kind_of_attention_makes_no_difference(kind, attention, make_module, make_token_texts):
    options = {"attn_implementation": attention}
    lm, directions, batch = _setting(kind, options, make_module, make_token_texts, num_directions=2)
    assert lm.module.config._attn_implementation == attention
    expected, _ = _plain_loop(lm, directions, batch)
    with GradientProducts(lm.module, directions, lm.text_losses) as engine:
        assert _error(engine(batch).products, expected) < 1e-4


@pytest.mark.parametrize(("kind", "wanted"), [("gpt2", "wpe"), ("opt", "embed_positions")])
def test_learned_positions_which_the_batch_shares_are_given_to_each_text(kind, wanted, make_module, make_token_texts):
    lm, directions, batch = _setting(kind, {}, make_module, make_token_texts, num_directions=2, wanted=wanted)
    expected, _ = _plain_loop(lm, directions, batch)
    with GradientProducts(lm.module, directions, lm.text_losses) as engine:
        assert _error(engine(batch).products, expected) < 1e-4


@pytest.mark.parametrize(
    ("kind", "wanted"), [("qwen2", "bias"), ("neox", "bias"), ("gpt_oss", "_bias"), ("gpt_oss", "router.bias")]
)
def test_biases_are_covered(kind, wanted, make_module, make_token_texts):
    lm, directions, batch = _setting(kind, {}, make_module, make_token_texts, num_directions=2, wanted=wanted)
    with GradientProducts(lm.module, directions, lm.text_losses, norms=True) as engine:
        fast = engine(batch)
    products, square_norms = _plain_loop(lm, directions, batch)
    assert _error(fast.products, products) < 1e-4
    torch.testing.assert_close(fast.square_norms, square_norms, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral"])
def test_tokens_that_are_not_predicted_have_no_share_of_the_loss(kind, make_module, make_token_texts):
    rows = make_token_texts(6, seed=3)
    for row in rows:
        row["labels"] = [token if place % 3 else IGNORED for place, token in enumerate(row["input_ids"])]
    rows.append({"input_ids": [4, 5, 6], "labels": [4, IGNORED, IGNORED]})  # the first token has nothing before it
    lm, directions, _ = _setting(kind, {}, make_module, make_token_texts, num_directions=2)
    batch = next(lm.batches(lm.encode(rows), batch_tokens=10_000))
    with GradientProducts(lm.module, directions, lm.text_losses, norms=True) as engine:
        fast = engine(batch)
    products, square_norms = _plain_loop(lm, directions, batch)
    assert _error(fast.products, products) < 1e-4
    torch.testing.assert_close(fast.square_norms, square_norms, rtol=1e-4, atol=1e-12)
    empty = batch.positions.index(6)
    assert not fast.products[empty].any() and not fast.square_norms[empty]


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "mixtral"])
def test_a_text_does_not_depend_on_its_batch(kind, make_module, make_token_texts):
    lm, directions, batch = _setting(kind, {}, make_module, make_token_texts, num_directions=2)
    encoded = lm.encode(make_token_texts(7, seed=3))
    with GradientProducts(lm.module, directions, lm.text_losses) as engine:
        together = engine(batch).products
        alone = torch.cat([engine(next(lm.batches([encoded[position]]))).products for position in batch.positions])
    assert _error(together, alone) < 1e-5


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


def test_many_directions_and_small_blocks_change_nothing(make_module, make_token_texts, monkeypatch):
    lm, directions, batch = _setting("llama", {}, make_module, make_token_texts, num_directions=40)
    with GradientProducts(lm.module, directions, lm.text_losses, norms=True) as engine:
        whole = engine(batch)
    monkeypatch.setattr(module_rules, "GRADIENT_BLOCK_BYTES", 1)  # one text of one layer at a time
    with GradientProducts(lm.module, directions, lm.text_losses, norms=True) as engine:
        blocked = engine(batch)
    assert _error(blocked.products, whole.products) < 1e-5
    assert _error(whole.products, PerTextProducts(lm.module, directions, lm.text_losses)(batch).products) < 1e-5
    torch.testing.assert_close(blocked.square_norms, whole.square_norms, rtol=1e-6, atol=0)


def test_blocked_dot_products_keep_float64_accuracy_over_a_million_elements():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.rand(2, 1_100_003, generator=generator), torch.rand(3, 1_100_003, generator=generator)
    exact = left.double() @ right.double().T
    assert ((dot_in_blocks(left, right) - exact).abs() / exact).max() < 1e-6


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("kind", ["neox", "llama", "gpt2", "mixtral"])
def test_bfloat16_is_as_good_as_one_bfloat16_backward_pass_per_text(kind, is_autocast, make_module, make_token_texts):
    """Several directions or norms multiply gradients like those of an ordinary pass; one direction is rounded too."""
    lm, directions, batch = _setting(kind, {}, make_module, make_token_texts, num_directions=2)
    exact = PerTextProducts(lm.module, directions, lm.text_losses)(batch).products
    if not is_autocast:
        lm.module.to(torch.bfloat16)
    for num_directions, norms, bound in ((2, False, 5e-3), (1, True, 5e-3), (1, False, 1e-2)):
        some = {name: direction[:num_directions] for name, direction in directions.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            slow = PerTextProducts(lm.module, some, lm.text_losses)(batch).products
            with GradientProducts(lm.module, some, lm.text_losses, norms=norms) as engine:
                fast = engine(batch).products
        assert 0 < _error(slow, exact[:, :num_directions]) < 0.1
        assert _error(fast, slow) < bound


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize(("kind", "options"), [("neox", {}), ("llama", {"tie_word_embeddings": True}), ("mixtral", {})], ids=str)
def test_gradient_checkpointing_changes_nothing(kind, options, is_reentrant, make_module, make_token_texts):
    lm, directions, batch = _setting(kind, options, make_module, make_token_texts, num_directions=2)
    expected = PerTextProducts(lm.module, directions, lm.text_losses, norms=True)(batch)
    lm.module.train()  # transformers checkpoints in training mode only; there is no dropout here
    lm.module.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    for norms in (False, True):
        with GradientProducts(lm.module, directions, lm.text_losses, norms=norms) as engine:
            fast = engine(batch)
        assert _error(fast.products, expected.products) < 1e-5
        if norms:
            torch.testing.assert_close(fast.square_norms, expected.square_norms, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_module_runs_as_it_is_written(in_place, make_module, make_token_texts):
    lm, directions, batch = _setting("llama", {}, make_module, make_token_texts, num_directions=2)
    expected = PerTextProducts(lm.module, directions, lm.text_losses)(batch).products
    module, prefix = lm.module, ""
    if in_place:
        module.compile(backend="aot_eager")
    else:
        module, prefix = torch.compile(lm.module, backend="aot_eager"), "_orig_mod."
    compiled = LanguageModel(module, max_tokens=64, device="cpu")
    module.requires_grad_(False)  # as the engine does it: nothing but the hooks is new to the compiled code
    compiled.text_losses(batch)
    own = {prefix + name: direction for name, direction in directions.items()}
    shapes = []

    def observe(batch, logits):
        shapes.append(logits.shape[:2])
        return logits.mean((1, 2)).unsqueeze(1)

    with GradientProducts(module, own, compiled.text_losses, observe=observe) as engine:
        found = engine(batch)
    assert _error(found.products, expected) < 1e-5
    assert shapes == [batch.input_ids.shape] and found.observed.shape == (7, 1)


class _Renamed(torch.nn.Module):
    """A model whose output layer has a name of its own and is in no list of known ones."""

    def __init__(self, module):
        super().__init__()
        self.config, self.core, self.odd_one = module.config, module.model, module.lm_head

    def get_input_embeddings(self):
        return self.core.get_input_embeddings()

    def forward(self, input_ids, use_cache=False):
        hidden = self.core(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        return type("Output", (), {"logits": self.odd_one(hidden)})()


def test_no_module_is_known_by_its_name(make_module, make_token_texts):
    lm, directions, batch = _setting("llama", {}, make_module, make_token_texts, num_directions=2)
    with GradientProducts(lm.module, directions, lm.text_losses) as engine:
        expected = engine(batch).products
    renamed = LanguageModel(_Renamed(lm.module), max_tokens=64, device="cpu")
    own = {
        name.replace("lm_head", "odd_one") if "lm_head" in name else name.replace("model.", "core.", 1): direction
        for name, direction in directions.items()
    }
    with GradientProducts(renamed.module, own, renamed.text_losses) as engine:
        assert torch.equal(engine(batch).products, expected)


class _LoraLinear(torch.nn.Module):
    """A frozen linear layer beside a trainable product of two small ones."""

    def __init__(self, base, generator, rank=3):
        super().__init__()
        self.base = base
        self.a, self.b = torch.nn.Linear(base.in_features, rank, bias=False), torch.nn.Linear(rank, base.out_features, bias=False)
        with torch.no_grad():
            for layer in (self.a, self.b):
                layer.weight.copy_(0.3 * torch.randn(layer.weight.shape, generator=generator))

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def test_adapters_beside_frozen_layers_are_covered_alone(make_module, make_token_texts):
    module, generator = make_module("llama"), torch.Generator().manual_seed(5)
    module.requires_grad_(False)
    for layer in module.model.layers:
        layer.self_attn.q_proj = _LoraLinear(layer.self_attn.q_proj, generator)
        layer.mlp.down_proj = _LoraLinear(layer.mlp.down_proj, generator)
    lm = LanguageModel(module, max_tokens=64, device="cpu")
    directions = {name: torch.randn(2, *p.shape, generator=generator) for name, p in module.named_parameters() if p.requires_grad}
    assert len(directions) == 8
    batch = next(lm.batches(lm.encode(make_token_texts(7, seed=3)), batch_tokens=10_000))
    with GradientProducts(module, directions, lm.text_losses, norms=True) as engine:
        fast = engine(batch)
    products, square_norms = _plain_loop(lm, directions, batch)
    assert _error(fast.products, products) < 1e-4
    torch.testing.assert_close(fast.square_norms, square_norms, rtol=1e-4, atol=0)


def test_a_direction_for_no_parameter_is_an_error(make_module, make_token_texts):
    lm, _, batch = _setting("llama", {}, make_module, make_token_texts, num_directions=1)
    with (
        pytest.raises(ValueError, match="no module holds"),
        GradientProducts(lm.module, {"nothing.weight": torch.zeros(1, 3)}, lm.text_losses) as engine,
    ):
        engine(batch)
    assert not any(module._forward_hooks for module in lm.module.modules())


def test_a_module_that_gathers_tokens_is_refused(make_module, make_token_texts, without_first_token):
    lm, directions, batch = _setting("llama", {}, make_module, make_token_texts, num_directions=1)
    layer = lm.module.model.layers[0].mlp
    layer.up_proj = without_first_token(layer.up_proj)
    own = {name.replace("0.mlp.up_proj", "0.mlp.up_proj.inner"): direction for name, direction in directions.items()}
    with pytest.raises(UncoveredModuleError) as caught, GradientProducts(lm.module, own, lm.text_losses) as engine:
        engine(batch)
    assert caught.value.parameters == ["model.layers.0.mlp.up_proj.inner.weight"]
    assert not any(module._forward_hooks for module in lm.module.modules())
