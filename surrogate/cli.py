"""The command line: every stage of a run folder, the demo, and the table of methods.

Each command prints one JSON object as its last line on stdout; progress and messages go to stderr. Exit codes:
0 done, 1 refused (the JSON says what was given, what is accepted and what to do), 2 wrong usage, 3 done but for rows or files
that were put aside.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oracle.errors import InputError
from surrogate.cli_options import (
    LABEL_HELP,
    EncoderOption,
    MaxTokens,
    MethodsOption,
    ModelOption,
    PoolOption,
    Precision,
    RunFolder,
    SeedOption,
    SurrogateOption,
    TargetOption,
    TextColumn,
)

if TYPE_CHECKING:
    from surrogate.oracle_stages import Measuring

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure how much training texts help a language model, predict it for a whole pool, and select.",
)


@app.command()
def label(
    run: RunFolder,
    target: TargetOption = None,
    model: ModelOption = None,
    pool: PoolOption = None,
    text_column: TextColumn = "text",
    method: Annotated[str, typer.Option(help="Oracle method; see `surrogate methods`.")] = "grad_dot",
    sample_size: Annotated[int, typer.Option(help="How many pool texts get a label.")] = 1000,
    max_tokens: MaxTokens = None,
    dtype: Precision = "float32",
    option: Annotated[list[str] | None, typer.Option("--option", help=LABEL_HELP)] = None,
    seed: SeedOption = 0,
) -> None:
    """Measure the influence of a sample of the pool on the target sets."""
    from surrogate.oracle_stages import label_stage

    given = _measuring(target, model, pool=pool, text_column=text_column, max_tokens=max_tokens, dtype=dtype, seed=seed)
    finish(label_stage(run, given, method=method, sample_size=sample_size, options=option or []))


@app.command()
def calibrate(
    run: RunFolder,
    target: TargetOption = None,
    model: ModelOption = None,
    pool: PoolOption = None,
    text_column: TextColumn = "text",
    methods: MethodsOption = "grad_dot",
    num_texts: Annotated[int, typer.Option(help="How many pool texts are labelled with each method.")] = 96,
    groups: Annotated[str | None, typer.Option(help="Column of the pool (its source) for agreement within groups.")] = None,
    max_tokens: MaxTokens = None,
    dtype: Precision = "float32",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            help="option=value of one_step and of what is compared and has it too (repeatable), such as max_grad_norm=1.0; "
            "or max_target_texts=64.",
        ),
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Measure how far cheap methods agree with real optimiser steps at this checkpoint."""
    from surrogate.oracle_stages import calibrate_stage

    given = _measuring(target, model, pool=pool, text_column=text_column, max_tokens=max_tokens, dtype=dtype, seed=seed)
    finish(calibrate_stage(run, given, methods=methods, num_texts=num_texts, groups=groups, options=option or []))


@app.command()
def judge(
    run: RunFolder,
    target: TargetOption = None,
    model: ModelOption = None,
    pool: PoolOption = None,
    text_column: TextColumn = "text",
    methods: MethodsOption = "grad_dot",
    num_texts: Annotated[int, typer.Option(help="How many pool texts are labelled and retrained on.")] = 96,
    subsets: Annotated[int, typer.Option(help="Models retrained on random halves of them; 0 leaves that judge out.")] = 16,
    share: Annotated[float, typer.Option(help="Top and bottom share that is removed and added; 0 leaves that out.")] = 0.2,
    seeds: Annotated[int, typer.Option(help="Models per subset and share, each with another order of the texts.")] = 1,
    target_texts: Annotated[int, typer.Option(help="Measure on at most so many texts of each target set.")] = 64,
    max_tokens: MaxTokens = None,
    dtype: Precision = "float32",
    seed: SeedOption = 0,
) -> None:
    """Judge labels by models that are retrained on parts of the labelled texts."""
    from surrogate.oracle_stages import judge_stage

    given = _measuring(target, model, pool=pool, text_column=text_column, max_tokens=max_tokens, dtype=dtype, seed=seed)
    finish(
        judge_stage(
            run,
            given,
            methods=methods,
            num_texts=num_texts,
            num_subsets=subsets,
            share=share,
            num_seeds=seeds,
            target_texts=target_texts,
        )
    )


@app.command()
def embed(run: RunFolder, encoder: EncoderOption = None, pool: PoolOption = None, text_column: TextColumn = "text") -> None:
    """Encode the whole pool into the run's feature cache."""
    from surrogate.stages import embed_stage

    finish(embed_stage(run, encoder, pool=pool, text_column=text_column))


