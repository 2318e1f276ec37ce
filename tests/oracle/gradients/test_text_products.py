"""Which route the products take, and what the facts say of it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional

from oracle.gradients import text_products
from oracle.gradients.text_products import SlowRouteWarning, TextProducts
from oracle.language_model import LanguageModel


def _directions(module, num_directions=2):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(num_directions, *p.shape, generator=generator) for name, p in module.named_parameters()}


def _compare(lm, texts, **options):
    """Return the facts, after a look at whether values and norms are those of the plain loop."""
    encoded, directions = lm.encode(texts), _directions(lm.module)
    products = TextProducts(lm, directions, norms=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowRouteWarning)
        found = products.measure(encoded)
    expected = TextProducts(lm, directions, norms=True, per_text=True, **options).measure(encoded)
    assert (np.abs(found.products - expected.products) / np.abs(expected.products).max(0)).max() < 1e-4
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-4)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    return products.facts()


@pytest.mark.parametrize(
    ("kind", "some_name"), [("mamba", "conv1d.weight"), ("gpt_oss", "sinks"), ("llama4", "experts.down_proj")]
)
def test_what_no_rule_covers_is_run_again_for_each_text_and_the_rest_is_not(kind, some_name, make_module, make_token_texts):
    facts = _compare(LanguageModel(make_module(kind), max_tokens=64), make_token_texts(9, seed=3))
    assert facts["route"] == "batched"
    assert facts["self_check_relative_error"] < 1e-5
    rerun = facts["rerun_per_text"]
    assert any(some_name in name for name in rerun["names"])
    assert 0 < rerun["num_parameters"] < facts["covered_parameters"]
    assert rerun["share"] == pytest.approx(rerun["num_parameters"] / facts["covered_parameters"])
    assert facts["forced_the_slow_route"]["num_parameters"] == 0


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen2_moe"])
def test_where_every_module_has_a_rule_nothing_is_run_again(kind, make_module, make_token_texts):
    facts = _compare(LanguageModel(make_module(kind), max_tokens=64), make_token_texts(9, seed=3))
    assert facts["route"] == "batched"
    assert facts["rerun_per_text"]["num_parameters"] == facts["forced_the_slow_route"]["num_parameters"] == 0
    assert facts["covered_share"] == 1.0


class _Unused(torch.nn.Module):
    """The weight of an inner module is used, and the module is not called."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return functional.linear(x, self.inner.weight)


def test_a_module_that_is_not_called_is_seen_also_where_its_products_are_negligible(make_module, make_token_texts):
    module = make_module("llama")
    module.model.layers[1].mlp.up_proj = _Unused(module.model.layers[1].mlp.up_proj)
    lm, directions = LanguageModel(module, max_tokens=64), _directions(module)
    directions["model.layers.1.mlp.up_proj.inner.weight"] *= 1e-9
    encoded = lm.encode(make_token_texts(9, seed=3))
    products = TextProducts(lm, directions, norms=True)
    found = products.measure(encoded)
    assert products.facts()["rerun_per_text"]["names"] == ["model.layers.1.mlp.up_proj.inner.weight"]
    expected = TextProducts(lm, directions, norms=True, per_text=True).measure(encoded)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-4)


def test_a_weight_used_outside_its_module_forces_the_slow_route_and_is_named(make_module, make_token_texts):
    lm = LanguageModel(make_module("llama"), max_tokens=64)

    def losses(batch):
        weight = lm.module.get_input_embeddings().weight
        return lm.text_losses(batch) + weight[batch.input_ids].square().mean((1, 2))

    facts = _compare(lm, make_token_texts(9, seed=3), losses=losses)
    assert facts["route"].startswith("per_text")
    size = lm.module.get_input_embeddings().weight.numel()
    assert facts["forced_the_slow_route"] == {
        "num_parameters": size,
        "share": size / lm.num_parameters,
        "num_tensors": 1,
        "names": ["model.embed_tokens.weight"],
    }


def test_a_module_that_gathers_tokens_across_texts_forces_the_slow_route_and_is_named(
    make_module, make_token_texts, without_first_token
):
    module = make_module("llama")
    module.lm_head = without_first_token(module.lm_head)
    lm = LanguageModel(module, max_tokens=64)
    with pytest.warns(SlowRouteWarning, match="one backward pass per text"):
        TextProducts(lm, _directions(module)).measure(lm.encode(make_token_texts(4, seed=3)))
    facts = _compare(lm, make_token_texts(9, seed=3))
    assert facts["route"].startswith("per_text")
    assert facts["forced_the_slow_route"]["names"] == ["lm_head.inner.weight"]
    assert facts["rerun_per_text"]["num_parameters"] == 0


def test_automatic_mixed_precision_is_no_reason_for_the_slow_route(make_module, make_token_texts):
    lm = LanguageModel(make_module("llama"), max_tokens=64)
    products = TextProducts(lm, _directions(lm.module))
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error", SlowRouteWarning)
        products.measure(lm.encode(make_token_texts(9, seed=3)))
    assert products.facts()["route"] == "batched"
    assert 1e-6 < products.facts()["self_check_relative_error"] < 0.05


