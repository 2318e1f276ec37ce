"""A small predictor and small corpora, shared by the tests of scoring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import oracle
import surrogate
from oracle.labels import Labels
from surrogate.features.hashed_ngrams import HashedNgrams

WORDS = ["sum", "integral", "proof", "theorem", "lemma", "salt", "butter", "onion", "oven", "recipe", "über", "naïve"]


def texts_of(num_texts: int, *, seed: int = 0) -> list[str]:
    """Different short texts."""
    rng = np.random.default_rng(seed)
    return [f"text {seed} {number} " + " ".join(rng.choice(WORDS, 12)) for number in range(num_texts)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.fixture(scope="session")
def make_texts() -> Any:
    return texts_of


@pytest.fixture(scope="session")
def make_jsonl() -> Any:
    return write_jsonl


@pytest.fixture(scope="session")
def make_parquet() -> Any:
    return write_parquet


def _fitted(kind: Any) -> surrogate.InfluencePredictor:
    texts = oracle.read_texts(texts_of(40, seed=7))
    values = np.array([[text.count("sum") - text.count("salt"), len(text)] for text in texts["text"]], dtype=float)
    labels = Labels.from_values(values, texts["text_id"], ["math", "cooking"])
    return surrogate.InfluencePredictor(HashedNgrams(dim=32), kind, num_folds=2).fit(texts, labels)


@pytest.fixture(scope="session")
def predictor() -> surrogate.InfluencePredictor:
    return _fitted("ridge")


@pytest.fixture(scope="session")
def predictor_folder(predictor: Any, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("predictors") / "ridge"
    predictor.save(folder)
    return folder


@pytest.fixture(scope="session")
def network_folder(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("predictors") / "network"
    _fitted(surrogate.InfluenceNetwork(hidden="4", max_epochs=2, ensemble=2)).save(folder)
    return folder
