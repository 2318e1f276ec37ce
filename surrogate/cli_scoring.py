"""Commands that score and select, a run's pool or a corpus of any size: `score`, `select`, `cascade` and `distil`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from oracle.errors import InputError
from surrogate.cli_options import PoolOption, SeedOption, SurrogateOption, TextColumn, finish

ENGINE_HELP = (
    "Of the engine, such as workers=8 (repeatable); local has workers (0: this process) and max_attempts, ray also address, "
    "cpus_per_task and gpus_per_task."
)


def score(
    run: Annotated[Path | None, typer.Argument(help="Run folder, whose pool is scored; not needed with --predictor.")] = None,
    surrogate: SurrogateOption = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", help="Score this corpus, file by file: folder, glob, file, URL or hub name (repeatable)."),
    ] = None,
    predictor: Annotated[Path | None, typer.Option(help="With --source: a predictor's folder, in place of the run's.")] = None,
    output: Annotated[Path | None, typer.Option(help="With --source: where the scores go; RUN/corpus by default.")] = None,
    engine: Annotated[str, typer.Option(help="With --source: local, or ray.")] = "local",
    text_column: TextColumn = "text",
    format: Annotated[str, typer.Option(help="With --source: text, completion, chat, tokens or auto.")] = "auto",
    column: Annotated[
        list[str] | None,
        typer.Option("--column", help="With --source: a column written beside the scores; a.b is the field b of a (repeatable)."),
    ] = None,
    rank: Annotated[int, typer.Option(help="With --source: the number of this machine of an array.")] = 0,
    world_size: Annotated[int, typer.Option(help="With --source: how many machines the array has.")] = 1,
    option: Annotated[list[str] | None, typer.Option("--option", help=ENGINE_HELP)] = None,
) -> None:
    """Score the run's whole pool, or with --source any corpus; exit code 3 if rows or files were put aside."""
    if not source:
        from surrogate.stages import score_stage

        unused: tuple[Any, ...] = (predictor, output, column, option, *(given for given in (format,) if given != "auto"))
        unused += tuple(given for given in (text_column,) if given != "text")
        finish(score_stage(_needed(run, *unused, instead="--source FILES with --predictor and --output"), surrogate))
        return
    from surrogate.scoring.commands import score_corpus_stage

    reading: dict[str, Any] = {"text_column": text_column, "format": format, "columns": column or []}
    placing: dict[str, Any] = {"engine": engine, "options": option or [], "rank": rank, "world_size": world_size}
    where: dict[str, Any] = {"predictor": predictor, "run": run, "surrogate": surrogate, "output": output}
    summary = score_corpus_stage(source, **where, **reading, **placing)
    finish(summary)
    raise typer.Exit(summary["exit_code"])


def select(
    run: Annotated[Path | None, typer.Argument(help="Run folder with scores; not needed with --corpus.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Budget: share of the pool's texts.")] = None,
    texts: Annotated[int | None, typer.Option(help="Budget: number of texts.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Budget: number of tokens.")] = None,
    rule: Annotated[str, typer.Option(help="Selection rule; see `surrogate methods`.")] = "top",
    surrogate: SurrogateOption = None,
    option: Annotated[list[str] | None, typer.Option("--option", help="option=value of the rule (repeatable).")] = None,
    allow_low_fidelity: Annotated[
        bool, typer.Option("--allow-low-fidelity", help="Select by scores at chance all the same.")
    ] = False,
    seed: SeedOption = 0,
    corpus: Annotated[Path | None, typer.Option(help="Select from what `surrogate score --source` wrote, of any size.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="With --corpus: where the selection goes; CORPUS-selection by default.")
    ] = None,
    predictor: Annotated[Path | None, typer.Option(help="With --corpus: the predictor's folder, for its fidelity.")] = None,
    labels: Annotated[Path | None, typer.Option(help="With --corpus: labels; these texts are ranked by them.")] = None,
    min_score: Annotated[
        float | None,
        typer.Option(
            help="With --corpus: only texts whose combined number is at least this: a sum of z-scores, of which 0 is the "
            "corpus's mean; with --option combine=TARGET the score of that target itself."
        ),
    ] = None,
    tokens_column: Annotated[
        str | None,
        typer.Option(help="With --corpus: column with token counts, kept by `score --column`; num_tokens by default."),
    ] = None,
    max_similarity: Annotated[
        float | None,
        typer.Option(help="With --corpus: drop chosen texts of this cosine or more to a better one; no others take their place."),
    ] = None,
    similarity_encoder: Annotated[
        str | None, typer.Option(help="With --max-similarity: NAME or NAME:option=value,... of the encoder; sentence by default.")
    ] = None,
    write_texts: Annotated[
        bool, typer.Option("--write-texts", help="With --corpus: write the chosen rows too, as parquet.")
    ] = False,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="With --corpus: select from what is scored so far.")
    ] = False,
) -> None:
    """Spend a budget on the scored pool, or with --corpus on a scored corpus."""
    budget: dict[str, float | int | None] = {"fraction": fraction, "texts": texts, "tokens": tokens}
    choice: dict[str, Any] = {"rule": rule, "options": option or [], "allow_low_fidelity": allow_low_fidelity, "seed": seed}
    if corpus is None:
        from surrogate.stages import select_stage

        unused: tuple[Any, ...] = (output, min_score, predictor, labels, tokens_column, max_similarity, similarity_encoder)
        unused += (write_texts or None, allow_incomplete or None)
        finish(select_stage(_needed(run, *unused, instead="--corpus FOLDER"), budget, surrogate=surrogate, **choice))
        return
    if run is not None or surrogate is not None:
        raise InputError(
            f"the run folder {run} or --surrogate {surrogate} beside --corpus.",
            "a run folder, or a corpus with --predictor FOLDER for its fidelity",
            "leave one of the two out.",
        )
    from surrogate.scoring.commands import select_corpus_stage

    more: dict[str, Any] = {
        "predictor": predictor,
        "labels": labels,
        "min_score": min_score,
        "tokens_column": tokens_column,
        "max_similarity": max_similarity,
        "similarity_encoder": similarity_encoder,
        "allow_incomplete": allow_incomplete,
    }
    finish(select_corpus_stage(corpus, output, budget, texts=write_texts, **more, **choice))


