"""What the benchmarks share: a pool and target sets from arguments, a small warmed-up model, and the report line."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import oracle
from oracle.artifacts import atomic_folder, fingerprint, provenance, read_json, require_same, write_json
from oracle.language_model import LanguageModel
from oracle.tables import aligned
from oracle.texts import list_text_ids
from surrogate.training.loop import TrainingPlan, train
from surrogate.training.small_models import build_model, train_tokenizer
from surrogate.training.weight_average import WeightAverage


def arguments(description: str, *, pool: bool = True) -> argparse.ArgumentParser:
    """Make a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    if pool:
        parser.add_argument("--pool", nargs="+", default=["python_library"], help="files of the pool, or a bundled corpus")
        parser.add_argument(
            "--target", nargs="+", default=[], metavar="NAME=FILE", help="target sets; those of the bundled corpus by default"
        )
        parser.add_argument("--limit", type=int, default=None, help="read only so many texts of the pool")
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks"), help="where checkpoints and labels are kept")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves the default")
    return parser


def start(options: argparse.Namespace) -> None:
    """Set the threads and keep third-party chatter out of the report."""
    if options.threads:
        torch.set_num_threads(options.threads)


def load_pool(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Read the pool and its target sets."""
    from surrogate import corpora
    from surrogate.stages import parse_targets

    if len(options.pool) == 1 and options.pool[0] in corpora.names():
        corpus = corpora.load(options.pool[0])
        return oracle.read_texts(corpus.pool, limit=options.limit), dict(corpus.targets) if not options.target else parse_targets(
            options.target
        )
    return oracle.read_texts(list(options.pool), limit=options.limit), dict(parse_targets(options.target))


def claim(path: Path, identity: dict[str, Any]) -> None:
    """Keep what a folder's results were made with, and refuse to go on with them under other options."""
    if path.exists():
        require_same(read_json(path), identity, where=path.parent)
    else:
        write_json(path, identity)


def warmed_up(
    folder: Path,
    texts: Any,
    *,
    architecture: str,
    width: int,
    num_layers: int,
    vocabulary_size: int,
    max_tokens: int,
    num_tokens: int,
    seed: int = 0,
    learning_rate: float = 2e-3,
    rows_per_step: int = 16,
    average_decay: float | None = None,
) -> LanguageModel:
    """Make a tokenizer and a model, train them on random texts, keep the checkpoint with its optimiser, or reuse it.

    With `average_decay` the running average of the weights is kept in the folder `averaged_beside(folder)`; killed, such a
    warm-up begins again.
    """
    claim(
        folder.with_name(f"{folder.name}.json"),
        {
            "texts": fingerprint(sorted(list_text_ids(texts))),
            "shape": [architecture, width, num_layers, vocabulary_size, max_tokens],
            "training": [num_tokens, seed, learning_rate, rows_per_step, *([] if average_decay is None else [average_decay])],
        },
    )
    if not folder.exists():
        tokenizer_folder = folder.parent / f"tokenizer-{vocabulary_size}"
        if not tokenizer_folder.exists():
            with atomic_folder(tokenizer_folder) as partial:
                train_tokenizer(texts["text"][:5000], vocabulary_size=vocabulary_size).save_pretrained(partial)
        from transformers import AutoTokenizer

        module = build_model(
            architecture, vocabulary_size=vocabulary_size, width=width, num_layers=num_layers, context=max_tokens, seed=seed
        )
        optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
        lm = LanguageModel(module, AutoTokenizer.from_pretrained(tokenizer_folder), optimizer, max_tokens=max_tokens)
        average = None if average_decay is None else WeightAverage(module, decay=average_decay)
        if average is not None:
            average.watch(optimizer)
        plan = TrainingPlan(
            num_tokens=num_tokens,
            row_tokens=max_tokens,
            rows_per_step=rows_per_step,
            warmup_steps=20,
            seed=seed,
            checkpoint_every=50,
        )
        train(
            lm,
            texts,
            plan,
            folder=None if average is not None else folder.with_name(f"{folder.name}-training"),
            title=f"warm-up of {lm.num_parameters / 1e6:.1f}M parameters",
        )
        if average is not None:
            averaged_beside(folder).mkdir(parents=True, exist_ok=True)
            average.save(averaged_beside(folder))
        lm.save(folder)
    return LanguageModel.from_pretrained(folder, max_tokens=max_tokens)


def averaged_beside(folder: Path) -> Path:
    """Return where `warmed_up` keeps the running average of a checkpoint's weights."""
    return folder.with_name(f"{folder.name}-average")


def shape_arguments(
    parser: argparse.ArgumentParser, *, width: int = 128, layers: int = 4, tokens: int = 256, warmup_tokens: int = 1_000_000
) -> None:
    """Add the options that `warmed_up_as_asked` reads, with these defaults."""
    parser.add_argument("--width", type=int, default=width)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=tokens, help="longest text, and row length in training")
    parser.add_argument("--warmup-tokens", type=int, default=warmup_tokens)


def warmed_up_as_asked(folder: Path, texts: Any, options: argparse.Namespace, **changes: Any) -> LanguageModel:
    """Make a model of the shape that the options of `shape_arguments` give, changed by arguments of `warmed_up`."""
    asked = {
        "architecture": "llama",
        "width": options.width,
        "num_layers": options.layers,
        "vocabulary_size": options.vocabulary,
        "max_tokens": options.tokens,
        "num_tokens": options.warmup_tokens,
        "seed": vars(options).get("seed", 0),
    }
    return warmed_up(folder, texts, **{**asked, **changes})


def now() -> float:
    """Return seconds on the wall where a GPU works, else the process's own CPU seconds, which other jobs do not change."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def report(title: str, header: list[str], rows: list[list[str]], result: dict[str, Any]) -> None:
    """Print a table for people and, as the last line, one JSON object for programs."""
    print(title)
    print(aligned([header, *rows]))
    machine = {"torch_threads": torch.get_num_threads(), "device": "cuda" if torch.cuda.is_available() else "cpu"}
    print(json.dumps({**result, "machine": machine, "provenance": provenance()}))
    sys.stdout.flush()
