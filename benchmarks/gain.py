"""What a selection buys: training tokens to reach the loss that random texts reach, and what the selection cost.

For every seed a small Llama model is warmed up on random texts, a sample is labelled, the pool is scored, and for each
target one copy of the checkpoint is trained on the selection and one on random texts for the same number of tokens. Labels
use one half of each target set; losses are measured on the other half. Costs of labels (with the target gradients),
features, fitting and scoring are counted in the same unit, FLOPs, and measured in seconds; one labelling, one set of
features and one fit serve all targets, and each target is charged the whole of it. A loss is the mean of three evaluations
in a row. Training on a selection stops once random's last loss is reached (`--to-the-end` goes on); seconds are without
the evaluations.

    python benchmarks/gain.py --pool 'pool-*.parquet' --target math=math_dev.jsonl code=code_dev.jsonl
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
from setting import arguments, claim, load_pool, report, shape_arguments, start, warmed_up_as_asked

from oracle.artifacts import read_json, write_json
from oracle.labels import Labels
from oracle.language_model import LanguageModel
from oracle.measure import label
from oracle.target_columns import prepare_targets
from oracle.targets import TargetSet, read_targets, split_halves
from surrogate.pipeline import Run
from surrogate.selection import Budget, select
from surrogate.training.loop import TrainingCurve, TrainingPlan, train

WINDOW = 3  # evaluations that a loss is averaged over: single ones jump, at a constant learning rate


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labels", type=int, default=600)
    parser.add_argument("--fraction", type=float, default=0.2, help="share of the pool's texts that is selected")
    shape_arguments(parser)
    parser.add_argument("--training-tokens", type=int, default=800_000)
    parser.add_argument("--target-texts", type=int, default=64, help="target texts per set to label with")
    parser.add_argument("--judge-texts", type=int, default=64, help="target texts per set to measure the loss on")
    parser.add_argument(
        "--to-the-end", action="store_true", help="train on the selection for all tokens, not only until random's loss is reached"
    )
    parser.add_argument("--surrogate", default="ridge")
    parser.add_argument("--encoder", nargs="+", default=["hashed_ngrams", "text_stats"])
    options = parser.parse_args()
    start(options)
    pool, targets = load_pool(options)
    results = [_one_seed(options, pool, targets, seed=seed) for seed in options.seeds]
    report(
        f"{len(pool)} texts, {options.labels} labels, {options.training_tokens:,} training tokens, "
        f"mean (lowest to highest of {len(results)} seeds)",
        [
            "target",
            "loss before",
            "random",
            "selected (at its stop)",
            "share of tokens to random's loss",
            "with cost of selecting",
            "held-out Spearman",
        ],
        _table(results, list(targets)),
        {
            "benchmark": "gain",
            "pool": len(pool),
            "labels": options.labels,
            "training_tokens": options.training_tokens,
            "fraction": options.fraction,
            "surrogate": options.surrogate,
            "encoders": options.encoder,
            "seeds": results,
        },
    )


def _table(results: list[dict[str, Any]], names: list[str]) -> list[list[str]]:
    """One row per target with the spread over seeds, and two rows of what selecting cost."""
    columns = ("before", "random", "selected", "share_of_tokens", "share_of_flops_with_selection", "spearman")
    rows = [[name, *(_spread([result["targets"][name][column] for result in results]) for column in columns)] for name in names]
    for unit in ("flops", "seconds"):
        spread = _spread([result[f"selection_{unit}_share"] for result in results])
        rows.append([f"cost of selecting, share of {unit} of training", "", "", "", "", spread, ""])
    return rows


def _one_seed(options: Any, pool: Any, targets: dict[str, Any], *, seed: int) -> dict[str, Any]:
    run = Run(options.workdir / f"gain-{seed}")
    run.set_pool(pool)
    ignored = ("workdir", "threads", "seeds", "pool")
    claim(run.folder / "options.json", {name: value for name, value in vars(options).items() if name not in ignored})
    lm = warmed_up_as_asked(run.folder / "model", pool, options, seed=seed, rows_per_step=8)
    labelling, judging = _halves(targets, options, seed=seed)
    labels = label(
        lm,
        run.sample(options.labels, seed=seed),
        labelling,
        method="grad_dot",
        workdir=run.folder / "labels",
        seed=seed,
        max_grad_norm=1.0,
    )
    predictor = run.fit(options.encoder, options.surrogate, lm=lm, seed=seed)
    scores = run.score(options.surrogate, lm=lm)
    spearman = {row.target: row.spearman for row in predictor.fidelity_.surrogate}
    curves = {"random": _train(run, lm, "random", None, judging=judging, options=options, seed=seed)}
    goals = {name: curves["random"]["curve"].smoothed(name, window=WINDOW)[-1] for name in targets}
    for name in targets:
        selection = select(
            scores,
            budget=Budget(fraction=options.fraction),
            rule="top",
            combine=name,
            labels=labels,
            fidelity=predictor.fidelity_,
            allow_low_fidelity=True,
            seed=seed,
        )
        curves[name] = _train(run, lm, name, selection.text_ids, judging=judging, options=options, seed=seed, goal=goals[name])
    selecting = _cost_of_selecting(run, labels, options)
    training_flops = 3 * lm.forward_flops_per_token * curves["random"]["curve"].tokens[-1]
    flops_share = selecting["flops"] / training_flops
    found = {}
    for name in targets:
        random, selected = (curves[which]["curve"].smoothed(name, window=WINDOW) for which in ("random", name))
        tokens = curves[name]["curve"].tokens_to_reach(name, goals[name], window=WINDOW)
        share = None if tokens is None else tokens / curves["random"]["curve"].tokens[-1]
        found[name] = {
            "before": random[0],
            "random": random[-1],
            "selected": selected[-1],
            "share_of_tokens": share,
            "spearman": spearman[name],
            "share_of_flops_with_selection": None if share is None else share + flops_share,
        }
    return {
        "seed": seed,
        "targets": found,
        "selection_flops_share": flops_share,
        "selection_seconds_share": selecting["seconds"] / curves["random"]["seconds"],
        "selecting": selecting,
    }


def _cost_of_selecting(run: Run, labels: Labels, options: Any) -> dict[str, float]:
    """FLOPs and seconds of labels with their target gradients, features of the whole pool, fitting and scoring."""
    cost, stages = labels.meta["cost"], run.costs()
    rest = [stage for stage in stages if stage.startswith("features ") or stage in (f"fit {options.surrogate}", "score")]
    return {
        "flops": cost["label_flops"] + cost["prepare_flops"] + sum(stages[stage]["flops"] for stage in rest),
        "seconds": cost["label_seconds"] + cost["prepare_seconds"] + sum(stages[stage]["seconds"] for stage in rest),
    }


def _train(
    run: Run,
    lm: LanguageModel,
    name: str,
    text_ids: list[str] | None,
    *,
    judging: list[TargetSet],
    options: Any,
    seed: int,
    goal: float | None = None,
) -> dict[str, Any]:
    """Train a copy of the checkpoint; keep the curve."""
    path = run.folder / "training" / f"{name}.json"
    if not path.exists():
        copy = LanguageModel.from_pretrained(run.folder / "model", max_tokens=options.tokens)
        columns = prepare_targets(
            copy, judging if text_ids is None else [target for target in judging if target.name == name], halves=False
        )
        plan = replace(
            TrainingPlan(num_tokens=options.training_tokens),
            row_tokens=options.tokens,
            rows_per_step=8,
            evaluate_every=10,
            seed=seed + 1,
            checkpoint_every=100,
        )
        curve = train(
            copy,
            run.pool() if text_ids is None else run.texts(text_ids),
            plan,
            folder=run.folder / "training" / name,
            title=f"seed {seed}: {name}",
            stop=None if goal is None or options.to_the_end else lambda curve: curve.smoothed(name, window=WINDOW)[-1] <= goal,
            evaluate=lambda model: dict(zip(columns.names, columns.combine(columns.losses(model)).tolist(), strict=True)),
        )
        write_json(path, asdict(curve))
    curve = TrainingCurve(**read_json(path))
    return {"curve": curve, "seconds": curve.seconds - curve.evaluation_seconds}


def _halves(targets: dict[str, Any], options: Any, *, seed: int) -> tuple[dict[str, TargetSet], list[TargetSet]]:
    """Split each target set into texts to label with and texts to judge by."""
    labelling, judging = {}, []
    for target in read_targets(targets):
        first = split_halves(target, seed=seed)
        labelling[target.name] = read_targets(
            {target.name: target.texts.select(np.flatnonzero(first))}, max_texts=options.target_texts, seed=seed
        )[0]
        judging += read_targets(
            {target.name: target.texts.select(np.flatnonzero(~first))}, max_texts=options.judge_texts, seed=seed
        )
    return labelling, judging


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "not reached" if not known else f"{np.mean(known):.3f} ({len(values) - len(known)} not reached)"
    return f"{np.mean(known):.3f} ({min(known):.3f} to {max(known):.3f})"


if __name__ == "__main__":
    main()