def cascade(
    first: Annotated[Path, typer.Argument(help="Folder of the cheap predictor.")],
    full: Annotated[Path, typer.Argument(help="Folder of the full predictor.")],
    labels: Annotated[Path, typer.Argument(help="Folder of the labels that both were fitted on.")],
    source: Annotated[
        list[str] | None, typer.Option("--source", help="Corpus to score; without it only recall is shown.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the scores go.")] = None,
    share: Annotated[float | None, typer.Option(help="Share of the texts that the full predictor sees; 0.2 by default.")] = None,
    top: Annotated[float, typer.Option(help="Share of the texts that will be selected at last.")] = 0.05,
    min_recall: Annotated[float | None, typer.Option(help="Refuse to score where the recall is lower.")] = None,
    text_column: TextColumn = "text",
    column: Annotated[list[str] | None, typer.Option("--column", help="A column written beside the scores (repeatable).")] = None,
    combine: Annotated[str, typer.Option(help="How the first pass makes one number of several targets.")] = "sum_z",
    engine: Annotated[str, typer.Option(help="local, or ray.")] = "local",
    option: Annotated[list[str] | None, typer.Option("--option", help=ENGINE_HELP)] = None,
) -> None:
    """Score a corpus in two passes: a cheap predictor on all texts, the full one on the best share."""
    from surrogate.scoring.commands import cascade_stage

    spending: dict[str, Any] = {"share": share, "top": top, "min_recall": min_recall}
    result = cascade_stage(
        first,
        full,
        labels,
        source=source or [],
        output=output,
        text_column=text_column,
        columns=column or [],
        combine=combine,
        engine=engine,
        options=option or [],
        **spending,
    )
    finish(result)
    raise typer.Exit(result.get("exit_code", 0))


def distil(
    output: Annotated[Path, typer.Argument(help="Where the table goes; then --encoder static_embedding:table=FOLDER.")],
    pool: PoolOption = None,
    text_column: TextColumn = "text",
    limit: Annotated[int | None, typer.Option(help="Read only so many texts; some thousands are enough.")] = None,
    teacher: Annotated[str, typer.Option(help="NAME or NAME:option=value,... of the encoder to be approached.")] = "sentence",
    start: Annotated[str, typer.Option(help="Table to begin with: minilm, or the folder of one.")] = "minilm",
    max_tokens: Annotated[int, typer.Option(help="Where texts are cut.")] = 256,
    cache: Annotated[Path | None, typer.Option(help="Folder where the encoder's features are kept.")] = None,
    seed: SeedOption = 0,
) -> None:
    """Distil an encoder into a table of token vectors, for `static_embedding`: no transformer when scoring."""
    from surrogate.distilling import distil_stage

    given: dict[str, Any] = {"text_column": text_column, "limit": limit, "teacher": teacher, "start": start}
    finish(distil_stage(output, pool, **given, max_tokens=max_tokens, cache=cache, seed=seed))


def _needed(run: Path | None, *others: Any, instead: str) -> Path:
    """Return the run folder, where no option of a corpus was given beside it."""
    if run is None or any(other is not None for other in others):
        raise InputError(
            "no run folder." if run is None else f"options of a corpus without {instead}.",
            "a run folder alone, or a corpus",
            f"name the run folder, or {instead}.",
        )
    return run
