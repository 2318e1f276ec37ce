"""Reads a Python's standard library into passages: documentation, docstrings, code, tests, comments, tables, licences.

Sources are parsed, never imported or run. Nothing here depends on a seed: the same library gives the same passages.
Left out: files that do not parse, all but a few pieces of each table, and tests beyond a fixed number of bytes.
"""

from __future__ import annotations

import ast
import math
import os
import re
import textwrap
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

KINDS = ("code", "comment", "data", "docstring", "documentation", "license", "news", "test")
MIN_CHARS, PACKED_CHARS, MAX_CHARS = 120, 450, 1500  # shortest text; pieces are joined up to here; longest text
MIN_CODE_CHARS = 200
MAX_CODE_LINES = 150
MAX_TABLE_PIECES = 3
MAX_SOURCE_BYTES, MAX_TEST_BYTES = 400_000, 3_000_000  # of one file; of all test files, to keep the run short
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "__phello__", "_bundled"}
LOCAL_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")  # they differ between machines of one Python version
TEST_FOLDERS = {"test", "tests", "idle_test"}
TOPICS_FILE = "pydoc_data/topics.py"
TEXT_FILES = {
    "email/architecture.rst": "documentation",
    "idlelib/help.html": "documentation",
    "idlelib/NEWS.txt": "news",
    "idlelib/News3.txt": "news",
    "idlelib/NEWS2x.txt": "news",
    "idlelib/HISTORY.txt": "news",
    "lib2to3/Grammar.txt": "data",
    "lib2to3/PatternGrammar.txt": "data",
    "idlelib/config-keys.def": "data",
    "idlelib/config-highlight.def": "data",
}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class Passage:
    """One text of the library, as it becomes a row."""

    text: str
    source: str
    kind: str
    origin: str
    corruption: str = ""


@lru_cache(maxsize=2)
def read_library(folder: str, without: tuple[str, ...]) -> dict[str, tuple[Passage, ...]]:
    """Return all passages but the topics, by kind; cached because parsing is what takes the time."""
    files = dict(_files(folder, without))
    sources = {name: path for name, path in files.items() if name.endswith(".py") and path.stat().st_size <= MAX_SOURCE_BYTES}
    tests = [name for name in sources if TEST_FOLDERS & set(name.split("/"))]
    passages: list[Passage] = []
    for name in sources.keys() - set(tests) - {TOPICS_FILE}:
        passages += _from_source(name, sources[name])
    num_bytes = 0
    for name in sorted(tests, key=lambda name: zlib.crc32(name.encode())):  # a fixed mixture of all test folders
        num_bytes += sources[name].stat().st_size
        if num_bytes > MAX_TEST_BYTES:
            break
        passages += _from_source(name, sources[name], is_test=True)
    for name in TEXT_FILES.keys() & files.keys():
        passages += _from_text_file(name, files[name], TEXT_FILES[name])
    for path in (Path(folder, "LICENSE.txt"), Path(folder).parent / "LICENSE.txt"):  # the second on Windows
        if path.is_file():
            passages += _from_text_file("LICENSE.txt", path, "license")
            break
    return {kind: tuple(passage for passage in passages if passage.kind == kind) for kind in KINDS}


def _files(folder: str, without: Sequence[str]) -> Iterator[tuple[str, Path]]:
    skipped = NOT_LIBRARY | set(without)
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith("config-")]
        for name in names:
            path = Path(root, name)
            if path.is_file() and not name.startswith(LOCAL_FILES):
                yield path.relative_to(folder).as_posix(), path


def read_topics(folder: str) -> dict[str, list[Passage]]:
    """Return the documentation passages by topic; a paragraph of several topics belongs to the shortest of them."""
    tree = ast.parse(Path(folder, TOPICS_FILE).read_text(encoding="utf-8"))
    topics: dict[str, str] = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
    )
    seen: set[str] = set()
    passages = {}
    for topic in sorted(topics, key=lambda topic: (len(topics[topic]), topic)):
        stretches: list[list[str]] = [[]]
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            words = " ".join(paragraph.split())
            if words in seen:
                stretches.append([])
            else:
                seen.add(words)
                stretches[-1].append(paragraph)
        texts = [text for stretch in stretches for text in _pack(stretch, "\n\n")]
        passages[topic] = [
            Passage(text, "topics", "documentation", f"topics:{topic}:{number}") for number, text in enumerate(texts)
        ]
    return passages


def _from_text_file(name: str, path: Path, kind: str) -> list[Passage]:
    text = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
    if name.endswith(".html"):
        reader = _HtmlText()
        reader.feed(text)
        text = "".join(reader.parts)
    source = name.split("/")[0].removesuffix(".txt")
    return [
        Passage(text, source, kind, f"{name}:{kind}:{number}")
        for number, text in enumerate(_pack(re.split(r"\n\s*\n", text), "\n\n"))
    ]


