"""The feature cache encodes each text once, survives a kill, and never mixes features of different encoders."""

import dataclasses
import json
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

import datasets
import numpy as np
import pytest

from oracle.errors import InputError, MismatchError, NotFiniteError
from oracle.plugins import option
from oracle.texts import list_text_ids, read_texts
from surrogate import feature_cache
from surrogate.feature_cache import FeatureCache, encode_all
from surrogate.features.hashed_ngrams import HashedNgrams


@dataclass(kw_only=True)
class Counting:
    """Length and vowels; remembers what it encoded and can be told to fail."""

    plugin_name: ClassVar[str] = "counting"
    frozen: ClassVar[bool] = True
    needs_model: ClassVar[bool] = False

    scale: float = option(1.0, "Factor on all features.")
    state: str = field(default="a", repr=False)
    calls_left: int = field(default=1000, repr=False)
    broken: str = field(default="", repr=False)
    seen: list = field(default_factory=list, repr=False)

    def encode(self, texts):
        if self.calls_left == 0:
            raise RuntimeError("killed")
        self.calls_left -= 1
        strings = list(texts["text"])
        self.seen += strings
        rows = [[len(s), sum(s.count(v) for v in "aeiou"), np.nan if s == self.broken else 0.0] for s in strings]
        return self.scale * np.array(rows, dtype=np.float32).reshape(-1, 3)

    def key(self):
        return f"counting-{self.scale:g}"

    def fingerprint(self):
        return self.state

    def flops(self, texts):
        return 10.0 * len(texts)


STRINGS = [f"text {'o' * (number % 7)} {number}" for number in range(25)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(feature_cache, "BLOCK_TEXTS", 4)


@pytest.fixture
def texts():
    return read_texts(STRINGS)


def files_of(folder):
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: {**json.loads(data), "seconds": 0} if name.endswith(".cost.json") else data for name, data in files.items()}


def test_cached_features_equal_encoded_ones_and_nothing_is_encoded_twice(tmp_path, texts):
    encoder, expected = Counting(), Counting().encode(texts)
    first, second = (FeatureCache(tmp_path).features(encoder, texts) for _ in range(2))
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, expected)
    assert second.dtype == np.float32 and sorted(encoder.seen) == sorted(STRINGS)


def test_only_missing_texts_are_encoded_and_order_and_repeats_follow_the_query(tmp_path, texts):
    cache, encoder = FeatureCache(tmp_path), Counting()
    cache.features(encoder, texts.select(range(10)))
    query = texts.select([20, 3, 3, 24, 20, 0])
    cost = {}
    np.testing.assert_array_equal(cache.features(encoder, query, cost=cost), Counting().encode(query))
    assert sorted(encoder.seen) == sorted([*STRINGS[:10], STRINGS[20], STRINGS[24]])
    assert cost["num_encoded"] == 2 and cost["flops"] == 20 and cost["seconds"] > 0


def test_texts_of_others_in_a_shared_cache_cost_nothing(tmp_path, texts):
    cache = FeatureCache(tmp_path)
    cache.features(Counting(), texts)
    own = list_text_ids(texts)[:5]
    assert cache.cost(Counting())["num_encoded"] == 25
    share = cache.cost(Counting(), [*own, "a text that is not there"])
    assert share["num_encoded"] == pytest.approx(5) and 0 < share["flops"] < cache.cost(Counting())["flops"]


def test_cost_is_added_to_what_is_there_and_a_hit_costs_nothing(tmp_path, texts):
    cache, cost = FeatureCache(tmp_path), {"flops": 1.0}
    cache.features(Counting(), texts, cost=cost)
    spent = dict(cost)
    cache.features(Counting(), texts, cost=cost)
    assert cost == spent and cost["flops"] == 251 and cost["num_encoded"] == 25


def test_the_cost_of_all_cached_features_outlives_a_kill(tmp_path, texts):
    cost = {}
    with pytest.raises(RuntimeError, match="killed"):
        FeatureCache(tmp_path).features(Counting(calls_left=3), texts, cost=cost)
    assert FeatureCache(tmp_path).cost(Counting())["num_encoded"] == 12
    FeatureCache(tmp_path).features(Counting(), texts, cost=cost)
    total = FeatureCache(tmp_path).cost(Counting())
    assert total["num_encoded"] == 25 and total["flops"] == 250 and total["seconds"] > cost["seconds"] > 0
    assert set(FeatureCache(tmp_path).cost(Counting(scale=2)).values()) == {0.0}
    with pytest.raises(MismatchError, match="encoder changed"):
        FeatureCache(tmp_path).cost(Counting(state="b"))


def test_blocks_are_plain_npy_files(tmp_path, texts):
    features = FeatureCache(tmp_path).features(Counting(), texts.select(range(4)))
    (path,) = tmp_path.rglob("*.npy")
    ids = json.loads(path.with_suffix(".ids.json").read_text())
    np.save(tmp_path / "plain.npy", features[[list(texts["text_id"]).index(text_id) for text_id in ids]])
    assert path.read_bytes() == (tmp_path / "plain.npy").read_bytes()


