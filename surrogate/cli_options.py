"""Arguments and options that several commands share, and how each ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

LABEL_HELP = (
    "option=value of the method (`surrogate methods NAME`), or of the labels: max_target_texts=64 measures on so many texts of "
    "each target set, per=token divides by a text's tokens, halves=False, block_size=32 (repeatable)."
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
TargetOption = Annotated[
    list[str] | None, typer.Option("--target", help="NAME=FILE of a target set (repeatable); not where a method has none.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Folder or hub name of the language model; not where a method needs none.")
]
MethodsOption = Annotated[
    str, typer.Option("--methods", help="NAME or NAME:option=value,...; several with commas; see `surrogate methods`.")
]
MaxTokens = Annotated[int | None, typer.Option(help="Longer texts are cut; 512 or the model's context by default.")]
Precision = Annotated[str, typer.Option(help="float32 or bfloat16.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random in this stage.")]


def finish(result: dict[str, Any]) -> None:
    """Print the JSON object that ends every command."""
    sys.stdout.write(json.dumps(result, ensure_ascii=False, allow_nan=False, default=str) + "\n")
