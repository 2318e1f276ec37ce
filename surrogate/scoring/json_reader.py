"""Rows of JSON lines, or of one JSON list of objects, plain or packed, in bounded memory.

JSON stays Python values, so that a column may mix types and a string that looks like a date stays a string. Rows are
counted as `oracle.read_texts` counts them: blank lines are none, broken lines are.
"""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from fsspec.utils import infer_compression

from oracle.sources import JSON_ENDINGS
from surrogate.scoring.items import (
    BLOCK_BYTES,
    BLOCK_ROWS,
    MAX_ROW_BYTES,
    READ_BYTES,
    READ_ERRORS,
    SHOWN_CHARS,
    BadFile,
    BadRow,
    Item,
    JsonRow,
    bad_file,
)

STEP_BYTES = 2**14  # what is lost at most of an archive that breaks off; unpacking gives all of a step or an error
ARROW_CODECS = {"gzip": "gzip", "zstd": "zstd", "bz2": "bz2"}  # they tell a cut file from a whole one; zstandard does not


class JsonReader:
    """Rows of JSON lines, or of one JSON list of objects, plain or packed."""

    def __init__(self, raw: Any, name: str) -> None:
        self._raw = raw
        self._lines = _Lines(_unpacked(raw, name))
        self._items = _list_items(self._lines) if _may_be_list(name) and self._lines.begins_with_list() else None
        self._position = 0
        self._probed = self._first_items()
        found = dict.fromkeys(name for item in self._probed if isinstance(item, JsonRow) for name in item.values)
        self.names = list(found)
        self.is_empty = not self._probed

    def first_rows(self) -> list[Mapping[str, Any]]:
        """Return the first rows, by which the format is settled."""
        return [item.values for item in self._probed if isinstance(item, JsonRow)]

    def rows(self, columns: Sequence[str], *, first_row: int, num_rows: int | None) -> Iterator[Item]:
        """Yield the rows of the range, with all their columns."""
        end = None if num_rows is None else first_row + num_rows
        for item in self._probed:
            position = getattr(item, "position", None)
            if position is None or (position >= first_row and (end is None or position < end)):
                yield item
        ended = any(isinstance(item, BadFile) for item in self._probed)
        self._probed = []
        if not ended and (end is None or self._position < end):
            yield from self._parse(None if end is None else end - self._position, first_row=first_row)

    def close(self) -> None:
        """Close the file."""
        self._raw.close()

    def _first_items(self) -> list[JsonRow | BadRow | BadFile]:
        """Read the first rows: as many as a block has, fewer where they are long."""
        items, num_bytes = [], 0
        for item in self._parse(BLOCK_ROWS):
            items.append(item)
            num_bytes += item.num_bytes if isinstance(item, JsonRow) else 0
            if num_bytes >= BLOCK_BYTES:
                break
        return items

    def _parse(self, num_rows: int | None, *, first_row: int = 0) -> Iterator[JsonRow | BadRow | BadFile]:
        """Yield the next rows; those before `first_row` are counted and not parsed."""
        left = num_rows
        while left is None or left > 0:
            try:
                line = self._lines.next_row() if self._items is None else next(self._items, b"")
            except READ_ERRORS as error:
                yield bad_file(f"rows from {self._position} on cannot be read", error)
                return
            except ValueError as error:
                yield BadFile(f"rows from {self._position} on cannot be read: {error}")
                return
            if not line:
                return
            position = self._position
            self._position += 1
            left = None if left is None else left - 1
            if position >= first_row:
                yield _parsed(line, position)


def count_rows(raw: Any, name: str) -> int | None:
    """Count the rows of JSON lines without parsing them; None for a JSON list."""
    lines = _Lines(_unpacked(raw, name))
    if _may_be_list(name) and lines.begins_with_list():
        return None
    count = 0
    while lines.next_row():
        count += 1
    return count


def _unpacked(raw: Any, name: str) -> Any:
    packing = infer_compression(name)
    if packing in ARROW_CODECS:
        return pa.CompressedInputStream(raw, ARROW_CODECS[packing])
    return lzma.LZMAFile(raw) if packing == "xz" else raw


