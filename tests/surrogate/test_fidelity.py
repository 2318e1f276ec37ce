from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from oracle.errors import InputError, NotFiniteError
from surrogate.fidelity import Fidelity, above_chance, measure_fidelity


def measure(scores, labels, **options):
    scores, labels = (np.asarray(values, dtype=float).reshape(len(values), -1) for values in (scores, labels))
    names = [f"target{column}" for column in range(labels.shape[1])]
    if "baseline" in options:
        options["baseline"] = np.asarray(options["baseline"], dtype=float).reshape(labels.shape)
    return measure_fidelity(scores, labels, target_names=names, **{"num_bootstrap": 50, **options})


def noisy(num_texts=200, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.standard_t(3, size=num_texts)
    return labels + noise * rng.normal(size=num_texts), labels


def test_spearman_and_p_value_agree_with_scipy_also_on_ties():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 8, size=(60, 2)), rng.integers(0, 5, size=(60, 2))
    for column, row in enumerate(measure(scores, labels)):
        expected = stats.spearmanr(scores[:, column], labels[:, column], alternative="greater")
        assert row.target == f"target{column}"
        assert row.spearman == pytest.approx(expected.statistic) and row.p_value == pytest.approx(expected.pvalue)


def test_hand_computed_figures():
    labels = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    scores = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0, 7.0, 8.0])  # best two predicted: labels 7 and 9
    (row,) = measure(scores, labels, top_fraction=0.2)
    assert row.top_recall == 0.5 and row.mean_label_selected == 8.0
    assert row.mean_label_best == 8.5 and row.mean_label_all == 4.5 and row.num_texts == 10
    assert row.r2 == pytest.approx(1 - (4 + 1 + 1) / 82.5)
    (row,) = measure(scores, labels, baseline=np.full(10, 5.0))
    assert row.r2 == pytest.approx(1 - 6 / (82.5 + 10 * 0.25))


def test_perfect_and_reversed_scores():
    labels = np.arange(30.0)
    (perfect,), (reversed_,) = measure(labels, labels), measure(-labels, labels)
    assert perfect.spearman == 1.0 and perfect.p_value == 0.0 and perfect.r2 == 1.0 and perfect.top_recall == 1.0
    assert reversed_.spearman == -1.0 and reversed_.p_value == 1.0 and reversed_.top_recall == 0.0
    assert above_chance(perfect) and not above_chance(reversed_)


def test_constant_scores_get_what_a_blind_choice_gets():
    _, labels = noisy(100)
    (row,) = measure(np.full(100, labels.mean()), labels, top_fraction=0.2)
    assert row.spearman == 0.0 and row.spearman_interval == (0.0, 0.0) and row.p_value == 0.5 and not above_chance(row)
    assert row.top_recall == pytest.approx(0.2) and row.mean_label_selected == pytest.approx(labels.mean())
    assert row.r2 == pytest.approx(0.0)


def test_constant_labels_have_no_r2():
    (row,) = measure(np.arange(10.0), np.ones(10))
    assert row.spearman == 0.0 and row.r2 is None and row.top_recall == pytest.approx(0.2)


def test_telling_sources_apart_is_not_rewarded_inside_them():
    rng = np.random.default_rng(0)
    sources = np.repeat(["web", "code", "books"], 60)
    offset = np.repeat([0.0, 5.0, 10.0], 60)
    labels = offset + rng.normal(size=180)
    (only_sources,) = measure(offset, labels, sources=list(sources))
    assert only_sources.spearman > 0.8 and only_sources.spearman_within_source == 0.0 and only_sources.num_sources_within == 3
    (noise_inside,) = measure(offset + 0.1 * rng.normal(size=180), labels, sources=list(sources))
    assert noise_inside.spearman > 0.8 and abs(noise_inside.spearman_within_source) < 0.2


def test_within_source_is_the_mean_over_large_enough_sources_weighted_by_texts():
    scores, labels = noisy(40)
    sources = ["a"] * 22 + ["b"] * 11 + ["c"] * 7
    (row,) = measure(scores, labels, sources=sources)
    inside = [stats.spearmanr(scores[part], labels[part]).statistic for part in (slice(0, 22), slice(22, 33))]
    assert row.spearman_within_source == pytest.approx((22 * inside[0] + 11 * inside[1]) / 33) and row.num_sources_within == 2
    assert measure(scores, labels, sources=[str(number) for number in range(40)])[0].spearman_within_source is None
    assert measure(scores, labels)[0].spearman_within_source is None


