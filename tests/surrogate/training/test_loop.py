"""The training loop: exact token counts, exact resume, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from oracle.errors import InputError, NotFiniteError
from surrogate.training.loop import TrainingCurve, TrainingPlan, pack, train

PLAN = {
    "num_tokens": 12 * 2 * 16,
    "row_tokens": 16,
    "rows_per_step": 2,
    "warmup_steps": 3,
    "evaluate_every": 4,
    "checkpoint_every": 5,
}


def _lm(make_module):
    module = make_module("gpt2")
    return oracle.LanguageModel(module, optimizer=torch.optim.AdamW(module.parameters(), lr=1e-2), max_tokens=64)


def _evaluate(rows):
    return lambda lm: {"loss": float(np.mean(lm.losses(rows)))}


def test_training_lowers_the_loss_and_counts_tokens_exactly(make_module, make_token_texts):
    rows = make_token_texts(8, seed=1)
    lm = _lm(make_module)
    curve = train(lm, rows, TrainingPlan(**PLAN), evaluate=_evaluate(rows))
    assert curve.steps == [0, 4, 8, 12] and curve.tokens == [0, 128, 256, 384]
    assert curve.column("loss")[-1] < curve.column("loss")[0] - 0.1


def test_every_row_is_full_and_the_stream_repeats_only_after_every_text_was_used(make_module, make_token_texts):
    lm = _lm(make_module)
    encoded = lm.encode(make_token_texts(5, seed=1))
    total = sum(len(text.input_ids) + 1 for text in encoded)
    rows = pack(encoded, num_rows=4, row_tokens=32, separator=0, seed=3)
    assert rows.shape == (2, 4, 32)
    first_round = rows[0].reshape(-1)[:total]
    pieces = {tuple(text.input_ids) for text in encoded}
    found, piece = set(), []
    for token in first_round.tolist():
        if token == 0:
            found.add(tuple(piece))
            piece = []
        else:
            piece.append(token)
    assert found == pieces
    shuffled = pack(encoded[::-1], num_rows=4, row_tokens=32, separator=0, seed=3)
    np.testing.assert_array_equal(rows, shuffled)  # the order of the texts decides nothing
    assert not np.array_equal(rows, pack(encoded, num_rows=4, row_tokens=32, separator=0, seed=4))


def test_an_interrupted_run_ends_with_the_same_weights_and_curve(make_module, make_token_texts, tmp_path, monkeypatch):
    rows = make_token_texts(8, seed=1)
    whole = _lm(make_module)
    curve = train(whole, rows, TrainingPlan(**PLAN), evaluate=_evaluate(rows))
    broken = _lm(make_module)
    steps = []
    original = broken.optimizer.step

    def dies(*args, **kwargs):
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(broken.optimizer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(broken, rows, TrainingPlan(**PLAN), evaluate=_evaluate(rows), folder=tmp_path)
    resumed = _lm(make_module)
    again = train(resumed, rows, TrainingPlan(**PLAN), evaluate=_evaluate(rows), folder=tmp_path)
    assert again.steps == curve.steps and again.losses == curve.losses
    assert resumed.fingerprint(optimizer=True) == whole.fingerprint(optimizer=True)


def test_training_stops_early_when_told(make_module, make_token_texts):
    rows = make_token_texts(8, seed=1)
    curve = train(_lm(make_module), rows, TrainingPlan(**PLAN), evaluate=_evaluate(rows), stop=lambda losses: True)
    assert curve.steps == [0]


def test_tokens_to_reach_interpolates_between_evaluations():
    curve = TrainingCurve([0, 1, 2], [0, 100, 200], [{"t": 4.0}, {"t": 3.0}, {"t": 2.0}])
    assert curve.tokens_to_reach("t", 2.5) == pytest.approx(150)
    assert curve.tokens_to_reach("t", 5.0) == 0
    assert curve.tokens_to_reach("t", 1.0) is None


def test_what_cannot_train_is_refused(make_module, make_token_texts):
    with pytest.raises(InputError, match="no optimizer"):
        train(oracle.LanguageModel(make_module("gpt2"), max_tokens=64), make_token_texts(2, seed=1), TrainingPlan(**PLAN))
    with pytest.raises(InputError, match="has a target token"):
        train(_lm(make_module), [{"input_ids": [4]}], TrainingPlan(**PLAN))
    lm = _lm(make_module)
    with torch.no_grad():
        next(lm.module.parameters()).fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="training loss"):
        train(lm, make_token_texts(2, seed=1), TrainingPlan(**PLAN))
