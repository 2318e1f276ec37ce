"""The recall of a first pass is what counting by hand gives, and is refused where it would say nothing."""

from types import SimpleNamespace

import numpy as np
import pytest

from oracle.errors import InputError, MismatchError
from oracle.labels import Labels
from surrogate.scores import Scores
from surrogate.scoring.cascade_recall import COMBINED, measure_recall, recall_table

NAMES = ["math", "code"]
NUM_TEXTS = 200
IDS = [f"{number:032x}" for number in range(NUM_TEXTS)]
RNG = np.random.default_rng(4)
LABELS = RNG.normal(size=(NUM_TEXTS, 2))


def predictor(noise, *, ids=IDS, names=NAMES, seed=1):
    """A predictor whose held-out scores are the labels and so much noise, in another order of the texts."""
    values = LABELS + noise * np.random.default_rng(seed).normal(size=LABELS.shape)
    order = np.random.default_rng(seed).permutation(len(ids))
    held_out = Scores(values[order], text_ids=[ids[row] for row in order], target_names=names)
    return SimpleNamespace(held_out_=held_out, target_names_=names, rows=np.asarray(held_out)[np.argsort(order)])


def best(values, number):
    return set(sorted(range(len(values)), key=lambda row: -values[row])[:number])


def test_each_figure_is_what_counting_gives():
    first, full = predictor(1.0), predictor(0.3, seed=2)
    labels = Labels.from_values(LABELS, IDS, NAMES)
    rows = measure_recall(first, full, labels, shares=(0.2, 0.5), top=0.1, how="code")
    assert [(row.target, row.share) for row in rows] == [(name, share) for share in (0.2, 0.5) for name in (COMBINED, *NAMES)]
    measured = np.asarray(labels.values)
    for row in rows:
        column = NAMES.index(row.target) if row.target in NAMES else 1
        passed = best(first.rows[:, 1], round(row.share * NUM_TEXTS))
        wanted, chosen_by_full = best(measured[:, column], 20), best(full.rows[:, column], 20)
        found = set(sorted(passed, key=lambda text: -full.rows[text, column])[:20])
        assert row.recall == len(passed & wanted) / 20 and row.num_best == 20 and row.num_texts == NUM_TEXTS
        assert row.recall_of_full == len(passed & chosen_by_full) / 20
        assert row.found == len(found & wanted) / 20 and row.found_by_full == len(chosen_by_full & wanted) / 20
        assert row.found_by_first == len(best(first.rows[:, column], 20) & wanted) / 20
        assert row.interval[0] < row.recall < row.interval[1] or row.recall in (0, 1)
    table = recall_table(rows).splitlines()
    assert len(table) == 7 and "(combined)" in table[1]


def test_everything_is_kept_by_a_share_of_1_and_by_a_first_pass_that_knows_the_labels():
    labels = Labels.from_values(LABELS, IDS, NAMES)
    (all_kept, *_) = measure_recall(predictor(100.0), predictor(0.5, seed=2), labels, shares=(1.0,), top=0.1)
    assert all_kept.recall == all_kept.recall_of_full == 1 and all_kept.found == all_kept.found_by_full
    (knows, *_) = measure_recall(predictor(0.0), predictor(0.5, seed=2), labels, shares=(0.1,), top=0.1)
    assert knows.recall == 1 and knows.found == 1 > knows.found_by_full
    assert knows.interval[1] == pytest.approx(1) and 0.8 < knows.interval[0] < 0.9  # Wilson for 20 of 20: 0.839


def test_a_first_pass_at_chance_keeps_about_its_share():
    labels = Labels.from_values(LABELS, IDS, NAMES)
    recalls = [
        measure_recall(predictor(1e6, seed=seed), predictor(0.1), labels, shares=(0.3,), top=0.1)[0].recall for seed in range(60)
    ]
    assert abs(np.mean(recalls) - 0.3) < 0.05


def test_only_texts_that_all_three_have_count():
    half = Labels.from_values(LABELS[:100], IDS[:100], NAMES)
    (row, *_) = measure_recall(predictor(1.0), predictor(0.3), half, shares=(0.5,), top=0.1)
    assert row.num_texts == 100 and row.num_best == 10


def test_what_would_say_nothing_is_refused():
    labels = Labels.from_values(LABELS, IDS, NAMES)
    first, full = predictor(1.0), predictor(0.3)
    with pytest.raises(InputError, match="are 2"):
        measure_recall(first, full, labels, top=0.01)
    for wrong in ({"top": 0.0}, {"shares": (1.5,)}):
        with pytest.raises(InputError, match="a share above 0"):
            measure_recall(first, full, labels, **wrong)
    with pytest.raises(MismatchError, match="the full predictor is of a, b"):
        measure_recall(first, predictor(0.3, names=["a", "b"]), labels)
    with pytest.raises(MismatchError, match="no labelled text"):
        measure_recall(first, predictor(0.3, ids=[f"{number:032x}" for number in range(900, 1100)]), labels)
    with pytest.raises(InputError, match="first predictor has not been fitted"):
        measure_recall(SimpleNamespace(), full, labels)
