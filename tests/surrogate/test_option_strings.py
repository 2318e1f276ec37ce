"""Plug-ins and options as the command line writes them."""

from __future__ import annotations

import pytest

from oracle.errors import InputError
from surrogate.option_strings import parse_options, parse_plugin, split_plugins


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


def test_true_false_and_none_are_read_as_people_write_them():
    assert parse_options(["a=True", "b=False", "c=None", "d=false", "e=null", "f=Falsey"]) == {
        "a": True,
        "b": False,
        "c": None,
        "d": False,
        "e": None,
        "f": "Falsey",
    }


def test_several_plugins_with_options_are_told_apart():
    given = "less, grad_dot:max_grad_norm=1.0, statistics=False,ekfac:fit_texts=a:b.jsonl,two_forward"
    assert split_plugins(given) == [
        "less",
        "grad_dot:max_grad_norm=1.0,statistics=False",
        "ekfac:fit_texts=a:b.jsonl",
        "two_forward",
    ]
    assert split_plugins("less,max_grad_norm=1.0") == ["less", "max_grad_norm=1.0"]  # no option of anything
