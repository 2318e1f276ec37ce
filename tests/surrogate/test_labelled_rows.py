from __future__ import annotations

import numpy as np
import pytest

from oracle.errors import InputError, MismatchError
from oracle.labels import Labels
from surrogate.labelled_rows import LabelledRows, check_labels, on_new_scale

NAMES = ["math", "code"]


def labels_of(ids, seed=0, names=NAMES):
    return Labels.from_values(np.random.default_rng(seed).normal(size=(len(ids), len(names))), ids, names)


def numbered(numbers):
    return [f"text{number}" for number in numbers]


class Spy:
    """A surrogate that keeps what it was fitted on and predicts zeros."""

    fits: list

    def __init__(self, fits):
        self.fits = fits

    def fit(self, X, y, *, groups=None, sample_weight=None, warm_start=None):
        texts = X[:, 0].astype(int)
        self.fits.append({"texts": texts, "values": y, "groups": groups, "weights": sample_weight, "warm_start": warm_start})
        return self

    def predict(self, X):
        return np.zeros((len(X), 2), dtype=np.float32)


def joined(**options):
    """Texts 0 to 39 in pairs of near-duplicates: 0 to 29 have a new label, 20 to 39 an old one of weight 0.25."""
    ids = numbered(range(40))
    new, old = labels_of(numbered(range(30))), labels_of(numbered(range(20, 40)), seed=1)
    return LabelledRows.join(ids, new, groups=np.arange(40) // 2, older=[(old, 0.25)], **options), new, old


FEATURES = np.arange(40, dtype=np.float32)[:, None]  # each text's own number


def test_rows_hold_new_labels_then_older_ones_with_their_weights():
    rows, new, old = joined(sample_weight=np.arange(30) + 1.0)
    np.testing.assert_array_equal(rows.places, [*range(30), *range(20, 40)])
    np.testing.assert_array_equal(rows.values[:30], new.values)
    np.testing.assert_array_equal(rows.values[30:], on_new_scale(old, new, weights=np.arange(30) + 1.0))
    np.testing.assert_array_equal(rows.weights, [*range(1, 31), *[0.25] * 20])
    np.testing.assert_array_equal(rows.groups, rows.places // 2)


def test_weights_belong_to_labels_whatever_their_order():
    order = np.random.default_rng(0).permutation(30)
    new = labels_of(numbered(range(30)))
    rows = LabelledRows.join(
        numbered(range(20)), new.take(numbered(order)), groups=np.arange(20), sample_weight=order.astype(float)
    )
    np.testing.assert_array_equal(rows.weights, np.arange(20.0))


def test_a_held_out_text_is_held_out_with_its_older_labels_and_its_near_duplicates():
    rows, _, _ = joined(judged=numbered(range(0, 30, 3)))
    fits: list = []
    scores, means = rows.cross_predict(lambda: Spy(fits), FEATURES, num_folds=5, seed=0)
    assert scores.shape == means.shape == (10, 2) and len(fits) == 5
    held_out = []
    for fit in fits:
        gone = set(range(0, 30, 3)) - set(fit["texts"].tolist())
        held_out += sorted(gone)
        assert not {text // 2 for text in gone} & set((fit["texts"] // 2).tolist())
        expected = [place for place in rows.places if place // 2 not in {text // 2 for text in gone}]
        np.testing.assert_array_equal(fit["texts"], expected)  # everything else helps
        np.testing.assert_array_equal(fit["groups"], fit["texts"] // 2)
        assert len(fit["weights"]) == len(fit["texts"])
    assert sorted(held_out) == list(range(0, 30, 3))


def test_the_training_mean_is_that_of_judged_texts_alone():
    rows, new, _ = joined(judged=numbered(range(0, 30, 3)))
    fits: list = []
    _, means = rows.cross_predict(lambda: Spy(fits), FEATURES, num_folds=5, seed=0)
    for fit in fits:
        kept = [number for number in range(0, 30, 3) if number in fit["texts"]]
        gone = [position for position, number in enumerate(range(0, 30, 3)) if number not in fit["texts"]]
        np.testing.assert_allclose(means[gone], np.tile(new.values[kept].mean(axis=0), (len(gone), 1)), rtol=1e-5)


def test_without_weights_and_older_labels_nothing_is_weighed():
    rows = LabelledRows.join(numbered(range(30)), labels_of(numbered(range(30))), groups=np.arange(30))
    assert rows.weights is None
    fits: list = []
    rows.fit(Spy(fits), FEATURES)
    assert fits[0]["weights"] is None and len(fits[0]["texts"]) == 30


def test_older_labels_take_the_median_and_spread_of_new_ones_and_keep_their_order():
    new, old = labels_of(numbered(range(60))), labels_of(numbered(range(60, 110)), seed=3, names=NAMES[::-1])
    shrunk = Labels.from_values(0.01 * old.values - 7.0, old.text_ids, old.target_names)
    moved = on_new_scale(shrunk, new)
    for column, name in enumerate(NAMES):
        np.testing.assert_array_equal(np.argsort(moved[:, column]), np.argsort(old.target(name)))
        for measure in (np.median, lambda values: np.median(np.abs(values - np.median(values)))):
            np.testing.assert_allclose(measure(moved[:, column]), measure(new.target(name)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(on_new_scale(new, new), new.values, atol=1e-6)


@pytest.mark.parametrize("constant", ["old", "new"])
def test_a_constant_target_in_one_set_becomes_the_new_median(constant):
    sets = {"old": labels_of(numbered(range(30)), seed=1), "new": labels_of(numbered(range(30)))}
    values = sets[constant].values.copy()
    values[:, 0] = 0.1
    sets[constant] = Labels.from_values(values, sets[constant].text_ids, NAMES)
    moved = on_new_scale(sets["old"], sets["new"])
    np.testing.assert_allclose(moved[:, 0], np.median(sets["new"].values[:, 0]), rtol=1e-6)
    assert np.ptp(moved[:, 0]) == 0 and np.ptp(moved[:, 1]) > 1


def test_what_cannot_be_joined_is_refused():
    new, ids = labels_of(numbered(range(30))), numbered(range(30))
    for older, error, match in [
        ([(labels_of(ids, names=["math", "law"]), 0.5)], MismatchError, "targets"),
        ([(labels_of(numbered(range(25, 35))), 0.5)], MismatchError, "5 of 10 older labels"),
        ([(labels_of([]), 0.5)], MismatchError, "0 of 0 older labels"),
        ([(new, 0.0)], InputError, "weight 0.0"),
        ([(new, float("nan"))], InputError, "weight nan"),
    ]:
        with pytest.raises(error, match=match):
            check_labels(new, older, ids)
    options = {"groups": np.arange(30)}
    with pytest.raises(MismatchError, match="1 of 2 judged"):
        LabelledRows.join(ids, new, judged=["text3", "text99"], **options)
    with pytest.raises(MismatchError, match="0 of 0 judged"):
        LabelledRows.join(ids, new, judged=[], **options)
    with pytest.raises(InputError, match="sample_weight"):
        LabelledRows.join(ids, new, sample_weight=np.ones(29), **options)
    with pytest.raises(InputError, match="every sample_weight is 0"):
        LabelledRows.join(ids, new, sample_weight=np.zeros(30), **options)
