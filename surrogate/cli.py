"""The command line: every stage of a run folder, the demo, and the table of methods.

Each command prints one JSON object as its last line on stdout; progress and messages go to stderr. Exit codes:
0 done, 1 refused (the JSON says what was given, what is accepted and what to do), 2 wrong usage, 3 done but for rows or files
that were put aside, 130 stopped from the keyboard.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from oracle.errors import InputError
from surrogate.cli_measuring import calibrate, judge, label
from surrogate.cli_options import (
    EncoderOption,
    MaxTokens,
    PoolOption,
    RunFolder,
    SeedOption,
    SurrogateOption,
    TargetOption,
    TextColumn,
    finish,
)
from surrogate.cli_scoring import cascade, distil, score, select

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure how much training texts help a language model, predict it for a whole pool, and select.",
)


def embed(run: RunFolder, encoder: EncoderOption = None, pool: PoolOption = None, text_column: TextColumn = "text") -> None:
    """Encode the whole pool into the run's feature cache."""
    from surrogate.stages import embed_stage

    finish(embed_stage(run, encoder, pool=pool, text_column=text_column))


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


def demo(
    run: Annotated[Path, typer.Argument(help="Run folder.")] = Path("runs/demo"),
    size: Annotated[str, typer.Option(help="full (minutes) or tiny (for a quick look).")] = "full",
    seed: SeedOption = 0,
) -> None:
    """Run the whole loop on texts of Python's own library, with a small model made on the spot."""
    from surrogate.demo import run_demo

    finish(run_demo(run, size=size, seed=seed))


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


STOPPED = 130  # exit code of a program that is stopped from the keyboard


def _told_when_stopped(command: Callable[..., None]) -> Callable[..., None]:
    """Say that a command which is stopped from the keyboard can be gone on with."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            sys.stderr.write("stopped from the keyboard; what is finished is kept, and the same command goes on from there\n")
            raise typer.Exit(STOPPED) from None

    return run


for command in (label, calibrate, judge, embed, fit, score, select, cascade, distil, explain, plan, methods, demo):
    app.command()(_told_when_stopped(command))


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
