"""What a predictor keeps of its fit comes back bit for bit, in little space, and names its columns."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from surrogate.features.hashed_ngrams import HashedNgrams
from surrogate.features.text_stats import TextStats
from surrogate.fitted_rows import ARRAYS_FILE, ColumnGroup, FittedRows, column_groups


def rows(*, density: float, weights: bool = False) -> FittedRows:
    rng = np.random.default_rng(0)
    features = np.where(rng.random((30, 400)) < density, rng.normal(size=(30, 400)), 0.0).astype(np.float32)
    features[0, :2] = [-0.0, np.float32(1e-45)]
    places = np.array([*range(30), 3, 5])
    return FittedRows(
        [f"id-{number}" for number in range(30)],
        places,
        rng.normal(size=(32, 2)).astype(np.float32),
        rng.random(32) if weights else None,
        places % 20,
        features,
        [ColumnGroup("hashed_ngrams", "", 400)],
    )


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weights", [False, True])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, density, weights):
    kept = rows(density=density, weights=weights)
    kept.save(tmp_path)
    loaded = FittedRows.load(tmp_path)
    for field in dataclasses.fields(FittedRows):
        before, after = getattr(kept, field.name), getattr(loaded, field.name)
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype and before.tobytes() == after.tobytes(), field.name
        else:
            assert before == after, field.name


def test_features_that_are_mostly_zero_take_little_space(tmp_path):
    rows(density=0.1).save(tmp_path)
    assert (tmp_path / ARRAYS_FILE).stat().st_size < 0.35 * 30 * 400 * 4


def test_a_folder_without_them_gives_none(tmp_path):
    assert FittedRows.load(tmp_path) is None


def test_a_text_with_several_labels_shows_the_new_one():
    kept = rows(density=1.0)
    np.testing.assert_array_equal(kept.label_of_texts(), kept.values[:30])


def test_columns_are_named_by_encoder_and_what_the_encoder_calls_them():
    groups = column_groups([HashedNgrams(dim=8), TextStats(), HashedNgrams(dim=4)], [8, len(TextStats().feature_names), 4])
    assert groups[0] == ColumnGroup("hashed_ngrams#1", "", 8) and groups[-1] == ColumnGroup("hashed_ngrams#2", "", 4)
    assert [group.name for group in groups[1:-1]] == list(TextStats().feature_names)

    class States:
        plugin_name = "model_state"

        def feature_names(self):
            return ["loss", "last_layer.math", "hidden.0", "hidden.1", "error.0"]

    names = [(group.name, group.width) for group in column_groups([States()], [5])]
    assert names == [("loss", 1), ("last_layer.math", 1), ("hidden", 2), ("error", 1)]
