"""The same numbers on a GPU; skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from surrogate.features.model_state import ModelState

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama"])
def test_labels_and_features_on_a_gpu_equal_those_on_the_cpu(kind, make_module, make_token_texts, make_adamw):
    rows = make_token_texts(8, seed=31)
    methods = {
        "one_step": {},
        "grad_dot": {},
        "two_forward": {},
        "less": {},
        "ekfac": {"fit_texts": rows, "fisher": "empirical"},
        "rollout": {"companions": rows, "num_steps": 2, "batch_size": 3},
        "in_context": {},
    }
    sample, targets = make_token_texts(9, seed=1), {"a": make_token_texts(4, seed=2), "b": make_token_texts(3, seed=3)}
    found = {}
    for device in ("cpu", "cuda"):
        module = make_module(kind)
        optimizer = make_adamw(module, make_token_texts(4, seed=0))
        lm = oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64, device=device)
        assert lm.device.type == device
        before = lm.fingerprint(optimizer=True)
        for method, options in methods.items():
            found[device, method] = oracle.label(lm, sample, targets, method=method, **options).values
        found[device, "features"] = ModelState(model=lm, targets=targets).encode(oracle.read_texts(sample))
        assert lm.fingerprint(optimizer=True) == before
    for name in (*methods, "features"):
        a, b = found["cpu", name], found["cuda", name]
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3 * np.abs(a).max(), err_msg=name)


def test_a_model_without_optimizer_goes_to_the_gpu_by_itself(make_module, make_token_texts):
    lm = oracle.LanguageModel(make_module("llama"), max_tokens=64)
    assert lm.device.type == "cuda"
    assert np.isfinite(lm.losses(make_token_texts(3, seed=1))).all()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=["plain", "fused", "capturable"])
def test_a_loaded_optimiser_steps_on_a_gpu(options, make_module, make_token_texts, tmp_path):
    module = make_module("llama")
    lm = oracle.LanguageModel(module.to("cuda"), max_tokens=64)
    lm.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, **options)
    sample, targets = make_token_texts(3, seed=1), {"a": make_token_texts(4, seed=2)}
    lm.text_losses(next(lm.batches(lm.encode(sample)))).sum().backward()
    lm.optimizer.step()
    lm.optimizer.zero_grad()
    lm.save(tmp_path)
    loaded = oracle.LanguageModel.from_pretrained(tmp_path, max_tokens=64, device="cuda")
    values = [oracle.label(each, sample, targets, method="one_step").values for each in (lm, loaded)]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-3, atol=1e-6)
