"""The main job on texts that every machine has: Python's own library, with a small model made on the spot.

Label a sample, fit the surrogates, score the pool, select, and train two copies of the same checkpoint, one on
the selection and one on random texts, for the same number of tokens. Every stage keeps its result in the run
folder; killed and run again, the demo continues.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oracle.artifacts import atomic_folder, provenance, read_json, require_same, write_json
from oracle.comparison import MIN_GROUP, TargetAgreement, agreement, noise_ceiling
from oracle.errors import check_choice
from oracle.labels import Labels
from oracle.language_model import LanguageModel
from oracle.tables import figure
from oracle.target_columns import prepare_targets
from oracle.targets import read_targets, split_halves
from oracle.texts import write_texts
from surrogate import corpora
from surrogate.fidelity import fidelity_table
from surrogate.pipeline import Run
from surrogate.plots import plot_curves, plot_fidelity
from surrogate.selection import Budget, Selection
from surrogate.training.loop import TrainingCurve, TrainingPlan, train
from surrogate.training.small_models import build_model, train_tokenizer

TARGET = "documentation"
SURROGATES = ("ridge", "trees", "network")
LEARNING_RATE = 2e-3
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much the demo does."""

    num_texts: int
    vocabulary_size: int
    width: int
    num_layers: int
    max_tokens: int
    warmup_tokens: int
    training_tokens: int
    sample_size: int
    num_one_step: int
    num_target_texts: int
    row_tokens: int = 256
    rows_per_step: int = 8


SIZES = {
    "full": DemoSize(
        num_texts=6000,
        vocabulary_size=2048,
        width=128,
        num_layers=3,
        max_tokens=256,
        warmup_tokens=480_000,
        training_tokens=400_000,
        sample_size=500,
        num_one_step=32,
        num_target_texts=48,
    ),
    "tiny": DemoSize(
        num_texts=5000,
        vocabulary_size=512,
        width=32,
        num_layers=2,
        max_tokens=128,
        warmup_tokens=16_000,
        training_tokens=16_000,
        sample_size=120,
        num_one_step=12,
        num_target_texts=16,
        row_tokens=128,
        rows_per_step=4,
    ),
}


def run_demo(folder: Path, *, size: str = "full", seed: int = 0) -> dict[str, Any]:
    """Run (or continue) the demo.

    Args:
        folder: Run folder.
        size: "full" or "tiny".
        seed: Seed of everything.

    Returns:
        The summary that the command prints as JSON.

    Raises:
        MismatchError: The folder holds a demo of another size or seed.
    """
    check_choice("size", size, SIZES)
    demo = SIZES[size]
    run = Run(folder)
    identity = {"demo": size, "seed": seed}
    if (folder / "demo.json").exists():
        require_same(read_json(folder / "demo.json"), identity, where=folder)
        _say(f"going on with the demo in {folder}; name another folder to begin anew")
    else:
        write_json(folder / "demo.json", identity)
    targets = _build_pool(run, demo, seed=seed)
    lm = _warmed_up(run, demo, seed=seed)
    labels, steps = _label(run, lm, targets["labelling"], demo=demo, seed=seed)
    found = _agreement(run, steps, labels)
    fidelity = _fit(run, lm)
    selection = run.select(Budget(fraction=0.2), lm=lm)
    _say(f"selected {selection.num_texts} texts of {len(run.pool())} ({selection.num_tokens} tokens): {_kinds(run, selection)}")
    curves = {
        name: _train(run, name, text_ids, targets=targets["judging"], demo=demo, seed=seed)
        for name, text_ids in (("random", None), ("selected", selection.text_ids))
    }
    summary = _summary(run, labels, steps=steps, fidelity=fidelity, curves=curves, demo=demo)
    summary |= {"agreement_with_one_step": found.spearman, "agreement_with_one_step_within_kinds": found.spearman_within}
    _plot(run, labels, curves)
    write_json(folder / "report.json", summary)
    _say(_comparison(summary))
    return summary


# ---------------------------------------------------------------------- stages


def _build_pool(run: Run, demo: DemoSize, *, seed: int) -> dict[str, dict[str, str]]:
    """Read the corpus once; pool and target texts stay in the run folder, one half to label with and one to judge by."""
    files = {part: run.folder / "targets" / f"{TARGET}_{part}.parquet" for part in ("labelling", "judging")}
    if not files["judging"].exists():
        _say("reading Python's own library ...")
        corpus = corpora.load("python_library", num_texts=demo.num_texts, seed=seed)
        run.set_pool(corpus.pool)
        target = read_targets({TARGET: corpus.targets[TARGET]})[0]
        in_first = split_halves(target, seed=seed)
        for part, wanted in (("labelling", True), ("judging", False)):
            write_texts(target.texts.select(np.flatnonzero(in_first == wanted)), files[part])
    _say(
        f"pool: {len(run.pool())} texts of {len(set(run.pool()['kind']))} kinds; "
        f"target: {TARGET}, half of it to label with, half to judge by"
    )
    return {part: {TARGET: str(path)} for part, path in files.items()}


