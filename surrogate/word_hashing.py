"""Words of many texts at once: where they are, and the hash of every run of them.

What `hashed_ngrams` defines by a regular expression and a hash function, one string after the other, is done here on the
bytes of all texts together. The results are the same, bit for bit; it takes a fifth of the time.

Paper: the hash is MurmurHash3_x86_32 by Austin Appleby, public domain, with seed 0, as scikit-learn's FeatureHasher has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

WORD = re.compile(r"\w+|[^\w\s]|\n|  +")  # words, single punctuation marks, line breaks, indentation
BETWEEN = "\r"  # white space that belongs to no word; it stands between texts
NONE, LETTER, MARK, BREAK, SPACE, GOES_ON, OTHER = range(7)  # classes of bytes; GOES_ON is the rest of a mark, OTHER no ASCII
PADDING = b"\0" * 4  # the hash reads four bytes at a time
HASHED_TOGETHER = 2**15  # so many hashes that the numbers stay in the processor's cache
CHARS_TOGETHER = 2**17
C1, C2, ADDED, MIX1, MIX2 = (np.uint32(number) for number in (0xCC9E2D51, 0x1B873593, 0xE6546B64, 0x85EBCA6B, 0xC2B2AE35))


@dataclass(frozen=True)
class Words:
    """The words of N texts, one after the other, each with a space before it.

    Attributes:
        buffer: Their bytes in UTF-8, as numbers, and four zeros.
        starts: (W,) where each word begins in the buffer.
        ends: (W,) where it ends.
        text_starts: (N + 1,) which word each text begins with; the last is W.
    """

    buffer: NDArray[np.uint8]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    text_starts: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[str]) -> Words:
        """Find the words of texts as `WORD` does."""
        encoded = [text.encode() for text in texts]
        data = BETWEEN.encode().join([*encoded, b""])
        classes = _classes(data)
        before, after = np.zeros_like(classes), np.zeros_like(classes)
        before[1:], after[:-1] = classes[:-1], classes[1:]
        is_letter, is_mark = classes == LETTER, (classes == MARK) | (classes == BREAK)
        is_run = (classes == SPACE) & ((before == SPACE) | (after == SPACE))
        begins = (is_letter & (before != LETTER)) | is_mark | (is_run & (before != SPACE))
        kept = is_letter | is_mark | is_run | (classes == GOES_ON)
        goes_on = kept & ~begins
        stops = kept.copy()
        stops[:-1] &= ~goes_on[1:]
        found = np.flatnonzero(begins)
        lengths = np.flatnonzero(stops) + 1 - found
        text_ends = np.cumsum([len(text) + 1 for text in encoded])
        text_starts = np.concatenate([[0], np.searchsorted(found, text_ends)])
        ends = np.cumsum(lengths + 1)  # each word has a space before it
        starts = ends - lengths
        times = kept.view(np.uint8) + begins.view(np.uint8)
        buffer = np.repeat(
            np.frombuffer(data + PADDING, dtype=np.uint8), np.concatenate([times, np.ones(len(PADDING), np.uint8)])
        )
        buffer[starts - 1] = ord(" ")
        return cls(buffer, starts, ends, text_starts)

    def hashes(self, length: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the hash of each run of `length` words within a text, and which text it is of."""
        counts = np.maximum(np.diff(self.text_starts) - (length - 1), 0)  # (N,)
        texts = np.repeat(np.arange(len(counts)), counts)
        shift = np.concatenate([[0], np.cumsum(counts)])[:-1]
        first = np.arange(len(texts)) + np.repeat(self.text_starts[:-1] - shift, counts)
        starts, lengths = self.starts[first], (self.ends[first + (length - 1)] - self.starts[first]).astype(np.uint32)
        hashes = np.empty(len(starts), dtype=np.uint32)
        for place in range(0, len(starts), HASHED_TOGETHER):
            part = slice(place, place + HASHED_TOGETHER)
            hashes[part] = _murmur(self._quads, starts[part], lengths[part])
        return hashes.view(np.int32), texts

    @cached_property
    def _quads(self) -> NDArray[np.uint32]:
        """The four bytes from each place of the buffer on, as one little-endian number."""
        quads = self.buffer[:-3].astype(np.uint32)
        for place in (1, 2, 3):
            quads |= self.buffer[place : len(self.buffer) - 3 + place].astype(np.uint32) << np.uint32(8 * place)
        return quads


def texts_together(texts: Iterable[str], *, num_chars: int = CHARS_TOGETHER) -> Iterator[list[str]]:
    """Yield texts in lists of so many characters or little more; arrays of this size are made fastest."""
    together: list[str] = []
    left = num_chars
    for text in texts:
        together.append(text)
        left -= len(text)
        if left <= 0:
            yield together
            together, left = [], num_chars
    if together:
        yield together


def _murmur(quads: NDArray[np.uint32], starts: NDArray[np.int64], lengths: NDArray[np.uint32]) -> NDArray[np.uint32]:
    hashes = np.zeros(len(starts), dtype=np.uint32)
    num_blocks = lengths >> np.uint32(2)
    block = 0
    active = np.flatnonzero(num_blocks)
    while len(active):
        h = hashes[active] ^ _scrambled(quads[starts[active] + 4 * block])
        hashes[active] = _rotated(h, 13) * np.uint32(5) + ADDED
        block += 1
        active = active[num_blocks[active] > block]
    rest = (np.uint32(1) << (np.uint32(8) * (lengths & np.uint32(3)))) - np.uint32(1)  # keeps the bytes behind the last block
    h = hashes ^ _scrambled(quads[starts + (num_blocks << np.uint32(2))] & rest) ^ lengths
    h ^= h >> np.uint32(16)
    h *= MIX1
    h ^= h >> np.uint32(13)
    h *= MIX2
    h ^= h >> np.uint32(16)
    return h


def _scrambled(k: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return _rotated(k * C1, 15) * C2


def _rotated(x: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))


def _classes(data: bytes) -> NDArray[np.uint8]:
    """Return the class of each byte of a text."""
    classes = np.frombuffer(bytearray(data.translate(_ascii_classes())), dtype=np.uint8)
    if data.isascii():
        return classes
    values = np.frombuffer(data, dtype=np.uint8)
    places = np.flatnonzero(values >= 0xC0)  # where a character of several bytes begins
    leads = values[places].astype(np.uint32)
    widths = np.where(leads >= 0xF0, 4, np.where(leads >= 0xE0, 3, 2))
    points = leads & (0xFF >> (widths + 1)).astype(np.uint32)
    for place in (1, 2, 3):
        more = widths > place
        points[more] = (points[more] << np.uint32(6)) | (values[places[more] + place] & np.uint32(0x3F))
    different, which = np.unique(points, return_inverse=True)
    found = np.array([_class_of(chr(point)) for point in different.tolist()], dtype=np.uint8)[which]
    classes[places] = found
    following = np.where(found == MARK, GOES_ON, found)
    for place in (1, 2, 3):
        more = widths > place
        classes[places[more] + place] = following[more]
    return classes


@lru_cache(maxsize=2**16)
def _class_of(character: str) -> int:
    if not WORD.fullmatch(character):
        return SPACE if character == " " else NONE
    return BREAK if character == "\n" else MARK if not re.fullmatch(r"\w", character) else LETTER


@lru_cache(maxsize=1)
def _ascii_classes() -> bytes:
    return bytes(_class_of(chr(code)) if code < 0x80 else OTHER for code in range(256))