def test_a_check_that_was_interrupted_is_made_again(make_module, make_token_texts, monkeypatch):
    """A device that runs out of memory in the check gets smaller batches, and the same method goes on."""
    lm = LanguageModel(make_module("mamba"), max_tokens=64)
    products, check = TextProducts(lm, _directions(lm.module)), text_products.check_products
    calls = []

    def fails(engine, batch):  # the second time, when the first check has moved parameters up
        calls.append(batch)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return check(engine, batch)

    monkeypatch.setattr(text_products, "check_products", fails)
    with pytest.raises(torch.OutOfMemoryError):
        products.measure(lm.encode(make_token_texts(3, seed=3)))
    assert products.facts()["self_check_relative_error"] is None
    monkeypatch.setattr(text_products, "check_products", check)
    products.measure(lm.encode(make_token_texts(3, seed=3)))
    assert products.facts()["self_check_relative_error"] < 1e-5


def test_a_check_on_a_single_text_is_made_again_on_several(make_module, make_token_texts, monkeypatch):
    lm, checked = LanguageModel(make_module("llama"), max_tokens=64), []
    check = text_products.check_products
    monkeypatch.setattr(
        text_products, "check_products", lambda engine, batch: checked.append(len(batch.input_ids)) or check(engine, batch)
    )
    products = TextProducts(lm, _directions(lm.module))
    for count in (1, 1, 3, 1, 5):
        products.measure(lm.encode(make_token_texts(count, seed=3)))
    assert checked == [1, 3]


class _HeadThatIsTheEmbedding(torch.nn.Module):
    """A head that uses the embedding's weight without calling the embedding."""

    def __init__(self, embedding):
        super().__init__()
        self.uses = [embedding]  # in a list: no module of this one

    def forward(self, x):
        return functional.linear(x, self.uses[0].weight)


def _without_targets(num_texts):
    """Prompts that are longer than the 64 tokens that are read."""
    return [{"input_ids": [*range(3, 72), 3 + i], "labels": [-100] * 69 + [5]} for i in range(num_texts)]


@pytest.mark.parametrize("packing", [False, True])
def test_texts_whose_targets_were_cut_off_are_no_check(packing, make_module, make_token_texts):
    """They are the longest ones, and come first."""
    module = make_module("llama")
    module.lm_head = _HeadThatIsTheEmbedding(module.get_input_embeddings())
    lm = LanguageModel(module, max_tokens=64, packing=packing)
    first, rest = lm.encode(_without_targets(6)), lm.encode(make_token_texts(9, seed=3))
    directions = _directions(module)
    products = TextProducts(lm, directions)
    assert not products.measure(first).products.any()
    assert products.facts()["self_check_relative_error"] is None
    with pytest.warns((SlowRouteWarning, text_products.UnpackedWarning), match="used outside its own module"):
        found = products.measure(rest).products
    expected = TextProducts(lm, directions, per_text=True).measure(rest).products
    assert (np.abs(found - expected) / np.abs(expected).max(0)).max() < 1e-4


@pytest.mark.parametrize("packing", [False, True])
def test_one_text_among_those_without_targets_counts_as_one_text(packing, make_module, make_token_texts, monkeypatch):
    """It cannot show that products are given to the wrong text, so the check is made again on several."""
    lm, checked = LanguageModel(make_module("llama"), max_tokens=64, packing=packing), []
    cut, others = lm.encode(_without_targets(6)), lm.encode(make_token_texts(9, seed=3))
    check = text_products.check_products
    monkeypatch.setattr(
        text_products, "check_products", lambda engine, batch: checked.append(len(batch.input_ids)) or check(engine, batch)
    )
    products = TextProducts(lm, _directions(lm.module))
    num_checks = []
    for texts in ([*cut, *others[:1]], others, [*cut, *others[:1]], others):
        products.measure(texts)
        num_checks.append(len(checked))
    assert num_checks[0] < num_checks[1] == num_checks[2] == num_checks[3]


@pytest.mark.parametrize("per_text", [False, True])
def test_what_is_observed_is_in_the_order_of_the_texts(per_text, make_module, make_token_texts):
    lm = LanguageModel(make_module("llama"), max_tokens=64)
    encoded = lm.encode(make_token_texts(9, seed=3))

    def observe(batch, logits):
        assert not logits.requires_grad and logits.shape[:2] == batch.input_ids.shape
        return torch.stack([batch.input_ids[:, 0].float(), logits[:, 0, 7]], dim=1)

    found = TextProducts(lm, _directions(lm.module), observe=observe, per_text=per_text).measure(encoded)
    assert found.observed[:, 0].tolist() == [text.input_ids[0] for text in encoded]
    with torch.no_grad():
        for text, value in zip(encoded, found.observed[:, 1], strict=True):
            assert value == pytest.approx(float(lm.module(input_ids=torch.tensor([text.input_ids])).logits[0, 0, 7]), abs=1e-5)
    assert not lm.module._forward_hooks


ADAPTERS = [
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ("llama", {"target_modules": ["embed_tokens", "down_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "use_dora": True}),
]


@pytest.mark.parametrize(("kind", "options"), ADAPTERS, ids=str)
def test_adapters_of_peft_are_covered(kind, options, make_module, make_token_texts):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.5, task_type="CAUSAL_LM", **options)
    module = peft.get_peft_model(make_module(kind), config).eval()
    lm = LanguageModel(module, max_tokens=64)
    encoded = lm.encode(make_token_texts(9, seed=3))
    directions = {name: torch.randn(2, *p.shape) for name, p in module.named_parameters() if p.requires_grad}
    products = TextProducts(lm, directions)
    found, expected = products.measure(encoded).products, TextProducts(lm, directions, per_text=True).measure(encoded).products
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert products.facts()["route"] == "batched"