def _warmed_up(run: Run, demo: DemoSize, *, seed: int) -> LanguageModel:
    """Make tokenizer and model, train them on random texts, keep the checkpoint with its optimiser."""
    checkpoint = run.folder / "checkpoint"
    if not checkpoint.exists():
        tokenizer_folder = run.folder / "tokenizer"
        if not tokenizer_folder.exists():
            with atomic_folder(tokenizer_folder) as partial:
                train_tokenizer(run.pool()["text"], vocabulary_size=demo.vocabulary_size).save_pretrained(partial)
        from transformers import AutoTokenizer

        module = build_model(
            "llama",
            vocabulary_size=demo.vocabulary_size,
            width=demo.width,
            num_layers=demo.num_layers,
            context=demo.max_tokens,
            seed=seed,
        )
        lm = LanguageModel(
            module, AutoTokenizer.from_pretrained(tokenizer_folder), _optimizer(module), max_tokens=demo.max_tokens
        )
        plan = _plan(demo, num_tokens=demo.warmup_tokens, warmup_steps=10, seed=seed)
        curve = train(lm, run.pool(), plan, folder=run.folder / "warmup", title="warm-up")
        lm.save(checkpoint)
        run.set_cost("warm-up", seconds=curve.seconds, flops=_training_flops(lm, demo.warmup_tokens))
    return LanguageModel.from_pretrained(checkpoint, max_tokens=demo.max_tokens)


def _label(run: Run, lm: LanguageModel, targets: Mapping[str, str], *, demo: DemoSize, seed: int) -> tuple[Labels, Labels]:
    options: dict[str, Any] = {"max_target_texts": demo.num_target_texts, "seed": seed, "max_grad_norm": MAX_GRAD_NORM}
    labels = run.label(
        lm,
        targets,
        sample_size=demo.sample_size,
        method="grad_dot",
        model_path=str(run.folder / "checkpoint"),
        **options,
    )
    steps = run.label(
        lm, targets, sample_size=demo.num_one_step, method="one_step", name="one_step_labels", block_size=4, **options
    )
    found = _agreement(run, steps, labels)
    _say(
        f"grad_dot and one_step agree on {found.num_texts} texts: Spearman {found.spearman:.3f}, within kinds "
        f"{figure(found.spearman_within)} (of {MIN_GROUP} or more of these texts); noise ceiling of the labels "
        f"{noise_ceiling(labels)[TARGET]:.3f}"
    )
    return labels, steps


def _agreement(run: Run, steps: Labels, labels: Labels) -> TargetAgreement:
    """Agreement of grad_dot with one_step, over all texts that have both and within their kinds."""
    return agreement(steps, labels, groups=list(run.texts(steps.text_ids)["kind"]))[TARGET]


def _fit(run: Run, lm: LanguageModel) -> dict[str, Any]:
    fidelities = {name: run.fit(surrogate=name, lm=lm).fidelity_ for name in SURROGATES}
    last = fidelities[SURROGATES[-1]]
    rows = [(name, fidelity.surrogate[0]) for name, fidelity in fidelities.items()]
    _say(fidelity_table([*rows, ("constant", last.constant[0])], last.noise_ceiling))
    kept = ("spearman", "spearman_interval", "spearman_within_source", "r2", "top_recall", "mean_label_selected")
    return {name: {key: value for key, value in asdict(row).items() if key in kept} for name, row in rows}


def _train(
    run: Run, name: str, text_ids: list[str] | None, *, targets: Mapping[str, str], demo: DemoSize, seed: int
) -> TrainingCurve:
    """Train a copy of the checkpoint on a selection, or (None) on random texts of the pool; keep the curve."""
    path = run.folder / "training" / f"{name}.json"
    if path.exists():
        stored = read_json(path)
        return TrainingCurve(stored["steps"], stored["tokens"], stored["losses"])
    lm = LanguageModel.from_pretrained(run.folder / "checkpoint", max_tokens=demo.max_tokens)
    columns = prepare_targets(lm, read_targets(targets), halves=False)
    texts = run.pool() if text_ids is None else run.texts(text_ids)
    plan = _plan(demo, num_tokens=demo.training_tokens, warmup_steps=0, seed=seed + 1)
    curve = train(
        lm,
        texts,
        plan,
        evaluate=lambda model: {TARGET: float(columns.combine(columns.losses(model))[0])},
        folder=run.folder / "training" / name,
        title=f"train ({name})",
    )
    run.set_cost(f"train {name}", seconds=curve.seconds, flops=_training_flops(lm, curve.tokens[-1]))
    write_json(path, {"steps": curve.steps, "tokens": curve.tokens, "losses": curve.losses})
    return curve


