"""`judge` trusts labels that predict what training does, and no others; it resumes and refuses like `label`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import numpy as np
import pytest

import oracle
from oracle.errors import InputError, MismatchError
from oracle.judging.datamodelling import draw_subsets
from oracle.judging.retraining import Retraining, RetrainingPlan

PLAN = RetrainingPlan(batch_size=5)


def skill_texts(num_texts, *, first, seed, size=50):
    """Texts of one made-up skill: counting in steps of 1 to 3 round a clock of tokens of its own."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_texts):
        start, step, length = rng.integers(size), rng.integers(1, 4), rng.integers(8, 14)
        rows.append({"input_ids": [int(first + (start + step * place) % size) for place in range(length)]})
    return rows


POOL = skill_texts(20, first=3, seed=1) + skill_texts(20, first=110, seed=2)
TARGETS = {"clock": skill_texts(8, first=3, seed=11)}


def _random_labels(text_ids, seed):
    return oracle.Labels.from_values(np.random.default_rng(seed).normal(size=(len(text_ids), 1)), text_ids, ["clock"])


@pytest.fixture(scope="module")
def lm(make_module, make_adamw):
    module = make_module("llama")
    seen = skill_texts(8, first=3, seed=5) + skill_texts(8, first=110, seed=6)
    return oracle.LanguageModel(module, optimizer=make_adamw(module, seen[::-1], num_steps=8, texts_per_step=2), max_tokens=32)


@pytest.fixture(scope="module")
def planted():
    return oracle.plant(POOL, TARGETS, kinds=["copies"], num_per_kind=4)


