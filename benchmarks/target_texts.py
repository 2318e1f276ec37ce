"""How few target texts `one_step` needs: labels per second over a probe with a thousand, and what agreement is left.

The baseline does what released code does: for each text it reloads the checkpoint from disk, steps, and evaluates 1,024
reference texts one at a time. `one_step` keeps the state in memory, batches the target texts and takes fewer of them.
Every text's effect on every single reference text is measured once; a smaller target set is then a subset of them, so all
rows speak of the same steps. `corrected` adds what `grad_dot`, nearly free, says of the target texts that were left out
(`oracle.control_variate`).

    python benchmarks/target_texts.py --pool 'pool-*.parquet'
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from setting import arguments, claim, load_pool, report, shape_arguments, start, warmed_up_as_asked

from oracle.artifacts import fingerprint
from oracle.comparison import spearman
from oracle.control_variate import corrected_values
from oracle.encoding import EncodedText, make_batch
from oracle.labels import Labels
from oracle.language_model import LanguageModel
from oracle.measure import label
from oracle.texts import list_text_ids

COUNTS = (16, 32, 64, 96, 128, 256)
TIMED = 32  # texts whose labels are timed, what is done once included
OPTIONS = {"max_grad_norm": 1.0, "subtract_shared": True}


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.splitlines()[0])
    shape_arguments(parser, tokens=128)
    parser.add_argument("--references", type=int, default=1024, help="reference texts of the baseline")
    parser.add_argument("--texts", type=int, default=64, help="texts to label")
    parser.add_argument("--draws", type=int, default=5, help="random subsets per number of target texts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start(options)
    pool, _ = load_pool(options)
    folder = options.workdir / "target-texts"
    claim(
        folder / "options.json", {name: str(value) for name, value in vars(options).items() if name not in ("workdir", "threads")}
    )
    lm = warmed_up_as_asked(folder / "model", pool, options)
    drawn = pool.shuffle(seed=options.seed).select(range(options.texts + options.references))
    sample, references = drawn.select(range(options.texts)), drawn.select(range(options.texts, len(drawn)))
    singles = {text_id: references.select([row]) for row, text_id in enumerate(list_text_ids(references))}
    shared: dict[str, Any] = {"method": "one_step", "halves": False, "seed": options.seed, **OPTIONS}
    effects = label(lm, sample, singles, workdir=folder / "one_step", block_size=4, **shared)
    weights = np.array([text.num_targets for text in lm.encode(references)], dtype=np.float64)
    full = effects.values @ weights / weights.sum()  # (S,)
    baseline = _probe_seconds(lm, sample, references, path=folder / "probe_state.pt")
    found = [
        _row(lm, sample, references, count=count, effects=effects, weights=weights, full=full, folder=folder, options=options)
        for count in COUNTS
        if count < len(references)
    ]
    rows = [
        [
            str(row["target_texts"]),
            f"{1000 * row['seconds_per_text']:.0f}",
            f"{baseline / row['seconds_per_text']:.1f}",
            f"{row['spearman']:.3f}",
            f"{row['noise_ceiling']:.3f}",
            f"{row['spearman_corrected']:.3f}",
        ]
        for row in found
    ]
    report(
        f"{options.texts} texts, {len(references)} reference texts; the reloading probe takes {1000 * baseline:.0f} ms per text",
        ["target texts", "ms per text", "labels per second over the probe", "Spearman with all", "noise ceiling", "corrected"],
        rows,
        {"benchmark": "target_texts", "probe_seconds_per_text": baseline, "references": len(references), "rows": found},
    )


def _row(
    lm: LanguageModel,
    sample: Any,
    references: Any,
    *,
    count: int,
    effects: Labels,
    weights: np.ndarray,
    full: np.ndarray,
    folder: Path,
    options: Any,
) -> dict[str, float]:
    """Agreement of labels on `count` of the reference texts with those on all, and the time that they take."""
    rng = np.random.default_rng([options.seed, count])
    subsets = [np.sort(rng.permutation(len(weights))[:count]) for _ in range(options.draws)]
    few = np.stack([effects.values[:, rows] @ weights[rows] / weights[rows].sum() for rows in subsets], axis=1)  # (S, draws)
    targets = {f"draw-{number}": references.select(rows) for number, rows in enumerate(subsets)}
    slope = label(
        lm,
        sample,
        {"all": references, **targets},
        method="grad_dot",
        max_grad_norm=OPTIONS["max_grad_norm"],
        workdir=folder / f"grad_dot-{fingerprint(count)}",
        seed=options.seed,
    )
    corrected = np.stack(
        [corrected_values(few[:, d], slope.values[:, 1 + d], slope.values[:, 0]) for d in range(options.draws)], 1
    )
    agreements = [spearman(slope.halves[0, :, 1 + draw], slope.halves[1, :, 1 + draw]) for draw in range(options.draws)]
    seconds = []
    for number in range(2):
        begin = time.perf_counter()
        label(lm, sample.select(range(TIMED)), targets["draw-0"], method="one_step", halves=False, seed=number, **OPTIONS)
        seconds.append((time.perf_counter() - begin) / TIMED)
    return {
        "target_texts": count,
        "seconds_per_text": min(seconds),
        "spearman": float(np.mean([spearman(few[:, draw], full) for draw in range(options.draws)])),
        "spearman_lowest": float(np.min([spearman(few[:, draw], full) for draw in range(options.draws)])),
        "spearman_corrected": float(np.mean([spearman(corrected[:, draw], full) for draw in range(options.draws)])),
        "spearman_corrected_lowest": float(np.min([spearman(corrected[:, draw], full) for draw in range(options.draws)])),
        "noise_ceiling": float(np.mean([2 * r / (1 + r) for r in agreements])),
    }


def _probe_seconds(lm: LanguageModel, sample: Any, references: Any, *, path: Path, num_texts: int = 3) -> float:
    """Seconds per text of a probe that reloads its checkpoint and evaluates the reference texts one at a time."""
    assert lm.optimizer is not None
    singles = [make_batch([text], positions=[0], device=lm.device) for text in lm.encode(references)]
    texts: list[EncodedText] = lm.encode(sample.select(range(num_texts)))
    torch.save({"model": lm.module.state_dict(), "optimizer": lm.optimizer.state_dict()}, path)
    seconds = []
    with lm.preserved(), torch.enable_grad():
        for text in texts:
            begin = time.perf_counter()
            state = torch.load(path, weights_only=True)
            lm.module.load_state_dict(state["model"])
            lm.optimizer.load_state_dict(state["optimizer"])
            lm.optimizer.zero_grad()
            lm.text_losses(make_batch([text], positions=[0], device=lm.device)).sum().backward()
            torch.nn.utils.clip_grad_norm_(lm.module.parameters(), 1.0)
            lm.optimizer.step()
            with torch.no_grad():
                for single in singles:
                    lm.text_losses(single)
            seconds.append(time.perf_counter() - begin)
    path.unlink()
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
