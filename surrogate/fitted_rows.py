"""What a predictor keeps of its fit, so that it can explain scores: features, labels, weights, and names of columns.

They stand in the predictor's own folder and not only in a feature cache: a predictor is moved and shared without its cache,
and features of a live model can never be made again. Features are kept in float32, for trees need every bit of a
threshold, and sparse (CSR) where that is smaller, as hashed n-grams are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from oracle.artifacts import atomic_path, read_json, write_json
from surrogate.labelled_rows import LabelledRows
from surrogate.models import TrainingData, training_data

NAMES_FILE, ARRAYS_FILE = "fitted_rows.json", "fitted_rows.safetensors"


@dataclass(frozen=True)
class ColumnGroup:
    """Feature columns that stand side by side and mean something together.

    Attributes:
        encoder: Name of the encoder, with its number where it occurs twice.
        name: What the encoder calls them, without a number at the end; empty where its columns have no names.
        width: How many they are.
    """

    encoder: str
    name: str
    width: int


@dataclass(frozen=True)
class FittedRows:
    """The R labelled rows of T texts that a surrogate was fitted on, in the order in which it was given them.

    Shapes: places (R,) the text of each row; values (R, C) float32; weights (R,) or None; groups (R,); features (T, D) float32.

    Attributes:
        text_ids: T ids.
        columns: What the D columns are.
    """

    text_ids: Sequence[str]
    places: NDArray[np.int64]
    values: NDArray[np.float32]
    weights: NDArray[np.float64] | None
    groups: NDArray[np.int64]
    features: NDArray[np.float32]
    columns: Sequence[ColumnGroup]

    @classmethod
    def of(cls, rows: LabelledRows, features: NDArray[np.float32], columns: Sequence[ColumnGroup]) -> Self:
        """Keep labelled rows and the features (T, D) of their texts."""
        return cls(list(rows.text_ids), rows.places, rows.values, rows.weights, rows.groups, features, columns)

    def training_data(self) -> TrainingData:
        """Return the data as surrogates see it, in content order."""
        return training_data(self.features[self.places], self.values, self.groups, sample_weight=self.weights)

    def label_of_texts(self) -> NDArray[np.float32]:
        """Return each text's label (T, C), of several the first: new ones stand before those of earlier checkpoints."""
        labels = np.zeros((len(self.text_ids), self.values.shape[1]), dtype=np.float32)
        labels[self.places[::-1]] = self.values[::-1]
        return labels

    def save(self, folder: Path) -> None:
        """Write into a predictor's folder."""
        from safetensors.numpy import save_file

        arrays = {"places": self.places, "values": self.values, "groups": self.groups, **_packed(self.features)}
        if self.weights is not None:
            arrays["weights"] = self.weights
        with atomic_path(folder / ARRAYS_FILE) as partial:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial)
        columns = [[group.encoder, group.name, group.width] for group in self.columns]
        write_json(folder / NAMES_FILE, {"text_ids": list(self.text_ids), "columns": columns})

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read what `save` wrote; None in the folder of a predictor that kept nothing."""
        from safetensors.numpy import load_file

        if not (folder / NAMES_FILE).exists():
            return None
        names, arrays = read_json(folder / NAMES_FILE), load_file(folder / ARRAYS_FILE)
        return cls(
            names["text_ids"],
            arrays["places"],
            arrays["values"],
            arrays.get("weights"),
            arrays["groups"],
            _unpacked(arrays),
            [ColumnGroup(*group) for group in names["columns"]],
        )


def column_groups(encoders: Sequence[Any], widths: Sequence[int]) -> list[ColumnGroup]:
    """Name the columns of encoders that stand side by side with these widths."""
    names = [encoder.plugin_name for encoder in encoders]
    groups = []
    for number, (encoder, width) in enumerate(zip(encoders, widths, strict=True)):
        label = names[number] + (f"#{names[: number + 1].count(names[number])}" if names.count(names[number]) > 1 else "")
        given = getattr(encoder, "feature_names", None)
        columns = [""] * width if given is None else list(given() if callable(given) else given)
        assert len(columns) == width, f"{label} names {len(columns)} of {width} columns"
        runs = groupby(column.partition(".")[0] if column.rpartition(".")[2].isdecimal() else column for column in columns)
        groups += [ColumnGroup(label, name, len(list(run))) for name, run in runs]
    return groups


def _packed(features: NDArray[np.float32]) -> dict[str, NDArray]:
    """Return features (T, D) as CSR arrays, or whole where that is smaller."""
    rows, columns = np.nonzero(features.view(np.uint32))  # -0.0 is kept too
    if 2 * len(rows) >= features.size:
        return {"features": features}
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(features)))])
    return {
        "feature_values": features[rows, columns],
        "feature_columns": columns.astype(np.int32),
        "feature_starts": starts.astype(np.int64),
        "num_features": np.array([features.shape[1]], dtype=np.int64),
    }


def _unpacked(arrays: dict[str, NDArray]) -> NDArray[np.float32]:
    if "features" in arrays:
        return arrays["features"]
    starts = arrays["feature_starts"]
    features = np.zeros((len(starts) - 1, int(arrays["num_features"][0])), dtype=np.float32)
    features[np.repeat(np.arange(len(features)), np.diff(starts)), arrays["feature_columns"]] = arrays["feature_values"]
    return features
