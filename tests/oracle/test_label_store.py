"""Finished blocks: what lies in the folder is what is there, whoever wrote it."""

from __future__ import annotations

import numpy as np
import pytest

from oracle.errors import InputError, MismatchError
from oracle.label_store import LabelStore
from oracle.labels import Labels

IDENTITY = {"method": "grad_dot", "seed": 0}


def block(*text_ids, num_tokens=7.0):
    values = np.array([[float(len(text_id)), 1.0] for text_id in text_ids], dtype=np.float32)
    halves = np.stack([values, values + 1])
    columns = {"num_tokens": np.full(len(text_ids), num_tokens, dtype=np.float32)}
    return Labels(values, list(text_ids), ["a", "b"], "", halves, columns)


def finish(store, text_ids):
    cost = {"label_seconds": store.seconds, "counted_blocks": store.block_names()}
    return store.finish(text_ids, units="nats", meta={"cost": cost})


def test_a_second_store_sees_what_the_first_one_adds_once_it_reloads(tmp_path):
    first, second = (LabelStore(tmp_path, ["a", "b"], IDENTITY) for _ in range(2))
    first.add(block("x", "yy"), seconds=2.0)
    second.add(block("zzz"), seconds=3.0)
    assert first.done() == {"x", "yy"}
    first.reload()
    assert first.done() == {"x", "yy", "zzz"} and first.seconds == 5.0
    labels = finish(first, ["zzz", "x", "yy"])
    np.testing.assert_array_equal(labels.values[:, 0], [3, 1, 2])
    assert not (tmp_path / "blocks").exists()


def test_the_order_of_blocks_decides_no_byte_of_the_result(tmp_path):
    blocks = [block("x", "yy"), block("zzz"), block("wwww", "v")]
    for name, order in (("one", [0, 1, 2]), ("other", [2, 0, 1])):
        store = LabelStore(tmp_path / name, ["a", "b"], IDENTITY)
        for index in order:
            store.add(blocks[index], seconds=1.0)
        finish(store, ["v", "wwww", "x", "yy", "zzz"])
    assert (tmp_path / "one/labels.parquet").read_bytes() == (tmp_path / "other/labels.parquet").read_bytes()


def test_labels_outside_the_sample_stay_behind_it(tmp_path):
    store = LabelStore(tmp_path, ["a", "b"], IDENTITY)
    store.add(block("x", "yy", "zzz"), seconds=1.0)
    assert finish(store, ["zzz"]).text_ids == ["zzz"]
    assert Labels.load(tmp_path).text_ids == ["zzz", "x", "yy"]
    again = LabelStore(tmp_path, ["a", "b"], IDENTITY)
    assert again.is_complete(["x", "zzz"]) and not again.is_complete(["x", "new"])
    assert again.finished(["yy"]).values[0, 0] == 2


def test_another_identity_is_refused(tmp_path):
    LabelStore(tmp_path, ["a", "b"], IDENTITY).add(block("x"), seconds=1.0)
    with pytest.raises(MismatchError, match="seed: stored 0, asked 1"):
        LabelStore(tmp_path, ["a", "b"], {**IDENTITY, "seed": 1})


def test_tokens_that_nobody_counted_count_nothing():
    store = LabelStore(None, ["a", "b"], IDENTITY)
    store.add(block("b", num_tokens=np.nan), seconds=1.0)
    store.add(block("a"), seconds=1.0)
    assert store.num_tokens() == [7, 0]
    assert store.block_names() == []


def test_blocks_that_never_arrived_are_missed_by_name_of_the_folder(tmp_path):
    store = LabelStore(tmp_path, ["a", "b"], IDENTITY)
    store.add(block("x"), seconds=1.0)
    store.check_all_there(["x"])
    with pytest.raises(InputError, match=f"2 of 3 texts .* not in {tmp_path}"):
        store.check_all_there(["x", "y", "z"])


def test_a_folder_without_a_finished_row_takes_another_identity_and_the_first_call_then_stops(tmp_path):
    first = LabelStore(tmp_path, ["a", "b"], IDENTITY)
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks/unfinished.json").write_text('{"seconds": 9.0}')
    second = LabelStore(tmp_path, ["a", "b"], {**IDENTITY, "seed": 1})
    assert second.seconds == 0.0
    second.add(block("x"), seconds=1.0)
    with pytest.raises(MismatchError, match="seed: stored 1, asked 0"):
        first.add(block("yy"), seconds=1.0)
    assert LabelStore(tmp_path, ["a", "b"], {**IDENTITY, "seed": 1}).done() == {"x"}
