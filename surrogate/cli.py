"""The command line: every stage of a run folder, the demo, and the table of methods.

Each command prints one JSON object as its last line on stdout; progress and messages go to stderr. Exit codes:
0 done, 1 refused (the JSON says what was given, what is accepted and what to do), 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from oracle.errors import InputError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure how much training texts help a language model, predict it for a whole pool, and select.",
)

RunFolder = Annotated[Path, typer.Argument(help="Run folder; made when it does not exist.")]
PoolOption = Annotated[
    list[str] | None, typer.Option("--pool", help="File, glob or URL of the pool (repeatable), bundled corpus or hub name.")
]
TextColumn = Annotated[str, typer.Option(help="Column of the pool that holds plain text.")]
EncoderOption = Annotated[
    list[str] | None,
    typer.Option("--encoder", help="NAME or NAME:option=value,... (repeatable); hashed_ngrams and text_stats by default."),
]
SurrogateOption = Annotated[
    str | None, typer.Option("--surrogate", help="NAME or NAME:option=value,...; for score and select: which fitted one.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random in this stage.")]


@app.command()
def label(
    run: RunFolder,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="NAME=FILE of a target set (repeatable); not where a method has none."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Folder or hub name of the language model; not where a method needs none."),
    ] = None,
    pool: PoolOption = None,
    text_column: TextColumn = "text",
    method: Annotated[str, typer.Option(help="Oracle method; see `surrogate methods`.")] = "grad_dot",
    sample_size: Annotated[int, typer.Option(help="How many pool texts get a label.")] = 1000,
    max_tokens: Annotated[int | None, typer.Option(help="Longer texts are cut; 512 or the model's context by default.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    option: Annotated[list[str] | None, typer.Option("--option", help="option=value of the method (repeatable).")] = None,
    seed: SeedOption = 0,
) -> None:
    """Measure the influence of a sample of the pool on the target sets."""
    from surrogate.stages import label_stage

    finish(
        label_stage(
            run,
            target or [],
            model=model,
            pool=pool,
            text_column=text_column,
            method=method,
            sample_size=sample_size,
            max_tokens=max_tokens,
            dtype=dtype,
            options=option or [],
            seed=seed,
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
def score(run: RunFolder, surrogate: SurrogateOption = None) -> None:
    """Score the whole pool."""
    from surrogate.stages import score_stage

    finish(score_stage(run, surrogate))


@app.command()
def select(
    run: RunFolder,
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
) -> None:
    """Spend a budget on the scored pool."""
    from surrogate.stages import select_stage

    finish(
        select_stage(
            run,
            {"fraction": fraction, "texts": texts, "tokens": tokens},
            rule=rule,
            surrogate=surrogate,
            options=option or [],
            allow_low_fidelity=allow_low_fidelity,
            seed=seed,
        )
    )


@app.command()
def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README instead of JSON.")] = False,
) -> None:
    """List oracle methods, encoders, surrogates and rules with their options."""
    from surrogate.catalogue import as_markdown, catalogue

    if markdown:
        sys.stdout.write(as_markdown())
    else:
        finish(catalogue())


@app.command()
def demo(
    run: Annotated[Path, typer.Argument(help="Run folder.")] = Path("runs/demo"),
    size: Annotated[str, typer.Option(help="full (minutes) or tiny (for a quick look).")] = "full",
    seed: SeedOption = 0,
) -> None:
    """Run the whole loop on texts of Python's own library, with a small model made on the spot."""
    from surrogate.demo import run_demo

    finish(run_demo(run, size=size, seed=seed))


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
