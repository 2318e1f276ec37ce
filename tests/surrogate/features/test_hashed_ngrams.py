"""Hashing many texts at once against the plain way: a regular expression and scikit-learn's hasher, text by text."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn.feature_extraction import FeatureHasher

import oracle
from surrogate import word_hashing
from surrogate.features.hashed_ngrams import HashedNgrams
from surrogate.word_hashing import WORD, Words, texts_together

ALPHABET = " \n\t\rab_1.,é—日🎉\u00a0\u2028\u0301²ΣİB'\x1c\x00"


def odd_texts(num_texts, *, seed=0):
    choose = random.Random(seed)
    texts = {"".join(choose.choice(ALPHABET) for _ in range(choose.randint(1, 70))) for _ in range(num_texts)}
    return sorted(text for text in texts if not text.isspace())


def plain_ngrams(words, length):
    return [" ".join(words[start : start + length]) for start in range(len(words) - length + 1)]


def plain_features(texts, lengths, widths):
    blocks = []
    for length, width in zip(lengths, widths, strict=True):
        hasher = FeatureHasher(n_features=width, input_type="string", dtype=np.float32)
        counts = hasher.transform([plain_ngrams(WORD.findall(text.lower()), length) for text in texts]).toarray()
        damped = (np.sign(counts) * np.log1p(np.abs(counts))).astype(np.float32)
        norms = np.linalg.norm(damped, axis=1, keepdims=True)
        blocks.append(np.divide(damped, norms, out=np.zeros_like(damped), where=norms > 0))
    features = np.concatenate(blocks, axis=1)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, norms, out=np.zeros_like(features), where=norms > 0)


@pytest.mark.parametrize(
    ("word_ngrams", "lengths", "widths"), [("1", [1], [97]), ("1-2", [1, 2], [49, 48]), ("2-3", [2, 3], [49, 48])]
)
def test_features_are_those_of_the_plain_way_bit_for_bit(word_ngrams, lengths, widths):
    texts = [*odd_texts(800), "one two, THREE.\n    four " * 300, "日本語 " * 200]
    found = HashedNgrams(dim=97, word_ngrams=word_ngrams).encode(oracle.read_texts(texts))
    assert found.tobytes() == plain_features(texts, lengths, widths).tobytes()


def test_words_are_those_of_the_regular_expression():
    texts = [*odd_texts(800, seed=1), "", " ", "  ", "a", "a  b"]
    words = Words.of(texts)
    data = words.buffer.tobytes()
    spans = [data[start:end].decode() for start, end in zip(words.starts, words.ends, strict=True)]
    found = [spans[start:end] for start, end in zip(words.text_starts, words.text_starts[1:], strict=False)]
    assert found == [WORD.findall(text) for text in texts]


def test_hashes_at_both_ends_of_their_range():
    """The least 32-bit number has no absolute value; FeatureHasher gives it a column of its own."""
    words = Words.of(["a b"])
    least = np.array([-(2**31), 2**31 - 1], dtype=np.int32)
    from surrogate.features.hashed_ngrams import _count

    fake = type(
        "Fake", (), {"hashes": lambda self, length: (least, np.zeros(2, dtype=np.int64)), "text_starts": words.text_starts}
    )
    row = _count(fake(), 1, 10)[0]
    expected = np.zeros(10)
    expected[(2**31 - 1 - 9) % 10] -= 1
    expected[(2**31 - 1) % 10] += 1
    assert np.array_equal(np.sign(row), np.sign(expected))


def test_how_texts_are_taken_together_changes_nothing(monkeypatch):
    texts = oracle.read_texts(odd_texts(300, seed=2))
    whole = HashedNgrams(dim=64).encode(texts)
    monkeypatch.setattr("surrogate.features.hashed_ngrams.texts_together", lambda strings: texts_together(strings, num_chars=1))
    assert HashedNgrams(dim=64).encode(texts).tobytes() == whole.tobytes()
    assert list(texts_together(["abc", "d", "ef"], num_chars=4)) == [["abc", "d"], ["ef"]]
    assert word_hashing.CHARS_TOGETHER > 0


def test_token_ids_are_hashed_as_their_digits():
    rows = [[1, 20, 300], [7], [20, 300, 1]]
    found = HashedNgrams(dim=32).encode(oracle.read_texts([{"input_ids": row} for row in rows]))
    plain = HashedNgrams(dim=32).encode(oracle.read_texts([" ".join(map(str, row)) for row in rows]))
    assert found.tobytes() == plain.tobytes()
