"""InfluencePredictor.explain: amounts add up, save and load change nothing, and what cannot be explained is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

import oracle
import surrogate
from oracle.errors import InputError
from oracle.labels import Labels
from surrogate.features.hashed_ngrams import HashedNgrams
from surrogate.fitted_rows import NAMES_FILE

WORDS = ["sum", "integral", "proof", "lemma", "salt", "butter", "onion", "oven"]


def planted(num_texts, *, seed=0):
    """Influence on "math" grows with the number of math words."""
    rng = np.random.default_rng(seed)
    rows, values = [], []
    for number in range(num_texts):
        words = [WORDS[rng.integers(4) + 4 * (rng.random() < 0.5)] for _ in range(20)]
        math = sum(word in WORDS[:4] for word in words)
        rows.append({"text": f"text {seed} {number} " + " ".join(words)})
        values.append([math + rng.normal(), -math + rng.normal()])
    texts = oracle.read_texts(rows)
    return texts, Labels.from_values(np.array(values), texts["text_id"], ["math", "cooking"])


def fit(name, texts, labels, **more):
    made = {
        "ridge": surrogate.RidgeSurrogate,
        "trees": lambda: surrogate.InfluenceTrees(num_threads=1, num_trees=40, min_trees=40, validation_folds=0, min_leaf_size=3),
        "network": lambda: surrogate.InfluenceNetwork(ensemble=2, max_epochs=10, hidden="8"),
    }[name]()
    return surrogate.InfluencePredictor([HashedNgrams(dim=64), "text_stats"], made, num_folds=2).fit(texts, labels, **more)


@pytest.fixture(scope="module", params=["ridge", "trees", "network"])
def fitted(request):
    texts, labels = planted(90)
    return fit(request.param, texts, labels), texts, labels


def total(target):
    listed = sum(share.amount for share in (*target.raised, *target.lowered))
    return target.bias + target.earlier + listed + target.others + target.remainder


def test_the_account_adds_up_and_ends_in_the_score(fitted):
    predictor, _, labels = fitted
    new, _ = planted(70, seed=4)
    scores = np.asarray(predictor.predict(new))
    found = predictor.explain(new, 3)
    assert [explanation.text_id for explanation in found] == list(new["text_id"])
    values = dict(zip(labels.text_ids, labels.values, strict=True))
    for text, explanation in enumerate(found):
        assert explanation.units == labels.units and "quantiles" in explanation.scale
        for column, target in enumerate(explanation.targets):
            assert total(target) == pytest.approx(target.scaled_score, abs=1e-9)
            by_blocks = target.block_bias + target.earlier + sum(target.blocks.values()) + target.block_remainder
            assert by_blocks == pytest.approx(target.scaled_score, abs=1e-9)
            assert set(target.blocks) == {"hashed_ngrams", "text_stats"}
            assert target.score == pytest.approx(scores[text, column], abs=1e-4)
            if predictor.surrogate_name != "network":
                assert abs(target.remainder) < 1e-6 and abs(target.block_remainder) < 1e-6
            amounts = [share.amount for share in target.raised]
            assert len(amounts) <= 3 and amounts == sorted(amounts, reverse=True) and all(amount > 0 for amount in amounts)
            assert all(share.amount < 0 for share in target.lowered)
            for share in (*target.raised, *target.lowered):
                assert share.label == values[share.text_id][column]


def test_all_labelled_texts_listed_leave_nothing_to_others(fitted):
    predictor, texts, _ = fitted
    for target in predictor.explain(texts.select([0]), 90)[0].targets:
        assert abs(target.others) < 1e-9 and len(target.raised) + len(target.lowered) > 50


def test_a_loaded_predictor_explains_with_the_same_bytes(fitted, tmp_path):
    predictor, _, _ = fitted
    new, _ = planted(5, seed=4)
    predictor.save(tmp_path / "predictor")
    loaded = surrogate.InfluencePredictor.load(tmp_path / "predictor")
    before, after = (json.dumps([e.as_dict() for e in p.explain(new)]) for p in (predictor, loaded))
    assert before == after
    alone = loaded.explain(new.select([2]))[0].targets[0]
    assert [share.text_id for share in alone.raised] == [s.text_id for s in loaded.explain(new)[2].targets[0].raised]
    (tmp_path / "predictor" / NAMES_FILE).unlink()  # as versions left it that kept nothing
    old = surrogate.InfluencePredictor.load(tmp_path / "predictor")
    assert np.array_equal(old.predict(new), predictor.predict(new))
    with pytest.raises(InputError, match="without the texts that it was fitted on"):
        old.explain(new)


def test_a_planted_near_duplicate_comes_first(fitted):
    predictor, texts, labels = fitted
    rows = [{"text": text} for text in texts["text"]] + [{"text": "zebra quartz " * 12 + "one"}]
    planted_texts = oracle.read_texts(rows)
    values = np.vstack([labels.values, [[40.0, 40.0]]])
    planted_labels = Labels.from_values(values, planted_texts["text_id"], labels.target_names)
    again = fit(predictor.surrogate_name, planted_texts, planted_labels)
    near = oracle.read_texts([{"text": "zebra quartz " * 12 + "two"}])
    for target in again.explain(near, 1)[0].targets:
        assert target.raised[0].text_id == planted_texts["text_id"][-1]


def test_trees_score_hashed_columns_by_the_leaves_that_they_trained():
    """LightGBM's bundles of columns lose values where two of them meet; leaves would hold other texts than they are said to."""
    for seed in range(3):
        texts, labels = planted(90, seed=seed)
        for target in fit("trees", texts, labels).explain(texts.select([0]))[0].targets:
            assert abs(target.remainder) < 1e-6


