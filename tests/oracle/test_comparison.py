"""Agreement and noise ceiling against hand-made cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import oracle
from oracle.comparison import spearman, spearman_within, top_overlap
from oracle.errors import InputError, InputTypeError, MismatchError
from oracle.labels import Labels


def _labels(values, ids=None, names=("t",), halves=None):
    values = np.asarray(values, dtype=np.float32).reshape(-1, len(names))
    ids = ids or [f"id{row}" for row in range(len(values))]
    halves = np.full((2, *values.shape), np.nan, dtype=np.float32) if halves is None else halves.astype(np.float32)
    return Labels(values, list(ids), list(names), "nats", halves)


def test_spearman_matches_scipy_with_ties():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 40), rng.normal(size=40)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(np.ones(5), np.arange(5)) == 0.0


def test_agreement_joins_by_text_id_and_not_by_row():
    a = _labels([1, 2, 3, 4, 5])
    b = _labels([50, 40, 30, 20, 10, 0], ids=["id4", "id3", "id2", "id1", "id0", "other"])
    found = oracle.agreement(a, b)["t"]
    assert found.spearman == pytest.approx(1.0) and found.num_texts == 5 and found.top_overlap == 1.0


def test_agreement_within_groups_does_not_reward_telling_groups_apart():
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1], 50)
    a, b = (10 * group + rng.normal(size=100) for _ in range(2))
    groups = [str(g) for g in group]
    found = oracle.agreement(_labels(a), _labels(b), groups=groups)["t"]
    assert found.spearman > 0.7 and abs(found.spearman_within) < 0.25
    assert spearman_within(a, a, groups) == pytest.approx(1.0)
    assert spearman_within(a[:4], a[:4], ["x"] * 4) is None


def test_disjoint_label_sets_are_refused():
    with pytest.raises(MismatchError, match="share 0 texts"):
        oracle.agreement(_labels([1, 2, 3]), _labels([1, 2, 3], ids=["x", "y", "z"]))
    with pytest.raises(MismatchError, match="targets"):
        oracle.agreement(_labels([1, 2, 3]), _labels([1, 2, 3], names=("u",)))


def test_the_noise_ceiling_recovers_the_agreement_of_two_whole_measurements():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=20_000)
    halves = truth + rng.normal(size=(2, 20_000))  # each half has signal and noise of variance 1: r = 0.5
    whole_a, whole_b = (truth + rng.normal(size=20_000) / np.sqrt(2) for _ in range(2))
    labels = _labels(halves.mean(0), halves=halves[:, :, None])
    assert oracle.noise_ceiling(labels)["t"] == pytest.approx(spearman(whole_a, whole_b), abs=0.02)


def test_top_overlap_of_unrelated_labels_is_about_the_fraction():
    rng = np.random.default_rng(2)
    assert top_overlap(rng.normal(size=20_000), rng.normal(size=20_000), fraction=0.2) == pytest.approx(0.2, abs=0.02)


def test_labels_refuse_wrong_shapes_and_missing_texts(tmp_path):
    with pytest.raises(ValueError, match="one row per text_id"):
        Labels(np.zeros((2, 1), np.float32), ["a"], ["t"], "nats", np.zeros((2, 2, 1), np.float32))
    with pytest.raises(MismatchError, match="have no label"):
        _labels([1, 2, 3]).take(["id0", "nothing"])
    with pytest.raises(FileNotFoundError, match="no complete labels"):
        Labels.load(tmp_path)
    assert Labels.from_values(np.ones((2, 1)), ["a", "b"], ["t"]).values.dtype == np.float32


@pytest.mark.parametrize(
    "names",
    [("text_loss", "num_tokens", "text_id"), ("m", "m.half_a", "half_a.m"), ("value.m", "m", "extra.num_tokens")],
    ids=str,
)
def test_labels_come_back_from_disk_whatever_their_targets_are_called(names, tmp_path):
    rng = np.random.default_rng(0)
    halves, columns = (
        rng.normal(size=(2, 4, 3)),
        {name: rng.normal(size=4).astype(np.float32) for name in ("text_loss", "num_tokens")},
    )
    labels = replace(_labels(rng.normal(size=12), ids=list("abcd"), names=names, halves=halves), columns=columns)
    labels.save(tmp_path)
    loaded = Labels.load(tmp_path)
    assert loaded.target_names == list(names) and loaded.text_ids == list("abcd")
    np.testing.assert_array_equal(loaded.values, labels.values)
    np.testing.assert_array_equal(loaded.halves, labels.halves)
    assert set(loaded.columns) == set(columns)
    for name, column in columns.items():
        np.testing.assert_array_equal(loaded.columns[name], column)


def test_the_signal_kept_leaves_out_the_noise_that_two_methods_share():
    rng = np.random.default_rng(2)
    truth, noise = rng.normal(size=20_000), rng.normal(size=(2, 20_000))  # the target texts' noise, the same for all methods
    reference = _labels(truth, halves=(truth + noise)[:, :, None])
    cheap = truth + 0.5 * rng.normal(size=20_000)  # a method with an error of its own
    other = _labels(cheap, halves=(cheap + noise)[:, :, None])
    assert oracle.agreement(reference, reference)["t"].signal_kept == pytest.approx(1.0)
    found = oracle.agreement(reference, other)["t"]
    assert found.signal_kept == pytest.approx(np.sqrt(2 / 2.25), abs=0.02)
    assert found.noise_ceilings[0] == pytest.approx(2 / 3, abs=0.02) and found.noise_ceilings[1] == pytest.approx(0.72, abs=0.03)
    assert oracle.agreement(reference, _labels(cheap))["t"].signal_kept is None
    unrelated = rng.normal(size=(2, 20_000))
    assert abs(oracle.agreement(reference, _labels(unrelated[0], halves=unrelated[:, :, None]))["t"].signal_kept) < 0.05


def test_what_cannot_be_compared_is_refused_in_words():
    labels = _labels([1, 2, 3])
    with pytest.raises(InputTypeError, match=r"a ndarray was given for labels[\s\S]*from_values"):
        oracle.agreement(labels, labels.values)
    with pytest.raises(InputError, match="1 groups for the 3 texts"):
        oracle.agreement(labels, labels, groups=["x"])
    for fraction in (2.0, 0.0, -0.1, float("nan"), "0.2"):
        with pytest.raises(InputError, match="top_fraction="):
            oracle.agreement(labels, labels, top_fraction=fraction)
    assert oracle.agreement(labels, labels, top_fraction=1)["t"].top_overlap == 1.0
