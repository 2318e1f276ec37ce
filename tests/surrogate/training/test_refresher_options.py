"""What decides a run is kept in the same words by every process, also where options are objects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import oracle
from oracle.errors import InputError, InputTypeError, MismatchError
from oracle.targets import read_targets
from surrogate.features.model_state import ModelState
from surrogate.training import Refresher
from surrogate.training.refresher_options import as_plain, make_strategy
from surrogate.training.strategies.refresh import Refresh


def proxy(make_module):
    return ModelState(model=oracle.LanguageModel(make_module("llama")), states=False)


def test_an_option_that_is_an_object_is_its_name_and_options_and_no_address(make_module):
    first, second = (as_plain({"encoder": ("text_stats", proxy(make_module))}) for _ in range(2))
    assert first == second == json.loads(json.dumps(first))
    assert first["encoder"][0] == "text_stats" and first["encoder"][1]["model_state"]["states"] is False
    other = ModelState(model=oracle.LanguageModel(make_module("llama")), states=True)
    assert as_plain([other]) != as_plain([proxy(make_module)])


def test_plain_values_stay_and_arrays_and_targets_are_told(make_token_texts):
    assert as_plain([None, True, 3, 0.5, "a", Path("a/b"), np.float32(0.5), np.int64(7)]) == [
        None, True, 3, 0.5, "a", "a/b", 0.5, 7,
    ]  # fmt: skip
    one, other = (as_plain(read_targets({"goal": make_token_texts(3, seed=seed)})) for seed in (1, 2))
    assert [list(value) for value in one] == [["goal"]] and one != other


def test_a_run_with_objects_among_its_options_is_resumed_by_another_process(make_module, make_token_texts, tmp_path):
    pool, targets = make_token_texts(60, seed=3), {"goal": make_token_texts(3, seed=4)}

    def refresher(**options):
        encoder = ["hashed_ngrams", proxy(make_module)]
        return Refresher(pool, targets, workdir=tmp_path, encoder=encoder, num_probe=8, **options)

    refresher().store.claim(refresher()._options)
    refresher().store.claim(refresher()._options)
    with pytest.raises(MismatchError, match="sample_size"):
        refresher(sample_size=7).store.claim(refresher(sample_size=7)._options)


def test_a_strategy_is_made_by_name_or_given_as_an_object():
    assert make_strategy("refresh", {"encoder": "hashed_ngrams"}).encoder == ("hashed_ngrams",)
    made = Refresh(sample_size=5)
    assert make_strategy(made, {}) is made
    with pytest.raises(InputError, match="options sample_size beside"):
        make_strategy(made, {"sample_size": 6})
    with pytest.raises(InputTypeError, match="has no method rank"):
        make_strategy(object(), {})
