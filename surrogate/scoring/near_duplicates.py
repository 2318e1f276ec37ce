"""Near-duplicates among the chosen texts: the better one of each pair stays.

Copies of a good text with small changes all have good scores, and a selection by score is full of them. The chosen
texts are looked at best first, and one whose embedding is as close as `max_similarity` to that of a text that stays is
dropped. Only the chosen texts are compared, and what is dropped is not made up for.

Paper: Abbas et al. 2023, SemDeDup (which clusters first and compares within clusters; here all pairs are compared).
Cost: the chosen rows are read and encoded again, then K * K / 2 products of D numbers; 100,000 texts of 384 numbers take
4e12 operations, minutes on a core, and ten times as many texts a hundred times that. Memory is 4 * K * D bytes.
Left out: an index that would find most pairs faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oracle import plugins
from oracle.errors import InputError
from oracle.progress import track
from surrogate.feature_cache import Encoder
from surrogate.scoring.blocks import Block
from surrogate.scoring.chosen import CHOSEN
from surrogate.scoring.disk_columns import Column
from surrogate.scoring.layout import ScoreOptions
from surrogate.scoring.rows import read_blocks

ENCODERS = "surrogate.features"
MAX_TEXTS = 1_000_000
BLOCK_TEXTS, KEPT_TEXTS = 1024, 16_384  # texts compared with each other, and with so many that stay, at once
WHOLE_FILES = {"columns": (), "only": ""}
ROUNDING = 1e-6  # what float32 may take from a cosine


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """How near-duplicates are told.

    Attributes:
        max_similarity: A text with this cosine or more to a better one is dropped; for MiniLM 0.95 is the same text in
            other words or with other numbers, 0.8 the same subject.
        encoder: Name of an encoder without a model, or an encoder object.

    Raises:
        InputError: The similarity is not in (0, 1], or there is no such encoder.
    """

    max_similarity: float = 0.95
    encoder: str | Encoder = "sentence"

    def __post_init__(self) -> None:
        value = self.max_similarity
        if not (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1):
            raise InputError(f"max_similarity={value!r}.", "a cosine above 0 and at most 1", "pass 0.95, say.")
        if isinstance(self.encoder, str):
            object.__setattr__(self, "encoder", plugins.create(ENCODERS, self.encoder, {}))

    def identity(self) -> dict[str, Any]:
        """Return what decides which texts stay."""
        encoder: Any = self.encoder
        return {"max_similarity": self.max_similarity, "encoder": encoder.key(), "weights": encoder.fingerprint()}

    def keep_distinct(self, ordered: Column, scored: Any, scratch: Path) -> Column:
        """Return the records of the texts that stay.

        Args:
            ordered: Records of the chosen texts, best first.
            scored: Their corpus.
            scratch: Where the column is kept.

        Raises:
            InputError: Too many texts were chosen.
            MismatchError: An input file has changed.
        """
        if ordered.num_rows > MAX_TEXTS:
            raise InputError(
                f"{ordered.num_rows} chosen texts to compare with each other.",
                f"at most {MAX_TEXTS}",
                "choose fewer, or remove near-duplicates from the corpus before it is scored.",
            )
        records = ordered.read()
        kept = Column(scratch / "distinct", CHOSEN)
        if len(records):
            kept.append(records[distinct_rows(self._embed(records, scored), self.max_similarity)])
        kept.close()
        return kept

    def _embed(self, records: np.ndarray, scored: Any) -> np.ndarray:
        """Return (K, D) embeddings of unit length, in the order of the records."""
        encoder: Any = self.encoder
        options = ScoreOptions(**{**scored.identity["options"], **WHOLE_FILES})
        by_place = np.lexsort((records["position"], records["file"]))
        vectors: np.ndarray | None = None
        num_found = 0
        with track("embedding chosen texts", len(records)) as tracker:
            for number in np.unique(records["file"]).tolist():
                rows = by_place[records["file"][by_place] == number]
                wanted = records["position"][rows]
                for block in read_blocks(scored.input_of(scored.files[number]), options):
                    if not isinstance(block, Block):
                        continue
                    block = block.only(wanted)
                    if not len(block.positions):
                        continue
                    here, found = np.searchsorted(wanted, block.positions), encoder.encode(block.texts)
                    if vectors is None:
                        vectors = np.zeros((len(records), found.shape[1]), dtype=np.float32)
                    vectors[rows[here]] = found[block.text_of_row]
                    num_found += len(here)
                    tracker.advance(len(here))
        if vectors is None or num_found < len(records):
            raise InputError(
                f"only {num_found} of {len(records)} chosen rows were found in the input files.",
                "the input files as they were scored",
                "score the corpus again.",
            )
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.divide(vectors, lengths, out=vectors, where=lengths > 0)


def distinct_rows(vectors: np.ndarray, max_similarity: float) -> np.ndarray:
    """Go through vectors in order and drop each that is too close to one that stays.

    Args:
        vectors: (K, D) float32, of unit length.
        max_similarity: The cosine from which two are too close.

    Returns:
        (K,) bool, True where it stays.
    """
    stays = np.ones(len(vectors), dtype=bool)
    kept, num_kept = np.empty_like(vectors), 0
    limit = max_similarity - ROUNDING
    with track("comparing chosen texts", len(vectors)) as tracker:
        for start in range(0, len(vectors), BLOCK_TEXTS):
            block = vectors[start : start + BLOCK_TEXTS]  # (B, D)
            own = stays[start : start + BLOCK_TEXTS]
            for first in range(0, num_kept, KEPT_TEXTS):
                own &= ~(block @ kept[first : min(first + KEPT_TEXTS, num_kept)].T >= limit).any(axis=1)
            close = block @ block.T >= limit  # (B, B)
            for row in np.flatnonzero(own):
                if own[row]:
                    own[row + 1 :] &= ~close[row, row + 1 :]
            chosen = block[own]
            kept[num_kept : num_kept + len(chosen)] = chosen
            num_kept += len(chosen)
            tracker.advance(len(block))
    return stays
