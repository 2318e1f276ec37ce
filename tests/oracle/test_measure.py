"""`label` resumes, refuses what does not fit, and leaves the model as it was. Contract tests over every method."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import oracle
from oracle import label_store, measure, plugins
from oracle.errors import InputError, InputTypeError, MismatchError, NotFiniteError
from oracle.measure import UnlabelableTextWarning
from oracle.methods import needs_of
from oracle.optimizers import FreshOptimizerWarning
from oracle.processes import Processes

METHODS = plugins.names("oracle.methods")
NEEDS = {method: needs_of(plugins.load("oracle.methods", method)) for method in METHODS}
MODEL_METHODS = [method for method in METHODS if NEEDS[method].model]
TRAINING_METHODS = [method for method in METHODS if method not in ("in_context", "self_rating", "target_similarity")]
OPTIONS = {  # what a method cannot do without, with `rows` for texts that are neither sample nor targets; all others get {}
    "ekfac": lambda rows: {"fit_texts": rows},
    "rollout": lambda rows: {"companions": rows, "num_steps": 2, "batch_size": 3},
}
SENTENCES = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs."]


@pytest.fixture
def lm(make_module, make_token_texts, make_adamw, make_tokenizer):
    """With whatever any method asks for: an optimiser with state, a tokenizer, and a context that holds prompts."""
    module = make_module("neox", vocab_size=300, max_position_embeddings=512)
    optimizer = make_adamw(module, make_token_texts(4, seed=0))
    return oracle.LanguageModel(module, make_tokenizer(SENTENCES), optimizer, max_tokens=512)


@pytest.fixture
def targets(make_token_texts):
    return {"a": make_token_texts(4, seed=21), "b": make_token_texts(3, seed=22)}


@pytest.fixture
def label_by(lm, targets, make_token_texts):
    """`oracle.label` with what the method needs: its options, and target sets unless it takes none."""
    rows = make_token_texts(8, seed=31)

    def label_by(method, sample, **settings):
        options = {**OPTIONS.get(method, lambda rows: {})(rows), **settings}
        return oracle.label(lm, sample, targets if NEEDS[method].targets else None, method=method, **options)

    return label_by


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_finite_float32_labels_and_same_seed_same_bytes(method, label_by, make_token_texts):
    sample = make_token_texts(7, seed=1)
    first, second = (label_by(method, sample) for _ in range(2))
    names = ["a", "b"] if NEEDS[method].targets else [method]
    assert first.target_names == names
    assert first.values.shape == (7, len(names)) and first.values.dtype == np.float32
    assert len(np.unique(first.values)) > 1
    assert first.values.tobytes() == second.values.tobytes()
    assert first.halves.shape == (2, 7, len(names))
    assert np.isfinite(first.halves).all() == NEEDS[method].targets
    assert first.units
    assert first.meta["cost"]["label_flops"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_invariant_to_batch_size_and_row_order(method, label_by, make_token_texts):
    sample = make_token_texts(9, seed=1)
    whole = label_by(method, sample)
    other = label_by(method, sample[::-1], block_size=2).take(whole.text_ids)
    np.testing.assert_allclose(other.values, whole.values, rtol=2e-3, atol=2e-3 * np.abs(whole.values).max())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_the_model_bit_identical_also_when_it_raises(method, lm, label_by, make_token_texts, monkeypatch):
    lm.module.train()
    before = lm.fingerprint(optimizer=True)
    random_state = torch.get_rng_state()
    label_by(method, make_token_texts(3, seed=1))
    if NEEDS[method].model:
        plugin, passes = plugins.load("oracle.methods", method), []
        measure_some = plugin.measure

        def fails_soon(self, encoded):
            passes.append(0)
            return measure_some(self, encoded)

        def in_the_third_pass(module, args, kwargs):
            if passes:
                passes[0] += 1
                if passes[0] == 3:
                    raise RuntimeError("the third pass fails")

        monkeypatch.setattr(plugin, "measure", fails_soon)
        with lm.module.register_forward_pre_hook(in_the_third_pass, with_kwargs=True):
            with pytest.raises(RuntimeError, match="the third pass fails"):
                label_by(method, make_token_texts(8, seed=2), block_size=1)
            assert len(lm.module._forward_pre_hooks) == 1
    assert lm.fingerprint(optimizer=True) == before
    assert lm.module.training
    assert lm.batch_tokens is None
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in lm.module.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_after_an_error_with_identical_labels(method, label_by, make_token_texts, monkeypatch, tmp_path):
    sample = make_token_texts(9, seed=1)
    whole = label_by(method, sample, block_size=2, workdir=tmp_path / "whole")
    plugin = plugins.load("oracle.methods", method)
    original, measured = plugin.measure, []
    num_finished = 0 if NEEDS[method].whole_sample else 2

    def dies_later(self, encoded):
        if len(measured) == num_finished:
            raise KeyboardInterrupt
        measured.extend([1])
        return original(self, encoded)

    monkeypatch.setattr(plugin, "measure", dies_later)
    with pytest.raises(KeyboardInterrupt):
        label_by(method, sample, block_size=2, workdir=tmp_path / "broken")
    monkeypatch.setattr(plugin, "measure", original)
    resumed = label_by(method, sample, block_size=2, workdir=tmp_path / "broken")
    assert resumed.meta["cost"]["num_measured_now"] == 9 - 2 * num_finished
    assert (tmp_path / "broken/labels.parquet").read_bytes() == (tmp_path / "whole/labels.parquet").read_bytes()
    assert resumed.values.tobytes() == whole.values.tobytes()


def test_finished_labels_are_read_and_not_measured_again(lm, targets, make_token_texts, tmp_path, monkeypatch):
    sample = make_token_texts(4, seed=1)
    first = oracle.label(lm, sample, targets, method="grad_dot", workdir=tmp_path)
    monkeypatch.setattr(plugins.load("oracle.methods", "grad_dot"), "prepare", None)
    again = oracle.label(lm, sample, targets, method="grad_dot", workdir=tmp_path)
    assert again.values.tobytes() == first.values.tobytes()
    loaded = oracle.Labels.load(tmp_path)
    assert loaded.text_ids == first.text_ids and loaded.units == first.units
    np.testing.assert_array_equal(loaded.halves, first.halves)
    np.testing.assert_array_equal(loaded.columns["text_loss"], first.columns["text_loss"])


def test_a_larger_sample_measures_only_the_new_texts(lm, targets, make_token_texts, tmp_path):
    sample = make_token_texts(8, seed=1)
    oracle.label(lm, sample[:5], targets, method="grad_dot", workdir=tmp_path)
    grown = oracle.label(lm, sample, targets, method="grad_dot", workdir=tmp_path)
    assert len(grown) == 8 and grown.meta["cost"]["num_measured_now"] == 3


def test_labels_measured_earlier_are_never_dropped_by_another_sample(lm, targets, make_token_texts, tmp_path, monkeypatch):
    sample = make_token_texts(9, seed=1)
    first = oracle.label(lm, sample[:6], targets, method="grad_dot", workdir=tmp_path)
    other = oracle.label(lm, sample[4:], targets, method="grad_dot", workdir=tmp_path)
    assert other.text_ids == [text.text_id for text in lm.encode(sample[4:])]
    assert len(oracle.Labels.load(tmp_path)) == 9
    monkeypatch.setattr(plugins.load("oracle.methods", "grad_dot"), "prepare", None)  # a part of what is stored needs no model
    again = oracle.label(lm, sample[:6], targets, method="grad_dot", workdir=tmp_path)
    np.testing.assert_array_equal(again.values, first.values)


def test_labels_of_another_checkpoint_target_or_option_are_refused_with_the_difference(lm, targets, make_token_texts, tmp_path):
    sample = make_token_texts(4, seed=1)
    oracle.label(lm, sample, targets, method="grad_dot", workdir=tmp_path)
    stored = (tmp_path / "labels.parquet").read_bytes()
    with pytest.raises(MismatchError, match=r"options.*cosine"):
        oracle.label(lm, sample, targets, method="grad_dot", similarity="cosine", workdir=tmp_path)
    with pytest.raises(MismatchError, match="targets"):
        oracle.label(lm, sample, {"a": make_token_texts(4, seed=5)}, method="grad_dot", workdir=tmp_path)
    with torch.no_grad():
        next(lm.module.parameters()).add_(1e-3)
    with pytest.raises(MismatchError, match="checkpoint"):
        oracle.label(lm, sample, targets, method="grad_dot", workdir=tmp_path)
    assert (tmp_path / "labels.parquet").read_bytes() == stored


def test_a_nan_loss_names_the_text_and_keeps_finished_blocks(lm, targets, make_token_texts, tmp_path, monkeypatch):
    sample = make_token_texts(6, seed=1)
    ids = [text.text_id for text in lm.encode(sample)]
    plugin = plugins.load("oracle.methods", "grad_dot")
    original = plugin.measure

    def one_is_nan(self, encoded):
        measured = original(self, encoded)
        for row, text in enumerate(encoded):
            if text.text_id == ids[5]:
                measured.values[row] = np.nan
        return measured

    monkeypatch.setattr(plugin, "measure", one_is_nan)
    with pytest.raises(NotFiniteError, match=ids[5]):
        oracle.label(lm, sample, targets, method="grad_dot", workdir=tmp_path, block_size=2)
    assert len(list((tmp_path / "blocks").glob("*.parquet"))) == 2


@pytest.mark.parametrize("method", MODEL_METHODS)
def test_a_diverged_checkpoint_is_refused(method, lm, label_by, make_token_texts):
    with torch.no_grad():
        next(lm.module.parameters()).fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="NaN"):
        label_by(method, make_token_texts(2, seed=1))


@pytest.mark.parametrize("method", METHODS)
def test_a_text_without_a_target_token_has_no_influence_of_its_own_and_is_counted(method, label_by):
    with pytest.warns(UnlabelableTextWarning, match="1 of 2 texts have no target token"):
        labels = label_by(method, [{"input_ids": [5]}, {"input_ids": [5, 6, 7]}])
    if method in TRAINING_METHODS:  # the others do not train on it
        shared = labels.meta["facts"].get("shared_part", [0.0, 0.0])
        np.testing.assert_allclose(labels.values[0], shared, atol=1e-7)
    assert labels.meta["num_without_target_token"] == 1


def test_truncation_is_counted_or_refused(make_module, make_token_texts, targets):
    module = make_module("llama")
    sample = [{"input_ids": list(range(3, 43))}, {"input_ids": [5, 6, 7]}]
    short = oracle.LanguageModel(module, max_tokens=45)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnlabelableTextWarning)
        oracle.label(short, sample, targets, method="grad_dot")
    short.max_tokens = 16
    with pytest.warns(UnlabelableTextWarning, match="1 of 2 texts were cut"):
        assert oracle.label(short, sample, targets, method="grad_dot").meta["num_truncated"] == 1
    strict = oracle.LanguageModel(module, max_tokens=16, too_long="refuse")
    with pytest.raises(InputError, match="longer than 16 tokens"):
        oracle.label(strict, sample, {"a": [{"input_ids": [1, 2, 3]}]}, method="grad_dot")


def test_a_target_set_without_target_tokens_is_refused_by_name(lm, make_token_texts):
    with pytest.raises(InputError, match=r"'empty'.*no(ne|t)"):
        oracle.label(lm, make_token_texts(2, seed=1), {"empty": [{"input_ids": [4]}]}, method="grad_dot")


def test_target_subsampling_follows_the_seed_and_not_the_row_order(lm, make_token_texts):
    rows, sample = make_token_texts(12, seed=9), make_token_texts(5, seed=1)
    settings = {"method": "grad_dot", "max_target_texts": 4}
    first = oracle.label(lm, sample, {"t": rows}, seed=1, **settings)
    np.testing.assert_allclose(
        oracle.label(lm, sample, {"t": rows[::-1]}, seed=1, **settings).values, first.values, rtol=1e-3, atol=1e-6
    )
    assert not np.allclose(oracle.label(lm, sample, {"t": rows}, seed=2, **settings).values, first.values, rtol=1e-2)
    assert first.meta["num_target_texts"] == {"t": 4}


def _change_lr(lm, make_tokenizer):
    lm.optimizer.param_groups[0]["lr"] *= 2


def _change_tokenizer(lm, make_tokenizer):
    lm.tokenizer = make_tokenizer([sentence[::-1] for sentence in SENTENCES])


def _change_config(lm, make_tokenizer):
    lm.module.config.rms_norm_eps *= 2


def _freeze(lm, make_tokenizer):
    lm.module.get_input_embeddings().weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_change_lr, "checkpoint"),
        (_change_tokenizer, "target_ids.*tokenizer"),
        (_freeze, "trainable_parameters"),
        (_change_config, "config"),
    ],
)
def test_labels_of_another_optimiser_tokenizer_config_or_set_of_trainable_parameters_are_refused(
    change, named, make_module, make_tokenizer, make_token_texts, make_adamw, tmp_path
):
    module = make_module("llama", vocab_size=300)
    optimizer = make_adamw(module, make_token_texts(4, seed=0))
    lm = oracle.LanguageModel(module, make_tokenizer(SENTENCES), optimizer, max_tokens=64)
    oracle.label(lm, SENTENCES, {"t": SENTENCES}, method="grad_dot", workdir=tmp_path)
    change(lm, make_tokenizer)
    with pytest.raises(MismatchError, match=named):
        oracle.label(lm, SENTENCES, {"t": SENTENCES}, method="grad_dot", workdir=tmp_path)


def test_another_tokenizer_of_the_sample_alone_is_refused(make_module, make_tokenizer, make_token_texts, tmp_path):
    lm = oracle.LanguageModel(make_module("llama", vocab_size=300), make_tokenizer(SENTENCES), max_tokens=64)
    targets = {"t": make_token_texts(3, seed=2)}
    oracle.label(lm, SENTENCES, targets, method="grad_dot", workdir=tmp_path)
    _change_tokenizer(lm, make_tokenizer)
    with pytest.raises(MismatchError, match="tokenizer"):
        oracle.label(lm, SENTENCES, targets, method="grad_dot", workdir=tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_labels_do_not_need_the_callers_gradient_mode(method, label_by, make_token_texts):
    sample = make_token_texts(3, seed=1)
    expected = label_by(method, sample)
    with torch.no_grad():
        found = label_by(method, sample)
        assert not torch.is_grad_enabled()
    assert found.values.tobytes() == expected.values.tobytes()


@pytest.mark.parametrize("method", ["ekfac", "grad_dot", "in_context", "two_forward"])
def test_labels_per_token_are_those_per_text_over_the_texts_tokens(method, label_by, make_token_texts):
    sample = make_token_texts(5, seed=1)
    whole, each = (label_by(method, sample, per=per) for per in ("text", "token"))
    lengths = np.array([[len(row["input_ids"])] for row in sample])
    np.testing.assert_allclose(each.values * lengths, whole.values, rtol=1e-5)
    np.testing.assert_allclose(each.halves * lengths, whole.halves, rtol=1e-5)
    assert each.units == whole.units + " per text token"


def test_labels_per_token_and_per_text_do_not_mix(lm, targets, make_token_texts, tmp_path):
    sample = make_token_texts(3, seed=1)
    oracle.label(lm, sample, targets, method="grad_dot", workdir=tmp_path)
    with pytest.raises(MismatchError, match="per: stored 'text', asked 'token'"):
        oracle.label(lm, sample, targets, method="grad_dot", workdir=tmp_path, per="token")
    with pytest.raises(InputError, match="per='word'"):
        oracle.label(lm, sample, targets, method="grad_dot", per="word")
    with pytest.raises(InputError, match="nothing counts the texts' tokens"):
        oracle.label(None, SENTENCES, {"t": SENTENCES}, method="target_similarity", per="token")


def test_only_methods_that_need_no_model_or_targets_do_without(lm, targets, make_token_texts):
    sample = make_token_texts(3, seed=1)
    for method in METHODS:
        options = OPTIONS.get(method, lambda rows: {})(sample)
        if NEEDS[method].model:
            with pytest.raises(InputTypeError, match="lm is a NoneType"):
                oracle.label(None, sample, targets if NEEDS[method].targets else None, method=method, **options)
        if NEEDS[method].targets:
            with pytest.raises(InputError, match=f"{method} needs target sets"):
                oracle.label(lm, sample, method=method, **options)
        else:
            for given in ({"targets": targets}, {"max_target_texts": 3}):
                with pytest.raises(InputError, match=f"{method} looks at no target set"):
                    oracle.label(lm, sample, method=method, **given, **options)


def test_without_a_model_labels_have_no_checkpoint_and_uncounted_tokens(tmp_path):
    labels = oracle.label(None, SENTENCES, {"t": SENTENCES}, method="target_similarity", workdir=tmp_path)
    assert not {"model", "checkpoint", "tokenizer"} & set(labels.meta)
    assert np.isnan(labels.columns["num_tokens"]).all()
    assert labels.meta["cost"]["num_tokens"] == 0 and labels.meta["cost"]["num_labelled"] == 2
    again = oracle.label(None, SENTENCES[::-1], {"t": SENTENCES}, method="target_similarity", workdir=tmp_path)
    np.testing.assert_array_equal(again.take(labels.text_ids).values, labels.values)


def test_a_sample_that_is_measured_as_a_whole_cannot_grow(tmp_path):
    more = [*SENTENCES, "Sphinx of black quartz, judge my vow."]
    oracle.label(None, SENTENCES, {"t": SENTENCES}, method="target_similarity", workdir=tmp_path)
    for sample in (more, SENTENCES[:1]):
        with pytest.raises(MismatchError, match="sample: stored"):
            oracle.label(None, sample, {"t": SENTENCES}, method="target_similarity", workdir=tmp_path)


def _ticks(monkeypatch):
    """Make every block last one second."""
    clock = iter(range(10**6))
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(clock)))


def test_flops_seconds_and_tokens_are_of_all_texts_that_have_labels(lm, targets, make_token_texts, tmp_path, monkeypatch):
    _ticks(monkeypatch)
    sample = make_token_texts(9, seed=1)
    whole = oracle.label(lm, sample, targets, method="one_step", block_size=2).meta["cost"]
    oracle.label(lm, sample[:8], targets, method="one_step", block_size=2, workdir=tmp_path)
    grown = oracle.label(lm, sample[8:], targets, method="one_step", block_size=2, workdir=tmp_path).meta["cost"]
    for key in ("label_flops", "num_tokens", "num_labelled", "label_seconds"):
        assert grown[key] == whole[key], key
    assert grown["num_labelled"] == 9 and grown["label_seconds"] == 5


@pytest.mark.parametrize("dies_at", ["the labels", "the blocks' removal"])
def test_a_kill_at_the_end_counts_no_second_twice(dies_at, lm, targets, make_token_texts, tmp_path, monkeypatch):
    _ticks(monkeypatch)
    added, original = [], label_store.LabelStore.add

    def counting(self, block, **options):
        added.append(len(block))
        original(self, block, **options)

    monkeypatch.setattr(label_store.LabelStore, "add", counting)
    sample = make_token_texts(8, seed=1)
    settings = {"method": "grad_dot", "block_size": 2, "workdir": tmp_path}
    oracle.label(lm, sample[:2], targets, **settings)
    with monkeypatch.context() as patch:

        def dies(*args, **options):
            raise KeyboardInterrupt

        if dies_at == "the labels":
            patch.setattr("oracle.labels.to_table", dies)
        else:
            patch.setattr(label_store.shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            oracle.label(lm, sample[:6], targets, **settings)
    oracle.label(lm, sample, targets, **settings)
    assert oracle.Labels.load(tmp_path).meta["cost"]["label_seconds"] == len(added)
    assert sum(added) == 8
    assert len(oracle.Labels.load(tmp_path)) == 8


def test_texts_of_like_length_share_a_block_and_the_longest_come_first(lm, targets, make_token_texts, monkeypatch):
    lengths, original = [], label_store.LabelStore.add

    def noting(self, block, **options):
        lengths.extend(block.columns["num_tokens"].tolist())
        original(self, block, **options)

    monkeypatch.setattr(label_store.LabelStore, "add", noting)
    sample = make_token_texts(12, seed=1)
    labels = oracle.label(lm, sample, targets, method="grad_dot", block_size=4)
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 5
    assert labels.columns["num_tokens"].tolist() == [len(row["input_ids"]) for row in sample]


def test_preparing_costs_what_the_method_does(lm, targets, make_token_texts):
    sample = make_token_texts(2, seed=1)
    costs = {name: oracle.label(lm, sample, targets, method=name).meta["cost"] for name in ("one_step", "grad_dot")}
    assert costs["one_step"]["prepare_flops"] * 3 == costs["grad_dot"]["prepare_flops"] * 2 > 0


SCRIPT = textwrap.dedent("""
    import sys, time, torch, transformers, oracle
    from oracle import plugins
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                      intermediate_size=64,
                                      max_position_embeddings=64)
    module = transformers.LlamaForCausalLM(config)
    lm = oracle.LanguageModel(module, optimizer=torch.optim.AdamW(module.parameters(), lr=1e-3), max_tokens=64)
    rows = [{"input_ids": torch.randint(3, 99, (20,), generator=torch.Generator().manual_seed(i)).tolist()} for i in range(24)]
    if len(sys.argv) > 3:
        plugin = plugins.load("oracle.methods", sys.argv[2])
        original = plugin.measure
        def slowly(self, encoded):
            time.sleep(0.3)
            return original(self, encoded)
        plugin.measure = slowly
    oracle.label(lm, rows[:16], {"t": rows[16:]}, method=sys.argv[2], workdir=sys.argv[1], block_size=2)