# ---------------------------------------------------------------------- summary


def _summary(
    run: Run, labels: Labels, *, steps: Labels, fidelity: dict[str, Any], curves: dict[str, TrainingCurve], demo: DemoSize
) -> dict[str, Any]:
    random, selected = curves["random"].column(TARGET), curves["selected"].column(TARGET)
    costs = run.costs()
    selection_stages = [
        stage for stage in costs if stage not in ("warm-up", "one_step_labels") and not stage.startswith("train ")
    ]
    spent = {unit: sum(costs[stage][unit] for stage in selection_stages) for unit in ("seconds", "flops")}
    training = costs["train selected"]
    label_cost = labels.meta["cost"]
    whole_pool_flops = label_cost["label_flops"] / len(labels) * len(run.pool()) + label_cost["prepare_flops"]
    return {
        "pool": len(run.pool()),
        "labelled": len(labels),
        "one_step_labelled": len(steps),
        "fidelity": fidelity,
        "noise_ceiling": noise_ceiling(labels)[TARGET],
        "surrogate_used": run.predictor().surrogate_name,
        "target_loss": {"before": random[0], "random": random[-1], "selected": selected[-1]},
        "training_tokens": curves["random"].tokens[-1],
        "tokens_to_random": curves["selected"].tokens_to_reach(TARGET, random[-1]),
        "cost": {
            "stages": costs,
            "selection_seconds": round(spent["seconds"], 1),
            "selection_flops": spent["flops"],
            "selection_share_of_training_flops": spent["flops"] / training["flops"],
            "selection_share_of_training_seconds": spent["seconds"] / training["seconds"],
            "labelling_the_whole_pool_flops": whole_pool_flops,
        },
        "provenance": provenance(),
        "run_folder": str(run.folder),
    }


def _comparison(summary: dict[str, Any]) -> str:
    loss, needed, given = summary["target_loss"], summary["tokens_to_random"], summary["training_tokens"]
    reached = "not reached" if needed is None else f"{needed:,.0f} ({needed / given:.0%})"
    cost = summary["cost"]
    return "\n".join(
        [
            f"{'target loss (nats per token)':34}{'before':>10}{'random':>10}{'selected':>10}",
            f"{'':34}{loss['before']:>10.3f}{loss['random']:>10.3f}{loss['selected']:>10.3f}",
            f"tokens to reach random's final loss: random {given:,}, selected {reached}",
            f"cost of labels, features, fitting and scoring: {cost['selection_seconds']:.0f} s, "
            f"{cost['selection_flops']:.2e} FLOPs, "
            f"{cost['selection_share_of_training_flops']:.0%} of the FLOPs of one of the two training runs; "
            f"labelling the whole pool: {cost['labelling_the_whole_pool_flops']:.2e} FLOPs",
        ]
    )


def _plot(run: Run, labels: Labels, curves: dict[str, TrainingCurve]) -> None:
    plot_curves(
        run.folder / "loss_curves.png",
        {name: (curve.tokens, curve.column(TARGET)) for name, curve in curves.items()},
        target=TARGET,
    )
    predictor = run.predictor()
    held_out = predictor.held_out_
    plot_fidelity(
        run.folder / "fidelity.png",
        held_out[:, 0],
        labels.take(held_out.text_ids).values[:, 0],
        title=f"{predictor.surrogate_name}: {TARGET}, Spearman {predictor.fidelity_.surrogate[0].spearman:.2f}",
        units=labels.units,
    )


def _kinds(run: Run, selection: Selection) -> str:
    """Show how the selection differs from the pool in kinds, which no surrogate was shown."""
    pool, chosen = run.pool(), run.texts(selection.text_ids)
    parts = []
    for kind in sorted(set(pool["kind"])):
        before, after = (np.mean([other == kind for other in texts["kind"]]) for texts in (pool, chosen))
        parts.append(f"{kind} {before:.0%} -> {after:.0%}")
    corrupted = [np.mean([bool(other) for other in texts["corruption"]]) for texts in (pool, chosen)]
    return ", ".join(parts) + f"; corrupted {corrupted[0]:.0%} -> {corrupted[1]:.0%}"


def _plan(demo: DemoSize, *, num_tokens: int, warmup_steps: int, seed: int) -> TrainingPlan:
    return TrainingPlan(
        num_tokens=num_tokens,
        row_tokens=demo.row_tokens,
        rows_per_step=demo.rows_per_step,
        warmup_steps=warmup_steps,
        max_grad_norm=MAX_GRAD_NORM,
        evaluate_every=10,
        checkpoint_every=25,
        seed=seed,
    )


def _optimizer(module: Any) -> Any:
    import torch

    return torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)


def _training_flops(lm: LanguageModel, num_tokens: int) -> float:
    return 3 * lm.forward_flops_per_token * num_tokens


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")
