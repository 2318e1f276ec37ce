"""Counting digits finds the place in an order that sorting finds; rules that need memory are refused."""

from dataclasses import dataclass

import numpy as np
import pytest

from oracle.errors import InputError
from surrogate.scoring import disk_order
from surrogate.scoring.disk_columns import Column
from surrogate.scoring.disk_order import check_streamed, fill_after, find_cut, places_in_order, sortable


def column(path, values, dtype):
    made = Column(path, dtype)
    made.append(np.asarray(values, dtype=dtype))
    made.close()
    return made


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(Column.blocks, "__defaults__", (9,))
    monkeypatch.setattr(disk_order, "WINDOW_TEXTS", 4)


def test_integers_sort_as_the_numbers_do_and_both_zeros_are_one():
    values = np.array([-np.inf, -3e300, -1.5, -1e-310, -0.0, 0.0, 1e-310, 0.5, 0.5000000000000001, 2e9, np.inf])
    keys = sortable(values)
    assert keys[4] == keys[5] and keys.dtype == np.uint64 and keys.min() > 0
    assert (np.delete(np.diff(keys.astype(object)), 4) > 0).all()


@pytest.mark.parametrize("seed", range(12))
def test_a_cut_is_where_a_sorted_order_reaches_the_limit(seed, tmp_path):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=70), 1) if seed % 2 else rng.normal(size=70)
    keys, sizes = sortable(scores), rng.integers(0, 9, size=70)
    keys[rng.choice(70, 5)] = 0  # never chosen
    on_disk, weights = column(tmp_path / "keys", keys, "<u8"), column(tmp_path / "sizes", sizes, "<i8")
    order = [row for row in np.argsort(~keys, kind="stable").tolist() if keys[row]]
    for limit in (0, 1, 13, 60, 1000):
        cut = find_cut(lambda: ((block, None) for block in on_disk.blocks()), limit)
        taken = np.flatnonzero((keys > 0) & cut.takes(keys, 0))
        assert sorted(taken) == sorted(order[:limit]) and cut.left == max(0, limit - len(order))
        cut = find_cut(lambda: zip(on_disk.blocks(), weights.blocks(), strict=True), limit)
        spent = np.cumsum(sizes[order])
        fitting = order[: int(np.searchsorted(spent, limit, side="right"))]
        assert sorted(np.flatnonzero((keys > 0) & cut.takes(keys, 0))) == sorted(fitting)
        left, beyond = limit - sizes[fitting].sum(), []
        for row in order[len(fitting) :]:
            if sizes[row] <= left:
                beyond.append(row)
                left -= sizes[row]
        assert fill_after(cut, on_disk, weights).tolist() == beyond
        assert places_in_order(np.array(beyond, dtype=np.int64), on_disk).tolist() == [order.index(row) for row in beyond]


def test_a_rule_of_ones_own_is_refused_by_name():
    @dataclass
    class Mine:
        plugin_name = "mine"

        def order(self, scores, *, target_names, seed):
            return np.arange(len(scores))

    with pytest.raises(InputError, match="the rule 'mine' orders scores in memory only"):
        check_streamed(Mine())
