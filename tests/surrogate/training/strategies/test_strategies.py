"""The contract of strategies, for those that need nothing but a pool, target sets and a model."""

from __future__ import annotations

import numpy as np
import pytest

from oracle import plugins
from oracle.texts import list_text_ids
from surrogate.catalogue import catalogue
from surrogate.scores import Scores

PACKAGE = "surrogate.training.strategies"
FITTED = {"refresh", "static"}  # fit a surrogate, which takes more texts than there are here
NAMES = [name for name in plugins.names(PACKAGE) if name not in FITTED]
ADAPTING = {"loss", "oracle", "rs2"}
COLUMNS = {"dsir": ["animals", "sums"], "oracle": ["animals", "sums"], "target_similarity": ["animals", "sums"]}


@pytest.fixture(params=NAMES)
def strategy(request):
    return plugins.create(PACKAGE, request.param, {})


def by_text(scores):
    return dict(zip(scores.text_ids, np.asarray(scores).tolist(), strict=True))


def test_the_baselines_are_found_and_listed():
    assert {"dsir", "loss", "oracle", "random", "rs2", "target_similarity"} <= set(NAMES)
    assert [row["name"] for row in catalogue()["strategies"]] == plugins.names(PACKAGE)


@pytest.mark.parametrize("name", plugins.names(PACKAGE))
def test_every_strategy_tells_its_paper_cost_and_limit(name):
    told = plugins.describe(PACKAGE, name)
    assert told["summary"].endswith(".") and told["paper"] and told["cost"] and told["limit"]
    assert all(option["help"].endswith(".") for option in told["options"])


def test_a_ranking_has_exactly_the_candidates_in_their_order(strategy, make_context):
    context = make_context(candidates=np.array([1, 2, 5, 8, 11]))
    ranking = strategy.rank(context)
    assert type(ranking.scores) is Scores
    assert ranking.scores.text_ids == list_text_ids(context.candidate_texts())
    assert ranking.scores.target_names == COLUMNS.get(strategy.plugin_name, [strategy.plugin_name])
    assert np.isfinite(np.asarray(ranking.scores)).all()
    assert np.unique(np.asarray(ranking.scores)).size > 1


@pytest.mark.filterwarnings("ignore::oracle.texts.TextsRejectedWarning")
def test_a_text_that_stands_twice_in_the_pool_has_two_rows(strategy, make_context):
    context = make_context()
    rows = [3, 0, 1, 2, 0]
    scores = strategy.rank(make_context(pool=context.pool.select(rows), candidates=np.arange(5))).scores
    assert scores.text_ids == [list_text_ids(context.pool)[row] for row in rows]
    np.testing.assert_array_equal(np.asarray(scores)[1], np.asarray(scores)[4])


def test_costs_are_seconds_and_counted_flops_by_stage(strategy, make_context):
    ranking = strategy.rank(make_context())
    assert list(ranking.costs) == (["targets", "label"] if strategy.plugin_name == "oracle" else ["score"])
    for cost in ranking.costs.values():
        assert set(cost) == {"seconds", "flops"} and all(type(value) is float for value in cost.values())
        assert cost["seconds"] >= 0
    multiplies = strategy.needs_model or strategy.plugin_name == "target_similarity"
    assert (sum(cost["flops"] for cost in ranking.costs.values()) > 0) == multiplies


def test_the_same_seed_gives_the_same_bytes(strategy, make_context):
    first, again = (strategy.rank(make_context(name=name, seed=3)).scores for name in ("first", "again"))
    assert first.tobytes() == again.tobytes()


def test_the_order_of_the_pool_changes_no_byte(strategy, make_context):
    context = make_context()
    turned = make_context(name="turned", pool=context.pool.select(range(len(context.pool))[::-1]))
    assert by_text(strategy.rank(turned).scores) == by_text(strategy.rank(context).scores)


def test_the_model_is_left_as_it_was(strategy, make_context, lm):
    lm.module.train()
    before = lm.fingerprint(optimizer=True)
    modes = [module.training for module in lm.module.modules()]
    strategy.rank(make_context())
    assert lm.fingerprint(optimizer=True) == before
    assert [module.training for module in lm.module.modules()] == modes and all(modes)


def test_a_strategy_that_needs_no_model_or_targets_works_without(strategy, make_context):
    options = {}
    if not strategy.needs_model:
        options["lm"] = None
    if not strategy.needs_targets:
        options["targets"] = None
    with_all, without = strategy.rank(make_context()), strategy.rank(make_context(name="without", **options))
    assert with_all.scores.tobytes() == without.scores.tobytes()


def test_only_a_strategy_that_adapts_depends_on_the_refresh_or_the_model(strategy, make_context, lm):
    assert strategy.adapts == (strategy.plugin_name in ADAPTING)
    first = strategy.rank(make_context()).scores
    for parameter in lm.module.parameters():
        parameter.data.mul_(1.5)
    later = strategy.rank(make_context(name="later", refresh=1)).scores
    assert (first.tobytes() != later.tobytes()) == strategy.adapts
