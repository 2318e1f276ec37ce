"""Random projections of gradients that no matrix is stored for: every sign follows from a seed, a name and a place.

A Rademacher matrix R of P rows and D columns, divided by sqrt(D), keeps inner products up to an error that falls
with 1 / sqrt(D) (Johnson and Lindenstrauss). Here the sign at row i and column j of a parameter's matrix is one bit
of a counter-based hash (the finaliser of SplitMix64, Steele et al. 2014) of (seed, parameter name, shape, i, j // 64).
It is the same on every device, in every order and in every process, and blocks of rows are made when they are needed.
The first columns of a wider projection are those of a narrower one. Left out: sparse and Fourier projections.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SIGNS_PER_WORD = 64  # bits of one hash
BLOCK_ELEMENTS = 2**20  # signs that exist at a time, 4 MiB
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the three constants of SplitMix64, as signed 64-bit integers
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_WORD_BITS = 20  # a row's words are numbered from row << 20


@dataclass(frozen=True, kw_only=True)
class RademacherProjection:
    """A projection of all parameters to `dim` numbers, the sum of one projection per parameter.

    Args:
        dim: How many numbers remain (D).
        seed: Another seed is another projection.
    """

    dim: int
    seed: int = 0

    def project(self, name: str, vectors: Tensor, *, shape: Sequence[int]) -> Tensor:
        """Project values of one parameter; the projections of all parameters add up to that of the whole.

        Args:
            name: The parameter's name.
            vectors: (B, P) float32, flattened.
            shape: The parameter's shape, of P elements.

        Returns:
            (B, D) float64.
        """
        assert vectors.shape[1] == math.prod(shape)
        result = torch.zeros(vectors.shape[0], self.dim, dtype=torch.float64, device=vectors.device)
        num_rows = max(BLOCK_ELEMENTS // self.dim, 1)
        for start in range(0, vectors.shape[1], num_rows):
            stop = min(start + num_rows, vectors.shape[1])
            signs = self.signs(name, shape, start=start, stop=stop, device=vectors.device)
            result += (vectors[:, start:stop] @ signs).double()  # (B, D)
        return result / math.sqrt(self.dim)

    def signs(self, name: str, shape: Sequence[int], *, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Make the rows `start` to `stop` of one parameter's matrix: (stop - start, D) float32 of +1 and -1."""
        num_words = -(-self.dim // SIGNS_PER_WORD)
        rows = torch.arange(start, stop, dtype=torch.int64, device=device)[:, None] << _WORD_BITS
        words = _hash(rows + torch.arange(num_words, dtype=torch.int64, device=device), key=self._key(name, shape))
        bytes_of_words = words.view(torch.uint8).int()  # (rows, 8 * words), the lowest byte first
        return functional.embedding(bytes_of_words, _signs_of_bytes(device)).flatten(1)[:, : self.dim]  # (rows, D)

    def _key(self, name: str, shape: Sequence[int]) -> int:
        digest = hashlib.sha256(f"{self.seed}:{name}:{'x'.join(map(str, shape))}".encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)


def _signs_of_bytes(device: torch.device | str) -> Tensor:
    """Return the signs of the bits of every byte, the lowest bit first: (256, 8) float32."""
    numbers = torch.arange(256, device=device)[:, None]
    return (numbers >> torch.arange(8, device=device) & 1).to(torch.float32) * 2 - 1


def _hash(counters: Tensor, *, key: int) -> Tensor:
    """SplitMix64 of int64 counters, a stream per key; integer products wrap around on every device."""
    state = counters * _GOLDEN + key
    state = (state ^ _shift(state, 30)) * _MIX_1
    state = (state ^ _shift(state, 27)) * _MIX_2
    return state ^ _shift(state, 31)


def _shift(values: Tensor, places: int) -> Tensor:
    """Shift right and fill with zeros; torch fills with the sign."""
    return values >> places & (1 << (64 - places)) - 1