@app.command()
def fit(
    run: RunFolder,
    encoder: EncoderOption = None,
    surrogate: SurrogateOption = None,
    folds: Annotated[int, typer.Option(help="Folds of the cross-fitting that measures fidelity.")] = 5,
    seed: SeedOption = 0,
) -> None:
    """Fit a surrogate on the labels and print its held-out fidelity."""
    from surrogate.stages import fit_stage

    finish(fit_stage(run, encoder, surrogate=surrogate or "trees", folds=folds, seed=seed))


@app.command()
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
    column: Annotated[list[str] | None, typer.Option("--column", help="With --source: a column to keep (repeatable).")] = None,
    rank: Annotated[int, typer.Option(help="With --source: the number of this machine of an array.")] = 0,
    world_size: Annotated[int, typer.Option(help="With --source: how many machines the array has.")] = 1,
    option: Annotated[list[str] | None, typer.Option("--option", help="Of the engine, such as workers=8 (repeatable).")] = None,
) -> None:
    """Score the run's whole pool, or with --source any corpus; exit code 3 if rows or files were put aside."""
    if not source:
        from surrogate.stages import score_stage

        finish(score_stage(_needed(run, predictor, output, instead="--source FILES with --predictor and --output"), surrogate))
        return
    from surrogate.scoring.command import score_corpus_stage

    reading: dict[str, Any] = {"text_column": text_column, "format": format, "columns": column or []}
    placing: dict[str, Any] = {"engine": engine, "options": option or [], "rank": rank, "world_size": world_size}
    where: dict[str, Any] = {"predictor": predictor, "run": run, "surrogate": surrogate, "output": output}
    summary = score_corpus_stage(source, **where, **reading, **placing)
    finish(summary)
    raise typer.Exit(summary["exit_code"])


@app.command()
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
    output: Annotated[Path | None, typer.Option(help="With --corpus: where the selection goes.")] = None,
    predictor: Annotated[Path | None, typer.Option(help="With --corpus: the predictor's folder, for its fidelity.")] = None,
    labels: Annotated[Path | None, typer.Option(help="With --corpus: labels; these texts are ranked by them.")] = None,
    min_score: Annotated[float | None, typer.Option(help="With --corpus: only texts that score at least this.")] = None,
    tokens_column: Annotated[str | None, typer.Option(help="With --corpus: column of the scores with token counts.")] = None,
    max_similarity: Annotated[
        float | None, typer.Option(help="With --corpus: drop texts of this cosine or more to a better one.")
    ] = None,
    write_texts: Annotated[bool, typer.Option("--write-texts", help="With --corpus: write the chosen rows too.")] = False,
) -> None:
    """Spend a budget on the scored pool, or with --corpus on a scored corpus."""
    budget: dict[str, float | int | None] = {"fraction": fraction, "texts": texts, "tokens": tokens}
    choice: dict[str, Any] = {"rule": rule, "options": option or [], "allow_low_fidelity": allow_low_fidelity, "seed": seed}
    if corpus is None:
        from surrogate.stages import select_stage

        finish(select_stage(_needed(run, output, min_score, instead="--corpus FOLDER"), budget, surrogate=surrogate, **choice))
        return
    from surrogate.scoring.select_command import select_corpus_stage

    more: dict[str, Any] = {
        "predictor": predictor,
        "labels": labels,
        "min_score": min_score,
        "tokens_column": tokens_column,
        "max_similarity": max_similarity,
    }
    finish(select_corpus_stage(corpus, output, budget, texts=write_texts, **more, **choice))


@app.command()
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
    engine: Annotated[str, typer.Option(help="local, or ray.")] = "local",
    option: Annotated[list[str] | None, typer.Option("--option", help="Of the engine, such as workers=8 (repeatable).")] = None,
) -> None:
    """Score a corpus in two passes: a cheap predictor on all texts, the full one on the best share."""
    from surrogate.scoring.cascade_command import cascade_stage

    spending: dict[str, Any] = {"share": share, "top": top, "min_recall": min_recall}
    result = cascade_stage(
        first,
        full,
        labels,
        source=source or [],
        output=output,
        text_column=text_column,
        engine=engine,
        options=option or [],
        **spending,
    )
    finish(result)
    raise typer.Exit(result.get("exit_code", 0))


