"""Labels: measured influence, with where it came from and what it cost.

On disk a folder: `labels.parquet` and `meta.json`. The table has one row per text: `text_id`; for every target
`value.<target>`, `half_a.<target>` and `half_b.<target>`; and `extra.<name>` for every further measured number, so
that no target's name can stand for something else. Parquet so that any tool can read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle.artifacts import atomic_path, read_json, write_json
from oracle.errors import InputError, MismatchError, MissingFileError, NotFiniteError, closest

if TYPE_CHECKING:
    import pyarrow as pa

VALUE, HALVES, EXTRA = "value.", ("half_a.", "half_b."), "extra."  # what the columns on disk begin with


@dataclass(frozen=True)
class Labels:
    """An oracle's measurement of influence.

    Attributes:
        values: (S, C) float32; positive means that training on the text lowers the target's loss.
        text_ids: S ids, in the order of the rows.
        target_names: C names, in the order of the columns; the method's own for a method that looks at no target.
        units: What one unit of a value is, usually "nats per target token", and "... per text token" for labels per token.
        halves: (2, S, C) float32, the same measured on either half of each target set; NaN without halves.
        columns: Further measured numbers, each (S,) float32, by name: `text_loss`, `num_tokens`, `gradient_norm`,
            `after.<target>` (the target's loss after the step). `num_tokens` is NaN where no model counted them.
        meta: Options, fingerprints of checkpoint and targets, losses before, seconds and FLOPs spent.
    """

    values: np.ndarray
    text_ids: list[str]
    target_names: list[str]
    units: str
    halves: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.text_ids), len(self.target_names))
        if self.values.shape != shape or self.halves.shape != (2, *shape):
            raise InputError(
                f"values have shape {self.values.shape} and halves {self.halves.shape} for {shape[0]} text_ids "
                f"and {shape[1]} targets.",
                f"values {shape} and halves {(2, *shape)}",
                "give one row per text_id and one column per target.",
            )
        if not np.isfinite(self.values).all():
            bad = [self.text_ids[row] for row in np.flatnonzero(~np.isfinite(self.values).all(1))[:3]]
            raise NotFiniteError(
                f"labels are NaN or infinite, first for the texts {bad}.",
                "finite labels",
                "remove those texts or find out why their loss is not finite.",
            )

    def __len__(self) -> int:
        return len(self.text_ids)

    @classmethod
    def from_values(
        cls, values: np.ndarray, text_ids: Sequence[str], target_names: Sequence[str], *, units: str = "nats per target token"
    ) -> Labels:
        """Make labels from values (S, C) that were measured elsewhere, without halves."""
        array = np.asarray(values, dtype=np.float32)
        return cls(array, list(text_ids), list(target_names), units, np.full((2, *array.shape), np.nan, dtype=np.float32))

    def take(self, text_ids: Sequence[str]) -> Labels:
        """Return the labels of these texts, in this order.

        Raises:
            MismatchError: Some have no label.
        """
        rows = {text_id: row for row, text_id in enumerate(self.text_ids)}
        missing = [text_id for text_id in text_ids if text_id not in rows]
        if missing:
            raise MismatchError(
                f"{len(missing)} of {len(text_ids)} texts have no label, first {missing[:3]}.",
                "texts that were labelled",
                "pass the sample that the labels were made for, or label these texts.",
            )
        index = np.array([rows[text_id] for text_id in text_ids], dtype=np.int64)
        return Labels(
            self.values[index],
            list(text_ids),
            self.target_names,
            self.units,
            self.halves[:, index],
            {name: column[index] for name, column in self.columns.items()},
            self.meta,
        )

    def target(self, name: str) -> np.ndarray:
        """Return one target's column, (S,)."""
        if name not in self.target_names:
            raise InputError(
                f"no target {name!r}{closest(name, self.target_names)}.", ", ".join(self.target_names), "choose one of these."
            )
        return self.values[:, self.target_names.index(name)]

    def save(self, folder: str | Path) -> None:
        """Write `labels.parquet` and `meta.json` to `folder`."""
        import pyarrow.parquet as pq

        folder = Path(folder)
        write_json(folder / "meta.json", {"target_names": self.target_names, "units": self.units, **self.meta})
        with atomic_path(folder / "labels.parquet") as partial:
            pq.write_table(to_table(self), partial)

    @classmethod
    def load(cls, folder: str | Path) -> Labels:
        """Read what `save` wrote.

        Raises:
            MissingFileError: There are no complete labels in `folder`.
        """
        import pyarrow.parquet as pq

        folder = Path(folder)
        if not (folder / "labels.parquet").exists():
            raise MissingFileError(
                f"there are no complete labels in {folder}.",
                "a folder with labels.parquet and meta.json",
                "run the labelling there; an interrupted one continues.",
            )
        meta = read_json(folder / "meta.json")
        names, units = meta.pop("target_names"), meta.pop("units")
        return from_table(pq.read_table(folder / "labels.parquet"), names, units=units, meta=meta)


def to_table(labels: Labels) -> pa.Table:
    """Lay labels out as a table with one row per text."""
    import pyarrow as pa

    columns: dict[str, Any] = {"text_id": pa.array(labels.text_ids, pa.string())}
    for index, name in enumerate(labels.target_names):
        columns[VALUE + name] = labels.values[:, index]
        for half, prefix in enumerate(HALVES):
            columns[prefix + name] = labels.halves[half, :, index]
    return pa.table({**columns, **{EXTRA + name: column for name, column in labels.columns.items()}})


def from_table(table: pa.Table, target_names: list[str], *, units: str, meta: dict[str, Any]) -> Labels:
    """Read the layout of `to_table`."""

    def column(name: str) -> np.ndarray:
        return np.asarray(table[name].to_numpy(), dtype=np.float32)

    values = np.stack([column(VALUE + name) for name in target_names], axis=1)
    halves = np.stack([np.stack([column(prefix + name) for name in target_names], axis=1) for prefix in HALVES])
    columns = {name.removeprefix(EXTRA): column(name) for name in table.column_names if name.startswith(EXTRA)}
    return Labels(values, table["text_id"].to_pylist(), list(target_names), units, halves, columns, meta)