def test_labels_of_earlier_checkpoints_and_a_warm_start_are_in_the_account():
    texts, labels = planted(120)
    first, second = labels.take(labels.text_ids[:60]), labels.take(labels.text_ids[50:])
    weighted = fit("trees", texts, second, older=[(first, 0.5)])
    target = weighted.explain(texts.select([0]), 200)[0].targets[0]
    assert total(target) == pytest.approx(target.scaled_score, abs=1e-9) and abs(target.remainder) < 1e-6
    listed = {share.text_id for share in (*target.raised, *target.lowered)}
    assert listed & set(first.text_ids[:50]) and len(listed) == len(target.raised) + len(target.lowered)


@pytest.mark.parametrize("name", ["ridge", "trees"])
def test_a_warm_start_is_in_the_account_also_after_loading(name, tmp_path):
    texts, labels = planted(120)
    first, later = labels.take(labels.text_ids[:60]), labels.take(labels.text_ids[60:])
    warm = fit(name, texts, later, warm_start=fit(name, texts, first))
    warm.save(tmp_path / "warm")
    new, _ = planted(3, seed=4)
    for predictor in (warm, surrogate.InfluencePredictor.load(tmp_path / "warm")):
        for explanation, scores in zip(predictor.explain(new), np.asarray(warm.predict(new)), strict=True):
            for target, score in zip(explanation.targets, scores, strict=True):
                assert total(target) == pytest.approx(target.scaled_score, abs=1e-9) and abs(target.remainder) < 1e-6
                assert target.earlier != 0 and target.score == score
                assert {share.text_id for share in (*target.raised, *target.lowered)} <= set(later.text_ids)


def test_what_cannot_be_explained_is_refused(fitted):
    predictor, texts, _ = fitted
    with pytest.raises(InputError, match="not been fitted"):
        surrogate.InfluencePredictor(["text_stats"]).explain(texts)
    with pytest.raises(InputError, match="top_k"):
        predictor.explain(texts, 0)
    with pytest.raises(InputError, match="method='shap'"):
        predictor.explain(texts, method="shap")
    if predictor.surrogate_name == "trees":
        boostin = predictor.explain(texts.select([0]), method="boostin")[0]
        assert boostin.method == "boostin" and total(boostin.targets[0]) == pytest.approx(boostin.targets[0].scaled_score)
    else:
        with pytest.raises(InputError, match="method='boostin'"):
            predictor.explain(texts, method="boostin")