""")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grad_dot", "one_step"])
def test_killed_with_sigkill_and_run_again_gives_the_same_bytes(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = [sys.executable, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*run, str(tmp_path / "whole"), method], check=True, env=environment)
    process = subprocess.Popen([*run, str(tmp_path / "killed"), method, "slowly"], env=environment)
    blocks = tmp_path / "killed" / "blocks"
    deadline = time.monotonic() + 120
    while len(list(blocks.glob("*.parquet")) if blocks.exists() else []) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "labels.parquet").exists()
    assert 3 <= len(list(blocks.glob("*.parquet"))) < 8
    subprocess.run([*run, str(tmp_path / "killed"), method], check=True, env=environment)
    assert (tmp_path / "killed/labels.parquet").read_bytes() == (tmp_path / "whole/labels.parquet").read_bytes()
    assert oracle.Labels.load(tmp_path / "killed").meta["cost"]["num_measured_now"] < 16


@pytest.mark.parametrize("method", [method for method in MODEL_METHODS if method not in ("in_context", "self_rating")])
def test_a_model_that_is_frozen_altogether_is_refused_by_every_method_that_takes_gradients(
    method, lm, label_by, make_token_texts
):
    lm.module.requires_grad_(False)
    with pytest.raises(InputError, match=r"no trainable parameter|none of the parameters|no linear layer"):
        label_by(method, make_token_texts(2, seed=1))


@pytest.mark.parametrize(("method", "options"), [("one_step", {}), ("grad_dot", {}), ("grad_dot", {"preconditioner": "none"})])
def test_an_adam_without_state_is_told_of_once_where_it_matters(method, options, lm, targets, make_token_texts):
    sample = make_token_texts(3, seed=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        oracle.label(lm, sample, targets, method=method, block_size=1, **options)
        assert not [each for each in caught if each.category is FreshOptimizerWarning]
        lm.optimizer.state.clear()
        oracle.label(lm, sample, targets, method=method, block_size=1, **options)
    told = [each for each in caught if each.category is FreshOptimizerWarning]
    assert len(told) == (0 if options else 1)
    assert all("AdamW has no state" in str(each.message) and each.filename == __file__ for each in told)


@pytest.mark.parametrize(
    ("method", "options", "given"),
    [
        ("one_step", {}, "a part that all texts share"),
        ("rollout", {}, "a part that all texts share"),
        ("less", {"similarity": "dot"}, "a part that all texts share"),
        ("grad_dot", {"similarity": "cosine"}, "are in cosine"),
        ("self_rating", {}, "are in rating"),
        ("target_similarity", {}, "rank"),
        ("in_context", {"distance": "probability"}, "distance of"),
    ],
)
def test_values_whose_0_is_an_effect_are_not_divided_by_tokens(method, options, given, label_by, make_token_texts):
    sample = SENTENCES if method == "self_rating" else make_token_texts(2, seed=1)
    with pytest.raises(InputError, match=f"per='token', and the values of '{method}' .*{given}"):
        label_by(method, sample, per="token", **options)


def test_a_step_is_divided_by_tokens_where_nothing_is_shared_or_that_is_subtracted(lm, targets, make_token_texts):
    sample, length = make_token_texts(1, seed=1), len(make_token_texts(1, seed=1)[0]["input_ids"])
    for optimizer, options in ((lm.optimizer, {"subtract_shared": True}), (torch.optim.SGD(lm.module.parameters(), lr=0.1), {})):
        lm.optimizer = optimizer
        whole, each = (oracle.label(lm, sample, targets, per=per, **options) for per in ("text", "token"))
        np.testing.assert_allclose(each.values * length, whole.values, rtol=1e-5)


def test_finished_labels_of_a_smaller_sample_are_counted_anew(lm, targets, make_token_texts, tmp_path):
    sample = [*make_token_texts(4, seed=1), {"input_ids": [5]}]
    with pytest.warns(UnlabelableTextWarning, match="1 of 5 texts have no target token"):
        oracle.label(lm, sample, targets, method="grad_dot", workdir=tmp_path)
    stored = (tmp_path / "meta.json").read_bytes()
    part = oracle.label(lm, sample[:3], targets, method="grad_dot", workdir=tmp_path)
    assert (part.meta["num_texts"], part.meta["num_without_target_token"]) == (3, 0)
    assert part.meta["cost"]["num_measured_now"] == 0 and part.meta["cost"]["num_labelled"] == 5
    assert (tmp_path / "meta.json").read_bytes() == stored


@pytest.mark.parametrize("method", ["one_step", "rollout", "two_forward"])
def test_methods_that_step_the_weights_measure_outside_the_callers_autocast(method, label_by, make_token_texts, tmp_path):
    sample = make_token_texts(3, seed=1)
    expected = label_by(method, sample, workdir=tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = label_by(method, sample)
        stored = label_by(method, sample, workdir=tmp_path)
        assert torch.is_autocast_enabled("cpu")
    assert found.values.tobytes() == stored.values.tobytes() == expected.values.tobytes()


def test_labels_measured_inside_an_autocast_do_not_mix_with_others(lm, targets, make_token_texts, tmp_path):
    sample = make_token_texts(3, seed=1)
    oracle.label(lm, sample, targets, method="grad_dot", workdir=tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(MismatchError, match="autocast: stored '', asked 'bfloat16'"):
        oracle.label(lm, sample, targets, method="grad_dot", workdir=tmp_path)


@pytest.mark.parametrize("method", ["ekfac", "in_context", "self_rating"])
def test_labels_that_no_optimiser_decides_are_gone_on_with_at_another_state_of_it(
    method, lm, label_by, make_token_texts, tmp_path, monkeypatch
):
    first = label_by(method, make_token_texts(3, seed=1), workdir=tmp_path)
    lm.optimizer.param_groups[0]["lr"] *= 2
    monkeypatch.setattr(plugins.load("oracle.methods", method), "prepare", None)
    again = label_by(method, make_token_texts(3, seed=1), workdir=tmp_path)
    assert again.values.tobytes() == first.values.tobytes()


def test_a_call_that_failed_before_its_first_block_binds_no_folder(lm, targets, make_token_texts, tmp_path, monkeypatch):
    sample, plugin = make_token_texts(3, seed=1), plugins.load("oracle.methods", "grad_dot")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(plugin, "measure", Mock(side_effect=KeyboardInterrupt))
        oracle.label(lm, sample, targets, method="grad_dot", workdir=tmp_path)
    labels = oracle.label(lm, sample, targets, method="grad_dot", similarity="cosine", workdir=tmp_path)
    assert labels.meta["options"]["similarity"] == "cosine"


def test_processes_that_see_other_finished_labels_stop_together(monkeypatch):
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, not value])
    task = SimpleNamespace(text_ids=["x"])
    store = SimpleNamespace(folder="labels", is_complete=lambda text_ids: True)
    with pytest.raises(InputError, match="for process 0, and not for process 1"):
        measure._is_complete(task, store, Processes(0, 2))
