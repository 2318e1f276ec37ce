"""Scores: predicted influence of every text on every target set, an array that knows its rows and columns.

`Scores` is a numpy array of shape (N, C) with `text_ids`, `target_names` and, where known, `num_tokens`.
Anything taken out of it or computed from it is a plain array, so these attributes never stand beside rows
that they do not describe.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oracle.artifacts import atomic_path
from oracle.errors import InputError, MissingFileError

ID_COLUMN, TOKENS_COLUMN = "text_id", "num_tokens"


class Scores(np.ndarray):
    """Predicted influence, (N, C) float32, with the names of its rows and columns.

    Attributes:
        text_ids: N text_ids, one per row.
        target_names: C names, one per column.
        num_tokens: N token counts, or None where they are not known.

    Example:
        >>> scores = Scores(np.zeros((2, 1)), text_ids=["a", "b"], target_names=["math"])
        >>> type(scores[:1]) is np.ndarray, type(scores + 1) is np.ndarray
        (True, True)
    """

    _text_ids: list[str]
    _target_names: list[str]
    _num_tokens: np.ndarray | None

    def __new__(
        cls,
        values: Any,
        *,
        text_ids: Sequence[str],
        target_names: Sequence[str],
        num_tokens: Sequence[int] | np.ndarray | None = None,
    ) -> Scores:
        """Copy `values` into a float32 array and attach the names.

        Raises:
            InputError: Rows or columns and names do not match, or a name is used twice or reserved.
        """
        array = np.array(values, dtype=np.float32)
        ids, names = list(text_ids), check_target_names(target_names)
        if array.ndim != 2 or array.shape != (len(ids), len(names)):
            raise InputError(
                f"scores of shape {array.shape} with {len(ids)} text_ids and {len(names)} target_names.",
                "an array (N, C) with N text_ids and C target_names",
                "make the three fit each other.",
            )
        counts = None if num_tokens is None else check_num_tokens(num_tokens, num_texts=len(ids))
        self = array.view(cls)
        self._text_ids, self._target_names, self._num_tokens = ids, names, counts
        return self

    def __reduce__(self) -> Any:  # numpy's own would drop the names when processes exchange scores
        return _rebuild, (np.asarray(self), self._text_ids, self._target_names, self._num_tokens)

    @property
    def text_ids(self) -> list[str]:
        """N text_ids, one per row."""
        return self._attribute("_text_ids")

    @property
    def target_names(self) -> list[str]:
        """C names, one per column."""
        return self._attribute("_target_names")

    @property
    def num_tokens(self) -> np.ndarray | None:
        """N token counts, or None where they are not known."""
        return self._attribute("_num_tokens")

    def _attribute(self, name: str) -> Any:
        if name not in self.__dict__:  # numpy made this object from another, through a method such as .T or .reshape
            raise InputError(
                "this array was derived from Scores and has lost its text_ids and target_names.",
                "the Scores object itself",
                "keep the original, or wrap the array in Scores(...) again.",
            )
        return self.__dict__[name]

    def __getitem__(self, key: Any) -> Any:
        return np.asarray(self)[key]

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if "out" in kwargs:
            kwargs["out"] = tuple(_plain(value) for value in kwargs["out"])
        return getattr(ufunc, method)(*(_plain(value) for value in inputs), **kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return function(*(_plain(value) for value in args), **{name: _plain(value) for name, value in kwargs.items()})

    def copy(self, order: Any = "C") -> Any:
        """Return a plain copy."""
        return np.asarray(self).copy(order)

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        """Return a plain array of another type."""
        return np.asarray(self).astype(dtype, *args, **kwargs)

    def save(self, path: str | Path) -> None:
        """Write a parquet file with the columns text_id, num_tokens (if known) and one per target."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {ID_COLUMN: pa.array(self.text_ids, pa.string())}
        if self.num_tokens is not None:
            columns[TOKENS_COLUMN] = pa.array(self.num_tokens, pa.int64())
        values = np.asarray(self)
        columns |= {name: pa.array(values[:, column], pa.float32()) for column, name in enumerate(self.target_names)}
        with atomic_path(Path(path)) as partial:
            pq.write_table(pa.table(columns), partial)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            MissingFileError: There is no such file.
            InputError: It has no text_id column or no target columns.
        """
        import pyarrow.parquet as pq

        if not Path(path).exists():
            raise MissingFileError(f"there is no file {path}.", "a parquet file that Scores.save wrote", "check the path.")
        table = pq.read_table(path)
        names = [name for name in table.column_names if name not in (ID_COLUMN, TOKENS_COLUMN)]
        if ID_COLUMN not in table.column_names or not names:
            raise InputError(
                f"{path} has the columns {', '.join(table.column_names)}.",
                "text_id and one column per target",
                "give a file that Scores.save wrote.",
            )
        values = np.stack([table[name].to_numpy() for name in names], axis=1)  # (N, C)
        num_tokens = table[TOKENS_COLUMN].to_numpy() if TOKENS_COLUMN in table.column_names else None
        return cls(values, text_ids=table[ID_COLUMN].to_pylist(), target_names=names, num_tokens=num_tokens)


def check_target_names(target_names: Sequence[str]) -> list[str]:
    """Return the names as a list; raise `InputError` if one is used twice or is a name of another column."""
    names = list(target_names)
    if not names or len(set(names)) < len(names) or {ID_COLUMN, TOKENS_COLUMN} & set(names):
        raise InputError(
            f"target_names={names!r} cannot be used.",
            f"at least one name, no name twice, none called {ID_COLUMN} or {TOKENS_COLUMN}",
            "rename the targets.",
        )
    return names


def check_num_tokens(num_tokens: Sequence[int] | np.ndarray, *, num_texts: int) -> np.ndarray:
    """Return (N,) int64 token counts; raise `InputError` unless they are N integers of at least 0."""
    counts = np.asarray(num_tokens)
    if counts.shape != (num_texts,) or counts.dtype.kind not in "iu" or (counts < 0).any():
        raise InputError(
            f"num_tokens of type {counts.dtype} and shape {counts.shape} for {num_texts} texts, or some below 0.",
            "one integer of at least 0 per text",
            "count the tokens of each text.",
        )
    return counts.astype(np.int64)


def first_of_each(blocks: Iterable[Scores], target_names: Sequence[str]) -> Scores:
    """Join blocks of scores; of a text that comes repeatedly the first row is kept.

    Raises:
        InputError: There is no text in them.
    """
    rows: dict[str, np.ndarray] = {}
    for block in blocks:
        for text_id, row in zip(block.text_ids, np.asarray(block), strict=True):
            rows.setdefault(text_id, row)
    if not rows:
        raise InputError("no text is left of the stream.", "an iterator with texts", "check that it was not used up before.")
    return Scores(np.stack(list(rows.values())), text_ids=list(rows), target_names=target_names)


def _rebuild(values: np.ndarray, text_ids: list[str], target_names: list[str], num_tokens: np.ndarray | None) -> Scores:
    return Scores(values, text_ids=text_ids, target_names=target_names, num_tokens=num_tokens)


def _plain(value: Any) -> Any:
    if isinstance(value, Scores):
        return np.asarray(value)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_plain(item) for item in value)
    return value
