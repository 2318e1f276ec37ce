"""Chance that belongs to a text: numbers drawn by a hash of its text_id, which no row order and no other text moves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

DRAWN_BITS = 53  # as many as a float64 holds


def uniform(text_ids: Sequence[str], *, salt: str) -> np.ndarray:
    """Draw one number per text, evenly from between 0 and 1, both excluded.

    Args:
        text_ids: M text_ids.
        salt: Says what the numbers are for; has the seed. Another salt draws independent numbers.

    Returns:
        (M,) float64.
    """
    start = hashlib.blake2b(f"{salt}:".encode(), digest_size=8)
    drawn = bytearray()
    for text_id in text_ids:
        digest = start.copy()
        digest.update(text_id.encode())
        drawn += digest.digest()
    numbers = np.frombuffer(bytes(drawn), dtype="<u8") >> np.uint64(64 - DRAWN_BITS)
    return (numbers.astype(np.float64) + 0.5) / 2.0**DRAWN_BITS
