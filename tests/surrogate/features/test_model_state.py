"""`model_state`: its last-layer influence is exact, its statistics are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from oracle.errors import InputTypeError
from surrogate.feature_cache import FeatureCache
from surrogate.features.model_state import STATISTICS, ModelState


@pytest.fixture
def setting(make_module, make_token_texts):
    lm = oracle.LanguageModel(make_module("neox"), max_tokens=64)
    return (
        lm,
        oracle.read_texts(make_token_texts(9, seed=1)),
        {"a": make_token_texts(4, seed=2), "b": make_token_texts(3, seed=3)},
    )


@pytest.mark.parametrize("has_adam", [False, True])
@pytest.mark.parametrize("kind", ["neox", "llama", "opt", "gemma", "gemma2", "gemma3", "phi", "cohere"])
def test_last_layer_influence_is_grad_dot_restricted_to_the_output_layer(
    kind, has_adam, setting, make_module, make_token_texts, make_adamw
):
    _, texts, targets = setting
    lm = oracle.LanguageModel(make_module(kind, tie_word_embeddings=False), max_tokens=64)
    if has_adam:
        lm.optimizer = make_adamw(lm.module, make_token_texts(4, seed=0))
    encoder = ModelState(model=lm, targets=targets)
    names = encoder.feature_names()
    features = encoder.encode(texts)
    head = lm.module.get_output_embeddings()
    for parameter in lm.module.parameters():
        parameter.requires_grad_(any(parameter is own for own in head.parameters()))
    expected = oracle.label(lm, texts, targets, method="grad_dot", per_text=True)
    scale = expected.meta["facts"]["step_size"] or 1.0
    for name in targets:
        own = features[:, names.index(f"last_layer.{name}")]
        np.testing.assert_allclose(own * scale, expected.target(name), rtol=1e-3, atol=1e-4 * np.abs(expected.target(name)).max())


def test_states_and_statistics_equal_a_plain_computation(setting):
    lm, texts, _ = setting
    encoder = ModelState(model=lm, min_k=0.5)
    features, names = encoder.encode(texts), encoder.feature_names()
    assert features.shape == (len(texts), len(names))
    row = 3
    ids = torch.tensor([texts[row]["input_ids"]])
    hidden = lm.module.get_input_embeddings()(ids).detach()
    captured = []
    handle = lm.module.get_output_embeddings().register_forward_pre_hook(lambda m, a: captured.append(a[0]))
    logits = lm.module(input_ids=ids).logits[0, :-1].detach()
    handle.remove()
    hidden = captured[0][0, :-1].detach()
    log_p = torch.log_softmax(logits, -1)
    own = log_p[torch.arange(len(log_p)), ids[0, 1:]]
    errors = log_p.exp()
    errors[torch.arange(len(log_p)), ids[0, 1:]] -= 1
    worst = own.sort().values[: int(np.ceil(len(own) * 0.5))]
    expected = {
        "mean_loss": -own.mean(),
        "std_loss": own.std(correction=0),
        "max_loss": -own.min(),
        "min_k": worst.mean(),
        "entropy": -(log_p.exp() * log_p).sum(-1).mean(),
        "error_norm": errors.norm(dim=-1).mean(),
        "log_num_tokens": np.log1p(len(own)),
        "hidden.5": hidden[:, 5].mean(),
        "hidden_rms.5": hidden[:, 5].square().mean().sqrt(),
        "error.7": (errors @ lm.module.get_output_embeddings().weight)[:, 7].mean().detach(),
    }
    for name, value in expected.items():
        assert features[row, names.index(name)] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("kind", ["neox", "gemma2", "cohere"])
def test_the_mean_error_state_is_the_gradient_at_the_output_layers_input(kind, setting, make_module):
    _, texts, _ = setting
    lm = oracle.LanguageModel(make_module(kind), max_tokens=64)
    encoder = ModelState(model=lm)
    names = encoder.feature_names()
    first = names.index("error.0")
    ids = torch.tensor([texts[0]["input_ids"]])
    inputs = []

    def keep(module, args):
        inputs.append(args[0])
        args[0].retain_grad()

    handle = lm.module.get_output_embeddings().register_forward_pre_hook(keep)
    lm.module(input_ids=ids, labels=ids).loss.backward()
    handle.remove()
    gradient = inputs[0].grad[0].sum(0).numpy()  # of the mean loss: already divided by the number of predicted tokens
    np.testing.assert_allclose(encoder.encode(texts)[0, first : first + len(gradient)], gradient, rtol=1e-3, atol=1e-6)


def test_a_text_does_not_depend_on_its_batch_and_the_model_is_left_alone(setting):
    lm, texts, targets = setting
    lm.module.train()
    before = lm.fingerprint()
    encoder = ModelState(model=lm, targets=targets)
    whole = encoder.encode(texts)
    alone = np.concatenate([encoder.encode(texts.select([row])) for row in range(len(texts))])
    np.testing.assert_allclose(whole, alone, rtol=1e-4, atol=1e-5)
    assert lm.fingerprint() == before and lm.module.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in lm.module.modules())
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in lm.module.parameters())


def test_the_cache_is_keyed_with_checkpoint_and_targets(setting, tmp_path):
    lm, texts, targets = setting
    cache = FeatureCache(tmp_path)
    first = cache.features(ModelState(model=lm, targets=targets), texts)
    key = ModelState(model=lm, targets=targets).key()
    assert ModelState(model=lm, targets={"a": targets["a"]}).key() != key
    with torch.no_grad():
        lm.module.get_output_embeddings().weight.mul_(1.1)
    assert ModelState(model=lm, targets=targets).key() != key
    second = cache.features(ModelState(model=lm, targets=targets), texts)
    assert not np.allclose(first, second)
    assert len(list(tmp_path.iterdir())) == 2


def test_target_directions_follow_the_weights(setting, tmp_path):
    lm, texts, targets = setting
    encoder = ModelState(model=lm, targets=targets, states=False)
    first = FeatureCache(tmp_path).features(encoder, texts)
    optimizer = torch.optim.SGD(lm.module.parameters(), lr=0.5)
    lm.text_losses(next(lm.batches(lm.encode(texts)))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    second = FeatureCache(tmp_path).features(encoder, texts)
    fresh = ModelState(model=lm, targets=targets, states=False).encode(texts)
    np.testing.assert_array_equal(second, fresh)
    assert not np.allclose(first, fresh)


def test_the_key_covers_how_texts_become_ids(make_module, make_tokenizer):
    module = make_module("neox", vocab_size=300)
    one, two = make_tokenizer(["abc abd abe"] * 5), make_tokenizer(["xyz xyw xyv"] * 5)
    models = [
        oracle.LanguageModel(module, tokenizer, max_tokens=max_tokens)
        for tokenizer, max_tokens in ((one, 64), (one, 32), (two, 64), (None, 64))
    ]
    assert len({ModelState(model=lm).key() for lm in models}) == len(models)


@pytest.mark.parametrize("how", ["frozen", "empty slots"])
def test_an_output_layer_without_adam_state_has_the_plain_product(how, setting, make_token_texts, make_adamw):
    lm, texts, targets = setting
    head = lm.module.get_output_embeddings()
    optimizer = make_adamw(lm.module, make_token_texts(4, seed=0))
    plain = ModelState(model=oracle.LanguageModel(lm.module, max_tokens=64), targets=targets).encode(texts)
    if how == "frozen":
        head.weight.requires_grad_(False)
        del optimizer.state[head.weight]
    else:
        optimizer.state[head.weight] = {}
    lm.optimizer = optimizer
    np.testing.assert_array_equal(ModelState(model=lm, targets=targets).encode(texts), plain)


def test_a_frozen_output_layer_with_adam_state_keeps_its_metric(setting, make_token_texts, make_adamw):
    lm, texts, targets = setting
    lm.optimizer = make_adamw(lm.module, make_token_texts(4, seed=0))
    expected = ModelState(model=lm, targets=targets).encode(texts)
    lm.module.get_output_embeddings().weight.requires_grad_(False)
    np.testing.assert_array_equal(ModelState(model=lm, targets=targets).encode(texts), expected)


def test_statistics_alone_are_seven_columns(setting):
    lm, texts, _ = setting
    assert ModelState(model=lm, states=False).encode(texts).shape == (len(texts), len(STATISTICS))


def test_a_missing_model_is_refused():
    with pytest.raises(InputTypeError, match="model=None"):
        ModelState().fingerprint()
