from __future__ import annotations

import time

import numpy as np
import pytest

from oracle.errors import InputError
from surrogate.splits import _rows_per_band, _shingles, _signatures, grouped_folds, grouped_holdout, near_duplicate_groups


def random_text(rng, num_words=170):
    return " ".join(f"w{number}" for number in rng.integers(0, 20_000, size=num_words))


def changed(text, rng, num_changes):
    words = text.split()
    for position in rng.choice(len(words), size=num_changes, replace=False):
        words[position] = f"new{rng.integers(10**6)}"
    return " ".join(words)


def as_sets(groups):
    return {frozenset(np.flatnonzero(groups == number)) for number in np.unique(groups)}


def test_light_edits_are_together_and_others_apart():
    rng = np.random.default_rng(0)
    originals = [random_text(rng) for _ in range(100)]
    copies = [changed(text, rng, 5) for text in originals]
    groups = near_duplicate_groups(originals + copies)
    np.testing.assert_array_equal(groups, np.tile(np.arange(100), 2))


def test_the_threshold_separates_by_jaccard_similarity():
    rng = np.random.default_rng(1)
    base = random_text(rng, 300)
    near, far = changed(base, rng, 15), changed(base, rng, 70)  # Jaccard about 0.74 and 0.3
    assert near_duplicate_groups([base, near], threshold=0.6)[1] == 0
    assert near_duplicate_groups([base, near], threshold=0.9)[1] == 1
    assert near_duplicate_groups([base, far], threshold=0.5)[1] == 1
    assert near_duplicate_groups([base, far], threshold=0.15)[1] == 0


def test_signatures_estimate_jaccard_similarity():
    rng = np.random.default_rng(2)
    base = random_text(rng, 400)
    texts = [base, changed(base, rng, 10), changed(base, rng, 40), changed(base, rng, 100)]
    signatures = _signatures(texts, 0)
    sets = [set(_shingles(text, {}).tolist()) for text in texts]
    for other in (1, 2, 3):
        exact = len(sets[0] & sets[other]) / len(sets[0] | sets[other])
        assert abs((signatures[0] == signatures[other]).mean() - exact) < 0.12


def test_groups_do_not_depend_on_row_order():
    rng = np.random.default_rng(3)
    texts = [random_text(rng, 60) for _ in range(60)]
    texts += [changed(texts[index % 40], rng, rng.integers(2, 12)) for index in range(140)]
    order = rng.permutation(len(texts))
    shuffled = near_duplicate_groups([texts[row] for row in order])
    unshuffled = np.empty_like(shuffled)
    unshuffled[order] = shuffled
    assert as_sets(unshuffled) == as_sets(near_duplicate_groups(texts))


def test_a_group_is_named_by_its_smallest_position():
    groups = near_duplicate_groups(
        [
            "one two three four five six seven eight nine",
            "another text altogether, of some more words here",
            "One two three  four five six seven EIGHT nine",
        ]
    )
    np.testing.assert_array_equal(groups, [0, 1, 0])


def test_short_and_unspaced_texts_are_compared_by_characters():
    unspaced = "".join(chr(0x4E00 + number) for number in np.random.default_rng(4).integers(0, 3000, size=400))
    texts = [
        "def add(first, second, a):",
        "def add(first, second, b):",
        "print('hello')",
        "",
        "  ",
        "a",
        unspaced,
        unspaced[:-5] + "x",
    ]
    np.testing.assert_array_equal(near_duplicate_groups(texts), [0, 0, 2, 3, 3, 5, 6, 6])


def test_many_copies_of_one_boilerplate_are_one_group():
    rng = np.random.default_rng(5)
    base = random_text(rng, 100)
    texts = [changed(base, rng, 3) for _ in range(300)]
    assert len(np.unique(near_duplicate_groups(texts))) == 1


def test_bands_bring_pairs_at_the_threshold_together():
    for threshold in (0.3, 0.5, 0.8, 1.0):
        rows = _rows_per_band(threshold)
        assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.95


def test_five_thousand_texts_take_seconds():
    rng = np.random.default_rng(6)
    texts = [random_text(rng, 140) for _ in range(5000)]
    start_seconds = time.process_time()
    groups = near_duplicate_groups(texts)
    assert time.process_time() - start_seconds < 5
    assert len(np.unique(groups)) == 5000


def test_no_texts_no_groups():
    assert near_duplicate_groups([]).shape == (0,)


@pytest.mark.parametrize("threshold", [0, 1.5, float("nan"), True])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(InputError, match="threshold"):
        near_duplicate_groups(["a"], threshold=threshold)


def some_groups(seed=0, num_texts=200):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 60, size=num_texts), [f"text{number}" for number in rng.permutation(num_texts)]


def test_folds_keep_groups_whole_and_are_balanced():
    groups, keys = some_groups()
    folds = grouped_folds(groups, num_folds=5, seed=0, keys=keys)
    for group in np.unique(groups):
        assert len(np.unique(folds[groups == group])) == 1
    sizes = np.bincount(folds, minlength=5)
    assert sizes.sum() == 200 and sizes.max() - sizes.min() <= 2


def test_a_large_group_does_not_unbalance_the_folds():
    groups = np.array([0] * 20 + list(range(1, 81)))
    for seed in range(10):
        sizes = np.bincount(grouped_folds(groups, num_folds=4, seed=seed), minlength=4)
        assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(
    "split",
    [
        lambda groups, keys: grouped_folds(groups, num_folds=4, seed=0, keys=keys),
        lambda groups, keys: grouped_holdout(groups, fraction=0.3, seed=0, keys=keys),
    ],
)
def test_content_and_not_position_decides_the_side(split):
    groups, keys = some_groups()
    order = np.random.default_rng(9).permutation(len(groups))
    renamed = np.random.default_rng(8).permutation(1000)[groups]
    np.testing.assert_array_equal(split(renamed[order], [keys[row] for row in order]), split(groups, keys)[order])


def test_the_seed_changes_the_split():
    groups, keys = some_groups()
    assert (grouped_folds(groups, num_folds=5, seed=0, keys=keys) != grouped_folds(groups, num_folds=5, seed=1, keys=keys)).any()
    assert (grouped_holdout(groups, fraction=0.3, seed=0) != grouped_holdout(groups, fraction=0.3, seed=1)).any()


def test_the_holdout_has_about_its_share_and_whole_groups():
    groups, keys = some_groups()
    mask = grouped_holdout(groups, fraction=0.25, seed=3, keys=keys)
    assert 48 <= mask.sum() <= 50
    assert not set(groups[mask]) & set(groups[~mask])


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_neither_side_of_a_holdout_is_empty(fraction):
    for groups in ([0, 0, 0, 1, 1], [0, 1], [0] * 50 + [1] * 3):
        mask = grouped_holdout(np.array(groups), fraction=fraction, seed=0)
        assert 0 < mask.sum() < len(groups)


def test_splits_refuse_bad_input():
    with pytest.raises(InputError, match="num_folds=4"):
        grouped_folds(np.array([0, 0, 1, 2]), num_folds=4, seed=0)
    with pytest.raises(InputError, match="two groups"):
        grouped_holdout(np.zeros(5, dtype=int), fraction=0.2, seed=0)
    with pytest.raises(InputError, match="fraction"):
        grouped_holdout(np.arange(5), fraction=1.0, seed=0)
    with pytest.raises(InputError, match="keys"):
        grouped_folds(np.arange(5), num_folds=2, seed=0, keys=["a"])
