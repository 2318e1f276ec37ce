"""Plug-ins and options as the command line writes them."""

from __future__ import annotations

import pytest

from oracle.errors import InputError
from surrogate.option_strings import parse_options, parse_plugin


def test_options_on_the_command_line():
    assert parse_plugin("hashed_ngrams:dim=64,word_ngrams=1-2") == ("hashed_ngrams", {"dim": 64, "word_ngrams": "1-2"})
    assert parse_plugin("trees") == ("trees", {})
    assert parse_options(["max_grad_norm=1.0", "similarity=cosine", "per_text=true"]) == {
        "max_grad_norm": 1.0,
        "similarity": "cosine",
        "per_text": True,
    }
    with pytest.raises(InputError, match="option=value"):
        parse_options(["temperature"])
