"""Scoring large corpora: throughput, prediction, faster encoders, memory, scaling, and what a trillion tokens cost.

Each part prints a table; the last line is one JSON line for all of them.

- throughput: texts per second from parquet to parquet, beside the bare encoder's own `encode` of the same texts, and each
  step alone.
- prediction: rows per second from features in memory.
- encoders: MiniLM in the given order and sorted, in bfloat16 and int8, by ONNX: rows per second, and whether ranks stay.
- memory: the peak beyond the model, with generated texts.
- scaling: the same bytes from the local engine, Ray and a cluster of two nodes.
- trillion: core-hours for 10^12 tokens from the rates of `throughput`, or of the JSON line in the file `--rates`.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --parts throughput trillion --encoders sentence --seconds 90
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scoring_encoders import encoders
from scoring_scaling import memory, scaling, trillion
from scoring_speed import ENCODERS, Part, prediction, throughput
from setting import arguments, load_pool, report, start

from oracle.tables import aligned
from oracle.texts import plain_strings

PARTS = ("throughput", "prediction", "encoders", "memory", "scaling", "trillion")
MIN_CHARS = 20  # shorter texts of the pool are left out


def main() -> None:
    """Run the benchmark."""
    options = _options()
    start(options)
    folder = options.workdir / "scoring"
    strings: list[str] = []
    if set(options.parts) - {"prediction", "trillion"}:
        pool, _ = load_pool(options)
        strings = [string for string in plain_strings(pool) if len(string) >= MIN_CHARS]
    results: dict[str, Any] = {}
    if options.rates:
        lines = [line for line in options.rates.read_text().splitlines() if line.startswith("{")]
        results["throughput"] = json.loads(lines[-1])["parts"]["throughput"]
    parts: dict[str, Callable[[], Part]] = {
        "throughput": lambda: throughput(strings, options, folder),
        "prediction": lambda: prediction(options),
        "encoders": lambda: encoders(strings, options, folder),
        "memory": lambda: memory(strings, options, folder),
        "scaling": lambda: scaling(strings, options, folder),
        "trillion": lambda: trillion(results["throughput"], options),
    }
    asked = [part for part in PARTS if part in options.parts]
    try:
        for part in asked:
            title, header, rows, results[part] = parts[part]()
            if part != asked[-1]:
                print(f"{title}\n{aligned([header, *rows])}\n", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    given = {name: value for name, value in vars(options).items() if name not in ("workdir", "rates", "target", "limit")}
    report(title, header, rows, {"benchmark": "scoring", "options": given, "parts": results})


def _options() -> argparse.Namespace:
    parser = arguments(str(__doc__).splitlines()[0], pool=False)
    parser.add_argument("--pool", nargs="+", default=["python_library"], help="files with real text, or a bundled corpus")
    parser.set_defaults(target=[], limit=None)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--turns", type=int, default=3, help="a figure is the median over so many")
    parser.add_argument("--targets", type=int, default=3, help="targets that are predicted")
    parser.add_argument("--tokens", type=int, default=250, help="tokens per text, by MiniLM's tokenizer")
    parser.add_argument("--files", type=int, default=8, help="files that a corpus is in")
    parser.add_argument("--encoders", nargs="+", choices=list(ENCODERS), default=list(ENCODERS), help="of throughput")
    parser.add_argument("--seconds", type=float, default=40.0, help="about so long throughput scores on one core, each turn")
    parser.add_argument("--prediction-rows", type=int, default=100_000)
    parser.add_argument("--encoder-texts", type=int, default=600)
    parser.add_argument("--memory-rows", type=int, nargs="+", default=[1_000_000, 4_000_000])
    parser.add_argument("--memory-workers", type=int, default=0, help="0 takes one per core")
    parser.add_argument("--scaling-rows", type=int, default=20_000)
    parser.add_argument("--scaling-encoder", choices=list(ENCODERS), default="hashed_ngrams")
    parser.add_argument("--machine-cores", type=int, default=64, help="of the machines of the estimate")
    parser.add_argument("--rates", type=Path, help="what an earlier run with the part throughput printed")
    options = parser.parse_args()
    if "trillion" in options.parts and "throughput" not in options.parts and not options.rates:
        parser.error("trillion needs the part throughput, or --rates with what it printed")
    return options


if __name__ == "__main__":
    main()
