"""Of chosen texts that are alike the best one stays, as a plain loop over pairs would have it."""

import numpy as np
import pytest

from oracle.errors import InputError, MismatchError
from surrogate.budget import Budget
from surrogate.features.hashed_ngrams import HashedNgrams
from surrogate.scoring import near_duplicates
from surrogate.scoring.corpus import score_corpus
from surrogate.scoring.near_duplicates import NearDuplicates, distinct_rows
from surrogate.scoring.selecting import select_corpus


def slow_distinct(vectors, limit):
    kept = []
    for row, vector in enumerate(vectors):
        if all(vector @ vectors[other] < limit for other in kept):
            kept.append(row)
    return [row in kept for row in range(len(vectors))]


def test_blocks_drop_what_a_loop_over_pairs_drops(monkeypatch):
    monkeypatch.setattr(near_duplicates, "BLOCK_TEXTS", 7)
    monkeypatch.setattr(near_duplicates, "KEPT_TEXTS", 5)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(80, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[9] = 0  # a text without features is like no other
    for limit in (0.6, 0.9, 0.99):
        stays = distinct_rows(vectors, limit)
        assert stays.tolist() == slow_distinct(vectors, limit) and 3 < stays.sum() < 80


@pytest.fixture
def corpus(make_jsonl, make_texts, predictor_folder, tmp_path):
    """Texts, half of them again with one word more, over two files."""
    texts = make_texts(40)
    more = [f"{text} sum" for text in texts[:20]]
    make_jsonl(tmp_path / "pool" / "a.jsonl", [{"text": text} for text in [*texts[:30], "{broken"]])
    make_jsonl(tmp_path / "pool" / "b.jsonl", [{"text": None}, *({"text": text} for text in [*texts[30:], *more])])
    return score_corpus(predictor_folder, tmp_path / "pool", tmp_path / "scored", workers=0)


def test_the_better_one_of_two_copies_stays(corpus, tmp_path):
    everything = select_corpus(corpus, tmp_path / "all", budget=Budget(fraction=1.0), combine="math")
    alike = NearDuplicates(max_similarity=0.93, encoder=HashedNgrams(word_ngrams="1"))
    chosen = select_corpus(corpus, tmp_path / "few", budget=Budget(fraction=1.0), combine="math", near_duplicates=alike)
    texts = {row["text_id"]: row["text"] for name in ("a.jsonl", "b.jsonl") for t in corpus.joined(name) for row in t.to_pylist()}
    assert len(texts) == len(everything) == 61 and chosen.counts["near_duplicates"] == 20 and len(chosen) == 41
    order, kept = everything.text_ids, set(chosen.text_ids)
    place = {texts[text_id]: number for number, text_id in enumerate(order)}
    of_text = {text: text_id for text_id, text in texts.items()}
    for text in texts.values():
        copy = f"{text} sum"
        if copy in of_text:
            better, worse = sorted((text, copy), key=place.__getitem__)
            assert of_text[better] in kept and of_text[worse] not in kept
    assert chosen.text_ids == [text_id for text_id in order if text_id in kept]
    assert chosen.table()["rank"].to_pylist() == [order.index(text_id) + 1 for text_id in chosen.text_ids]


def test_another_similarity_is_another_selection(corpus, tmp_path):
    options = {"budget": Budget(texts=9), "near_duplicates": NearDuplicates(max_similarity=0.9, encoder="hashed_ngrams")}
    select_corpus(corpus, tmp_path / "chosen", **options)
    with pytest.raises(MismatchError, match="near_duplicates"):
        select_corpus(corpus, tmp_path / "chosen", budget=Budget(texts=9))


def test_what_cannot_be_compared_is_refused(corpus, tmp_path, monkeypatch):
    for wrong in ({"max_similarity": 0}, {"max_similarity": 1.1}, {"encoder": "nothing"}):
        with pytest.raises(InputError):
            NearDuplicates(**wrong)
    alike = NearDuplicates(encoder="hashed_ngrams")
    (tmp_path / "pool" / "a.jsonl").write_text('{"text": "another"}\n')
    with pytest.raises(MismatchError, match="changed since it was scored"):
        select_corpus(corpus, tmp_path / "chosen", budget=Budget(texts=30), near_duplicates=alike)
    monkeypatch.setattr(near_duplicates, "MAX_TEXTS", 5)
    with pytest.raises(InputError, match="at most 5"):
        select_corpus(corpus, tmp_path / "chosen", budget=Budget(texts=6), near_duplicates=alike)
