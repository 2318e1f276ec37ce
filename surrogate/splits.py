"""Splits that go by text, near-duplicates together, so that a held-out figure is honest.

Corpora hold many copies of the same text with small changes. If one copy is fitted on and another held out,
a surrogate that only remembers looks good. `near_duplicate_groups` finds such texts; `grouped_folds` and
`grouped_holdout` keep each group on one side. Which side is decided by content keys and the seed, never by
row positions.

Paper: Broder 1997 (MinHash); Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3 (banding).
Left out: containment (a text that is a short part of another one is not its near-duplicate here).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oracle.errors import InputError, check_at_least

NUM_HASHES = 128  # standard error of an estimated Jaccard similarity: at most 0.044
MIN_RECALL = 0.95  # share of pairs exactly at the threshold that banding must bring together
WORDS_PER_SHINGLE = 3
CHARACTERS_PER_SHINGLE = 5
MIN_WORDS = 8  # texts with fewer words are compared by characters
MAX_MEAN_WORD_LENGTH = 20  # so are texts without spaces
MAX_BUCKET_PAIRS = 64  # each text of a larger bucket meets its 63 neighbours and the bucket's first text
SHINGLES_PER_BLOCK = 1_000_000
WORD = re.compile(r"\w+")


def near_duplicate_groups(strings: Sequence[str], *, threshold: float = 0.5, seed: int = 0) -> NDArray[np.int64]:
    """Group texts whose sets of word 3-grams overlap by at least `threshold` (estimated Jaccard similarity).

    Groups are connected components: two texts may be together through a third. Texts of fewer than 8 words,
    or without spaces, are compared by runs of 5 characters. Case and white space do not count.

    Args:
        strings: N texts.
        threshold: Jaccard similarity in (0, 1] from which two texts belong together.
        seed: Of the hash functions.

    Returns:
        (N,) group numbers; a group's number is the smallest position in it.

    Raises:
        InputError: The threshold is not in (0, 1].
    """
    _check_between("threshold", threshold, including_one=True)
    check_at_least("seed", seed, 0)
    num_texts = len(strings)
    if num_texts == 0:
        return np.zeros(0, dtype=np.int64)
    signatures = _signatures(strings, seed)  # (N, H)
    # Equal signatures collapse; the unique ones come sorted, so nothing after this depends on row order.
    rows = np.ascontiguousarray(signatures.astype(">u4")).view(f"V{4 * NUM_HASHES}").ravel()
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    components = _connected(signatures[first], threshold)[inverse]  # (N,)
    smallest = np.full(components.max() + 1, num_texts, dtype=np.int64)
    np.minimum.at(smallest, components, np.arange(num_texts))
    return smallest[components]


def grouped_folds(groups: ArrayLike, *, num_folds: int, seed: int, keys: Sequence[str] | None = None) -> NDArray[np.int64]:
    """Deal texts to folds of nearly equal size; a group stays whole.

    Args:
        groups: (S,) group numbers; only which texts share a number matters.
        num_folds: How many folds.
        seed: Another seed deals otherwise.
        keys: S content keys (text_ids) that decide the dealing; None takes row positions.

    Returns:
        (S,) fold numbers from 0 to `num_folds - 1`.

    Raises:
        InputError: There are fewer groups than folds, or keys and groups differ in length.
    """
    check_at_least("num_folds", num_folds, 2)
    members = _members_in_key_order(groups, seed, keys)
    if len(members) < num_folds:
        raise InputError(
            f"num_folds={num_folds} with {len(members)} groups of near-duplicates.",
            "at most as many folds as groups",
            "ask for fewer folds or give texts that differ more.",
        )
    folds = np.zeros(sum(map(len, members)), dtype=np.int64)
    fold_sizes = [0] * num_folds
    for rows in sorted(members, key=len, reverse=True):  # stable: key order among groups of equal size
        fold = fold_sizes.index(min(fold_sizes))
        folds[rows] = fold
        fold_sizes[fold] += len(rows)
    return folds


def grouped_holdout(groups: ArrayLike, *, fraction: float, seed: int, keys: Sequence[str] | None = None) -> NDArray[np.bool_]:
    """Choose about `fraction` of the texts to hold out; a group stays whole.

    Groups are taken in an order that key and seed decide; one that would overshoot is passed over. At least one
    group is held out (the smallest, if all are too large) and at least one is kept.

    Args:
        groups: (S,) group numbers.
        fraction: Share of the texts, strictly between 0 and 1.
        seed: Another seed holds out others.
        keys: S content keys (text_ids); None takes row positions.

    Returns:
        (S,) True where the text is held out.

    Raises:
        InputError: There are fewer than two groups, or an argument is out of range.
    """
    _check_between("fraction", fraction, including_one=False)
    members = _members_in_key_order(groups, seed, keys)
    if len(members) < 2:
        raise InputError(
            f"{len(members)} group of near-duplicates to split.", "at least two groups", "give texts that differ more."
        )
    num_texts = sum(map(len, members))
    wanted = max(1, round(fraction * num_texts))
    taken: list[NDArray[np.intp]] = []
    num_taken = 0
    for rows in members:
        if num_taken + len(rows) <= wanted and len(taken) < len(members) - 1:
            taken.append(rows)
            num_taken += len(rows)
    mask = np.zeros(num_texts, dtype=np.bool_)
    mask[np.concatenate(taken) if taken else min(members, key=len)] = True
    return mask


def _members_in_key_order(groups: ArrayLike, seed: int, keys: Sequence[str] | None) -> list[NDArray[np.intp]]:
    """Return the rows of each group; groups are ordered by a hash of the seed and their smallest key."""
    check_at_least("seed", seed, 0)
    numbers = np.asarray(groups)
    if numbers.ndim != 1 or (keys is not None and len(keys) != len(numbers)):
        raise InputError(
            f"groups of shape {numbers.shape} and {'no' if keys is None else len(keys)} keys were given.",
            "a vector of group numbers and as many keys",
            "pass one group number and one key per text.",
        )
    row_keys = [str(row) for row in range(len(numbers))] if keys is None else list(keys)
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1]) if len(numbers) else []
    smallest_key = [min(row_keys[row] for row in rows) for rows in members]
    order = sorted(range(len(members)), key=lambda group: _hash(f"{seed}:{smallest_key[group]}"))
    return [members[group] for group in order]


def _check_between(option: str, value: float, *, including_one: bool) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and (0 < value < 1 or (including_one and value == 1))):
        end = "up to 1" if including_one else "below 1"
        raise InputError(f"{option}={value!r} cannot be used.", f"a number above 0 and {end}", f"pass such a value for {option}.")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit values (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _shingles(text: str, word_hashes: dict[str, int]) -> NDArray[np.uint64]:
    """Return the hashes of a text's shingles (at least one)."""
    lowered = text.lower()
    words = WORD.findall(lowered)
    if len(words) >= MIN_WORDS and len(lowered) <= MAX_MEAN_WORD_LENGTH * len(words):
        for word in words:
            if word not in word_hashes:
                word_hashes[word] = _hash(word)
        units, width = np.array([word_hashes[word] for word in words], dtype=np.uint64), WORDS_PER_SHINGLE
    else:
        plain = " ".join(lowered.split())
        units = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64) + np.uint64(1)
        width = CHARACTERS_PER_SHINGLE
        units = np.concatenate([units, np.zeros(max(0, width - len(units)), dtype=np.uint64)])
    hashes = np.full(len(units) - width + 1, width, dtype=np.uint64)
    for offset in range(width):
        hashes = _mix(hashes * np.uint64(0x9E3779B97F4A7C15) + units[offset : offset + len(hashes)])
    return hashes


