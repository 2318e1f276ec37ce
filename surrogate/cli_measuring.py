"""Commands that measure on a language model: `label`, `calibrate` and `judge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from surrogate.cli_options import (
    LABEL_HELP,
    MaxTokens,
    MethodsOption,
    ModelOption,
    PoolOption,
    Precision,
    RunFolder,
    SeedOption,
    TargetOption,
    TextColumn,
    finish,
)

if TYPE_CHECKING:
    from surrogate.oracle_stages import Measuring


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


def _measuring(target: list[str] | None, model: str | None, **more: Any) -> Measuring:
    from surrogate.oracle_stages import Measuring

    return Measuring(targets=target or [], model=model, **more)