class _HtmlText(HTMLParser):
    """Collects the prose of a page, with a blank line after each paragraph, heading and list item."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in {"p", "h1", "h2", "h3", "h4", "dt", "dd", "li", "pre"}:
            self.parts.append("\n\n")


def _from_source(name: str, path: Path, *, is_test: bool = False) -> list[Passage]:
    """Return the code of a source file, and unless it is a test also its docstrings, comments and tables."""
    try:
        source = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in strings; they are the library's own affair
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # test data that is broken or in another encoding on purpose
        return []
    lines = source.split("\n")  # not splitlines, which also splits at form feeds, where ast does not
    definitions = list(_definitions(tree))
    top = name.split("/")[0].removesuffix(".py")
    taken: set[int] = set()
    found: list[tuple[int, str, list[str]]] = []
    found += [(line, "test" if is_test else "code", [text]) for line, text in _code(definitions, lines, taken)]
    if not is_test:
        nodes: list[ast.Module | Definition] = [tree, *definitions]
        found += [
            (number, "docstring", _pack((ast.get_docstring(node) or "").split("\n\n"), "\n\n"))
            for number, node in enumerate(nodes)
        ]
        found += [(line, "data", pieces) for line, pieces in _tables(tree, lines, taken)]
        for node in nodes:
            taken.update(_docstring_lines(node))
        found += [(line, "comment", pieces) for line, pieces in _comments(lines, taken)]
    return [
        Passage(text, top, kind, f"{name}:{kind}:{place}:{number}")
        for place, kind, texts in found
        for number, text in enumerate(texts)
    ]


def _definitions(node: ast.AST) -> Iterator[Definition]:
    """Yield classes and functions in order, looking into classes and branches but not into functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child
        if isinstance(child, (ast.ClassDef, ast.If, ast.Try, ast.ExceptHandler)):
            yield from _definitions(child)


def _docstring_lines(node: ast.Module | Definition) -> range:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return range(first.lineno, (first.end_lineno or first.lineno) + 1)
    return range(0)


def _code(definitions: Iterable[Definition], lines: list[str], taken: set[int]) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text, without docstrings, of functions and of classes small enough to be one text."""
    last = 0
    for node in definitions:
        start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        end = node.end_lineno or start
        if start <= last or end - start > MAX_CODE_LINES:
            continue
        inner = [child for child in ast.walk(node) if isinstance(child, Definition)]
        docstrings = {line for child in inner for line in _docstring_lines(child) if line > child.lineno}
        kept = [line for number, line in enumerate(lines[start - 1 : end], start) if number not in docstrings]
        text = _tidy(textwrap.dedent("\n".join(kept)))
        if MIN_CODE_CHARS <= len(text) <= MAX_CHARS and _is_plain(text):
            last = end
            taken.update(range(start, end + 1))
            yield start, text


def _tables(tree: ast.Module, lines: list[str], taken: set[int]) -> Iterator[tuple[int, list[str]]]:
    """Yield some pieces of each long literal that a module assigns: encodings, entities, keyword lists."""
    for node in tree.body:
        literal = isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(
            node.value, (ast.Dict, ast.List, ast.Tuple, ast.Set, ast.Constant)
        )
        span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        if literal and len(span) > 3:
            taken.update(span)
            pieces = _pack(lines[span.start - 1 : span.stop - 1], "\n")
            step = max(1, math.ceil(len(pieces) / MAX_TABLE_PIECES))
            yield span.start, pieces[::step]


def _comments(lines: list[str], taken: set[int]) -> Iterator[tuple[int, list[str]]]:
    block: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        stripped = line.strip()
        if stripped.startswith("#") and number not in taken and not stripped.startswith("#!"):
            block.append(re.sub(r"^#+ ?", "", stripped))
        elif block:
            text = "\n".join(block)
            if sum(character.isalpha() for character in text) > len(text) // 2:  # prose, not a drawn line
                yield number - len(block), _pack(re.split(r"\n\s*\n", text), "\n\n")
            block = []


def _pack(pieces: Iterable[str], separator: str) -> list[str]:
    """Join neighbouring pieces into texts of about PACKED_CHARS; cut pieces that are too long, drop rests that are too short."""
    texts, current = [], ""
    for piece in pieces:
        if len(piece) > MAX_CHARS:
            parts = _pack(piece.split("\n"), "\n") if "\n" in piece else textwrap.wrap(piece, MAX_CHARS)
            texts += [current, *parts]
            current = ""
            continue
        if len(current) + len(separator) + len(piece) > MAX_CHARS:
            texts.append(current)
            current = ""
        current = current + separator + piece if current else piece
        if len(current) >= PACKED_CHARS:
            texts.append(current)
            current = ""
    tidy = [_tidy(text) for text in [*texts, current]]
    return [text for text in tidy if len(text) >= MIN_CHARS and _is_plain(text)]


def _tidy(text: str) -> str:
    text = "\n".join(line.rstrip() for line in text.replace("\f", "").split("\n"))
    return textwrap.dedent(re.sub(r"\n{3,}", "\n\n", text)).strip()


def _is_plain(text: str) -> bool:
    """Tell whether a text can be stored as UTF-8 and holds no control characters but tabs and line ends."""
    return not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffd]", text)
