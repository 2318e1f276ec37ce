"""Products of text gradients with one target's gradient: the engine of `grad_dot` beside kronfluence and bergson.

Every row runs in one process, in turns, on the same model, texts and layers (the linear layers under the base model,
without the output head, as bergson's commands choose them), each with its own loop and its own target gradient. The price of
a further text is the time from the start of one forward pass to that of the next; what a run costs beyond its texts (the
target gradient, set-up, writing) is its fixed part. Both are given over a plain forward and backward pass of one text,
as the median over the turns of a ratio taken within one turn, in the process's own CPU seconds where there is no GPU.

A text's loss is the mean over its tokens and a target's the mean over its texts, for everyone. The peers' values are held
against ours on what each covers, ours against one backward pass per text; the script fails if they differ. A peer that is
not installed is left out and the table says so:

    pip install kronfluence==1.0.1 bergson==2.5.1
    python benchmarks/oracle_peers.py --threads 1
"""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_rows import Row, Texts, bergson_rows, kronfluence_rows
from setting import arguments, now, report, start

import oracle
from oracle.encoding import make_batch
from oracle.gradients.products import GradientProducts, PerTextProducts
from oracle.language_model import LanguageModel
from oracle.target_columns import prepare_targets
from oracle.targets import read_targets
from surrogate.training.small_models import build_model

PEERS = {"kronfluence": "1.0.1", "bergson": "2.5.1"}  # the releases this was written against
TOLERANCE = 1e-4  # of the largest value
PLAIN = "forward and backward"


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.splitlines()[0], pool=False)
    parser.add_argument("--architecture", default="neox")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=256, help="tokens per text")
    parser.add_argument("--batch", type=int, default=8, help="texts per batch")
    parser.add_argument("--batches", type=int, default=4, help="batches per run, at least 3")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--target-texts", type=int, default=16)
    parser.add_argument("--training-steps", type=int, default=20, help="steps that the model is trained before")
    options = parser.parse_args()
    if options.batches < 3:
        parser.error(f"--batches {options.batches}: at least 3, so that a further batch can be timed.")
    start(options)
    logging.disable(logging.INFO)
    texts = _prepare(options)
    options.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.workdir) as folder:
        rows = _own_rows(texts)
        missing = {}
        for name, make_rows in {"kronfluence": kronfluence_rows, "bergson": bergson_rows}.items():
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                    rows |= make_rows(texts, Path(folder) / name)
            except ImportError as error:
                missing[name] = f"not installed ({error.name}): pip install {name}=={PEERS[name]}"
        _compare(texts, rows)
        _time(texts, rows, options.turns)
    _report(options, texts, rows, missing)
    wrong = {name: row.difference for name, row in rows.items() if row.difference is not None and not row.difference <= TOLERANCE}
    if wrong:
        raise SystemExit(f"values differ by more than {TOLERANCE} of the largest: {wrong}")