@app.command()
def explain(
    run: RunFolder,
    text_id: Annotated[list[str] | None, typer.Option("--text-id", help="Text of the pool to explain (repeatable).")] = None,
    top: Annotated[
        int | None, typer.Option(help="In place of --text-id: the texts with the highest scores; 3 by default.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Labelled texts listed on each side.")] = 5,
    surrogate: SurrogateOption = None,
    method: Annotated[str, typer.Option(help="contributions, or for trees also boostin.")] = "contributions",
) -> None:
    """Say which labelled texts and which features made the scores of texts."""
    from surrogate.explain_command import explain_stage

    finish(explain_stage(run, text_id, top=top, top_k=top_k, surrogate=surrogate, method=method))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One of them, with paper, cost, limit and options.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README instead of JSON.")] = False,
) -> None:
    """List oracle methods, encoders, surrogates and rules with their options."""
    from surrogate.catalogue import as_markdown, as_text, described

    if markdown:
        sys.stdout.write(as_markdown())
        return
    found = described(name)
    finish(found)
    sys.stdout.flush()  # the text comes last on a terminal
    sys.stderr.write(as_text(found, in_full=name is not None))


@app.command()
def demo(
    run: Annotated[Path, typer.Argument(help="Run folder.")] = Path("runs/demo"),
    size: Annotated[str, typer.Option(help="full (minutes) or tiny (for a quick look).")] = "full",
    seed: SeedOption = 0,
) -> None:
    """Run the whole loop on texts of Python's own library, with a small model made on the spot."""
    from surrogate.demo import run_demo

    finish(run_demo(run, size=size, seed=seed))


def _measuring(target: list[str] | None, model: str | None, **more: Any) -> Measuring:
    from surrogate.oracle_stages import Measuring

    return Measuring(targets=target or [], model=model, **more)


@app.command()
def plan(
    training_tokens: Annotated[float, typer.Option(help="Tokens to train on in all: steps x texts per step x tokens per text.")],
    model: Annotated[str | None, typer.Option("--model", help="Folder or hub name of a model; its config is read.")] = None,
    parameters: Annotated[float | None, typer.Option(help="In place of --model, its parameters, such as 1e9.")] = None,
    pool: PoolOption = None,
    text_column: TextColumn = "text",
    pool_texts: Annotated[int | None, typer.Option(help="In place of --pool, how many texts it has.")] = None,
    text_tokens: Annotated[float | None, typer.Option(help="In place of --pool, mean tokens of a text after cutting.")] = None,
    target: TargetOption = None,
    target_tokens: Annotated[float | None, typer.Option(help="In place of --target, tokens of all target sets together.")] = None,
    num_targets: Annotated[int | None, typer.Option(help="In place of --target, how many target sets.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of the training; a refresh comes at the beginning of one.")] = 8,
    proxy: Annotated[str | None, typer.Option(help="Folder, hub name or parameters of a smaller model for features.")] = None,
    method: Annotated[str | None, typer.Option(help="Oracle method; chosen by its cost if none is named.")] = None,
    prefer: Annotated[str, typer.Option(help="What is bought first: labels (and refreshes) or features.")] = "labels",
    max_tokens: MaxTokens = None,
    flops_per_second: Annotated[float | None, typer.Option(help="Speed of training; without it time is not planned.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time 64 texts through encoders and model now.")] = False,
    max_overhead: Annotated[float, typer.Option(help="Most that selecting may cost, as a share of training.")] = 0.1,
) -> None:
    """Choose oracle, sample size, refreshes and features that keep --max-overhead, before anything is spent."""
    from surrogate.plan_command import plan_stage

    sizes = {"training_tokens": training_tokens, "num_pool_texts": pool_texts, "text_tokens": text_tokens, "num_rounds": rounds}
    sizes |= {"target_tokens": target_tokens, "num_targets": num_targets, "training_flops_per_second": flops_per_second}
    options = {"method": method, "prefer": prefer, "max_tokens": max_tokens, "measure": measure, "max_overhead": max_overhead}
    texts: dict[str, Any] = {"pool": pool, "text_column": text_column, "targets": target or []}
    finish(plan_stage(model=model, parameters=parameters, proxy=proxy, **texts, numbers=sizes, options=options))


def _needed(run: Path | None, *others: Any, instead: str) -> Path:
    """Return the run folder, where no option of a corpus was given beside it."""
    if run is None or any(other is not None for other in others):
        raise InputError(
            "no run folder." if run is None else f"options of a corpus without {instead}.",
            "a run folder alone, or a corpus",
            f"name the run folder, or {instead}.",
        )
    return run


def finish(result: dict[str, Any]) -> None:
    """Print the JSON object that ends every command."""
    sys.stdout.write(json.dumps(result, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    sys.stderr.write(f"note: {message}\n")


def main() -> None:
    """Run the command line; refusals become exit code 1."""
    warnings.showwarning = _show_warning
    try:
        app()
    except InputError as error:
        sys.stderr.write(f"refused: {error}\n")
        finish({"refused": type(error).__name__, "given": error.given, "accepted": error.accepted, "to_do": error.remedy})
        sys.exit(1)
