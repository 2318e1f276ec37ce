"""What one process does while others wait, and what each does for itself, costs as often as there are processes."""

from __future__ import annotations

import numpy as np
import pytest

import oracle
from oracle.targets import read_targets
from oracle.texts import read_texts
from surrogate.feature_cache import FeatureCache
from surrogate.training.ranking_costs import label_costs
from surrogate.training.strategies import RankingContext
from surrogate.training.strategies.refresh import Refresh


@pytest.fixture(scope="module")
def world(make_module, make_token_texts):
    lm = oracle.LanguageModel(make_module("llama"))
    return lm, read_texts(make_token_texts(60, seed=0)), read_targets({"goal": make_token_texts(4, seed=1)})


def test_target_gradients_are_made_by_each_process_and_labels_shared(world):
    lm, pool, targets = world
    labels = oracle.label(lm, pool.select(range(8)), targets, method="grad_dot")
    alone, three = (label_costs(labels, num_processes=number) for number in (1, 3))
    assert alone["label"] == three["label"] and three["targets"]["flops"] == 3 * alone["targets"]["flops"] > 0


def test_a_refresh_costs_the_seconds_of_those_that_wait(world, tmp_path):
    lm, pool, targets = world
    strategy = Refresh(sample_size=30, num_probe=6, encoder=("hashed_ngrams",), num_folds=2)
    candidates = np.setdiff1d(np.arange(60), strategy.reserved(pool["text_id"], seed=0))
    costs = {}
    for number in (1, 1000):
        context = RankingContext(
            pool=pool, candidates=candidates, targets=targets, lm=lm, cache=FeatureCache(tmp_path / f"features{number}"),
            folder=tmp_path / f"ranking{number}", num_processes=number,
        )  # fmt: skip
        costs[number] = strategy.rank(context).costs
    assert set(costs[1]) == {"targets", "label", "features", "fit", "score"}
    for stage in ("features", "fit", "score"):
        assert costs[1000][stage]["seconds"] > 20 * costs[1][stage]["seconds"]
        assert costs[1000][stage]["flops"] == costs[1][stage]["flops"]
