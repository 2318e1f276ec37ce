"""`surrogate score --source`: a corpus scored from the command line, and what is printed of it.

Exit codes beside those of the command line: 3 where everything else is finished, but rows or files were put aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oracle.errors import InputError
from surrogate.option_strings import parse_options
from surrogate.pipeline import Run
from surrogate.scoring.corpus import score_corpus

PUT_ASIDE = 3  # exit code
SHOWN_FILES = 20


def score_corpus_stage(
    source: Sequence[str],
    *,
    predictor: Path | None = None,
    run: Path | None = None,
    surrogate: str | None = None,
    output: Path | None = None,
    engine: str = "local",
    text_column: str = "text",
    format: str = "auto",
    columns: Sequence[str] = (),
    rank: int = 0,
    world_size: int = 1,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Score a corpus.

    Args:
        source: Files, globs, folders, URLs or a hub name.
        predictor: A predictor's folder; or none, with `run`.
        run: A run folder, whose predictor is taken.
        surrogate: Which of the run's predictors; without it the one with the highest fidelity.
        output: The output folder; with `run` by default its folder `corpus`.
        engine: local or ray.
        text_column: The column with the text.
        format: Format of the texts.
        columns: Columns that are passed through.
        rank: The number of this machine of an array.
        world_size: How many there are.
        options: `option=value` of the engine, such as workers=8.

    Returns:
        A summary; its `exit_code` is 0, or 3 where rows or files were put aside.

    Raises:
        InputError: Neither or both of predictor and run, or what `score_corpus` raises.
    """
    if (predictor is None) == (run is None):
        raise InputError(
            f"--predictor {predictor} and the run folder {run}.",
            "either a predictor's folder or a run folder with a fitted predictor",
            "give one of the two.",
        )
    if surrogate is not None and run is None:
        raise InputError(
            f"--surrogate {surrogate} has no effect with --predictor.", "a run folder beside it", "leave out one of the two."
        )
    if output is None:
        if run is None:
            raise InputError("no output folder.", "--output FOLDER", "say where the scores go.")
        output = run / "corpus"
    folder = predictor or _fitted(run, surrogate)
    scored = score_corpus(
        folder,
        list(source),
        output,
        engine=engine,
        text_column=text_column,
        format=format,
        columns=list(columns),
        rank=rank,
        world_size=world_size,
        **parse_options(options),
    )
    return summary(scored.manifest, output)


def _fitted(run: Path | None, surrogate: str | None) -> Path:
    assert run is not None
    return run / "predictors" / Run(run).predictor(surrogate).surrogate_name


def summary(manifest: dict[str, Any], output: Path) -> dict[str, Any]:
    """Return what is printed of a manifest."""
    faulty = [entry for entry in manifest["files"] if entry["status"] != "done"]
    put_aside = bool(faulty or manifest["num_bad"] or manifest["not_listed"])
    last = manifest["runs"][-1]
    return {
        "output": str(output),
        "complete": manifest["complete"],
        "num_files": manifest["num_files"],
        "files_by_status": manifest["files_by_status"],
        "num_rows": manifest["num_rows"],
        "num_scored": manifest["num_scored"],
        "num_bad": manifest["num_bad"],
        "bad_reasons": manifest["bad_reasons"],
        "faulty_files": {entry["name"]: entry["errors"][:1] for entry in faulty[:SHOWN_FILES]},
        "not_listed": dict(list(manifest["not_listed"].items())[:SHOWN_FILES]),
        "num_missing": len(manifest["missing"]),
        "seconds": last["seconds"],
        "rows_per_second": round(last["num_rows"] / last["seconds"], 1) if last["seconds"] else 0.0,
        "exit_code": PUT_ASIDE if put_aside else 0,
    }