def _may_be_list(name: str) -> bool:
    plain_name = name.rpartition(".")[0] if infer_compression(name) else name
    return plain_name.endswith(JSON_ENDINGS[-1])


class _Lines:
    """Lines of a stream of bytes, read in blocks; a line that is too long is cut, and its rest passed over."""

    def __init__(self, stream: Any) -> None:
        self._stream = io.BufferedReader(_Raw(stream), READ_BYTES)
        if self._stream.peek(3)[:3] == b"\xef\xbb\xbf":  # the mark that Windows puts first
            self._stream.read(3)

    def begins_with_list(self) -> bool:
        """Look whether the first character is that of a JSON list."""
        try:
            return self._stream.peek(1).lstrip()[:1] == b"["
        except READ_ERRORS:
            return False

    def next_row(self) -> bytes:
        """Return the next line that is not blank, or nothing at the end."""
        while line := self._stream.readline(MAX_ROW_BYTES):
            if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                while (rest := self._stream.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
                    pass
                return line
            if not line.isspace():
                return line
        return b""

    def read(self, num_bytes: int) -> bytes:
        """Return the next bytes."""
        return self._stream.read(num_bytes)


class _Raw(io.RawIOBase):
    """A stream that can only be read, as what `io.BufferedReader` takes."""

    def __init__(self, stream: Any) -> None:
        self._wrapped = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._wrapped.read(min(len(buffer), STEP_BYTES))
        buffer[: len(data)] = data
        return len(data)


def _parsed(line: bytes, position: int) -> JsonRow | BadRow:
    if len(line) >= MAX_ROW_BYTES:
        return BadRow(position, f"longer than {MAX_ROW_BYTES >> 20} MiB", _beginning(line))
    try:
        values = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        return BadRow(position, _reason(error), _beginning(line))
    if not isinstance(values, dict):
        return BadRow(position, f"a {type(values).__name__} where an object is needed", _beginning(line))
    return JsonRow(position, values, len(line))


def _reason(error: ValueError | RecursionError) -> str:
    """Return why something is not JSON, without the place, for reasons are counted."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg}"
    return "nested too deeply" if isinstance(error, RecursionError) else "not valid JSON: a number of too many digits"


def _beginning(line: bytes) -> str:
    return line[: 4 * SHOWN_CHARS].decode("utf-8", "replace")[:SHOWN_CHARS].rstrip()


def _list_items(lines: _Lines) -> Iterator[bytes]:
    """Yield the elements of one JSON list, each as its own bytes, while reading it in blocks."""
    decoder, text, at_end = json.JSONDecoder(), "", False
    undecoded = b""

    def more(size: int) -> None:
        nonlocal text, at_end, undecoded
        data = undecoded + lines.read(size)
        at_end = len(data) - len(undecoded) == 0
        cut = len(data) if at_end else _last_boundary(data)
        text, undecoded = text + data[:cut].decode("utf-8", "surrogateescape"), data[cut:]

    more(READ_BYTES)
    place = text.index("[") + 1
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if place < len(text) and text[place] == "]":
            return
        try:
            _, end = decoder.raw_decode(text, place)
            whole = end < len(text) or at_end  # a number at the end of a block may go on in the next
        except RecursionError:
            raise ValueError("the list is nested too deeply") from None
        except ValueError as error:
            if at_end:
                raise ValueError(f"the list is not valid JSON: {error}") from None
            whole = False
        if whole:
            yield text[place:end].encode("utf-8", "surrogateescape")
            text, place = (text[end:], 0) if end > READ_BYTES else (text, end)
        elif len(text) - place > MAX_ROW_BYTES:
            raise ValueError(f"an element is longer than {MAX_ROW_BYTES >> 20} MiB")
        else:
            text, place = text[place:], 0
            more(max(READ_BYTES, len(text)))


def _last_boundary(data: bytes) -> int:
    """Return where the last whole character of UTF-8 ends; at most three bytes are left over."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            return len(data)
        if byte >= 0xC0:
            width = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if back < width else len(data)
    return len(data)
