"""The training loop: exact token counts, exact resume, refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import oracle
from oracle.encoding import IGNORED, EncodedText
from oracle.errors import InputError, MismatchError, NotFiniteError
from surrogate.training.loop import TrainingCurve, TrainingPlan, pack, train

PLAN = {
    "num_tokens": 12 * 2 * 16,
    "row_tokens": 16,
    "rows_per_step": 2,
    "warmup_steps": 3,
    "evaluate_every": 4,
    "checkpoint_every": 5,
}


def _lm(make_module, **options):
    module = make_module("gpt2")
    optimizer = torch.optim.AdamW(module.parameters(), **{"lr": 1e-2, **options})
    return oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64)


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
    curve = train(_lm(make_module), rows, TrainingPlan(**PLAN), evaluate=_evaluate(rows), stop=lambda curve: True)
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


def test_a_run_is_resumed_only_as_itself(make_module, make_token_texts, tmp_path):
    rows, plan = make_token_texts(8, seed=1), TrainingPlan(**PLAN)
    done = _lm(make_module)
    train(done, rows, plan, folder=tmp_path)
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 10
    changes = {"num_tokens": 99, "row_tokens": 8, "rows_per_step": 3, "warmup_steps": 0, "max_grad_norm": 2.0}
    for name, value in {**changes, "evaluate_every": 3, "seed": 1}.items():
        with pytest.raises(MismatchError, match=f"{name}: stored"):
            train(_lm(make_module), rows, replace(plan, **{name: value}), folder=tmp_path)
    with pytest.raises(MismatchError, match="texts: stored '8 texts"):
        train(_lm(make_module), rows[:-1], plan, folder=tmp_path)
    with pytest.raises(MismatchError, match="texts: stored '8 texts"):
        shorter = _lm(make_module)
        shorter.max_tokens = 8
        train(shorter, rows, plan, folder=tmp_path)
    with pytest.raises(MismatchError, match=r"0\.01.*0\.02"):
        train(_lm(make_module, lr=2e-2), rows, plan, folder=tmp_path)
    with pytest.raises(MismatchError, match="weight_decay"):
        train(_lm(make_module, weight_decay=0.5), rows, plan, folder=tmp_path)
    with pytest.raises(MismatchError, match="trainable parameters: stored"):
        frozen = _lm(make_module)
        next(frozen.module.parameters()).requires_grad_(False)
        train(frozen, rows, plan, folder=tmp_path)
    with pytest.raises(MismatchError, match="at the start: stored"):
        other = _lm(make_module)
        with torch.no_grad():
            next(other.module.parameters()).view(-1)[0] += 1e-3
        train(other, rows, plan, folder=tmp_path)
    again = _lm(make_module)
    train(again, rows, replace(plan, checkpoint_every=3), folder=tmp_path)
    assert again.fingerprint(optimizer=True) == done.fingerprint(optimizer=True)


def test_frozen_parameters_have_no_optimiser_state_after_a_resume(make_module, make_token_texts, tmp_path):
    rows, plan, states = make_token_texts(8, seed=1), TrainingPlan(**PLAN), []
    for _ in range(2):
        lm = _lm(make_module)
        frozen = next(lm.module.parameters())
        frozen.requires_grad_(False)
        train(lm, rows, plan, folder=tmp_path)
        states.append((frozen in lm.optimizer.state, lm.fingerprint(optimizer=True)))
    assert states[0] == states[1] and not states[0][0]


def test_the_seconds_of_a_resumed_run_cover_the_processes_before_it(make_module, make_token_texts, tmp_path):
    rows, plan = make_token_texts(8, seed=1), TrainingPlan(**PLAN)
    curve = train(_lm(make_module), rows, plan, folder=tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    assert 0 < state["curve"]["seconds"] < curve.seconds
    state["curve"]["seconds"] = 1000.0
    (tmp_path / "state.json").write_text(json.dumps(state))
    again = train(_lm(make_module), rows, replace(plan, checkpoint_every=1), folder=tmp_path)
    assert 1000 < again.seconds < 1100
    assert 1000 < json.loads((tmp_path / "state.json").read_text())["curve"]["seconds"] < again.seconds


def test_without_an_end_of_text_token_nothing_stands_between_texts(make_module, make_token_texts, monkeypatch):
    texts = [EncodedText(str(index), [ids, ids + 1, ids + 2], [ids, ids + 1, ids + 2]) for index, ids in enumerate((10, 20))]
    ids, labels = pack(texts, num_rows=1, row_tokens=12, separator=None, seed=0).reshape(2, 12)
    assert set(ids.tolist()) == {10, 11, 12, 20, 21, 22} and not ({10, 20} & set(labels.tolist()))
    assert (labels == IGNORED).sum() == 4 and ((labels == ids) | (labels == IGNORED)).all()
    seen = []
    monkeypatch.setattr(
        "surrogate.training.loop.pack", lambda *args, **kwargs: seen.append(kwargs["separator"]) or pack(*args, **kwargs)
    )
    train(_lm(make_module), make_token_texts(2, seed=1), TrainingPlan(**PLAN))
    assert seen == [None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("switch", ["fused", "capturable"])
def test_a_run_resumes_on_cuda_with_its_step_count_on_the_device(make_module, make_token_texts, tmp_path, switch):
    for _ in range(2):
        module = make_module("gpt2").cuda()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, **{switch: True})
        lm = oracle.LanguageModel(module, optimizer=optimizer, max_tokens=64)
        train(lm, make_token_texts(8, seed=1), TrainingPlan(**PLAN), folder=tmp_path)
        assert {slots["step"].device.type for slots in optimizer.state.values()} == {"cuda"}


def test_a_smoothed_curve_reaches_a_loss_when_the_mean_of_its_last_evaluations_does():
    curve = TrainingCurve([0, 1, 2, 3], [0, 10, 20, 30], [{"a": value} for value in (5.0, 1.0, 3.0, 2.0)])
    assert curve.smoothed("a", window=3) == [5.0, 3.0, 3.0, 2.0]
    assert curve.tokens_to_reach("a", 2.5) == pytest.approx(6.25)  # a single evaluation dips below
    assert curve.tokens_to_reach("a", 2.5, window=3) == pytest.approx(25.0)
    assert curve.tokens_to_reach("a", 1.5, window=3) is None
