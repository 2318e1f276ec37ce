"""InfluencePredictor: honest fidelity, save and load, refusals. Influence here is planted, so the truth is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from datasets import Dataset

import oracle
import surrogate
from oracle.errors import InputError, InputTypeError, MismatchError, MissingFileError
from oracle.labels import Labels
from surrogate.features.hashed_ngrams import HashedNgrams
from surrogate.features.model_state import ModelState

WORDS = [
    ["sum", "integral", "proof", "theorem", "lemma", "axiom", "vector", "matrix"],
    ["salt", "butter", "onion", "oven", "recipe", "bake", "sugar", "flour"],
]


def planted(num_texts, *, seed=0):
    """Texts of two topics; influence on "math" grows with the number of math words."""
    rng = np.random.default_rng(seed)
    rows, values = [], []
    for number in range(num_texts):
        share = rng.random()
        words = [WORDS[0 if rng.random() < share else 1][rng.integers(8)] for _ in range(30)]
        rows.append({"text": f"text {number} " + " ".join(words), "source": "even" if number % 2 else "odd"})
        math = sum(word in WORDS[0] for word in words)
        values.append([math + rng.normal(), -math + rng.normal()])
    texts = oracle.read_texts(rows)
    return texts, Labels.from_values(np.array(values), texts["text_id"], ["math", "cooking"])


@pytest.fixture(scope="module")
def fitted():
    texts, labels = planted(160)
    encoders = [HashedNgrams(dim=64, word_ngrams="1"), "text_stats"]
    return surrogate.InfluencePredictor(encoders, "ridge").fit(texts, labels), texts, labels


def test_held_out_fidelity_foretells_agreement_on_new_texts(fitted):
    predictor, _, _ = fitted
    new_texts, new_labels = planted(150, seed=9)
    scores = predictor.predict(new_texts)
    assert scores.shape == (150, 2) and scores.dtype == np.float32
    for column, row in enumerate(predictor.fidelity_.surrogate):
        found = np.corrcoef(scores[:, column], new_labels.values[:, column])[0, 1]
        assert row.spearman > 0.7 and abs(found - row.spearman) < 0.15
    assert predictor.fidelity_.constant[0].spearman == 0.0


def test_a_stream_of_texts_is_scored_without_being_kept(fitted):
    """A generator, and a streamed dataset: the scores of a list, each text once, and endless streams block by block."""
    predictor, texts, _ = fitted
    strings = [*texts["text"][:30], texts["text"][3]]
    expected = predictor.predict(strings[:30])
    for stream in (iter(strings), Dataset.from_dict({"text": strings}).to_iterable_dataset()):
        found = predictor.predict(stream)
        assert found.text_ids == expected.text_ids and found.target_names == expected.target_names
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-5, atol=1e-6)
    endless = predictor.predict_stream(itertools.cycle(strings), batch_rows=8)
    assert next(endless).text_ids == expected.text_ids[:8]
    with pytest.raises(InputError, match="no text is left of the stream"):
        predictor.predict(iter([]))


def test_a_predictor_of_noise_says_that_it_is_at_chance():
    texts, labels = planted(120)
    noise = Labels.from_values(np.random.default_rng(3).normal(size=(120, 1)), labels.text_ids, ["noise"])
    predictor = surrogate.InfluencePredictor([HashedNgrams(dim=32)], "ridge").fit(texts, noise)
    assert predictor.fidelity_.targets_at_chance() == ["noise"]
    scores = predictor.predict(texts)
    with pytest.raises(InputError, match="not above chance"):
        surrogate.select(scores, budget=surrogate.Budget(fraction=0.2), fidelity=predictor.fidelity_)
    assert (
        len(surrogate.select(scores, budget=surrogate.Budget(texts=10), fidelity=predictor.fidelity_, allow_low_fidelity=True))
        == 10
    )


@pytest.mark.parametrize("name", ["ridge", "trees", "network"])
def test_a_loaded_predictor_predicts_the_same_bytes(name, tmp_path):
    texts, labels = planted(80)
    predictor = surrogate.InfluencePredictor([HashedNgrams(dim=32), "text_stats"], name, num_folds=2).fit(texts, labels)
    predictor.save(tmp_path / "predictor")
    loaded = surrogate.InfluencePredictor.load(tmp_path / "predictor")
    assert np.asarray(loaded.predict(texts)).tobytes() == np.asarray(predictor.predict(texts)).tobytes()
    assert loaded.fidelity_.as_dict() == predictor.fidelity_.as_dict()
    assert loaded.held_out_.text_ids == predictor.held_out_.text_ids
    suffixes = {path.suffix for path in (tmp_path / "predictor").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".parquet"}


def test_rows_are_joined_by_text_id_and_order_changes_nothing(fitted):
    predictor, texts, labels = fitted
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = Labels.from_values(labels.values[order], [labels.text_ids[row] for row in order], labels.target_names)
    again = surrogate.InfluencePredictor(predictor.encoders, "ridge").fit(texts.select(order[::-1]), shuffled)
    np.testing.assert_allclose(again.predict(texts), predictor.predict(texts), rtol=1e-4, atol=1e-4)


def test_texts_without_a_label_are_left_out_and_other_labels_refused(fitted):
    _, texts, labels = fitted
    part = labels.take(labels.text_ids[:50])
    predictor = surrogate.InfluencePredictor([HashedNgrams(dim=32)], "ridge").fit(texts, part)
    assert len(predictor.held_out_) == 50
    with pytest.raises(MismatchError, match="none of the"):
        surrogate.InfluencePredictor([HashedNgrams(dim=32)], "ridge").fit(planted(20, seed=5)[0].select(range(3)), labels)


def test_near_duplicates_never_help_their_own_held_out_score():
    """Every text has a twin with one word changed and the same random label: only memory could predict it."""
    rng = np.random.default_rng(0)
    rows, values = [], []
    for _ in range(60):
        words = [WORDS[rng.integers(2)][rng.integers(8)] for _ in range(60)]
        value = rng.normal()
        for twin in ("", " twin"):
            rows.append({"text": " ".join(words) + twin})
            values.append([value])
    texts = oracle.read_texts(rows)
    labels = Labels.from_values(np.array(values), texts["text_id"], ["t"])
    predictor = surrogate.InfluencePredictor([HashedNgrams(dim=512)], "ridge").fit(texts, labels)
    assert predictor.fidelity_.surrogate[0].spearman < 0.35


def test_the_model_of_model_state_is_saved_by_path_and_checked(make_module, make_tokenizer, tmp_path):
    texts, labels = planted(40)
    lm = oracle.LanguageModel(make_module("llama", vocab_size=300), make_tokenizer(texts["text"]), max_tokens=64)
    lm.save(tmp_path / "checkpoint")
    lm = oracle.LanguageModel.from_pretrained(tmp_path / "checkpoint", max_tokens=64)
    encoder = ModelState(model=lm, targets={"math": WORDS[0], "cooking": WORDS[1]})
    predictor = surrogate.InfluencePredictor([encoder], "ridge", num_folds=2).fit(texts, labels)
    predictor.save(tmp_path / "predictor")
    loaded = surrogate.InfluencePredictor.load(tmp_path / "predictor")
    np.testing.assert_allclose(loaded.predict(texts), predictor.predict(texts), rtol=1e-4, atol=1e-5)
    given = surrogate.InfluencePredictor.load(tmp_path / "predictor", lm=lm)
    np.testing.assert_array_equal(given.predict(texts), predictor.predict(texts))
    other = oracle.LanguageModel(make_module("llama", vocab_size=300, rms_norm_eps=1e-3).train(), lm.tokenizer, max_tokens=64)
    other.module.get_output_embeddings().weight.data.add_(0.1)
    by_path = surrogate.InfluencePredictor.load(
        tmp_path / "predictor", lm=other
    )  # not the model of the fit: the saved path has it
    np.testing.assert_allclose(by_path.predict(texts), predictor.predict(texts), rtol=1e-4, atol=1e-5)
    other.save(tmp_path / "checkpoint")
    with pytest.raises(MismatchError, match="fingerprint"):
        surrogate.InfluencePredictor.load(tmp_path / "predictor", lm=other)


def test_live_features_of_another_checkpoint_than_the_labels_are_refused(make_module, make_tokenizer):
    texts, _ = planted(24)
    tokenizer = make_tokenizer(texts["text"])
    lm = oracle.LanguageModel(make_module("llama", vocab_size=300), tokenizer, max_tokens=64)
    labels = oracle.label(lm, texts, {"math": WORDS[0]}, method="grad_dot")
    moved = oracle.LanguageModel(make_module("llama", vocab_size=300), tokenizer, max_tokens=64)
    moved.module.get_output_embeddings().weight.data.mul_(1.01)
    predictor = surrogate.InfluencePredictor([ModelState(model=moved)], "ridge", num_folds=2)
    with pytest.raises(MismatchError, match="labels were measured at checkpoint"):
        predictor.fit(texts, labels)
    predictor.fit(texts, labels, allow_stale=True)
    surrogate.InfluencePredictor([ModelState(model=lm)], "ridge", num_folds=2).fit(texts, labels)
    proxy = oracle.LanguageModel(make_module("neox", vocab_size=300), tokenizer, max_tokens=64)
    surrogate.InfluencePredictor([ModelState(model=proxy)], "ridge", num_folds=2).fit(texts, labels)


def test_what_cannot_be_used_is_refused(fitted, tmp_path):
    with pytest.raises(InputError, match="did you mean 'hashed_ngrams'"):
        surrogate.InfluencePredictor("hashed_ngram")
    with pytest.raises(InputError, match="did you mean 'trees'"):
        surrogate.InfluencePredictor("text_stats", "tree")
    with pytest.raises(InputTypeError, match="encoder"):
        surrogate.InfluencePredictor([])
    with pytest.raises(InputError, match="not been fitted"):
        surrogate.InfluencePredictor("text_stats").predict(["a text"])
    with pytest.raises(InputError, match="not been fitted"):
        surrogate.InfluencePredictor("text_stats").save(tmp_path / "x")
    with pytest.raises(MissingFileError, match="no predictor"):
        surrogate.InfluencePredictor.load(tmp_path)
    _, texts, labels = fitted
    with pytest.raises(InputError, match="one source per text"):
        surrogate.InfluencePredictor("text_stats", "ridge").fit(texts, labels, sources=["a"])


def small(name="ridge", **options):
    return surrogate.InfluencePredictor([HashedNgrams(dim=64, word_ngrams="1")], name, num_folds=3, **options)


def test_older_labels_on_another_scale_help_where_new_ones_are_few():
    texts, labels = planted(330)
    noisy = labels.values + 8 * np.random.default_rng(0).normal(size=labels.values.shape)
    labels = Labels.from_values(noisy, labels.text_ids, labels.target_names)
    new, old = labels.take(labels.text_ids[:30]), labels.take(labels.text_ids[30:])
    old = Labels.from_values(0.01 * old.values + 5.0, old.text_ids, old.target_names)
    judge, truth = planted(200, seed=4)
    alone, helped = small().fit(texts, new), small().fit(texts, new, older=[(old, 0.5)])
    found = [np.corrcoef(predictor.predict(judge)[:, 0], truth.values[:, 0])[0, 1] for predictor in (alone, helped)]
    assert found[1] > found[0] + 0.05
    assert helped.fidelity_.surrogate[0].spearman > alone.fidelity_.surrogate[0].spearman
    assert helped.held_out_.text_ids == alone.held_out_.text_ids == new.text_ids
    assert abs(np.median(helped.predict(judge)[:, 0]) - np.median(truth.values[:, 0])) < 3  # in the units of the new labels


def test_a_texts_own_older_label_never_helps_its_held_out_score():
    """Old labels equal the new ones, and both are noise: only memory could predict them."""
    texts, labels = planted(120)
    noise = Labels.from_values(np.random.default_rng(1).normal(size=(120, 1)), labels.text_ids, ["noise"])
    predictor = surrogate.InfluencePredictor([HashedNgrams(dim=512)], "ridge").fit(texts, noise, older=[(noise, 1.0)])
    assert predictor.fidelity_.surrogate[0].spearman < 0.2


def test_fidelity_is_measured_on_judged_texts_alone():
    texts, labels = planted(100)
    values = labels.values.copy()
    values[50:] = np.random.default_rng(0).normal(size=(50, 2))
    mixed = Labels.from_values(values, labels.text_ids, labels.target_names)
    weights = np.where(np.arange(100) < 50, 1.0, 0.01)
    good, bad = (
        small().fit(texts, mixed, sample_weight=weights, judged=ids) for ids in (labels.text_ids[:50], labels.text_ids[50:])
    )
    assert good.held_out_.text_ids == labels.text_ids[:50] and good.fidelity_.surrogate[0].num_texts == 50
    assert good.fidelity_.surrogate[0].spearman > 0.5 > bad.fidelity_.surrogate[0].spearman
    assert good.fidelity_.surrogate[0].num_sources_within == 2
    np.testing.assert_array_equal(good.predict(texts), bad.predict(texts))


def test_weights_of_one_and_judging_by_all_change_no_byte():
    texts, labels = planted(60)
    plain = small().fit(texts, labels)
    same = small().fit(texts, labels, sample_weight=np.ones(60), judged=labels.text_ids, older=())
    assert np.asarray(plain.predict(texts)).tobytes() == np.asarray(same.predict(texts)).tobytes()
    assert plain.fidelity_.as_dict() == same.fidelity_.as_dict()


def test_labels_of_weight_zero_are_judged_but_not_learned_from():
    texts, labels = planted(80)
    values = labels.values.copy()
    values[40:] += 1000.0
    spoilt = Labels.from_values(values, labels.text_ids, labels.target_names)
    weights = np.where(np.arange(80) < 40, 1.0, 0.0)
    weighed = small().fit(texts, spoilt, sample_weight=weights)
    alone = small().fit(texts, labels.take(labels.text_ids[:40]))
    np.testing.assert_array_equal(weighed.predict(texts), alone.predict(texts))
    assert len(weighed.held_out_) == 80


def two_times():
    """Texts with labels at two times: labels of the first 120 at time 1, of 40 others at time 2."""
    texts, labels = planted(160)
    noisy = labels.values + 8 * np.random.default_rng(0).normal(size=labels.values.shape)
    labels = Labels.from_values(noisy, labels.text_ids, labels.target_names)
    return texts, labels.take(labels.text_ids[:120]), labels.take(labels.text_ids[120:])


@pytest.mark.parametrize("name", ["ridge", "trees", "network"])
def test_a_warm_start_helps_held_out_and_is_saved(name, tmp_path):
    texts, old, new = two_times()
    judge, truth = planted(200, seed=4)
    earlier, cold = small(name).fit(texts, old), small(name).fit(texts, new)
    warm = small(name).fit(texts, new, warm_start=earlier)
    found = [np.corrcoef(predictor.predict(judge)[:, 0], truth.values[:, 0])[0, 1] for predictor in (cold, warm)]
    assert found[1] > found[0] + 0.02
    assert warm.fidelity_.surrogate[0].spearman > cold.fidelity_.surrogate[0].spearman - 0.05  # of 40 texts
    assert warm.held_out_.text_ids == new.text_ids
    warm.save(tmp_path / "predictor")
    loaded = surrogate.InfluencePredictor.load(tmp_path / "predictor")
    assert np.asarray(loaded.predict(judge)).tobytes() == np.asarray(warm.predict(judge)).tobytes()
    assert loaded.fitted_text_ids_ == warm.fitted_text_ids_ == sorted([*old.text_ids, *new.text_ids])


def test_a_warm_start_that_saw_judged_texts_is_refused_also_at_third_hand():
    texts, old, new = two_times()
    earlier = small().fit(texts, old)
    later = small().fit(texts, new, warm_start=earlier)
    mixed = Labels.from_values(
        np.concatenate([old.values[:20], new.values]), [*old.text_ids[:20], *new.text_ids], new.target_names
    )
    with pytest.raises(InputError, match="fitted on 20 of 60 judged"):
        small().fit(texts, mixed, warm_start=earlier)
    small().fit(texts, mixed, warm_start=earlier, judged=new.text_ids)
    with pytest.raises(InputError, match="fitted on 20 of 20 judged"):
        small().fit(texts, mixed, warm_start=later, judged=old.text_ids[:20])
    helped = small().fit(texts, new, older=[(old, 0.5)])
    with pytest.raises(InputError, match="judged"):
        small().fit(texts, old, warm_start=helped)


def test_a_warm_start_with_other_features_targets_or_surrogate_is_refused():
    texts, old, new = two_times()
    earlier = small().fit(texts, old)
    with pytest.raises(MismatchError, match="features of"):
        surrogate.InfluencePredictor([HashedNgrams(dim=32)], "ridge").fit(texts, new, warm_start=earlier)
    with pytest.raises(InputError, match="warm_start is a RidgeSurrogate"):
        small("trees").fit(texts, new, warm_start=earlier)
    with pytest.raises(MismatchError, match="warm_start predicts"):
        swapped = Labels.from_values(new.values, new.text_ids, new.target_names[::-1])
        small().fit(texts, swapped, warm_start=earlier)
    with pytest.raises(InputError, match="not been fitted"):
        small().fit(texts, new, warm_start=small())
