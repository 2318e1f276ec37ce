"""Scoring inside other people's pipelines: a batch of rows at a time, or a stream of texts.

`ScoreBatch` is a function for `datasets.Dataset.map(batched=True)` and a class for Ray Data's `map_batches`; it is
pickled by the path of the predictor, which is loaded once per process. `stream_scores` takes any iterable.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oracle.errors import InputTypeError
from oracle.texts import TextsRejectedWarning
from surrogate.scores import Scores
from surrogate.scoring.blocks import Block
from surrogate.scoring.items import BLOCK_ROWS
from surrogate.scoring.layout import Layout, RawRows, RowReader, ScoreOptions, walk
from surrogate.scoring.score_files import TEXT_ID, value_columns
from surrogate.scoring.scorer import PredictorLike, Scorer, load_scorer, one_thread, read_identity

ERROR_COLUMN = "score_error"


class ScoreBatch:
    """Adds scores to a batch of rows: text_id, score:<target>, spread:<target> and score_error.

    A row that cannot be scored keeps its place, with NaN, an empty text_id, and the reason in score_error, which is empty for
    the others: every batch has columns of the same types. Encoders that are
    transformers round by what stands beside a text, so scores agree with `score_corpus` to rounding.

    Args:
        predictor: The predictor's folder.
        text_column: The column with the text; `a.b` is the field b of the column a.
        format: text, completion, chat, tokens, or auto, as `oracle.read_texts` takes them.
        max_chars: A longer text is scored by its first so many characters.

    Raises:
        MissingFileError: There is no predictor in the folder.

    Example:
        >>> dataset.map(ScoreBatch("runs/demo/predictors/trees"), batched=True)                          # doctest: +SKIP
        >>> ray.data.read_parquet("pool").map_batches(                                                   # doctest: +SKIP
        ...     ScoreBatch,
        ...     fn_constructor_args=("runs/demo/predictors/trees",),
        ...     batch_size=2048,
        ...     compute=ray.data.ActorPoolStrategy(size=4),
        ... )
    """

    def __init__(
        self,
        predictor: str | Path,
        *,
        text_column: str = "text",
        format: str = "auto",
        max_chars: int = ScoreOptions.max_chars,
    ) -> None:
        if not isinstance(predictor, (str, Path)):
            raise InputTypeError(
                f"predictor is a {type(predictor).__name__}.",
                "the folder of a saved predictor, which other processes can load",
                "save it first: predictor.save(folder).",
            )
        self.predictor = str(predictor)
        self.options = ScoreOptions(text_column, format, (), max_chars)
        self.identity = read_identity(predictor)  # `datasets` tells by it whether its cached result still holds

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Return the columns of a batch (lists or arrays of B values) and those that are added."""
        columns = {name: _as_list(values) for name, values in batch.items()}
        num_rows = len(next(iter(columns.values()), []))
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        identity = self.identity
        names = value_columns(identity.target_names, has_spread=identity.has_spread)
        values = np.full((num_rows, len(names)), np.nan, dtype=np.float32)
        text_ids, errors = [""] * num_rows, [""] * num_rows
        if rows:
            with one_thread():
                block, found, reasons = score_rows(load_scorer(self.predictor), rows, self.options)
            values[block.positions] = found
            for position, text_id, reason in zip(block.positions, block.text_ids, reasons, strict=True):
                text_ids[position], errors[position] = ("" if reason else text_id), reason
            for bad in block.bad_rows:
                errors[bad.position] = bad.reason
        added = {name: values[:, column] for column, name in enumerate(names)}
        return {**batch, TEXT_ID: text_ids, **added, ERROR_COLUMN: errors}


def stream_scores(
    predictor: PredictorLike,
    texts: Iterable[str | Mapping[str, Any]],
    *,
    text_column: str = "text",
    format: str = "auto",
    batch_rows: int = BLOCK_ROWS,
) -> Iterator[Scores]:
    """Score a stream of texts without holding more than a block of it.

    Args:
        predictor: A fitted predictor or the folder of one.
        texts: Strings or dicts, as `oracle.read_texts` takes them; a generator or a streamed dataset may be endless.
        text_column: The column with the text.
        format: text, completion, chat, tokens, or auto.
        batch_rows: Texts that are scored together.

    Yields:
        Scores (B, C) of each block, in the order of the stream. Repeated texts are scored as often as they come; texts
        that cannot be scored are left out, and a warning at the end counts them.
    """
    scorer = load_scorer(predictor)
    options = ScoreOptions(text_column, format)
    rejected: Counter[str] = Counter()
    iterator = iter(texts)
    num_read = 0
    while rows := [
        dict(item) if isinstance(item, Mapping) else {text_column: item} for item in itertools.islice(iterator, batch_rows)
    ]:
        num_read += len(rows)
        with one_thread():
            block, values, reasons = score_rows(scorer, rows, options)
        rejected.update(row.reason for row in block.bad_rows)
        rejected.update(reason for reason in reasons if reason)
        good = [row for row, reason in enumerate(reasons) if not reason]
        names = list(scorer.identity.target_names)
        if good:
            kept = values[good][:, : len(names)]
            yield Scores(kept, text_ids=[block.text_ids[row] for row in good], target_names=names)
    if rejected:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in rejected.most_common())
        warnings.warn(f"dropped {rejected.total():,} of {num_read:,} texts: {counts}", TextsRejectedWarning, stacklevel=2)


def score_rows(scorer: Scorer, rows: Sequence[Mapping[str, Any]], options: ScoreOptions) -> tuple[Block, np.ndarray, list[str]]:
    """Score rows in memory.

    Returns:
        The block, whose positions are those of the n rows that have a text; their values (n, C or 2C); and for each why
        it has no score, or nothing.
    """
    layout = Layout(RowReader(rows), options, "the batch")
    columns = {path: [walk(row, path) for row in rows] for path in layout.read_columns}
    block = layout.block(RawRows(len(rows), list(range(len(rows))), columns))
    values, reasons = scorer.score(block.texts, scorer.prepare(block.texts))
    return block, values[block.text_of_row], [reasons[text] for text in block.text_of_row]


def _as_list(values: Any) -> list[Any]:
    return [_plain(value) for value in (values.tolist() if isinstance(values, np.ndarray) else values)]


def _plain(value: Any) -> Any:
    """Return a value without numpy in it; Ray hands out lists as arrays."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    return value
