"""Bundled corpora by name: found wherever the package is installed, checked options, plain datasets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oracle.errors import InputError, InputTypeError, MissingFileError
from surrogate import corpora


def test_names_are_the_folders_with_a_recipe() -> None:
    assert corpora.names() == ["python_library", "skills"]


def test_load_gives_pool_targets_and_card() -> None:
    corpus = corpora.load("skills", num_texts=100, seed=3, num_target_texts=5)
    assert corpus.pool.num_rows == 100
    assert {"text", "source", "kind", "usefulness_addition"} <= set(corpus.pool.column_names)
    assert {name: rows.num_rows for name, rows in corpus.targets.items()} == dict.fromkeys(
        ("addition", "capitals", "comparison", "reversal", "sequence"), 5
    )
    assert corpus.card.startswith("# skills")


def tiny_library(folder: Path) -> Path:
    """Ten topics of one passage and ten functions, in place of the standard library."""
    topics = {f"topic{number}": f"Words{number} about the topic{number} that say{number} much. " * 20 for number in range(10)}
    (folder / "pydoc_data").mkdir()
    (folder / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n")
    body = "".join(f"    value{line} = first{line} + second{line} * third{line}\n" for line in range(8))
    functions = [f"def compute{number}():\n" + body.replace("value", f"value{number}") for number in range(10)]
    (folder / "compute.py").write_text(
        "\n".join(
            function.replace("first", f"first{number}").replace("third", f"third{number}")
            for number, function in enumerate(functions)
        )
    )
    return folder


def test_card_of_every_corpus_names_every_column(tmp_path: Path) -> None:
    options: dict[str, dict[str, Any]] = {"skills": {}, "python_library": {"library_folder": tiny_library(tmp_path)}}
    for name in corpora.names():
        corpus = corpora.load(name, num_texts=5, **options[name])
        assert corpus.card.startswith(f"# {name}\n")
        for column in corpus.pool.column_names:
            assert f"`{column}`" in corpus.card or (column.startswith("usefulness_") and "`usefulness_<skill>`" in corpus.card)


def test_unknown_names_and_options_are_refused_with_a_suggestion() -> None:
    with pytest.raises(InputError, match="did you mean 'skills'"):
        corpora.load("skils")
    with pytest.raises(InputError, match="did you mean 'num_texts'"):
        corpora.load("skills", num_text=10)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_texts": 0}, InputError),
        ({"num_texts": 2.5}, InputTypeError),
        ({"num_texts": True}, InputTypeError),
        ({"seed": "0"}, InputTypeError),
        ({"corrupted_share": -0.1}, InputError),
        ({"corrupted_share": float("nan")}, InputError),
    ],
)
def test_bad_values_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        corpora.load("python_library", **options)


def test_more_texts_than_there_are_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num_texts=6000 is more"):
        corpora.load("python_library", library_folder=tiny_library(tmp_path))


def test_a_library_without_documentation_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"topics\.py"):
        corpora.load("python_library", library_folder=tmp_path)


def test_recipes_are_importable_and_data_is_not(tmp_path: Path) -> None:
    program = (
        "import importlib.util, sys, surrogate.corpora; "
        "assert 'datasets' not in sys.modules; "
        "assert importlib.util.find_spec('data') is None; "
        "from surrogate._data.python_library import recipe; print(surrogate.corpora.names())"
    )
    answer = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "['python_library', 'skills']"
