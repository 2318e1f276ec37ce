"""How many bytes rows of arrow take up, row by row, so that bounds on memory depend on the rows and not on their chunks."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NUMBER_BYTES = 8  # what anything but strings and lists is counted as


def row_bytes(table: pa.Table) -> np.ndarray:
    """Return about how many bytes each row takes up, (N,) int64."""
    total = np.zeros(table.num_rows, dtype=np.int64)
    for column in table.columns:
        sizes = [_value_bytes(chunk) for chunk in column.chunks]
        total += np.concatenate(sizes) if sizes else 0
    return total


def _value_bytes(array: pa.Array) -> np.ndarray:
    kind = array.type
    if any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)):
        return _numbers(pc.binary_length(array))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = _numbers(pc.list_value_length(array))
        ends = np.cumsum(lengths)
        inner = np.concatenate([[0], np.cumsum(_value_bytes(array.flatten()))])
        return np.asarray(inner[ends] - inner[ends - lengths], dtype=np.int64)
    if pa.types.is_struct(kind):
        total = np.zeros(len(array), dtype=np.int64)
        for child in array.flatten():
            total += _value_bytes(child)
        return total
    return np.full(len(array), NUMBER_BYTES, dtype=np.int64)


def _numbers(array: pa.Array) -> np.ndarray:
    return np.asarray(pc.fill_null(array, 0).to_numpy(zero_copy_only=False), dtype=np.int64)
