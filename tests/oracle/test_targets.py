"""Target sets: names, order, fingerprints and draws by content."""

import json

import datasets
import numpy as np
import pytest

from oracle.errors import InputError, MissingFileError
from oracle.targets import TargetSet, read_targets, split_halves
from oracle.texts import list_text_ids

TEXTS = [f"text number {index}" for index in range(21)]


def chosen(target, mask=None):
    ids = np.array(list_text_ids(target.texts))
    return set(ids if mask is None else ids[mask])


def test_targets_keep_the_order_in_which_they_are_given(tmp_path):
    (tmp_path / "math.jsonl").write_text(json.dumps({"text": "1+1"}))
    targets = read_targets(
        {"zebra": TEXTS, "math-2.0_a": tmp_path / "math.jsonl", "a": datasets.Dataset.from_dict({"text": ["x"]})}
    )
    assert [target.name for target in targets] == ["zebra", "math-2.0_a", "a"]
    assert [len(target) for target in targets] == [21, 1, 1]
    assert [target.num_given for target in targets] == [21, 1, 1]


@pytest.mark.parametrize("source", [TEXTS, tuple(TEXTS), datasets.Dataset.from_dict({"text": TEXTS})])
def test_one_source_without_a_name_is_called_target(source):
    (target,) = read_targets(source)
    assert target.name == "target"
    assert target.texts["text"][:] == TEXTS


def test_target_sets_pass_through_and_take_the_name_of_their_key():
    first, second = read_targets({"a": TEXTS, "b": TEXTS[:3]})
    assert read_targets([first, second]) == [first, second]
    assert read_targets(first) == [first]
    (renamed,) = read_targets({"c": first})
    assert (renamed.name, renamed.fingerprint, renamed.texts) == ("c", first.fingerprint, first.texts)


def test_fingerprint_is_of_the_texts_and_not_of_their_order_or_name():
    a, b, c = read_targets({"a": TEXTS, "b": TEXTS[::-1], "c": TEXTS[1:]})
    assert a.fingerprint == b.fingerprint != c.fingerprint


def test_subsample_is_drawn_by_content_and_seed():
    (a,), (b,), (c,) = (
        read_targets(TEXTS, max_texts=5),
        read_targets(TEXTS[::-1], max_texts=5),
        read_targets(TEXTS, max_texts=5, seed=1),
    )
    assert len(a) == 5
    assert a.num_given == 21
    assert chosen(a) == chosen(b) != chosen(c)
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert a.fingerprint == read_targets(a.texts)[0].fingerprint
    assert isinstance(a, TargetSet)


def test_subsample_leaves_smaller_sets_alone():
    (target,) = read_targets(TEXTS, max_texts=21)
    assert target.texts["text"][:] == TEXTS


def test_halves_are_equal_up_to_one_and_drawn_by_content_and_seed():
    (target,), (turned,) = read_targets(TEXTS), read_targets(TEXTS[::-1])
    half = split_halves(target)
    assert half.dtype == np.bool_
    assert half.shape == (21,)
    assert half.sum() == 11
    assert chosen(target, half) == chosen(turned, split_halves(turned))
    assert chosen(target, half) != chosen(target, split_halves(target, seed=1))


def test_halves_of_one_text_are_that_text():
    (target,) = read_targets(["only"])
    assert split_halves(target).tolist() == [True]


@pytest.mark.parametrize("name", ["", "a b", "a/b", "é", 3])
def test_names_that_cannot_be_columns_are_refused(name):
    with pytest.raises(InputError, match="cannot be the name"):
        read_targets({name: TEXTS})


def test_no_target_set_and_equal_names_are_refused():
    with pytest.raises(InputError, match="there is no target set"):
        read_targets({})
    (target,) = read_targets(TEXTS)
    with pytest.raises(InputError, match="same name"):
        read_targets([target, target])
    with pytest.raises(InputError, match="mixes"):
        read_targets([target, "text"])
    with pytest.raises(InputError, match="max_texts=0"):
        read_targets(TEXTS, max_texts=0)


def test_errors_of_reading_name_the_target_set(tmp_path):
    with pytest.raises(MissingFileError, match="target set 'math': there is no file"):
        read_targets({"code": TEXTS, "math": tmp_path / "no.jsonl"})
    with pytest.raises(InputError, match=r"target set 'math': .*holds no texts"):
        read_targets({"math": []})
