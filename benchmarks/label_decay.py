"""How fast labels grow old: their rank agreement after so many steps, at the last weights and at averaged ones.

A small model is warmed up and trained on, on random texts. After some steps a probe of texts that it is not trained on is
labelled, at the weights of the last step and at running averages with several decays. Agreement is Spearman's correlation, the
mean over the target sets, of the probe's labels at the start with those so many steps later. What is lost within a few
steps is noise of the checkpoint; what goes on falling is drift.

    python benchmarks/label_decay.py --pool 'pool-*.parquet' --target math=math_dev.jsonl code=code_dev.jsonl
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
from setting import arguments, load_pool, report, shape_arguments, start, warmed_up_as_asked

from oracle.comparison import spearman
from oracle.measure import label
from oracle.texts import list_text_ids
from surrogate.training.loop import TrainingPlan, train
from surrogate.training.sampling import draw_order
from surrogate.training.weight_average import WeightAverage

ROWS_PER_STEP = 8


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.splitlines()[0])
    shape_arguments(parser, width=96, layers=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--probe", type=int, default=400, help="texts that are labelled each time")
    parser.add_argument("--target-texts", type=int, default=48)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="steps after the start")
    parser.add_argument(
        "--decays", type=float, nargs="+", default=[0.0, 0.95, 0.98], help="of averages; 0 is the last step's weights"
    )
    parser.add_argument("--settle", type=int, default=100, help="steps before the start, over which the averages form")
    options = parser.parse_args()
    start(options)
    found = np.array([_one_seed(options, seed) for seed in options.seeds])  # (seeds, decays, steps)
    report(
        f"agreement with labels of the start; mean (lowest to highest of {len(options.seeds)} seeds)",
        ["weights", *(f"after {steps}" for steps in options.steps)],
        [
            [
                f"average {decay:g}" if decay else "last step",
                *(_spread(found[:, row, column]) for column in range(found.shape[2])),
            ]
            for row, decay in enumerate(options.decays)
        ],
        {
            "benchmark": "label_decay",
            "options": {name: value for name, value in vars(options).items() if name not in ("workdir", "pool", "target")},
            "agreement": found.tolist(),
        },
    )


def _one_seed(options: Any, seed: int) -> np.ndarray:
    """Return the agreements of one run, (decays, steps)."""
    pool, targets = load_pool(options)
    folder = options.workdir / f"label-decay-{seed}" / "model"
    lm = warmed_up_as_asked(folder, pool, options, seed=seed, rows_per_step=ROWS_PER_STEP)
    order = draw_order(list_text_ids(pool), f"{seed}:probe")
    probe, rest = pool.select(np.sort(order[: options.probe])), pool.select(np.sort(order[options.probe :]))
    averages = {decay: WeightAverage(lm.module, decay=decay) for decay in options.decays if decay}
    for average in averages.values():
        average.watch(lm.optimizer)
    labels: list[list[np.ndarray]] = []  # at each mark, for each decay: (probe, targets)
    marks = [options.settle + steps for steps in (0, *options.steps)]
    for number, (before, mark) in enumerate(zip([0, *marks], marks, strict=False)):
        tokens = (mark - before) * ROWS_PER_STEP * options.tokens
        if tokens:
            train(
                lm,
                rest,
                TrainingPlan(
                    num_tokens=tokens,
                    row_tokens=options.tokens,
                    rows_per_step=ROWS_PER_STEP,
                    evaluate_every=10**6,
                    seed=1000 * seed + number,
                ),
                title=f"seed {seed}, to step {mark}",
            )
        labels.append([])
        for decay in options.decays:
            with averages[decay].applied() if decay else nullcontext():
                measured = label(
                    lm,
                    probe,
                    targets,
                    method="grad_dot",
                    max_grad_norm=1.0,
                    halves=False,
                    seed=seed,
                    max_target_texts=options.target_texts,
                )
            labels[-1].append(measured.values)
    return np.array([[_agreement(labels[0][row], later[row]) for later in labels[1:]] for row in range(len(options.decays))])


def _agreement(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.mean([spearman(a, b) for a, b in zip(first.T, second.T, strict=True)]))


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.2f} ({values.min():.2f} to {values.max():.2f})"


if __name__ == "__main__":
    main()
