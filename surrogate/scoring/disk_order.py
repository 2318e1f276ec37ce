"""The order that a rule puts a pool on disk into, as one number per text, and how far down that order a budget goes.

Each rule's order is the one that it gives in memory, bit for bit: chance is drawn in the order of the text_ids, as there,
so neither files nor workers decide it. The number of a text is larger the earlier it comes; equal ones go by text_id.

The place where a budget ends is found by counting the numbers' leading 16 bits, then the next 16 within the one where it
ends, and so on: four walks through 8 bytes per text, and nothing is sorted.

Cost: one walk through the scores for a plain column, four more where z-scores are taken, three more for `softmax`. `random`
and `top_share` shuffle what they draw from, which takes 16 bytes of memory for each of its texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oracle import plugins
from oracle.errors import InputError
from surrogate.aggregation import Combination, moments
from surrogate.scoring.disk_columns import Column
from surrogate.scoring.disk_pool import DiskPool
from surrogate.selection import Rule, rule_name

STREAMED_RULES = ("top", "top_share", "softmax", "random")
KEY_TYPE = np.dtype("<u8")
NEVER = 0  # the number of a text that must not be chosen; below that of minus infinity
ABOVE_ALL = 0xFFF0000000000000  # the number of plus infinity; there is room for 2^52 above it
DIGIT_BITS = 16
ROW_BITS = 40  # enough for a trillion texts
WINDOW_TEXTS = 262_144  # texts looked at in memory at once where a token budget skips some


@dataclass(frozen=True)
class Cut:
    """How far down an order goes: to the text with this number and row, that one included; row -1 stops before the number."""

    key: int
    row: int
    left: int = 0  # what is left of the limit

    def takes(self, keys: np.ndarray, first_row: int) -> np.ndarray:
        """Return which texts of a block that begins at `first_row` come no later."""
        return (keys > self.key) | ((keys == self.key) & (np.arange(first_row, first_row + len(keys)) <= self.row))


def check_streamed(rule: Rule) -> None:
    """Refuse a rule whose order can only be had in memory."""
    if rule_name(rule) not in STREAMED_RULES:
        raise InputError(
            f"the rule {rule_name(rule)!r} orders scores in memory only.",
            ", ".join(STREAMED_RULES) + " for a scored corpus",
            "choose one of these, or read the scores (ScoredCorpus.scores()) and call surrogate.select.",
        )


def combine_on_disk(pool: DiskPool, way: Combination, folder: Path) -> Column:
    """Reduce the pool's values to one number per text, float64."""
    combined = Column(folder / "combined", "<f8")
    measured = moments(pool.float_values) if way.uses_moments else None
    for block in pool.float_values():
        combined.append(way.rows(block, measured))
    return combined


def order_on_disk(rule: Rule, combined: Column, folder: Path, *, seed: int, min_score: float | None = None) -> Column:
    """Give each text its number.

    Args:
        rule: One of `STREAMED_RULES`.
        combined: One number per text, in the order of the text_ids.
        folder: Where the column is kept.
        seed: Seed of rules with chance.
        min_score: Texts whose combined number is below are never chosen.
    """
    check_streamed(rule)
    keys = Column(folder / "keys", KEY_TYPE)
    for block, scores in zip(_keys(rule, combined, seed), combined.blocks(), strict=True):
        keys.append(block if min_score is None else np.where(scores >= min_score, block, KEY_TYPE.type(NEVER)))
    return keys


def _keys(rule: Rule, combined: Column, seed: int) -> Iterator[np.ndarray]:
    options = plugins.options_of(rule)
    name = rule_name(rule)
    if name == "top":
        yield from map(sortable, combined.blocks())
    elif name == "softmax":
        yield from _softmax_keys(combined, options["temperature"], np.random.default_rng(seed))
    elif name == "random":
        yield from _in_blocks_of(combined, _places(np.random.default_rng(seed).permutation(combined.num_rows)))
    else:
        yield from _top_share_keys(combined, round(options["share"] * combined.num_rows), np.random.default_rng(seed))


def _softmax_keys(combined: Column, temperature: float, rng: np.random.Generator) -> Iterator[np.ndarray]:
    measured = moments(combined.blocks)
    for block in combined.blocks():
        yield sortable(measured.z_scores(block) + temperature * rng.gumbel(size=len(block)))