@pytest.fixture(scope="module")
def labels(lm, planted):
    found = {method: oracle.label(lm, planted.texts, TARGETS, method=method) for method in ("grad_dot", "one_step")}
    return {**found, "random": _random_labels(planted.texts["text_id"][:], 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("judge")


@pytest.fixture(scope="module")
def judgement(lm, planted, labels, folder):
    before = lm.fingerprint(optimizer=True)
    found = oracle.judge(lm, planted.texts, TARGETS, labels, planted=planted, plan=PLAN, num_subsets=20, workdir=folder)
    assert lm.fingerprint(optimizer=True) == before
    return found


@pytest.mark.parametrize("method", ["grad_dot", "one_step"])
def test_labels_of_gradient_methods_predict_what_training_does(method, judgement):
    verdict = judgement.methods[method]
    score = verdict.lds["clock"]
    assert score.value > 0.6 and score.low > 0.2
    assert score.value < judgement.ceilings["clock"].ceiling + 0.1
    worths = verdict.shares["clock"]
    for judge in ("removal", "addition"):
        assert min(worths[judge]["top"].by_seed) > 0 > max(worths[judge]["bottom"].by_seed), judge
    assert verdict.planted["copies"]["clock"].auc > 0.9
    assert verdict.same_checkpoint and verdict.same_target_texts


def test_random_labels_score_about_zero_and_their_top_is_worth_little(lm, judgement, labels, folder):
    random = {f"random {seed}": _random_labels(labels["random"].text_ids, seed) for seed in range(30)}
    found = oracle.judge(lm, POOL, TARGETS, random, plan=PLAN, num_subsets=20, share=None, num_bootstrap=1, workdir=folder)
    assert found.cost["num_trained_now"] == 0  # judged by the same models
    assert abs(np.mean([verdict.lds["clock"].value for verdict in found.methods.values()])) < 0.15
    worths = {name: judgement.methods[name].shares["clock"]["removal"]["top"].mean for name in ("random", "grad_dot")}
    assert abs(worths["random"]) < 0.5 * worths["grad_dot"]
    assert 0.1 < judgement.methods["random"].planted["copies"]["clock"].auc < 0.9


def test_the_score_is_the_correlation_of_summed_labels_with_measured_effects(lm, judgement, labels):
    from scipy.stats import spearmanr

    ids = oracle.read_texts(POOL)["text_id"][:]
    predicted, measured = [], []
    for subset in draw_subsets(ids, alpha=0.5, num_subsets=20, seed=0):
        rows = [POOL[ids.index(text_id)] for text_id in subset]
        assert len(rows) == 20  # of 40: planted texts are in no subset
        predicted.append(sum(float(labels["grad_dot"].take([text_id]).values[0, 0]) for text_id in subset))
        effects = [oracle.retrain(lm, rows, TARGETS, plan=PLAN, seed=seed).effects[0] for seed in (0, 1)]
        measured.append(np.mean(effects))
    assert judgement.methods["grad_dot"].lds["clock"].value == pytest.approx(spearmanr(predicted, measured).statistic, abs=1e-6)


def test_row_order_changes_nothing(lm, judgement, labels, planted, folder):
    backwards = planted.texts.select(range(len(planted.texts) - 1, -1, -1))
    turned = {name: given.take(given.text_ids[::-1]) for name, given in labels.items()}
    found = oracle.judge(lm, backwards, TARGETS, turned, planted=planted, plan=PLAN, num_subsets=20, workdir=folder)
    assert found.cost["num_trained_now"] == 0
    assert found.as_dict()["methods"] == judgement.as_dict()["methods"]


def test_the_table_has_methods_by_judge_by_cost_and_the_json_the_same(judgement):
    table, values = judgement.table().splitlines(), json.loads(json.dumps(judgement.as_dict(), allow_nan=False))
    assert [line.split()[0] for line in table[:5]] == ["method", "grad_dot", "one_step", "random", "(ceiling)"]
    assert all(word in table[0] for word in ("lds", "removal of top", "addition of bottom", "copies", "passes per text"))
    assert table[1].split()[2] == f"{values['methods']['grad_dot']['lds']['clock']['value']:.3f}"
    assert table[1].endswith("1.00") and table[3].endswith("-")
    assert values["methods"]["grad_dot"]["cost"]["passes_per_text"] == pytest.approx(1.0)
    assert values["methods"]["one_step"]["cost"]["passes_per_text"] > 2
    assert values["methods"]["grad_dot"]["cost"]["passes_with_preparing"] > 1.0
    assert values["methods"]["random"]["cost"] is None and values["methods"]["random"]["same_checkpoint"] is None
    assert values["settings"]["num_texts"] == 40 and values["cost"]["num_models"] > 40
    assert set(values["methods"]["grad_dot"]["removal"]["clock"]) == {"top", "bottom"}


def test_planted_texts_alone_need_no_training(lm, labels, planted, monkeypatch):
    monkeypatch.setattr(Retraining, "run", None)
    found = oracle.judge(lm, POOL, TARGETS, labels, planted=planted, num_subsets=0, share=None)
    assert found.methods["grad_dot"].planted["copies"]["clock"].auc > 0.9 and not found.cost
    assert "lds" not in found.table() and "copies" in found.table()


def test_labels_of_other_checkpoints_and_target_texts_are_judged_and_named(lm, labels, planted):
    meta = {**labels["grad_dot"].meta, "checkpoint": "other"}
    stale = {"stale": replace(labels["grad_dot"], meta=meta)}
    fresh_texts = {"clock": skill_texts(8, first=3, seed=77)}
    settings = {"num_subsets": 0, "share": None, "planted": planted}
    assert "stale: labels of another checkpoint" in oracle.judge(lm, POOL, TARGETS, stale, **settings).table()
    found = oracle.judge(lm, POOL, fresh_texts, labels, **settings)
    assert found.methods["grad_dot"].same_target_texts is False and found.methods["random"].same_target_texts is None
    assert "grad_dot: labels of other target texts" in found.table()


def test_the_one_column_of_a_method_without_targets_stands_for_every_target(lm, labels, planted):
    alone = labels["grad_dot"]
    values = alone.values[:, [0]]
    blind = replace(alone, values=values, target_names=["blind"], halves=alone.halves[:, :, [0]], meta={"targets": {}})
    found = oracle.judge(lm, POOL, TARGETS, {"blind": blind, "seeing": alone}, num_subsets=0, share=None, planted=planted)
    assert found.methods["blind"].planted == found.methods["seeing"].planted


def test_labels_of_other_texts_or_targets_or_per_token_are_refused_by_name(lm, labels, planted):
    some = labels["grad_dot"].take(labels["grad_dot"].text_ids[:30])
    with pytest.raises(MismatchError, match="labels 'some': 10 of 40 texts have no label"):
        oracle.judge(lm, POOL, TARGETS, {**labels, "some": some})
    pool_only = labels["grad_dot"].take(oracle.read_texts(POOL)["text_id"][:])
    with pytest.raises(MismatchError, match="labels 'unplanted': 4 of 44 texts have no label"):
        oracle.judge(lm, POOL, TARGETS, {"unplanted": pool_only}, planted=planted)
    with pytest.raises(MismatchError, match="labels 'grad_dot' have the targets clock and not other"):
        oracle.judge(lm, POOL, {**TARGETS, "other": TARGETS["clock"]}, labels)
    per_token = replace(labels["grad_dot"], meta={"per": "token"})
    with pytest.raises(InputError, match="labels 'x' are per token"):
        oracle.judge(lm, POOL, TARGETS, {"x": per_token})


def test_options_that_leave_nothing_to_judge_are_refused(lm, labels):
    for options, named in (
        ({"num_subsets": 0, "share": None}, "leave no judge"),
        ({"num_subsets": 3}, "num_subsets=3"),
        ({"alpha": 1.0}, "alpha=1.0 of 40 texts"),
        ({"share": 0.01}, r"share=0.01 of 40 texts"),
        ({"share": 0.6}, r"share=0.6 of 40 texts"),
        ({"num_seeds": 0}, "num_seeds=0"),
    ):
        with pytest.raises(InputError, match=named):
            oracle.judge(lm, POOL, TARGETS, labels, **options)
    with pytest.raises(TypeError, match="a mapping of method name"):
        oracle.judge(lm, POOL, TARGETS, labels["grad_dot"])
    with pytest.raises(InputError, match="labels is empty"):
        oracle.judge(lm, POOL, TARGETS, {})


def test_the_public_names_are_the_functions():
    from oracle.judging.judge import judge
    from oracle.judging.planted import plant
    from oracle.judging.retraining import retrain

    assert (oracle.judge, oracle.plant, oracle.retrain) == (judge, plant, retrain)  # no module of such a name hides them


SCRIPT = textwrap.dedent("""
    import json, sys, time, torch, transformers, oracle
    from oracle.judging.retraining import Retraining
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                      intermediate_size=64, max_position_embeddings=64)
    module = transformers.LlamaForCausalLM(config)
    lm = oracle.LanguageModel(module, optimizer=torch.optim.AdamW(module.parameters(), lr=1e-3), max_tokens=64)
    rows = [{"input_ids": torch.randint(3, 99, (20,), generator=torch.Generator().manual_seed(i)).tolist()} for i in range(24)]
    targets = {"t": rows[16:]}
    if len(sys.argv) > 2:
        original = Retraining._train_one
        def slowly(self, *given):
            time.sleep(0.3)
            return original(self, *given)
        Retraining._train_one = slowly
    labels = {"grad_dot": oracle.label(lm, rows[:16], targets, method="grad_dot")}
    found = oracle.judge(lm, rows[:16], targets, labels, workdir=sys.argv[1], num_subsets=6, num_bootstrap=20)
    values = found.as_dict()
    trained = values.pop("cost")["num_trained_now"]
    del values["methods"]["grad_dot"]["cost"]  # seconds
    print(json.dumps([trained, values]))
""")


@pytest.mark.slow
def test_killed_with_sigkill_and_run_again_gives_the_same_models_and_judgement(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(folder):
        answer = subprocess.run(
            [sys.executable, str(script), str(folder)], check=True, env=environment, capture_output=True, text=True
        )
        return json.loads(answer.stdout.splitlines()[-1])

    num_trained, whole = run(tmp_path / "whole")
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "killed"), "slowly"], env=environment)
    models = tmp_path / "killed" / "models"
    deadline = time.monotonic() + 120
    while len(list(models.glob("*.json")) if models.exists() else []) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    num_finished = len(list(models.glob("*.json")))
    assert 3 <= num_finished < num_trained
    num_trained_again, resumed = run(tmp_path / "killed")
    assert num_trained_again == num_trained - num_finished
    assert resumed == whole
    found = {path.name: path.read_bytes() for path in models.glob("*.json")}
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "whole" / "models").glob("*.json")}


def test_labels_that_no_optimiser_decides_are_of_the_same_checkpoint_at_another_state_of_it(lm, labels, planted):
    meta = {**labels["grad_dot"].meta, "checkpoint": lm.fingerprint()}
    both = {name: replace(labels["grad_dot"], meta={**meta, "method": name}) for name in ("in_context", "grad_dot")}
    found = oracle.judge(lm, POOL, TARGETS, both, num_subsets=0, share=None, planted=planted)
    assert found.methods["in_context"].same_checkpoint is True and found.methods["grad_dot"].same_checkpoint is False
