"""The pool of real texts: size, mixture, honesty of the target set and of the corruptions, and that nothing is run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from surrogate._data.python_library import recipe

Rows = list[dict[str, Any]]
LEFT_OUT = ("test", "tests", "idle_test", "idlelib", "tkinter", "lib2to3")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built() -> tuple[Rows, dict[str, Rows]]:
    rows: tuple[Rows, dict[str, Rows]] = recipe.build()
    return rows


@pytest.fixture(scope="module")
def without_tests() -> tuple[Rows, dict[str, Rows]]:
    """What a system builds that installs neither tests nor the graphical parts."""
    rows: tuple[Rows, dict[str, Rows]] = recipe.build(without=LEFT_OUT)
    return rows


@pytest.fixture(scope="module")
def pool(built: tuple[Rows, dict[str, Rows]]) -> Rows:
    return built[0]


@pytest.fixture(scope="module")
def target(built: tuple[Rows, dict[str, Rows]]) -> Rows:
    return built[1]["documentation"]


def windows(text: str, length: int = 13) -> set[tuple[str, ...]]:
    """Plain reference for runs of words, with words as the letters and digits between anything else."""
    words = "".join(character if character.isalnum() or character == "_" else " " for character in text.lower()).split()
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def digest(rows: object) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def test_pool_has_thousands_of_different_texts(pool: Rows) -> None:
    assert len(pool) >= 5000
    assert len({row["text"] for row in pool}) == len({row["origin"] for row in pool}) == len(pool)


def test_pool_mixes_kinds_and_documentation_is_a_small_part(pool: Rows) -> None:
    counts = Counter(row["kind"] for row in pool)
    assert {"documentation", "docstring", "code", "comment", "data", "license"} <= set(counts)
    assert 0.07 < counts["documentation"] / len(pool) < 0.12
    assert max(counts.values()) < len(pool) / 2
    assert len({row["source"] for row in pool}) > 100


def test_columns_and_lengths(pool: Rows, target: Rows) -> None:
    for row in [*pool, *target]:
        assert set(row) == {"text", "source", "kind", "origin", "corruption"}
        assert 120 <= len(row["text"]) <= 1500
        row["text"].encode("utf-8")
        assert not any(character < " " and character not in "\n\t" for character in row["text"])


def test_another_process_makes_the_same_rows(without_tests: tuple[Rows, dict[str, Rows]], tmp_path: Path) -> None:
    program = (
        "import hashlib, json, sys; from surrogate._data.python_library import recipe; "
        "print(hashlib.sha256(json.dumps(recipe.build(without=sys.argv[1:])).encode()).hexdigest())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, *LEFT_OUT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == digest(without_tests)


def test_seed_changes_texts_and_topics(target: Rows) -> None:
    pool, targets = recipe.build(num_texts=500, seed=1)
    assert len(pool) == 500
    assert {row["origin"] for row in targets["documentation"]} != {row["origin"] for row in target}


def test_target_holds_topics_that_the_pool_does_not(pool: Rows, target: Rows) -> None:
    assert 150 <= len(target) <= 250
    assert all(row["source"] == "topics" and row["kind"] == "documentation" and not row["corruption"] for row in target)
    target_topics = {row["origin"].split(":")[1] for row in target}
    pool_topics = {row["origin"].split(":")[1] for row in pool if row["source"] == "topics"}
    assert len(target_topics) > 10 and len(pool_topics) > 10
    assert not target_topics & pool_topics


def test_pool_and_target_share_no_run_of_thirteen_words(pool: Rows, target: Rows) -> None:
    held_out = set().union(*(windows(row["text"]) for row in target))
    assert len(held_out) > 5000
    assert not [row["origin"] for row in pool if windows(row["text"]) & held_out]


def test_originals_of_corrupted_texts_are_not_in_the_pool(pool: Rows) -> None:
    clean, _ = recipe.build(corrupted_share=0.0)
    originals = {row["origin"]: row["text"] for row in clean}
    corrupted = [row for row in pool if row["corruption"]]
    counts = Counter(row["corruption"] for row in corrupted)
    assert set(counts) == {"shuffled", "character_noise", "repetition"} and max(counts.values()) - min(counts.values()) <= 1
    assert 0.14 < len(corrupted) / len(pool) < 0.16
    texts = {row["text"] for row in pool}
    runs = set().union(*(windows(row["text"]) for row in pool if not row["corruption"]))
    for row in corrupted:
        original = originals[row["origin"]]
        assert row["text"] != original and original not in texts
        assert len(windows(original) & runs) <= 0.75 * len(windows(original)), row["origin"]


def test_corruptions_do_what_they_are_called(pool: Rows) -> None:
    clean, _ = recipe.build(corrupted_share=0.0)
    originals = {row["origin"]: row["text"] for row in clean}
    shared = []
    for row in pool:
        text, original = row["text"], originals[row["origin"]]
        if row["corruption"] == "shuffled":
            assert sorted(text.split()) == sorted(original.split())
            shared.append(len(windows(text) & windows(original)) / max(1, len(windows(original))))
        elif row["corruption"] == "repetition":
            lines = text.split("\n") if "\n" in text else [text[: len(text) // 3]]
            assert len(set(lines)) == 1 and lines[0] in original.replace("\n", " ") + original
        elif row["corruption"] == "character_noise":
            kept = sum((Counter(text) & Counter(original)).values()) / len(original)
            assert 0.7 < kept < 1.0
        else:
            assert text == original
    assert sum(shared) / len(shared) < 0.02


def test_without_tests_and_idle_there_are_still_enough_texts(without_tests: tuple[Rows, dict[str, Rows]]) -> None:
    pool, targets = without_tests
    assert len(pool) >= 5000 and len(targets["documentation"]) >= 150
    assert not {"test", "news"} & {row["kind"] for row in pool}
    assert not set(LEFT_OUT) & {row["source"] for row in pool}
    assert 0.06 < sum(row["kind"] == "documentation" for row in pool) / len(pool) < 0.12


def sentence(name: str, number: int) -> str:
    return " ".join(f"{name}{number}word{place}" for place in range(30)) + "."


def small_library(folder: Path) -> Path:
    """Ten topics of two long paragraphs, and a module whose docstrings quote one paragraph of each topic."""
    topics = {f"topic{number}": "\n\n".join(sentence("abcdefghij"[number], part) for part in range(2)) for number in range(10)}
    (folder / "pydoc_data").mkdir(parents=True)
    (folder / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n")
    quotes = [f'def quote{number}():\n    """Says: {text.split(chr(10))[0]}"""\n' for number, text in enumerate(topics.values())]
    (folder / "quotes.py").write_text("\n".join(quotes))
    return folder


def test_docstrings_that_quote_the_target_are_dropped(tmp_path: Path) -> None:
    pool, targets = recipe.build(200, library_folder=small_library(tmp_path), corrupted_share=0.0)
    held_out = [row["text"][:200] for row in targets["documentation"]]
    assert held_out and not [row for row in pool if any(text in row["text"] for text in held_out)]
    assert not any(windows(row["text"]) & set().union(*map(windows, held_out)) for row in pool)


def test_near_copies_enter_once(tmp_path: Path) -> None:
    folder = small_library(tmp_path)
    body = "".join(f"    value{line} = first{line} + second{line} * third{line}\n" for line in range(12))
    (folder / "one.py").write_text(f"def compute(first):\n{body}")
    (folder / "two.py").write_text(f"def compute(other):\n{body}    return 1\n")
    pool, _ = recipe.build(200, library_folder=folder, corrupted_share=0.0)
    assert sum(row["kind"] == "code" for row in pool) == 1


def test_modules_are_read_but_never_run(tmp_path: Path) -> None:
    folder = small_library(tmp_path / "library")
    trace = tmp_path / "ran"
    body = "".join(f"    value{line} = first{line} + second{line} * third{line}\n" for line in range(12))
    hostile = f"open({str(trace)!r}, 'w')\ndef compute(first):\n    '''Short.'''\n{body}raise SystemExit\n"
    (folder / "hostile.py").write_text(hostile)
    (folder / "broken.py").write_text(f"def compute(first:\n{body}")
    (folder / "other_encoding.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\n")
    pool, _ = recipe.build(200, library_folder=folder, corrupted_share=0.0)
    code = [row for row in pool if row["kind"] == "code"]
    assert [row["source"] for row in code] == ["hostile"] and "Short." not in code[0]["text"]
    assert not trace.exists() and "hostile" not in sys.modules