def _prepare(options: Any) -> Texts:
    """A model that has learned how frequent its tokens are, and random texts with these frequencies."""
    shape = {"width": options.width, "num_layers": options.layers, "context": options.tokens}
    module = build_model(options.architecture, vocabulary_size=options.vocabulary, **shape)
    lm = LanguageModel(module, max_tokens=options.tokens)
    rng = np.random.default_rng(0)
    frequencies = 1.0 / np.arange(1, options.vocabulary)
    frequencies /= frequencies.sum()

    def rows(count: int) -> list[dict[str, Any]]:
        ids = rng.choice(np.arange(1, options.vocabulary), size=(count, options.tokens), p=frequencies)
        return [{"input_ids": row.tolist()} for row in ids]

    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for _ in range(options.training_steps):
        encoded = lm.encode(rows(options.batch))
        lm.text_losses(make_batch(encoded, positions=list(range(len(encoded))), device=lm.device)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    module.eval()
    target = rows(options.target_texts)
    columns = prepare_targets(lm, read_targets({"t": oracle.read_texts(target)}), halves=False)
    return Texts(lm, lm.encode(rows(options.batch * options.batches)), lm.encode(target), columns, options.batch)


def _own_rows(texts: Texts) -> dict[str, Row]:
    module, everything = texts.lm.module, [name for name, _ in texts.lm.module.named_parameters()]

    def plain() -> None:
        for batch in texts.batches():
            texts.lm.text_losses(batch).sum().backward()
            module.zero_grad(set_to_none=True)

    linear = texts.parameters_of(texts.linear_layers())
    return {
        PLAIN: Row(module, plain),
        "ours, linear layers": Row(module, partial(texts.products, linear), linear, everything, "nothing"),
        "ours, every parameter": Row(module, partial(texts.products, everything), everything, everything, "nothing"),
    }


def _compare(texts: Texts, rows: dict[str, Row]) -> None:
    """Hold the peers against ours, and ours against one backward pass per text."""
    for name, row in rows.items():
        if row.covers and row.is_product:
            truth = texts.products(row.covers, PerTextProducts if name.startswith("ours") else GradientProducts)
            with contextlib.redirect_stderr(io.StringIO()):
                row.difference = float(np.abs(row.run() - truth).max() / np.abs(truth).max())


def _time(texts: Texts, rows: dict[str, Row], turns: int) -> None:
    num_batches = len(texts.train) // texts.size
    for turn in range(turns + 1):
        for row in rows.values():
            starts: list[float] = []
            handle = row.module.register_forward_pre_hook(lambda *_, starts=starts: starts.append(now()))
            begin = now()
            with contextlib.redirect_stderr(io.StringIO()):
                row.run()
            total = now() - begin
            handle.remove()
            per_batch = statistics.median(np.diff(starts[-num_batches:]).tolist())
            if turn:  # the first turn warms up
                row.seconds.append((per_batch / texts.size, total - num_batches * per_batch))


def _report(options: Any, texts: Texts, rows: dict[str, Row], missing: dict[str, str]) -> None:
    plain = [unit for unit, _ in rows[PLAIN].seconds]
    figures: dict[str, dict[str, Any]] = {key: {} for key in ("ratio", "fixed_texts", "fit_texts", "coverage", "difference")}
    table = []
    for name, row in rows.items():
        further, fixed = (
            statistics.median(turn[part] / unit for turn, unit in zip(row.seconds, plain, strict=True)) for part in (0, 1)
        )
        cells = [name, f"{1000 * statistics.median(seconds for seconds, _ in row.seconds):.1f}", f"{further:.3f}"]
        if name != PLAIN:
            fit, coverage = row.fit_seconds / statistics.median(plain), texts.share(row.covers)
            cells += [f"{fixed:.1f}", f"{fit:.1f}", f"{coverage:.1%}", f"{texts.share(row.at_most):.1%}"]
            cells += ["other values" if row.difference is None else f"{row.difference:.1e}", row.needs]
            for key, value in zip(figures, (further, fixed, fit, coverage, row.difference), strict=True):
                figures[key][name] = None if value is None else float(f"{value:.4g}")
        table.append(cells + [""] * (9 - len(cells)))
    table += [[name, *[""] * 7, reason] for name, reason in missing.items()]
    report(
        f"{options.architecture}, {texts.lm.num_parameters / 1e6:.1f}M parameters, {options.tokens} tokens, "
        f"batch {options.batch}, 1 target of {options.target_texts} texts, {texts.lm.device.type}",
        ["", "ms per text", "over plain", "fixed, texts", "fit once, texts", "covers", "at most", "difference", "needs"],
        table,
        {
            "benchmark": "oracle_peers",
            "parameters": texts.lm.num_parameters,
            "tokens": options.tokens,
            "batch": options.batch,
            "target_texts": options.target_texts,
            **figures,
            "peers": {name: missing[name] if name in missing else version(name) for name in PEERS},
        },
    )


if __name__ == "__main__":
    main()
