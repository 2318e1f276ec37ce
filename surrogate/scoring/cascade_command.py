"""`surrogate cascade`: what a cheap first pass would lose, and scoring with one, from the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oracle.errors import InputError
from oracle.labels import Labels
from surrogate.option_strings import parse_options
from surrogate.predictor import InfluencePredictor
from surrogate.scoring.cascade import CASCADE_FILE, score_cascade
from surrogate.scoring.cascade_recall import measure_recall, recall_table
from surrogate.scoring.command import summary

SHARES = (0.1, 0.2, 0.3, 0.5)


def cascade_stage(
    first: Path,
    full: Path,
    labels: Path,
    *,
    source: Sequence[str] = (),
    output: Path | None = None,
    share: float | None = None,
    top: float = 0.05,
    combine: str = "sum_z",
    min_recall: float | None = None,
    text_column: str = "text",
    columns: Sequence[str] = (),
    engine: str = "local",
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Show the recall of a first pass on stderr; with a source, score with it.

    Args:
        first: Folder of the cheap predictor.
        full: Folder of the full one.
        labels: Folder of the labels that both were fitted on.
        source: What is scored; without it the recall is only shown, for several shares.
        output: The output folder.
        share: Share of the texts that the full predictor gets to see; 0.2 where a source is scored.
        top: Share of the texts that will be selected at last.
        combine: How the first pass makes one number of several targets.
        min_recall: Refuse to score where the recall is lower.
        text_column: The column with the text.
        columns: Columns that are passed through.
        engine: local or ray.
        options: option=value of the engine.

    Raises:
        InputError: A source without an output folder, or what `score_cascade` raises.
    """
    cheap, dear, measured = InfluencePredictor.load(first), InfluencePredictor.load(full), Labels.load(labels)
    shares = [share] if share is not None else [0.2] if source else [value for value in SHARES if value >= top]
    rows = measure_recall(cheap, dear, measured, shares=shares, top=top, how=combine)
    sys.stderr.write(recall_table(rows) + "\n")
    told: dict[str, Any] = {"recall": [row.as_dict() for row in rows]}
    if not source:
        return told
    if output is None:
        raise InputError("no output folder.", "--output FOLDER", "say where the scores go.")
    scored = score_cascade(
        first,
        full,
        list(source),
        output,
        labels=measured,
        share=shares[0],
        top=top,
        how=combine,
        min_recall=min_recall,
        text_column=text_column,
        columns=list(columns),
        engine=engine,
        **parse_options(options),
    )
    return {**told, "cascade": str(output / CASCADE_FILE), **summary(scored.manifest, scored.folder)}