def test_the_interval_is_repeatable_covers_the_figure_and_ignores_row_order():
    scores, labels = noisy(150)
    (row,), (again,) = measure(scores, labels, num_bootstrap=300), measure(scores, labels, num_bootstrap=300)
    assert row == again
    order = np.random.default_rng(1).permutation(150)
    (shuffled,) = measure(scores[order], labels[order], num_bootstrap=300)
    assert shuffled.spearman_interval == row.spearman_interval
    (other,) = measure(scores, labels, num_bootstrap=300, seed=1)
    assert other.spearman_interval != row.spearman_interval
    low, high = row.spearman_interval
    standard_error = (1 - row.spearman**2) / np.sqrt(150)
    assert low < row.spearman < high and 2 * standard_error < high - low < 6 * standard_error


def test_chance_is_rarely_above_chance():
    rng = np.random.default_rng(0)
    rows = measure(rng.normal(size=(80, 400)), rng.normal(size=(80, 400)), num_bootstrap=1)
    assert 0.02 < np.mean([above_chance(row) for row in rows]) < 0.09
    assert not any(above_chance(row, level=1e-6) for row in rows)


def test_a_useless_surrogate_is_not_pulled_below_zero_by_its_folds_means():
    labels = np.random.default_rng(0).normal(size=100)
    folds = np.arange(100) % 5
    means = np.array([labels[folds != fold].mean() for fold in folds])
    assert stats.spearmanr(means, labels).statistic < -0.05
    (row,) = measure(means, labels, baseline=means)
    assert row.spearman == 0.0 and row.r2 == 0.0


def test_one_outlying_label_does_not_disturb_the_ranks_of_cross_fitted_scores():
    scores, labels = noisy(200)
    labels[np.argmax(labels)] = 1e5
    folds = np.arange(200) % 5
    means = np.array([labels[folds != fold].mean() for fold in folds])
    assert measure(scores, labels, baseline=means)[0].spearman == pytest.approx(measure(scores, labels)[0].spearman, abs=0.03)


def test_leaving_out_single_texts_keeps_their_scores_apart():
    scores, labels = noisy(50)
    means = (labels.sum() - labels) / 49
    assert measure(scores, labels, baseline=means)[0].spearman == measure(scores, labels)[0].spearman


def test_bad_input_is_refused():
    scores, labels = noisy(20)
    with pytest.raises(InputError, match="scores"):
        measure_fidelity(scores[:, None], labels[:-1, None], target_names=["a"])
    with pytest.raises(InputError, match="target names"):
        measure_fidelity(scores[:, None], labels[:, None], target_names=["a", "b"])
    with pytest.raises(InputError, match="sources"):
        measure(scores, labels, sources=["a"])
    with pytest.raises(InputError, match="at least 3"):
        measure(scores[:2], labels[:2])
    with pytest.raises(InputError, match="top_fraction"):
        measure(scores, labels, top_fraction=0.0)
    with pytest.raises(NotFiniteError, match="scores"):
        measure(np.where(scores > 0, np.nan, scores), labels)


def fidelity():
    scores, labels = noisy(60)
    rng = np.random.default_rng(3)
    two_labels = np.stack([labels, rng.normal(size=60)], axis=1)
    rows = [
        measure_fidelity(values, two_labels, target_names=["math", "code"], num_bootstrap=20)
        for values in (np.stack([scores, -two_labels[:, 1]], axis=1), rng.normal(size=(60, 2)), np.zeros((60, 2)))
    ]
    return Fidelity(
        surrogate_name="trees", surrogate=rows[0], ridge=rows[1], constant=rows[2], noise_ceiling={"math": 0.91, "code": None}
    )


def test_fidelity_survives_json():
    original = fidelity()
    assert Fidelity.from_dict(json.loads(json.dumps(original.as_dict(), allow_nan=False))) == original


def test_targets_at_chance_are_named():
    assert fidelity().targets_at_chance() == ["code"]


def test_the_table_is_aligned_and_shows_ridge_and_constant_beside_the_surrogate():
    lines = fidelity().table().splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["math", "trees"],
        ["math", "ridge"],
        ["math", "constant"],
        ["code", "trees"],
        ["code", "ridge"],
        ["code", "constant"],
    ]
    for title in (
        "target",
        "surrogate",
        "spearman",
        "within source",
        "r2",
        "top-20 % recall",
        "mean label of selected",
        "noise ceiling",
    ):
        assert title in lines[0]
    assert all(len(line) == len(lines[0]) for line in lines)
    assert lines[1].endswith("0.910") and lines[4].endswith("-") and "0.000" in lines[3]
