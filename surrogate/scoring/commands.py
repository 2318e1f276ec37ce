"""`surrogate score --source`, `select --corpus` and `cascade`: from what is typed to what is printed.

The arguments are the options of the commands, which `surrogate score --help` and so on explain. Exit codes beside those of
the command line: 3 where everything else is finished, but rows or files were put aside.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from surrogate.scoring.cascade import CASCADE_FILE, FIRST, full_corpus, score_cascade
from surrogate.scoring.cascade_recall import measure_recall, recall_table
from surrogate.scoring.corpus import score_corpus
from surrogate.scoring.manifest import read_manifest
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
    try:
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
    except KeyboardInterrupt:
        _tell_stopped(output)
        raise
    told = summary(scored.manifest, output)
    sys.stderr.write(_in_words(told))
    return told


def _fitted(run: Path | None, surrogate: str | None) -> Path:
    assert run is not None
    folder = run / "predictors" / Run(run).predictor(surrogate).surrogate_name
    sys.stderr.write(f"scoring with the predictor {folder}\n")
    return folder


def _tell_stopped(output: Path) -> None:
    """Say how far a run had come that was stopped from the keyboard."""
    with suppress(InputError):
        manifest = read_manifest(output)
        finished = len(manifest["files"])
        sys.stderr.write(f"{finished} of {manifest['num_files']} files are finished in {output}\n")


def _in_words(told: Mapping[str, Any]) -> str:
    """Return what a summary says, for people."""
    output, faulty = told["output"], told["num_files"] - told["files_by_status"].get("done", 0) - told["num_missing"]
    words = f"{told['num_scored']:,} of {told['num_rows']:,} rows in {told['num_files']} files have scores in {output}"
    if told["rows_per_second"]:
        words += f"; {told['seconds']:.1f} s, {told['rows_per_second']:,.0f} rows/s"
    else:
        words += "; there was nothing left to do"
    if told["exit_code"]:
        words += f"\nput aside: {told['num_bad']:,} rows and {faulty} files; see {output}/quarantine and {output}/manifest.json"
    if told["num_not_in_source"]:
        words += f"\nnote: {told['num_not_in_source']} files that were scored before are not in this source, and not counted"
    if told["num_missing"]:
        return words + f"\nstill missing: {told['num_missing']} files\n"
    return words + f"\nnext: surrogate select --corpus {output} --fraction 0.1\n"


def summary(manifest: dict[str, Any], output: Path) -> dict[str, Any]:
    """Return what is printed of a manifest."""
    faulty = [entry for entry in manifest["files"] if entry["status"] != "done"]
    put_aside = bool(faulty or manifest["num_bad"] or manifest["not_listed"])
    last, not_listed = manifest["runs"][-1], len(manifest["not_listed"])
    return {
        "output": str(output),
        "complete": manifest["complete"],
        "predictor": last.get("predictor"),
        "num_files": manifest["num_files"],
        "files_by_status": manifest["files_by_status"] | ({"not_listed": not_listed} if not_listed else {}),
        "num_rows": manifest["num_rows"],
        "num_scored": manifest["num_scored"],
        "num_bad": manifest["num_bad"],
        "bad_reasons": manifest["bad_reasons"],
        "faulty_files": {entry["name"]: entry["errors"][:1] for entry in faulty[:SHOWN_FILES]},
        "not_listed": dict(list(manifest["not_listed"].items())[:SHOWN_FILES]),
        "num_missing": len(manifest["missing"]),
        "num_not_in_source": len(manifest["not_in_source"]),
        "num_ignored": manifest["num_ignored"],
        "num_cut": manifest["num_cut"],
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
    passes = [summary(ScoredCorpus(folder).manifest, folder) for folder in (output / FIRST, scored.folder)]
    sys.stderr.write(_in_words({**passes[1], "output": output}))
    return {
        **told,
        "cascade": str(output / CASCADE_FILE),
        "first_pass": passes[0],
        **passes[1],
        "exit_code": max(told_of["exit_code"] for told_of in passes),
    }


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

    Raises:
        InputError: What `select_corpus` raises, or an option without effect.
    """
    given = {name: value for name, value in budget.items() if value is not None}
    folder = corpus
    if (corpus / CASCADE_FILE).exists():
        folder, passed = full_corpus(corpus)
        given = _of_what_passed(given, passed)
    scored = ScoredCorpus(folder)
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
    num_alike = selection.counts.get("near_duplicates", 0)
    if num_alike:
        sys.stderr.write(f"note: {num_alike:,} chosen texts were near-duplicates of better ones; {len(selection):,} are kept\n")
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
    of_runs = [Path(run["predictor"]) for run in reversed(_runs(scored)) if run.get("predictor")]
    for path in [scored.folder / "predictor", *of_runs, *sorted(scored.folder.parent.glob("predictors/*"))]:
        if (path / PREDICTOR_FILE).exists() and read_identity(path).predictor == wanted:
            return _fidelity(path)
    warnings.warn(
        "the predictor of these scores was not found, so its fidelity is not checked; give --predictor FOLDER", stacklevel=2
    )
    return None


def _runs(scored: ScoredCorpus) -> list[dict[str, Any]]:
    try:
        return list(scored.manifest["runs"])
    except InputError:  # a run that has not come to its first manifest
        return []


def _of_what_passed(budget: dict[str, Any], passed: float) -> dict[str, Any]:
    """Return a budget for the texts that a cascade let through; a fraction was meant of all."""
    fraction = budget.get("fraction")
    if fraction is None:
        return budget
    if fraction > passed:
        raise InputError(
            f"--fraction {fraction:g} of a cascade that let through {passed:.3g} of the texts.",
            f"at most {passed:.3g}",
            "select less, or run a cascade with a larger --share.",
        )
    return {**budget, "fraction": min(fraction / passed, 1.0)}


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
