"""`one_step`'s use of memory; its values are checked in test_measure.py."""

from __future__ import annotations

import oracle


def test_the_state_is_copied_once(make_module, make_token_texts, make_adamw, monkeypatch):
    module, copies = make_module("neox"), []
    lm = oracle.LanguageModel(module, optimizer=make_adamw(module, make_token_texts(4, seed=0)), max_tokens=64)
    take = lm.snapshot
    monkeypatch.setattr(lm, "snapshot", lambda **options: copies.append(options) or take(**options))
    oracle.label(lm, make_token_texts(3, seed=2), {"t": make_token_texts(2, seed=5)}, method="one_step")
    assert len(copies) == 1
    lm.start_of_steps()  # outside of a block there is no copy to share
    assert len(copies) == 2