def _top_share_keys(combined: Column, num_best: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Put the best before all others, in random order."""
    cut = find_cut(lambda: ((sortable(block), None) for block in combined.blocks()), num_best)
    places = _places(rng.permutation(num_best))
    start = num_taken = 0
    for block in combined.blocks():
        keys = sortable(block)
        best = cut.takes(keys, start)
        num_here = int(best.sum())
        keys[best] = places[num_taken : num_taken + num_here] + KEY_TYPE.type(ABOVE_ALL)
        yield keys
        start, num_taken = start + len(block), num_taken + num_here


def _places(order: np.ndarray) -> np.ndarray:
    """Return for each row of an order how early it comes, from 1 for the last."""
    places = np.empty(len(order), dtype=KEY_TYPE)
    places[order] = np.arange(len(order), 0, -1, dtype=KEY_TYPE)
    return places


def _in_blocks_of(column: Column, values: np.ndarray) -> Iterator[np.ndarray]:
    start = 0
    for block in column.blocks():
        yield values[start : start + len(block)]
        start += len(block)


def sortable(values: np.ndarray) -> np.ndarray:
    """Return integers that sort as float64 values do, both zeros alike."""
    bits = (values + 0.0).view(KEY_TYPE)
    sign = KEY_TYPE.type(1 << 63)
    return np.where(bits & sign, ~bits, bits | sign)


Blocks = Callable[[], Iterable[tuple[np.ndarray, "np.ndarray | None"]]]


def find_cut(blocks: Blocks, limit: int) -> Cut:
    """Find how far down the order a limit goes.

    Args:
        blocks: Yields numbers with sizes, or with None for a size of 1 each; it is called up to five times. Texts whose
            number is `NEVER` do not count.
        limit: The sum of sizes that must not be exceeded. The first text that would exceed it ends the order, even if a
            later one would fit.
    """
    prefix, left = 0, limit
    for shift in range(64 - DIGIT_BITS, -1, -DIGIT_BITS):
        sums = np.zeros(1 << DIGIT_BITS, dtype=np.int64)
        for keys, sizes in blocks():
            inside = keys >= KEY_TYPE.type(1)
            if shift + DIGIT_BITS < 64:
                inside &= keys >> KEY_TYPE.type(shift + DIGIT_BITS) == KEY_TYPE.type(prefix)
            digits = (keys[inside] >> KEY_TYPE.type(shift)).astype(np.int64) & ((1 << DIGIT_BITS) - 1)
            counted = np.bincount(digits, None if sizes is None else sizes[inside], minlength=len(sums))
            sums += counted.astype(np.int64)  # float64 sums of counts are exact below 2^53
        from_top = np.cumsum(sums[::-1])
        place = int(np.searchsorted(from_top, left, side="right"))  # the first digit that exceeds the limit
        if place == len(sums):
            return Cut(NEVER, -1, left - int(from_top[-1]))  # all texts fit
        left -= int(from_top[place] - sums[len(sums) - 1 - place])
        prefix = prefix << DIGIT_BITS | (len(sums) - 1 - place)
    return _cut_among_ties(blocks, prefix, left)


def _cut_among_ties(blocks: Blocks, key: int, left: int) -> Cut:
    start, last = 0, -1
    for keys, sizes in blocks():
        tied = np.flatnonzero(keys == KEY_TYPE.type(key))
        spent = np.cumsum(np.ones(len(tied), dtype=np.int64) if sizes is None else sizes[tied])
        num_taken = int(np.searchsorted(spent, left, side="right"))
        if num_taken:
            last, left = start + int(tied[num_taken - 1]), left - int(spent[num_taken - 1])
        if num_taken < len(tied):
            return Cut(key, last, left)
        start += len(keys)
    raise AssertionError("some text of this number exceeds the limit")


def fill_after(cut: Cut, keys: Column, sizes: Column) -> np.ndarray:
    """Go on down the order after a cut and take every text that still fits what is left.

    Returns:
        The rows taken, in the order.
    """
    taken: list[np.ndarray] = []
    left = cut.left
    while True:
        here, limit = cut, left

        def waiting(here: Cut = here, limit: int = limit) -> Iterator[tuple[np.ndarray, None]]:
            """Numbers of the texts after `here` that would fit."""
            start = 0
            for block, size in zip(keys.blocks(), sizes.blocks(), strict=True):
                fits = (size <= limit) & ~here.takes(block, start)
                yield np.where(fits, block, KEY_TYPE.type(NEVER)), None
                start += len(block)

        end = find_cut(waiting, WINDOW_TEXTS)
        rows, row_keys, row_sizes = _window(waiting, end, sizes)
        order = np.argsort(~row_keys, kind="stable")
        kept = []
        for row, size in zip(rows[order].tolist(), row_sizes[order].tolist(), strict=True):
            if size <= left:
                kept.append(row)
                left -= size
        taken.append(np.array(kept, dtype=np.int64))
        if len(rows) < WINDOW_TEXTS:
            return np.concatenate(taken)
        last = order[-1]
        cut = Cut(int(row_keys[last]), int(rows[last]))


def _window(blocks: Blocks, end: Cut, sizes: Column) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows, numbers and sizes of the texts up to a cut."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    start = 0
    for (keys, _), size in zip(blocks(), sizes.blocks(), strict=True):
        inside = np.flatnonzero((keys != KEY_TYPE.type(NEVER)) & end.takes(keys, start))
        found.append((start + inside, keys[inside], size[inside]))
        start += len(keys)
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))  # type: ignore[return-value]


def places_in_order(rows: np.ndarray, keys: Column) -> np.ndarray:
    """Return how many texts come before each of some rows, which are given in the order."""
    if not len(rows):
        return np.zeros(0, dtype=np.int64)
    falling = ~keys_of_rows(rows, keys)  # sorts as the order does, but for ties
    different = np.unique(falling)
    own = np.searchsorted(different, falling) << ROW_BITS | rows  # ties as well, and rising
    before = np.zeros(len(rows) + 1, dtype=np.int64)
    start = 0
    for block in keys.blocks():
        number = np.searchsorted(different, ~block)
        tied = different[np.minimum(number, len(different) - 1)] == ~block
        next_one = np.searchsorted(falling, ~block)  # the first of the rows that comes later
        next_one[tied] = np.searchsorted(own, number[tied] << ROW_BITS | (start + np.flatnonzero(tied)), side="right")
        before += np.bincount(next_one, minlength=len(before))
        start += len(block)
    return np.cumsum(before[:-1])


def keys_of_rows(rows: np.ndarray, keys: Column) -> np.ndarray:
    """Return the numbers of some rows."""
    found, start = np.zeros(len(rows), dtype=KEY_TYPE), 0
    for block in keys.blocks():
        here = (rows >= start) & (rows < start + len(block))
        found[here] = block[rows[here] - start]
        start += len(block)
    return found
