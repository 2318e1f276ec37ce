"""What a strategy is asked with: a small pool, two target sets and a live model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import oracle
from oracle.targets import read_targets
from oracle.texts import read_texts
from surrogate.feature_cache import FeatureCache
from surrogate.training.strategies import RankingContext

SENTENCES = [
    "The cat sat on the mat and the dog sat on the rug.",
    "A dog and a cat are friends of old.",
    "Add two numbers: 2 + 2 = 4, so the sum is 4.",
    "The sum of 3 and 5 is 8; add 1 to it and get 9.",
    "Rain fell on the town all day, and nobody went out.",
    "def add(a, b): return a + b",
    "import os, sys",
    "A cat!",
    "Once upon a time there was a king who had three daughters, and the youngest of them was clever.",
    "Subtract 7 from 9 and get 2.",
    "The train to the north leaves at nine in the morning from the second platform.",
    "while True: pass",
]
TARGETS = {
    "animals": ["My cat sat on my dog.", "Cats and a dog are friends."],
    "sums": ["Add 2 and 5: the sum is 7.", "2 + 5 = 7", "Subtract 1 from 2."],
}


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer(SENTENCES)


@pytest.fixture
def lm(make_module, make_token_texts, make_adamw, tokenizer):
    module = make_module("llama", vocab_size=300)
    return oracle.LanguageModel(module, tokenizer, make_adamw(module, make_token_texts(4, seed=0)), max_tokens=64)


@pytest.fixture
def make_context(lm, tmp_path):
    """Make a context; files lie in `tmp_path / name`."""

    def make(texts=SENTENCES, targets=TARGETS, *, name="refresh", **changes):
        pool = read_texts(texts)
        context = RankingContext(
            pool=pool,
            candidates=np.arange(len(pool)),
            targets=read_targets(targets) if targets else [],
            lm=lm,
            cache=FeatureCache(tmp_path / "features"),
            folder=tmp_path / name,
        )
        return dataclasses.replace(context, **changes)

    return make
