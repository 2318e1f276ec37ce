"""Encoding masks, losses and what a LanguageModel refuses."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

import oracle
from oracle.checkpoints import place_state
from oracle.encoding import IGNORED
from oracle.errors import InputError, InputTypeError

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs.",
    "How vexingly quick daft zebras jump!",
]


@pytest.fixture(scope="module")
def lm(make_module, make_tokenizer):
    tokenizer = make_tokenizer(SENTENCES)
    return oracle.LanguageModel(make_module("llama", vocab_size=300), tokenizer, max_tokens=64)


def _predicted(text, tokenizer):
    return tokenizer.decode([label for label in text.labels if label != IGNORED])


def test_losses_equal_those_of_transformers_text_by_text_in_the_given_order(lm):
    expected = []
    for sentence in SENTENCES:
        ids = torch.tensor([lm.tokenizer(sentence)["input_ids"]])
        expected.append(float(lm.module(input_ids=ids, labels=ids).loss.detach()))
    np.testing.assert_allclose(lm.losses(SENTENCES), expected, rtol=1e-5)


def test_only_the_completion_is_predicted(lm):
    text = lm.encode([{"prompt": "The quick brown", "completion": " fox jumps"}])[0]
    assert _predicted(text, lm.tokenizer) == " fox jumps"
    assert lm.tokenizer.decode(text.input_ids) == "The quick brown fox jumps"


def test_only_the_assistants_turns_are_predicted(lm, monkeypatch):
    messages = [
        {"role": "user", "content": "fox?"},
        {"role": "assistant", "content": "brown fox"},
        {"role": "user", "content": "dog?"},
        {"role": "assistant", "content": "lazy dog"},
    ]
    with pytest.raises(InputError, match="chat template"):
        lm.encode([{"messages": messages}])
    monkeypatch.setattr(lm.tokenizer, "chat_template", CHAT_TEMPLATE)
    text = lm.encode([{"messages": messages}])[0]
    assert _predicted(text, lm.tokenizer) == "brown fox<eos>lazy dog<eos>"
    assert lm.tokenizer.decode(text.input_ids).count("<user>") == 2


def test_labels_of_token_ids_are_kept(lm):
    text = lm.encode([{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}])[0]
    assert text.labels == [-100, -100, 7, 8] and text.num_targets == 2


def test_a_text_does_not_depend_on_its_batch(lm):
    together = lm.losses(SENTENCES)
    alone = np.concatenate([lm.losses([sentence]) for sentence in SENTENCES])
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_batches_respect_the_token_limit_and_hold_every_text_once(lm, make_token_texts):
    encoded = lm.encode(make_token_texts(30, seed=1))
    batches = list(lm.batches(encoded, batch_tokens=100))
    assert all(batch.input_ids.numel() <= 100 for batch in batches)
    assert sorted(position for batch in batches for position in batch.positions) == list(range(30))


def test_save_and_load_keep_weights_tokenizer_and_optimiser_state(
    make_module, make_tokenizer, make_token_texts, make_adamw, tmp_path
):
    for kind in ("neox", "llama"):  # transformers renames the output layer of NeoX on saving
        module = make_module(kind, vocab_size=300)
        lm = oracle.LanguageModel(
            module, make_tokenizer(SENTENCES), make_adamw(module, make_token_texts(4, seed=0)), max_tokens=64
        )
        lm.save(tmp_path / kind)
        loaded = oracle.LanguageModel.from_pretrained(tmp_path / kind, max_tokens=64)
        assert loaded.fingerprint(optimizer=True) == lm.fingerprint(optimizer=True)
        assert loaded.optimizer.param_groups[0]["lr"] == lm.optimizer.param_groups[0]["lr"]
        np.testing.assert_array_equal(loaded.losses(SENTENCES), lm.losses(SENTENCES))
        assert not list((tmp_path / kind).glob("*.p*t*kl*")) and not list((tmp_path / kind).glob("*.bin"))


def test_the_optimiser_state_of_a_trainer_checkpoint_is_matched_by_name(make_module, tmp_path):
    from transformers.trainer_pt_utils import get_parameter_names

    module = make_module("neox")
    decayed = set(
        get_parameter_names(
            module, [torch.nn.LayerNorm], [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
        )
    )
    groups = [
        {"params": [p for n, p in module.named_parameters() if n in decayed], "weight_decay": 0.1},
        {"params": [p for n, p in module.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-4)
    ids = torch.tensor([[5, 6, 7, 8]])
    module(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    module.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = oracle.LanguageModel.from_pretrained(tmp_path, max_tokens=64)
    wanted = {n: optimizer.state[p]["exp_avg_sq"] for n, p in module.named_parameters()}
    for name, parameter in loaded.module.named_parameters():
        torch.testing.assert_close(loaded.optimizer.state[parameter]["exp_avg_sq"], wanted[name], rtol=0, atol=0)
    assert [group["weight_decay"] for group in loaded.optimizer.param_groups] == [0.1, 0.0]


def test_the_fingerprint_changes_with_one_bit_of_weights_or_optimiser(make_module, make_token_texts, make_adamw):
    module = make_module("llama")
    lm = oracle.LanguageModel(module, optimizer=make_adamw(module, make_token_texts(4, seed=0)), max_tokens=64)
    weights, both = lm.fingerprint(), lm.fingerprint(optimizer=True)
    next(iter(lm.optimizer.state.values()))["exp_avg"].view(-1)[0] += 1e-7
    assert lm.fingerprint() == weights and lm.fingerprint(optimizer=True) != both
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1e-3
    assert lm.fingerprint() != weights


def test_bfloat16_losses_are_close_to_float32(make_module, make_token_texts, tmp_path):
    module = make_module("neox")
    module.save_pretrained(tmp_path)
    rows = make_token_texts(5, seed=1)
    exact = oracle.LanguageModel(module, max_tokens=64).losses(rows)
    low = oracle.LanguageModel.from_pretrained(tmp_path, dtype=torch.bfloat16, max_tokens=64)
    assert next(low.module.parameters()).dtype == torch.bfloat16
    np.testing.assert_allclose(low.losses(rows), exact, rtol=2e-2)


def test_what_does_not_fit_is_refused(make_module, make_tokenizer, lm, tmp_path):
    with pytest.raises(InputError, match="embeddings"):
        oracle.LanguageModel(make_module("llama", vocab_size=100), make_tokenizer(SENTENCES), max_tokens=64)
    with pytest.raises(InputError, match="token id 299"):
        oracle.LanguageModel(make_module("llama"), max_tokens=64).encode([{"input_ids": [1, 299]}])
    with pytest.raises(InputError, match="context"):
        oracle.LanguageModel(make_module("llama"), max_tokens=65)
    with pytest.raises(InputTypeError, match="from_pretrained"):
        oracle.LanguageModel("gpt2")
    with pytest.raises(InputError, match="no tokenizer"):
        oracle.LanguageModel(make_module("llama"), max_tokens=64).encode(["text"])
    with pytest.raises(InputError, match="none of the model's parameters"):
        oracle.LanguageModel(
            make_module("llama"), optimizer=torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), max_tokens=64
        )
    with pytest.raises(InputError, match="cannot load a causal language model"):
        oracle.LanguageModel.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="float32, bfloat16"):
        oracle.LanguageModel.from_pretrained(tmp_path, dtype="fp8")
    for max_tokens in ("10", 10.5, True, 0):
        with pytest.raises(InputError, match="max_tokens="):
            oracle.LanguageModel(make_module("llama"), max_tokens=max_tokens)


@pytest.mark.parametrize(
    "change", [{"lr": 2e-3}, {"betas": (0.8, 0.999)}, {"eps": 1e-6}, {"weight_decay": 0.0}, {"maximize": True}], ids=str
)
def test_the_fingerprint_changes_with_every_hyper_parameter_of_the_optimiser(change, make_module):
    module = make_module("llama")
    prints = [
        oracle.LanguageModel(
            module, optimizer=torch.optim.AdamW(module.parameters(), **{"lr": 1e-3, **each}), max_tokens=64
        ).fingerprint(optimizer=True)
        for each in ({}, change, {"lr": torch.tensor(1e-3, dtype=torch.float64), "foreach": False}, {"lr": 0.001})
    ]
    assert prints[1] != prints[0] and prints[2] == prints[3] == prints[0]


def test_the_fingerprint_knows_optimisers_without_state_apart_and_which_parameters_they_step(make_module):
    module = make_module("llama")
    every, first = list(module.parameters()), [next(module.parameters())]
    optimizers = [
        torch.optim.SGD(every, lr=0.1),
        torch.optim.SGD(every, lr=0.1, momentum=0.9),
        torch.optim.SGD(first, lr=0.1),
        torch.optim.Adam(every, lr=0.1, weight_decay=0.01),
        torch.optim.AdamW(every, lr=0.1, weight_decay=0.01),
    ]
    prints = {oracle.LanguageModel(module, optimizer=each, max_tokens=64).fingerprint(optimizer=True) for each in optimizers}
    assert len(prints) == 5


def test_a_tensor_learning_rate_and_an_empty_slot_are_saved_and_fingerprinted(make_module, tmp_path):
    module = make_module("llama")
    lm = oracle.LanguageModel(module, optimizer=torch.optim.AdamW(module.parameters(), lr=torch.tensor(0.5)), max_tokens=64)
    lm.optimizer.state[next(module.parameters())]["momentum_buffer"] = None
    lm.save(tmp_path)
    loaded = oracle.LanguageModel.from_pretrained(tmp_path, max_tokens=64)
    assert loaded.optimizer.param_groups[0]["lr"] == 0.5
    assert loaded.fingerprint(optimizer=True) == lm.fingerprint(optimizer=True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_optimiser_state_of_another_optimiser_than_adam_is_refused(momentum, make_module, tmp_path):
    module = make_module("llama")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=momentum)
    ids = torch.tensor([[5, 6, 7, 8]])
    module(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    module.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match="not the state of Adam or AdamW"):
        oracle.LanguageModel.from_pretrained(tmp_path, max_tokens=64)


@pytest.mark.parametrize("is_capturable", [False, True])
def test_the_optimisers_state_goes_where_its_parameter_is(is_capturable):
    parameter = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    optimizer.param_groups[0]["capturable"] = is_capturable
    optimizer.state[parameter].update(step=torch.tensor(3.0), exp_avg=torch.ones(3), exp_avg_sq=torch.ones(3))
    place_state(optimizer)
    devices = {slot: value.device.type for slot, value in optimizer.state[parameter].items()}
    assert devices == {"step": "meta" if is_capturable else "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_a_model_that_moves_takes_its_optimisers_state_along(make_module, make_token_texts, make_adamw, monkeypatch):
    from oracle import language_model

    module, placed = make_module("llama"), []
    optimizer = make_adamw(module, make_token_texts(4, seed=0))
    monkeypatch.setattr(language_model, "place_state", placed.append)
    oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64, device="cpu")
    assert placed == [optimizer]


def test_the_optimiser_of_a_new_module_cannot_be_given_before_it_is_loaded():
    assert "optimizer" not in inspect.signature(oracle.LanguageModel.from_pretrained).parameters


def test_the_tokenizers_fingerprint_follows_its_rules_and_not_its_calls(make_module, make_tokenizer, tmp_path):
    lm = oracle.LanguageModel(make_module("llama", vocab_size=300), make_tokenizer(SENTENCES), max_tokens=64)
    first = lm.tokenizer_fingerprint()
    lm.tokenizer("Pack my box.", truncation=True, max_length=2)
    lm.save(tmp_path)
    assert lm.tokenizer_fingerprint() == first and len(first) == 16
    assert oracle.LanguageModel.from_pretrained(tmp_path, max_tokens=64).tokenizer_fingerprint() == first
    other = oracle.LanguageModel(lm.module, make_tokenizer([s[::-1] for s in SENTENCES]), max_tokens=64)
    assert len(other.tokenizer) == len(lm.tokenizer) and other.tokenizer_fingerprint() != first
    lm.tokenizer.chat_template = CHAT_TEMPLATE
    assert lm.tokenizer_fingerprint() != first
    assert oracle.LanguageModel(lm.module, max_tokens=64).tokenizer_fingerprint() == ""


def test_a_checkpoint_loaded_in_bfloat16_steps_with_moments_of_its_weights_type(
    make_module, make_token_texts, make_adamw, tmp_path
):
    module = make_module("llama")
    oracle.LanguageModel(module, optimizer=make_adamw(module, make_token_texts(4, seed=0)), max_tokens=64).save(tmp_path)
    low = oracle.LanguageModel.from_pretrained(tmp_path, dtype="bfloat16", max_tokens=64)
    types = {(slot, value.dtype) for slots in low.optimizer.state.values() for slot, value in slots.items()}
    assert types == {("step", torch.float32), ("exp_avg", torch.bfloat16), ("exp_avg_sq", torch.bfloat16)}
    labels = oracle.label(low, make_token_texts(2, seed=1), make_token_texts(2, seed=2), method="one_step")
    assert np.isfinite(labels.values).all()


def test_an_optimiser_of_other_parameters_too_is_not_saved(make_module, tmp_path):
    module, other = make_module("llama"), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([*module.parameters(), other], lr=1e-3)
    lm = oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64)
    other.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(InputError, match=r"1 parameters that are not the model's, first of shape \(3,\)"):
        lm.save(tmp_path / "checkpoint")
    assert not any(tmp_path.iterdir())