def _signatures(strings: Sequence[str], seed: int) -> NDArray[np.uint32]:
    """Return MinHash signatures (N, H): for each of H hash functions the smallest hash of a text's shingles."""
    rng = np.random.default_rng([seed, NUM_HASHES])
    factors = rng.integers(0, 2**63, size=NUM_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shifts = rng.integers(0, 2**63, size=NUM_HASHES, dtype=np.uint64)
    signatures = np.empty((len(strings), NUM_HASHES), dtype=np.uint32)
    word_hashes: dict[str, int] = {}
    start, block, block_size = 0, [], 0
    for position, text in enumerate(strings):
        block.append(_shingles(text, word_hashes))
        block_size += len(block[-1])
        if block_size >= SHINGLES_PER_BLOCK or position == len(strings) - 1:
            starts = np.cumsum([0] + [len(hashes) for hashes in block[:-1]])
            flat = np.concatenate(block)
            for index in range(NUM_HASHES):
                high = ((flat * factors[index] + shifts[index]) >> np.uint64(32)).astype(np.uint32)
                signatures[start : position + 1, index] = np.minimum.reduceat(high, starts)
            start, block, block_size = position + 1, [], 0
    return signatures


def _rows_per_band(threshold: float) -> int:
    """Return the longest band that still brings together MIN_RECALL of the pairs at the threshold."""
    for num_rows in range(NUM_HASHES, 1, -1):
        if 1 - (1 - threshold**num_rows) ** (NUM_HASHES // num_rows) >= MIN_RECALL:
            return num_rows
    return 1


def _connected(signatures: NDArray[np.uint32], threshold: float) -> NDArray[np.int64]:
    """Return component numbers (U,) of unique signatures (U, H) that are linked by similarity."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    num_unique, num_rows = len(signatures), _rows_per_band(threshold)
    pairs: list[NDArray[np.int64]] = []
    for band in range(NUM_HASHES // num_rows):
        columns = signatures[:, band * num_rows : (band + 1) * num_rows].astype(np.uint64)
        buckets = np.zeros(num_unique, dtype=np.uint64)
        for column in columns.T:
            buckets = _mix(buckets + column + np.uint64(1))
        pairs.extend(_bucket_pairs(buckets))
    left, right = np.divmod(np.unique(np.concatenate(pairs)), num_unique) if pairs else (np.zeros(0, dtype=np.int64),) * 2
    similar = np.zeros(len(left), dtype=np.bool_)
    num_equal_wanted = math.ceil(threshold * NUM_HASHES)
    for start in range(0, len(left), 65_536):
        block = slice(start, start + 65_536)
        similar[block] = (signatures[left[block]] == signatures[right[block]]).sum(axis=1) >= num_equal_wanted
    left, right = left[similar], right[similar]
    graph = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(num_unique, num_unique))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _bucket_pairs(buckets: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    """Return pairs (i < j, coded as i * U + j) of rows with the same bucket."""
    num_unique = len(buckets)
    order = np.argsort(buckets, kind="stable")  # rows ascend within a bucket
    ordered = buckets[order]
    pairs: list[NDArray[np.int64]] = []
    for distance in range(1, min(MAX_BUCKET_PAIRS, num_unique)):
        same = np.flatnonzero(ordered[:-distance] == ordered[distance:])
        if len(same) == 0:
            return pairs
        pairs.append(order[same] * num_unique + order[same + distance])
    bucket_start = np.searchsorted(ordered, ordered, side="left")
    far = np.flatnonzero(np.arange(num_unique) - bucket_start >= MAX_BUCKET_PAIRS)
    pairs.append(order[bucket_start[far]] * num_unique + order[far])
    return pairs
