"""A device that runs out of memory gets smaller batches, and labels stay what they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from oracle.errors import InputError
from oracle.memory import SmallerBatchWarning, split_batches
from oracle.target_columns import prepare_targets
from oracle.targets import read_targets


@pytest.fixture
def lm(make_module, make_token_texts, make_adamw):
    module = make_module("llama")
    return oracle.LanguageModel(module, optimizer=make_adamw(module, make_token_texts(4, seed=0)), max_tokens=64)


@pytest.fixture
def targets(make_token_texts):
    return {"a": make_token_texts(7, seed=21), "b": make_token_texts(1, seed=22)}


@pytest.fixture
def set_memory(lm, monkeypatch):
    """Let a pass over more tokens than so many run out of memory; return the sizes that were tried."""

    def set_memory(num_tokens, error=torch.OutOfMemoryError):
        measure, tried = type(lm).token_losses, []

        def token_losses(batch, **options):
            tried.append(batch.input_ids.numel())
            if tried[-1] > num_tokens:
                raise error("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            return measure(lm, batch, **options)

        monkeypatch.setattr(lm, "token_losses", token_losses)
        return tried

    return set_memory


@pytest.mark.parametrize(
    ("method", "error"),
    [(method, torch.OutOfMemoryError) for method in ("grad_dot", "one_step", "in_context")] + [("grad_dot", RuntimeError)],
)
def test_labels_are_the_same_with_little_memory(method, error, lm, targets, set_memory, make_token_texts):
    sample = make_token_texts(20, seed=1, longest=30)
    expected = oracle.label(lm, sample, targets, method=method)
    before = lm.fingerprint(optimizer=True)
    lm.batch_tokens = 256
    tried = set_memory(90, error)
    with pytest.warns(SmallerBatchWarning, match="batches have at most 64 tokens instead of 256"):
        labels = oracle.label(lm, sample, targets, method=method)
    np.testing.assert_allclose(labels.values, expected.values, rtol=1e-3, atol=1e-4 * np.abs(expected.values).max())
    np.testing.assert_allclose(labels.halves, expected.halves, rtol=1e-3, atol=1e-4 * np.nanmax(np.abs(expected.halves)))
    assert max(tried) > 90
    assert lm.batch_tokens == 256
    assert lm.fingerprint(optimizer=True) == before


def test_batches_stay_small_for_the_rest_of_the_call(lm, targets, set_memory, make_token_texts):
    tried = set_memory(200)
    lm.batch_tokens = 1000
    with pytest.warns(SmallerBatchWarning):
        oracle.label(lm, make_token_texts(30, seed=1, longest=30), targets, method="grad_dot", block_size=10)
    failed = [index for index, size in enumerate(tried) if size > 200]
    assert len(failed) <= 3 and len(tried) > 10
    assert lm.batch_tokens == 1000


def test_a_text_that_does_not_fit_alone_is_refused_and_the_model_put_back(lm, set_memory, make_token_texts, tmp_path):
    sample = [{"input_ids": [3 + number, 4, 5, 6]} for number in range(4)] + make_token_texts(1, seed=1, longest=40)
    sample[-1]["input_ids"] = list(range(3, 43))
    before = lm.fingerprint(optimizer=True)
    lm.batch_tokens = 128
    set_memory(20)
    with pytest.raises(InputError, match="no memory for one text of 40 tokens alone"):
        oracle.label(lm, sample, {"t": sample[:2]}, method="grad_dot", block_size=2, workdir=tmp_path)
    assert not list((tmp_path / "blocks").glob("*.parquet"))  # the longest come first, so nothing was measured in vain
    assert lm.batch_tokens == 128
    assert lm.fingerprint(optimizer=True) == before


def test_other_errors_are_not_taken_for_a_lack_of_memory(lm, targets, make_token_texts, monkeypatch):
    def fails(batch, **options):
        raise RuntimeError("CUDA out of memory, says a text")

    monkeypatch.setattr(lm, "text_losses", fails)
    with pytest.raises(RuntimeError, match="says a text"):
        oracle.label(lm, make_token_texts(3, seed=1), targets, method="grad_dot")


@pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
def test_splitting_batches_keeps_the_losses_of_every_part(batch_tokens, lm, targets):
    columns = prepare_targets(lm, read_targets(targets))
    expected, num_texts = columns.losses(lm), sum(len(batch.positions) for batch in columns.batches)
    split_batches(columns, batch_tokens=batch_tokens)
    np.testing.assert_allclose(columns.losses(lm), expected, rtol=1e-6)
    assert sum(len(batch.positions) for batch in columns.batches) == num_texts
    assert len(columns.batches) == len(columns.batch_parts)
    for batch in columns.batches:
        assert len(batch.positions) == len(batch.input_ids) == len(batch.labels)
        assert batch.input_ids.numel() <= batch_tokens or len(batch.positions) == 1
