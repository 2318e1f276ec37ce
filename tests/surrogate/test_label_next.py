"""What to label next: the masses of the formula, no near-duplicates, no labelled texts, and better than at random."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

import oracle
import surrogate
from oracle.errors import InputError
from oracle.labels import Labels
from surrogate.features.hashed_ngrams import HashedNgrams
from surrogate.label_next import largest_masses
from surrogate.training import what_to_label_next

WORDS = ["sum", "integral", "proof", "lemma", "salt", "butter", "onion", "oven", "sugar", "vector"]


def test_the_largest_masses_are_those_of_a_gaussian_process():
    """The slow way: the covariance of all texts, conditioned again on all labelled and chosen ones at each step."""
    rng = np.random.default_rng(0)
    pool, known, noise = rng.normal(size=(40, 5)), rng.normal(size=(6, 5)), 0.7
    is_free = np.arange(40) % 4 != 0
    found = largest_masses(pool, known, is_free=is_free, num_texts=12, noise=noise)
    labelled, slow = known, []
    for _ in range(12):
        gain = pool @ labelled.T @ np.linalg.inv(labelled @ labelled.T + noise * np.eye(len(labelled)))
        covariance = pool @ pool.T - gain @ labelled @ pool.T
        best, best_mass = -1, -1.0
        for text in range(40):
            if is_free[text] and text not in slow:
                mass = sum(covariance[text, other] ** 2 for other in range(40)) / (covariance[text, text] + noise)
                if mass > best_mass:
                    best, best_mass = text, mass
        slow.append(best)
        labelled = np.vstack([labelled, pool[[best]]])
    assert found.tolist() == slow


def test_a_near_duplicate_of_a_chosen_or_labelled_text_waits():
    eye = np.eye(4)
    pool = np.vstack([eye[0], eye[0] + 1e-3, eye[0] - 1e-3, eye[1], eye[2]])
    found = largest_masses(pool, eye[[3]], is_free=np.ones(5, dtype=bool), num_texts=3, noise=0.1)
    assert len({0, 1, 2} & set(found.tolist())) == 1 and {3, 4} < set(found.tolist())
    known = np.repeat(eye[[0]], 5, axis=0)
    assert {0, 1, 2}.isdisjoint(largest_masses(pool, known, is_free=np.ones(5, dtype=bool), num_texts=2, noise=0.1).tolist())


def table(seed, num_texts=900):
    """Clusters of unequal size, each with an effect of its own: at random, small ones get hardly any labels."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, 21)
    cluster = rng.choice(20, size=num_texts, p=share / share.sum())
    X = (2 * rng.normal(size=(20, 40))[cluster] + rng.normal(size=(num_texts, 40))).astype(np.float32)
    y = X @ rng.normal(size=40) / 6 + rng.normal(size=20)[cluster] + 0.5 * rng.normal(size=num_texts)
    return X, y[:, None]


SURROGATES = {
    "ridge": surrogate.RidgeSurrogate,
    "trees": lambda: surrogate.InfluenceTrees(num_threads=1, num_trees=60, min_trees=60, validation_folds=0, min_leaf_size=3),
    "network": lambda: surrogate.InfluenceNetwork(ensemble=2, max_epochs=10, hidden="8"),
}


@pytest.mark.parametrize("name", ["ridge", "trees"])
def test_it_beats_labels_at_random(name):
    """Held-out Spearman after 60 labels at random and 60 more of either kind: by a little, but by more than chance."""
    gains = []
    for seed in range(24):
        X, y = table(1000 + seed)
        pool, test = np.arange(600), np.arange(600, 900)
        first = SURROGATES[name]().fit(X[:60], y[:60])
        similar = first.similarity_features(X[pool]).astype(np.float64)
        similar -= similar.mean(axis=0)
        similar /= np.sqrt(np.square(similar).sum(axis=1).mean())
        chosen = largest_masses(similar, similar[:60], is_free=pool >= 60, num_texts=60, noise=1.8)
        found = []
        for rows in (np.concatenate([pool[:60], chosen]), pool[:120]):
            scores = SURROGATES[name]().fit(X[rows], y[rows]).predict(X[test])
            found.append(spearmanr(scores[:, 0], y[test, 0]).statistic)
        gains.append(found[0] - found[1])
    assert np.mean(gains) > 1.6 * np.std(gains) / np.sqrt(len(gains))


@pytest.fixture(scope="module", params=["ridge", "trees", "network"])
def fitted(request):
    rng = np.random.default_rng(0)
    rows = [{"text": f"text {number} " + " ".join(rng.choice(WORDS, size=12))} for number in range(90)]
    texts = oracle.read_texts(rows)
    values = np.array([[text.count("sum")] for text in texts["text"]], dtype=float)
    labels = Labels.from_values(values, texts["text_id"], ["t"]).take(texts["text_id"][:40])
    return surrogate.InfluencePredictor([HashedNgrams(dim=64)], SURROGATES[request.param](), num_folds=2).fit(
        texts, labels
    ), texts


def test_texts_without_a_label_are_chosen_whatever_their_order(fitted, tmp_path):
    predictor, texts = fitted
    found = what_to_label_next(predictor, texts, 12)
    assert len(set(found)) == 12 and set(found) <= set(texts["text_id"][40:])
    assert what_to_label_next(predictor, texts.select(range(89, -1, -1)), 12) == found
    assert what_to_label_next(predictor, texts, 5) == found[:5]
    predictor.save(tmp_path / "predictor")
    assert what_to_label_next(surrogate.InfluencePredictor.load(tmp_path / "predictor"), texts, 12) == found


def test_more_texts_than_there_are_without_a_label_are_refused(fitted):
    predictor, texts = fitted
    assert set(what_to_label_next(predictor, texts, 50)) == set(texts["text_id"][40:])
    with pytest.raises(InputError, match="50 of 90 texts"):
        what_to_label_next(predictor, texts, 51)
    with pytest.raises(InputError, match="num_texts"):
        what_to_label_next(predictor, texts, 0)
    with pytest.raises(InputError, match="not fitted"):
        what_to_label_next(surrogate.InfluencePredictor(["text_stats"]), texts, 1)
