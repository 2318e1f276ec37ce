"""Which rows each tree was grown on: LightGBM's bagging, drawn again from its seed.

LightGBM gives every block of 1024 rows its own linear congruential generator, seeded with the bagging seed plus the
block's number, and keeps a row where the generator's next number is below the bagging fraction. So the masks follow
from the parameters, the number of rows and, with fractions per class, the labels. The leaf counts that the model
stores prove them, and with them that the rows are in the order of training.

A bag that happens to hold every row is the last one that LightGBM draws: it keeps it for all later rounds.

A round in which no tree finds a split is dropped by LightGBM, but the bag that was drawn for it is gone. So bags that
do not give the stored leaf counts are passed over, up to as many as rounds can have been dropped.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from surrogate.attribution.model_text import ModelText
from surrogate.attribution.objectives import Array

ROWS_PER_GENERATOR = 1024
MULTIPLIER, INCREMENT = 214013, 2531011  # of LightGBM's generator, modulo 2^32
NUM_VALUES = 32768.0  # it returns 15 bits


def bags(text: ModelText, y: Array, leaves: NDArray[np.int32]) -> Iterator[NDArray[np.bool_] | None]:
    """Yield per round which rows (n,) grew its trees, or None for all.

    Args:
        text: The model, for its bagging parameters and leaf counts.
        y: Encoded targets (n,) of the training rows in training order.
        leaves: (n, C) leaf of each row in each tree.
    """
    threshold = _thresholds(text, y)
    num_outputs = text.num_trees_per_round
    num_rounds = len(text.trees) // num_outputs
    if threshold is None:
        yield from [None] * num_rounds
        return
    period, seed = int(text.number("bagging_freq")), int(text.number("bagging_seed"))
    most_dropped = max(0, int(text.number("num_iterations")) - num_rounds)
    lag = int(all(tree.is_constant for tree in text.trees[:num_outputs]))  # such a first round is kept but not counted
    masks, mask = _masks(threshold, seed, len(y)), np.ones(len(y), dtype=bool)
    for number in range(num_rounds):
        if number < lag or (number - lag) % period == 0:
            trees = range(number * num_outputs, (number + 1) * num_outputs)
            mask = expected = next(masks)
            while not _grew(mask, text, leaves, trees):
                if most_dropped == 0:  # these are other rows, which the leaf check will say
                    mask = expected
                    break
                mask, most_dropped = next(masks), most_dropped - 1
        yield mask


def _masks(threshold: Array, seed: int, num_rows: int) -> Iterator[NDArray[np.bool_]]:
    """Yield the masks (n,) one after the other, without end."""
    factors, offsets = _jumps()
    num_blocks = -(-num_rows // ROWS_PER_GENERATOR)
    state = (np.arange(num_blocks, dtype=np.int64) + seed).astype(np.uint32)  # (blocks,)
    while True:
        states = factors * state[:, None] + offsets  # (blocks, 1024), modulo 2^32
        draws = ((states >> np.uint32(16)) & np.uint32(0x7FFF)).ravel()[:num_rows] / NUM_VALUES
        state = states[:, -1]
        state[-1] = states[-1, (num_rows - 1) % ROWS_PER_GENERATOR]  # the last block may not be full
        mask = draws < threshold
        yield mask
        while mask.all():
            yield mask


def _grew(mask: NDArray[np.bool_], text: ModelText, leaves: NDArray[np.int32], trees: range) -> bool:
    """Whether the rows of a mask give the stored leaf counts."""
    for tree in trees:
        known = text.trees[tree]
        if known.is_constant or (known.leaf_counts < 0).any():
            continue
        if not np.array_equal(np.bincount(leaves[mask, tree], minlength=len(known.leaf_counts)), known.leaf_counts):
            return False
    return True


def _thresholds(text: ModelText, y: Array) -> Array | None:
    """Return the share of rows to keep, per row (n,) or for all (), or None without bagging."""
    fraction, of_positive, of_negative = (
        text.number(name) for name in ("bagging_fraction", "pos_bagging_fraction", "neg_bagging_fraction")
    )
    if text.number("bagging_freq") <= 0:
        return None
    if text.header.get("objective", "").startswith("binary") and (of_positive < 1 or of_negative < 1) and (y > 0).any():
        return np.where(y > 0, of_positive, of_negative)
    return np.array(fraction) if fraction < 1 else None


def _jumps() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return factors and offsets (1024,) that lead from a generator's state to its next 1024 states."""
    factors, offsets = np.empty(ROWS_PER_GENERATOR, np.uint32), np.empty(ROWS_PER_GENERATOR, np.uint32)
    factor, offset = 1, 0
    for step in range(ROWS_PER_GENERATOR):
        factor, offset = factor * MULTIPLIER % 2**32, (offset * MULTIPLIER + INCREMENT) % 2**32
        factors[step], offsets[step] = factor, offset
    return factors, offsets
