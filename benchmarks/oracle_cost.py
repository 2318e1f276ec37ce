"""What a label costs: `grad_dot` over a plain forward and backward pass, `one_step` over a probe that reloads its state.

All rows are timed in one process, in turns, on the same batches; a figure is the median over the turns of a ratio
taken within one turn, so that a machine whose speed drifts does not decide it. Times are the process's own CPU
seconds where there is no GPU (other jobs on the machine then count little), and wall-clock seconds on a GPU.

    python benchmarks/oracle_cost.py
"""

from __future__ import annotations

import io
import math
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from setting import arguments, now, report, start

import oracle
from oracle import plugins
from oracle.encoding import make_batch
from oracle.gradients.curvature import fit_factors
from oracle.gradients.products import GradientProducts
from oracle.language_model import LanguageModel
from oracle.methods.one_step import OneStep
from oracle.target_columns import prepare_targets
from oracle.targets import read_targets
from surrogate.training.small_models import build_model

NUM_DIRECTIONS = (1, 4, 8, 16)
NUM_FITTED = 32  # texts that the factors of ekfac are fitted on
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
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--target-texts", type=int, default=16)
    options = parser.parse_args()
    start(options)
    module = build_model(
        options.architecture,
        vocabulary_size=options.vocabulary,
        width=options.width,
        num_layers=options.layers,
        context=options.tokens,
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    lm = LanguageModel(module, optimizer=optimizer, max_tokens=options.tokens)
    module.eval()
    rng = np.random.default_rng(0)
    rows = [
        {"input_ids": rng.integers(1, options.vocabulary, options.tokens).tolist()}
        for _ in range(options.batch + options.target_texts)
    ]
    encoded = lm.encode(rows[: options.batch])
    batch = make_batch(encoded, positions=list(range(len(encoded))), device=lm.device)
    for parameter in module.parameters():  # a state, so that reloading it has something to reload
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer.step()
    optimizer.zero_grad()
    gradient = _gradient_rows(lm, batch, options.turns)
    methods, fit_ratio = _method_rows(lm, encoded, rows[options.batch :], turns=options.turns)
    steps = _step_rows(lm, encoded, rows[options.batch :], turns=options.turns, workdir=options.workdir)
    baseline = statistics.median(gradient[PLAIN])
    table = [
        [
            name,
            f"{1000 * statistics.median(values) / options.batch:.1f}",
            f"{_ratio(values, gradient['forward and backward']):.3f}",
        ]
        for name, values in gradient.items()
    ]
    table += [
        [name, f"{1000 * statistics.median(values) / options.batch:.1f}", f"{_ratio(values, methods[PLAIN]):.3f}"]
        for name, values in methods.items()
        if name != PLAIN
    ]
    table += [["fitting the factors of ekfac, per text fitted on", "", f"{fit_ratio:.2f}"]]
    table += [
        [name, f"{1000 * statistics.median(values):.1f}", f"{statistics.median(values) * options.batch / baseline:.2f}"]
        for name, values in steps.items()
    ]
    ratios = {name: round(_ratio(values, gradient[PLAIN]), 4) for name, values in gradient.items()}
    ratios |= {name: round(_ratio(values, methods[PLAIN]), 4) for name, values in methods.items()}
    speedup = _ratio(steps["reload from disk, target texts one by one"], steps["one_step"])
    report(
        f"{options.architecture}, {lm.num_parameters / 1e6:.1f}M parameters, {options.tokens} tokens, batch {options.batch}, "
        f"{lm.device.type}",
        ["", "ms per text", "over forward and backward"],
        table,
        {
            "benchmark": "oracle_cost",
            "parameters": lm.num_parameters,
            "tokens": options.tokens,
            "batch": options.batch,
            "ratios": ratios,
            "ekfac_fit_per_text": round(fit_ratio, 3),
            "one_step_speedup_over_reloading_probe": round(speedup, 2),
            "target_texts": options.target_texts,
        },
    )


def _gradient_rows(lm: LanguageModel, batch, turns: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(0)
    engines = {}
    for count in NUM_DIRECTIONS:
        directions = {
            name: torch.randn(count, *p.shape, generator=generator).to(p.device) for name, p in lm.module.named_parameters()
        }
        engines[f"grad_dot, {count} target{'s' if count > 1 else ''}"] = GradientProducts(lm.module, directions, lm.text_losses)
        if count in (1, 8):
            engines[f"grad_dot with norms, {count} target{'s' if count > 1 else ''}"] = GradientProducts(
                lm.module, directions, lm.text_losses, norms=True
            )

    def plain() -> None:
        lm.text_losses(batch).sum().backward()
        lm.module.zero_grad(set_to_none=True)

    def products(engine: GradientProducts) -> Callable[[], None]:
        def run() -> None:
            with engine:
                engine(batch)

        return run

    return _in_turns({PLAIN: plain, **{name: products(engine) for name, engine in engines.items()}}, turns)


def _method_rows(lm: LanguageModel, encoded, target_rows, *, turns: int) -> tuple[dict[str, list[float]], float]:
    """Whole methods with one target and no halves, what is done once left out; and what fitting ekfac's factors costs."""
    columns = prepare_targets(lm, read_targets({"t": oracle.read_texts(target_rows)}), halves=False)
    batch = make_batch(encoded, positions=list(range(len(encoded))), device=lm.device)
    rng = np.random.default_rng(1)
    texts = [{"input_ids": rng.integers(1, lm.vocabulary_size, lm.max_tokens).tolist()} for _ in range(NUM_FITTED)]

    def plain() -> None:
        lm.text_losses(batch).sum().backward()
        lm.module.zero_grad(set_to_none=True)

    with tempfile.TemporaryDirectory() as folder:
        begin = now()
        fit_factors(lm, texts, Path(folder) / "factors")
        fit_seconds = (now() - begin) / NUM_FITTED
        options = {
            "grad_dot": ("grad_dot", {}),
            "two_forward": ("two_forward", {"tolerance": math.inf}),
            "two_forward in forward mode": ("two_forward", {"tolerance": 0.0}),
            "ekfac": ("ekfac", {"factors": str(Path(folder) / "factors")}),
            "less": ("less", {}),
        }
        made = {name: plugins.create("oracle.methods", *given) for name, given in options.items()}
        with lm.preserved():
            for method in made.values():
                method.prepare(lm, columns)
                method.measure(encoded)  # what is checked on the first texts
            jobs = {f"{name}, the whole method": partial(method.measure, encoded) for name, method in made.items()}
            seconds = _in_turns({PLAIN: plain, **jobs}, turns)
    return seconds, fit_seconds * len(encoded) / statistics.median(seconds[PLAIN])


def _step_rows(lm: LanguageModel, encoded, target_rows, *, turns: int, workdir: Path) -> dict[str, list[float]]:
    """`one_step` against a probe as released code does it: reload the checkpoint, step, evaluate target texts one at a time."""
    columns = prepare_targets(lm, read_targets({"t": oracle.read_texts(target_rows)}))
    singles = [make_batch([text], positions=[0], device=lm.device) for text in lm.encode(target_rows)]
    method = OneStep(max_grad_norm=1.0)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "probe_state.pt"
    buffer = io.BytesIO()
    torch.save({"model": lm.module.state_dict(), "optimizer": lm.optimizer.state_dict()}, buffer)
    path.write_bytes(buffer.getvalue())

    def reloading() -> None:
        state = torch.load(path, weights_only=True)
        lm.module.load_state_dict(state["model"])
        lm.optimizer.load_state_dict(state["optimizer"])
        lm.optimizer.zero_grad()
        lm.text_losses(make_batch([encoded[0]], positions=[0], device=lm.device)).sum().backward()
        torch.nn.utils.clip_grad_norm_(lm.module.parameters(), 1.0)
        lm.optimizer.step()
        with torch.no_grad():
            for single in singles:
                lm.text_losses(single)

    with lm.preserved():
        method.prepare(lm, columns)
        result = _in_turns(
            {"one_step": lambda: method.measure([encoded[0]]), "reload from disk, target texts one by one": reloading}, turns
        )
    path.unlink()
    return result


def _in_turns(jobs: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(turns + 1):
        for name, job in jobs.items():
            begin = now()
            job()
            spent = now() - begin
            if turn:  # the first turn warms up
                seconds[name].append(spent)
    return seconds


def _ratio(values: list[float], baseline: list[float]) -> float:
    return statistics.median(value / base for value, base in zip(values, baseline, strict=True))


if __name__ == "__main__":
    main()
