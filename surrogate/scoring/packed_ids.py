"""text_ids as 16 bytes each in place of 32 hex digits; they sort alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from oracle.errors import InputError

ID_TYPE = np.dtype("S16")
HEX = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
NIBBLE = np.full(256, 255, dtype=np.uint8)
NIBBLE[HEX] = np.arange(16, dtype=np.uint8)


def pack(text_ids: Sequence[str] | pa.Array) -> np.ndarray:
    """Return text_ids as 16 bytes each.

    Raises:
        InputError: One is not 32 hex digits.
    """
    ids = pa.array(text_ids, pa.string()) if not isinstance(text_ids, pa.Array) else text_ids
    if len(ids) == 0:
        return np.zeros(0, dtype=ID_TYPE)
    lengths = np.diff(np.frombuffer(ids.buffers()[1], dtype=np.int32)[ids.offset : ids.offset + len(ids) + 1])
    if not ids.null_count and (lengths == 32).all():
        start = int(np.frombuffer(ids.buffers()[1], dtype=np.int32)[ids.offset])
        digits = NIBBLE[np.frombuffer(ids.buffers()[2], dtype=np.uint8)[start : start + 32 * len(ids)]].reshape(-1, 16, 2)
        if digits.max() < 16:
            return np.ascontiguousarray(digits[..., 0] << 4 | digits[..., 1]).view(ID_TYPE).ravel()
    raise InputError(
        f"some text_id of {len(ids)} is not 32 hex digits, such as {ids[0].as_py()!r}.",
        "text_ids as oracle.read_texts and score_corpus give them",
        "score the corpus with this package.",
    )


def unpack(ids: np.ndarray) -> pa.Array:
    """Return packed text_ids as strings."""
    plain = np.ascontiguousarray(ids).view(np.uint8).reshape(-1, 16)
    digits = HEX[np.stack([plain >> 4, plain & 15], axis=2)]  # (N, 16, 2)
    offsets = np.arange(0, 32 * len(ids) + 1, 32, dtype=np.int64)
    strings = pa.LargeStringArray.from_buffers(len(ids), pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(digits)))
    return strings.cast(pa.string())