def test_killed_then_rerun_equals_never_killed_byte_for_byte(tmp_path, texts):
    killed = Counting(calls_left=3)
    with pytest.raises(RuntimeError, match="killed"):
        FeatureCache(tmp_path / "killed").features(killed, texts)
    resumed = Counting()
    FeatureCache(tmp_path / "killed").features(resumed, texts)
    FeatureCache(tmp_path / "whole").features(Counting(), texts)
    assert len(killed.seen) == 12 and sorted(killed.seen + resumed.seen) == sorted(STRINGS)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_ids_without_features_count_as_missing(tmp_path, texts):
    FeatureCache(tmp_path).features(Counting(), texts)
    lost = min(tmp_path.rglob("*.npy"))
    lost.unlink()  # what a kill between the two writes of a block leaves
    encoder = Counting()
    np.testing.assert_array_equal(FeatureCache(tmp_path).features(encoder, texts), Counting().encode(texts))
    assert len(encoder.seen) == len(json.loads(lost.with_suffix(".ids.json").read_text()))


def test_files_do_not_depend_on_the_order_of_the_texts(tmp_path, texts):
    FeatureCache(tmp_path / "a").features(Counting(), texts)
    FeatureCache(tmp_path / "b").features(Counting(), texts.select(np.random.default_rng(0).permutation(25)))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_what_another_process_wrote_is_found(tmp_path, texts):
    one, other, encoder = FeatureCache(tmp_path), FeatureCache(tmp_path), Counting()
    one.features(Counting(), texts.select(range(5)))
    other.features(Counting(), texts.select(range(5, 25)))
    one.features(encoder, texts)
    assert encoder.seen == []


def test_blocks_are_memory_mapped_and_only_those_asked_for(tmp_path, texts, monkeypatch):
    FeatureCache(tmp_path).features(Counting(), texts)
    loads, real_load = [], np.load
    monkeypatch.setattr(np, "load", lambda path, **options: loads.append(options) or real_load(path, **options))
    FeatureCache(tmp_path).features(Counting(), texts.select([7]))
    assert loads == [{"mmap_mode": "r", "allow_pickle": False}]


def test_another_state_of_the_encoder_is_refused(tmp_path, texts):
    cache = FeatureCache(tmp_path)
    cache.features(Counting(), texts)
    with pytest.raises(MismatchError, match="encoder changed since the cache was made") as caught:
        cache.features(Counting(state="b"), texts)
    assert str(tmp_path / "counting-1") in caught.value.remedy


def test_other_options_have_a_folder_of_their_own(tmp_path, texts):
    cache = FeatureCache(tmp_path)
    cache.features(Counting(), texts)
    np.testing.assert_array_equal(cache.features(Counting(scale=2), texts), 2 * Counting().encode(texts))
    meta = json.loads((tmp_path / "counting-2" / "meta.json").read_text())
    assert meta["options"]["scale"] == 2 and meta["fingerprint"] == "a" and meta["dim"] == 3 and meta["version"]


def test_features_that_are_not_finite_name_the_text_and_are_not_kept(tmp_path, texts):
    broken_id = texts["text_id"][11]
    for cache in (FeatureCache(tmp_path), None):
        with pytest.raises(NotFiniteError, match=broken_id):
            encode_all([Counting(broken=STRINGS[11])], texts, cache)
    kept = {text_id for path in tmp_path.rglob("*.npy") for text_id in json.loads(path.with_suffix(".ids.json").read_text())}
    assert broken_id not in kept
    np.testing.assert_array_equal(FeatureCache(tmp_path).features(Counting(), texts), Counting().encode(texts))


def test_several_encoders_stand_side_by_side_with_and_without_a_cache(tmp_path, texts):
    encoders = [HashedNgrams(dim=8), Counting()]
    expected = np.concatenate([encoder.encode(texts) for encoder in encoders], axis=1)
    for cache in (None, FeatureCache(tmp_path), FeatureCache(tmp_path)):
        cost = {}
        np.testing.assert_array_equal(encode_all(encoders, texts, cache, cost=cost), expected)
    assert cost["num_encoded"] == 0
    encode_all(encoders, texts, cost=cost)
    assert cost["num_encoded"] == 50 and cost["flops"] == 250
    with pytest.raises(InputError, match="no encoders"):
        encode_all([], texts)


def test_no_texts_give_no_rows(tmp_path, texts):
    assert FeatureCache(tmp_path).features(Counting(), texts.select([])).shape == (0, 3)
    assert not list(tmp_path.iterdir())


def test_texts_without_text_ids_are_refused(tmp_path):
    with pytest.raises(InputError, match="text_id"):
        FeatureCache(tmp_path).features(Counting(), datasets.Dataset.from_dict({"text": ["a"]}))


def test_a_twin_of_an_encoder_shares_its_cache(tmp_path, texts):
    encoder = HashedNgrams(dim=8)
    FeatureCache(tmp_path).features(encoder, texts)
    cost = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FeatureCache(tmp_path).features(dataclasses.replace(encoder), texts, cost=cost)
    assert cost["num_encoded"] == 0
