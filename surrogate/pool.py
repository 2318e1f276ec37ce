"""The pool that a selection works on: distinct texts sorted by text_id, each with its scores or its label.

Sorting first is what makes a selection independent of the order in which texts were scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from oracle.errors import InputError, MismatchError, NotFiniteError
from surrogate.scores import Scores, check_num_tokens, check_target_names

SHOWN_IDS = 5  # text_ids named in an error
DUPLICATE_TOLERANCE = 1e-3  # in standard deviations: what rounding may make of the same text's scores
ROUNDING = 1e-6  # relative, about eight float32 steps


class LabelsLike(Protocol):
    """What is needed of labels; `oracle.Labels` has it."""

    @property
    def values(self) -> np.ndarray:
        """(S, C)."""

    @property
    def text_ids(self) -> list[str]:
        """S ids."""

    @property
    def target_names(self) -> list[str]:
        """C names."""


@dataclass(frozen=True)
class Pool:
    """Distinct texts sorted by text_id.

    Attributes:
        text_ids: N text_ids.
        values: (N, C) float32, scores or labels.
        target_names: C names.
        num_tokens: (N,) int64, or None where they are not known.
        is_label: (N,) bool, whether the row of `values` is a label.
    """

    text_ids: list[str]
    values: np.ndarray
    target_names: list[str]
    num_tokens: np.ndarray | None
    is_label: np.ndarray

    def take(self, rows: np.ndarray) -> Pool:
        """Return these rows."""
        return Pool(
            [self.text_ids[row] for row in rows],
            self.values[rows],
            self.target_names,
            None if self.num_tokens is None else self.num_tokens[rows],
            self.is_label[rows],
        )

    def fingerprint(self) -> str:
        """Return 16 hex digits of the text_ids and the values they are ranked by."""
        digest = hashlib.sha256("\n".join([*self.target_names, *self.text_ids]).encode())
        digest.update(self.values.astype("<f4").tobytes())
        return digest.hexdigest()[:16]

    def with_labels(self, labels: LabelsLike) -> tuple[Pool, int]:
        """Put labels in the place of scores.

        Args:
            labels: For the same targets, in any order.

        Returns:
            The new pool, and how many labels are of texts that it does not hold.

        Raises:
            MismatchError: Labels of other targets, or of other texts only.
            NotFiniteError: A label is NaN or infinite.
        """
        if sorted(labels.target_names) != sorted(self.target_names):
            raise MismatchError(
                f"labels for {', '.join(labels.target_names)}, scores for {', '.join(self.target_names)}.",
                "labels and scores of the same targets",
                "pass the labels that the predictor was fitted on.",
            )
        columns = [list(labels.target_names).index(name) for name in self.target_names]
        measured = np.asarray(labels.values, dtype=np.float32)[:, columns]  # (S, C)
        _check_finite(measured, labels.text_ids, "labels")
        if len(set(labels.text_ids)) < len(labels.text_ids):
            raise InputError("labels with some text twice.", "one label per text", "keep one label per text.")
        row_of = {text_id: row for row, text_id in enumerate(self.text_ids)}
        pairs = [(row_of[text_id], row) for row, text_id in enumerate(labels.text_ids) if text_id in row_of]
        if not pairs:
            raise MismatchError(
                f"labels of other text_ids: none of {len(labels.text_ids)} is in the pool of {len(self.text_ids)} texts.",
                "labels of texts of this pool",
                "check that labels and scores were made from the same texts.",
            )
        pool_rows, label_rows = np.array(pairs, dtype=np.int64).T
        values, is_label = self.values.copy(), self.is_label.copy()
        values[pool_rows] = measured[label_rows]
        is_label[pool_rows] = True
        return replace(self, values=values, is_label=is_label), len(labels.text_ids) - len(pairs)


def read_pool(
    scores: np.ndarray,
    *,
    text_ids: Sequence[str] | None,
    num_tokens: Sequence[int] | np.ndarray | None,
    target_names: Sequence[str] | None,
) -> tuple[Pool, int]:
    """Sort scores by text_id and drop repeats.

    Args:
        scores: (N, C); `Scores` carry the other three.
        text_ids: N text_ids, for a plain array.
        num_tokens: N token counts, or None where they are not known.
        target_names: C names, for a plain array.

    Returns:
        The pool, and how many rows repeated a text.

    Raises:
        InputError: Names are missing or do not fit, or one text has different scores.
        MismatchError: Names are given twice and differ.
        NotFiniteError: A score is NaN or infinite.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    carrier = scores if isinstance(scores, Scores) else None
    ids = _named("text_ids", text_ids, carrier.text_ids if carrier is not None else None)
    names = check_target_names(_named("target_names", target_names, carrier.target_names if carrier is not None else None))
    tokens = carrier.num_tokens if carrier is not None else None
    if num_tokens is not None:
        given = check_num_tokens(num_tokens, num_texts=len(ids))
        _named("num_tokens", given.tolist(), None if tokens is None else tokens.tolist())
        tokens = given
    values = np.asarray(scores, dtype=np.float32)
    if values.shape != (len(ids), len(names)):
        raise InputError(
            f"scores of shape {values.shape} with {len(ids)} text_ids and {len(names)} target_names.",
            "an array (N, C) with N text_ids and C target_names",
            "make the three fit each other.",
        )
    _check_finite(values, ids, "scores")
    order = pc.sort_indices(pa.array(ids, pa.string())).to_numpy()
    rows = Pool(ids, values, names, tokens, np.zeros(len(ids), dtype=bool)).take(order)
    is_first = np.array([row == 0 or rows.text_ids[row] != rows.text_ids[row - 1] for row in range(len(ids))], dtype=bool)
    pool = rows.take(np.flatnonzero(is_first))
    if not is_first.all():
        _check_repeats(rows, pool, is_first)
    return pool, int((~is_first).sum())


def _named(name: str, given: Sequence[Any] | None, carried: Sequence[Any] | None) -> list[Any]:
    if given is None and carried is None:
        raise InputError(f"a plain array of scores without {name}.", f"Scores, or an array and {name}", f"pass {name}=...")
    if given is not None and carried is not None and list(given) != list(carried):
        raise MismatchError(f"{name} given to select differ from those of the scores.", "either of the two", f"leave out {name}.")
    return list(given if given is not None else carried or [])


def _check_finite(values: np.ndarray, text_ids: Sequence[str], what: str) -> None:
    broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(broken):
        shown = ", ".join(text_ids[row] for row in broken[:SHOWN_IDS])
        raise NotFiniteError(
            f"{what} of {len(broken)} texts are NaN or infinite, first {shown}.",
            f"finite {what}",
            "leave these texts out, or find out why they have no number.",
        )


def _check_repeats(rows: Pool, pool: Pool, is_first: np.ndarray) -> None:
    """Refuse different scores for one text: which of them counts would depend on the order of the rows."""
    owner = np.cumsum(is_first) - 1  # (rows,) the same text's row in the pool
    spread = rows.values.astype(np.float64).std(axis=0)  # (C,)
    distance = np.abs(rows.values - pool.values[owner])
    differs = (distance > DUPLICATE_TOLERANCE * spread + ROUNDING * np.abs(rows.values)).any(axis=1)
    if rows.num_tokens is not None and pool.num_tokens is not None:
        differs |= rows.num_tokens != pool.num_tokens[owner]
    if differs.any():
        text_id = rows.text_ids[int(np.flatnonzero(differs)[0])]
        raise InputError(
            f"text {text_id} occurs more than once with different scores or token counts.",
            "one score per text",
            "score the pool with one predictor and one tokenizer.",
        )
