"""`surrogate score --source`, `select --corpus` and `cascade`: from what is typed to what is printed.

Exit codes beside those of the command line: 3 where everything else is finished, but rows or files were put aside.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oracle import plugins
from oracle.artifacts import read_json
from oracle.errors import InputError, MismatchError
from oracle.labels import Labels
from surrogate.budget import Budget
from surrogate.fidelity import Fidelity
from surrogate.option_strings import parse_options, parse_plugin
from surrogate.pipeline import Run
from surrogate.predictor import InfluencePredictor
from surrogate.scoring.cascade import CASCADE_FILE, score_cascade
from surrogate.scoring.cascade_recall import measure_recall, recall_table
from surrogate.scoring.corpus import score_corpus
from surrogate.scoring.near_duplicates import ENCODERS, NearDuplicates
from surrogate.scoring.scored_corpus import ScoredCorpus
from surrogate.scoring.scorer import PREDICTOR_FILE, read_identity
from surrogate.scoring.selecting import select_corpus
from surrogate.stages import plugin_options

PUT_ASIDE = 3  # exit code
SHOWN_FILES = 20
SHARES = (0.1, 0.2, 0.3, 0.5)


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


def select_corpus_stage(
    corpus: Path,
    output: Path | None,
    budget: Mapping[str, float | int | None],
    *,
    rule: str = "top",
    options: Sequence[str] = (),
    min_score: float | None = None,
    tokens_column: str | None = None,
    labels: Path | None = None,
    predictor: Path | None = None,
    allow_low_fidelity: bool = False,
    max_similarity: float | None = None,
    similarity_encoder: str | None = None,
    texts: bool = False,
    allow_incomplete: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Select from a scored corpus.

    Args:
        corpus: The folder that `surrogate score --source` wrote.
        output: Folder for the selection; by default beside the corpus, with its name and `-selection`.
        budget: At most one of tokens, texts and fraction; none is needed with `min_score`.
        rule: top, top_share, softmax or random.
        options: option=value of the rule.
        min_score: Only texts whose combined number is at least this.
        tokens_column: Column of the scores with token counts.
        labels: Folder of labels; a labelled text is ranked by its label.
        predictor: Folder of the predictor that made the scores, for its fidelity; it is looked for beside the scores.
        allow_low_fidelity: Select by scores at chance all the same.
        max_similarity: Drop texts of this cosine or more to a better one.
        similarity_encoder: NAME or NAME:option=value,... of the encoder for that; `sentence` by default.
        texts: Also write the chosen rows of the inputs.
        allow_incomplete: Select from what is scored so far.
        seed: Seed of rules with chance.

    Raises:
        InputError: What `select_corpus` raises, or an option without effect.
    """
    scored = ScoredCorpus(corpus)
    given = {name: value for name, value in budget.items() if value is not None}
    selection = select_corpus(
        scored,
        output or corpus.with_name(f"{corpus.name}-selection"),
        budget=Budget(**given) if given or min_score is None else None,  # type: ignore[arg-type]
        rule=rule,
        min_score=min_score,
        tokens_column=tokens_column,
        labels=None if labels is None else Labels.load(labels),
        fidelity=find_fidelity(scored, predictor),
        allow_low_fidelity=allow_low_fidelity,
        near_duplicates=_near_duplicates(max_similarity, similarity_encoder),
        texts=texts,
        allow_incomplete=allow_incomplete,
        seed=seed,
        **plugin_options("surrogate.rules", rule, options),
    )
    return {
        "corpus": str(corpus),
        "selection": str(selection.folder),
        "num_texts": len(selection),
        "num_tokens": selection.num_tokens,
        "counts": selection.counts,
        "targets_at_chance": selection.meta["targets_at_chance"],
    }


def find_fidelity(scored: ScoredCorpus, predictor: Path | None) -> Fidelity | None:
    """Return the fidelity of the predictor that made the scores; None where it is not named and not found.

    Raises:
        MismatchError: The predictor that is named did not make the scores.
    """
    wanted = scored.identity["predictor"]
    if predictor is not None:
        if read_identity(predictor).predictor != wanted:
            raise MismatchError(
                f"the scores of {scored.folder} are not of the predictor in {predictor}.",
                "the predictor that the corpus was scored with",
                "name that one, or leave it out.",
            )
        return _fidelity(predictor)
    for path in [scored.folder / "predictor", *sorted(scored.folder.parent.glob("predictors/*"))]:
        if (path / PREDICTOR_FILE).exists() and read_identity(path).predictor == wanted:
            return _fidelity(path)
    warnings.warn("the predictor of these scores was not found, so its fidelity is not checked; name it", stacklevel=2)
    return None


def _fidelity(folder: Path) -> Fidelity:
    return Fidelity.from_dict(read_json(folder / PREDICTOR_FILE)["fidelity"])


def _near_duplicates(max_similarity: float | None, encoder: str | None) -> NearDuplicates | None:
    if max_similarity is None:
        if encoder is not None:
            raise InputError(
                f"--similarity-encoder {encoder} has no effect alone.", "--max-similarity beside it", "say how alike is too much."
            )
        return None
    name, options = parse_plugin(encoder or "sentence")
    return NearDuplicates(max_similarity=max_similarity, encoder=plugins.create(ENCODERS, name, options))
