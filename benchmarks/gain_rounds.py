"""What refreshing buys: target loss against the whole cost, for every way to choose texts round by round.

For every seed a small model is warmed up on random texts. Then, for every target set and for all of them together, copies of
that checkpoint are trained for the same number of tokens in rounds, each on the texts that a strategy chooses: at random, by
one ranking (`static`), by a ranking that is refreshed on a schedule (`refresh`) or only where it has drifted by then
(`drift`), and by every other strategy. `oracle` ranks by labels of the whole pool, measured once; `oracle_again`, which takes
hours and is not among the defaults, measures them anew as often as `refresh` does. Labels use one half of each target set,
losses are measured on the other. What a strategy spends on labels, features, fitting and scoring is counted in the same unit
as training, FLOPs, and in seconds, and stands in front of the training that it serves; features that runs share are charged to
each of them in full. A loss is the mean of the last three evaluations; where a pool has few texts of use, it rises again once
those are spent, so the lowest within random's whole cost is told too. With `--average-decay` labels and losses are measured
at a running average of the weights: at a constant rate those of the last step jump, and with them the labels
(`label_decay.py`) and the losses.

    python benchmarks/gain_rounds.py --pool 'pool-*.parquet' --target math=math_dev.jsonl code=code_dev.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from setting import arguments, averaged_beside, claim, load_pool, report, start, warmed_up

from oracle.artifacts import read_json, write_json
from oracle.labels import Labels
from oracle.language_model import LanguageModel
from oracle.measure import label
from oracle.target_columns import TargetColumns, prepare_targets
from oracle.targets import TargetSet, read_targets, split_halves
from oracle.texts import list_text_ids
from surrogate.scores import Scores
from surrogate.training.loop import TrainingPlan, train
from surrogate.training.refresher import Refresher
from surrogate.training.strategies import Ranking, RankingContext
from surrogate.training.weight_average import WeightAverage

WINDOW = 3  # evaluations that a loss is averaged over
TOGETHER = "together"
BLIND = ("random", "rs2", "loss")  # strategies that look at no target: one run serves all
SURROGATES = ("static", "refresh", "drift")


@dataclass(kw_only=True)
class WholePoolLabels:
    """Rank by labels of the whole pool, measured once for all targets."""

    plugin_name: ClassVar[str] = "oracle"
    needs_model: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = False
    adapts: ClassVar[bool] = False
    redraws: ClassVar[bool] = False

    targets: tuple[str, ...]
    labels: Any

    def rank(self, context: RankingContext) -> Ranking:
        """Return the labels of the candidates."""
        labels = self.labels.take(list_text_ids(context.candidate_texts()))
        columns = [labels.target_names.index(name) for name in self.targets]
        cost = labels.meta["cost"]
        return Ranking(
            scores=Scores(labels.values[:, columns], text_ids=labels.text_ids, target_names=list(self.targets)),
            costs={"label": {"seconds": cost["label_seconds"], "flops": cost["label_flops"]}},
        )


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--strategies", nargs="+", default=["random", "rs2", *SURROGATES, "target_similarity", "dsir", "oracle", "loss"]
    )
    parser.add_argument("--aims", nargs="+", default=None, help="target sets to select for, or 'together'; all by default")
    parser.add_argument("--architecture", default="llama")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256, help="longest text, and row length in training")
    parser.add_argument("--warmup-tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--round-tokens", type=int, default=196_608)
    parser.add_argument("--evaluate-every", type=int, default=48, help="optimiser steps between evaluations")
    parser.add_argument("--static-labels", type=int, default=400)
    parser.add_argument("--refresh-labels", type=int, default=200)
    parser.add_argument("--refresh-every", type=int, default=2, help="rounds from one refresh to the next")
    parser.add_argument("--repeat", action="store_true", help="let every round offer the texts of earlier ones again")
    parser.add_argument("--sampling", default="random", help="how a refresh draws the texts that it labels")
    parser.add_argument("--keep-labels", type=float, default=1.0, help="weight of labels one refresh old")
    parser.add_argument("--drift-threshold", type=float, default=0.8)
    parser.add_argument("--probe", type=int, default=32, help="texts labelled to see whether scores have drifted")
    parser.add_argument("--target-texts", type=int, default=48, help="target texts per set to label with")
    parser.add_argument("--judge-texts", type=int, default=48, help="target texts per set to measure the loss on")
    parser.add_argument("--rule", default="top_share", help="selection rule of all strategies that rank")
    parser.add_argument("--top-share", type=float, default=0.1, help="share that the rule top_share draws from")
    parser.add_argument("--combine", default="max_z", help="how several targets become one; 'mean' is that of the nats judged by")
    parser.add_argument("--average-decay", type=float, default=0.95, help="of the averaged weights; 0 takes the last ones")
    parser.add_argument("--surrogate", default="ridge")
    parser.add_argument("--encoder", nargs="+", default=["hashed_ngrams", "text_stats"])
    options = parser.parse_args()
    start(options)
    pool, targets = load_pool(options)
    aims = options.aims or [*targets, TOGETHER]
    results = [run for seed in options.seeds for run in _one_seed(options, pool, targets, aims=aims, seed=seed)]
    report(
        f"{len(pool)} texts, {options.rounds} rounds of {options.round_tokens:,} tokens, {options.architecture}; "
        f"mean (lowest to highest of {len(options.seeds)} seeds)",
        [
            "selected for",
            "strategy",
            "loss before",
            "loss after",
            "less random's",
            "lowest at (share of the training)",
            "rise after it",
            "at random's whole cost",
            "lowest within it",
            "share of oracle's gain",
            "cost to random's loss",
            "selecting, share of FLOPs",
            "share of seconds",
            "held-out Spearman",
            "refreshes",
        ],
        _table(results, aims, options.strategies),
        {
            "benchmark": "gain_rounds",
            "pool": len(pool),
            "options": {name: value for name, value in vars(options).items() if name not in ("workdir", "pool", "target")},
            "runs": [{key: value for key, value in run.items() if key != "curve"} for run in results],
        },
    )


def _one_seed(options: Any, pool: Any, targets: dict[str, Any], *, aims: list[str], seed: int) -> list[dict[str, Any]]:
    folder = options.workdir / f"gain-rounds-{options.architecture}-{seed}"
    ignored = ("workdir", "threads", "seeds", "pool", "aims", "strategies")
    claim(folder / "options.json", {name: value for name, value in vars(options).items() if name not in ignored})
    lm = warmed_up(
        folder / "model",
        pool,
        architecture=options.architecture,
        width=options.width,
        num_layers=options.layers,
        vocabulary_size=options.vocabulary,
        max_tokens=options.tokens,
        num_tokens=options.warmup_tokens,
        seed=seed,
        rows_per_step=8,
        average_decay=options.average_decay or None,
    )
    labelling, judging = _halves(targets, options, seed=seed)
    counts = [len(text.input_ids) for text in lm.encode(pool)]
    runs = []
    for strategy in options.strategies:
        for aim in [aims[0]] if strategy in BLIND else aims:
            names = tuple(targets) if aim == TOGETHER else (aim,)
            path = folder / "runs" / (strategy if strategy in BLIND else f"{strategy}-{aim}") / "run.json"
            if not path.exists():
                whole = None
                if strategy == "oracle":
                    whole = label(lm, pool, labelling, workdir=folder / "whole_pool", **_label_options(seed))
                curve = _train(
                    options,
                    folder,
                    path.parent,
                    pool=pool,
                    strategy=_strategy(strategy, options, names, whole=whole),
                    targets={name: labelling[name] for name in names},
                    judging=judging,
                    num_tokens=counts,
                    seed=seed,
                )
                write_json(path, curve)
            runs += [
                {"seed": seed, "strategy": strategy, "aim": served, **_figures(read_json(path), targets, served)}
                for served in (aims if strategy in BLIND else [aim])
            ]
    return _with_comparisons(runs)


def _label_options(seed: int) -> dict[str, Any]:
    return {"method": "grad_dot", "seed": seed, "max_grad_norm": 1.0}


def _strategy(
    name: str, options: Any, targets: tuple[str, ...], *, whole: Labels | None
) -> tuple[str | WholePoolLabels, dict[str, Any]]:
    """Return a strategy, and the options of a refresher with it."""
    if name == "oracle":
        return WholePoolLabels(targets=targets, labels=whole), {}
    if name == "oracle_again":
        return "oracle", {"method_options": {"max_grad_norm": 1.0}, "refresh_every": options.refresh_every}
    if name not in SURROGATES:
        return name, {"refresh_every": options.refresh_every} if name == "loss" else {}
    shared = {
        "encoder": tuple(options.encoder),
        "surrogate": options.surrogate,
        "method_options": {"max_grad_norm": 1.0},
        "allow_low_fidelity": True,
    }
    if name == "static":
        return "static", {**shared, "sample_size": options.static_labels}
    refresh = {
        **shared,
        "sample_size": options.refresh_labels,
        "sampling": options.sampling,
        "num_probe": options.probe if name == "drift" else 0,
        "refresh_every": options.refresh_every,
        "keep_labels": options.keep_labels,
    }
    return "refresh", {**refresh, "drift_threshold": options.drift_threshold} if name == "drift" else refresh


def _train(
    options: Any,
    folder: Path,
    run_folder: Path,
    *,
    pool: Any,
    strategy: tuple[str | WholePoolLabels, dict[str, Any]],
    targets: dict[str, TargetSet],
    judging: list[TargetSet],
    num_tokens: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """Train a copy of the checkpoint round by round; return losses beside what training and selecting took until then."""
    lm = LanguageModel.from_pretrained(folder / "model", max_tokens=options.tokens)
    columns = prepare_targets(lm, judging, halves=False)
    average = _average(options, folder, lm)
    is_ranked = strategy[0] not in BLIND
    refresher = Refresher(
        pool,
        targets,
        workdir=run_folder / "rounds",
        cache=folder.parent / "features",
        num_tokens=num_tokens,
        strategy=strategy[0],
        consume_once=not options.repeat or strategy[0] == "random",  # rs2 draws anew already; random has to spend its pool
        rule=options.rule if is_ranked else "top",
        rule_options=_rule_options(options) if is_ranked else {},
        seed=seed,
        **strategy[1],
    )
    pass_flops = 3 * lm.forward_flops_per_token
    curve: dict[str, Any] = {"training_flops": [], "training_seconds": [], "cost_flops": [], "cost_seconds": [], "losses": []}
    tokens, seconds, spent = 0, 0.0, {"flops": 0.0, "seconds": 0.0}
    for index in range(options.rounds):
        made = refresher.next_round(
            lm, num_tokens=options.round_tokens, coming_flops=pass_flops * options.round_tokens, average=average
        )
        for unit in spent:
            spent[unit] += sum(stage[unit] for stage in made.record["costs"].values())
        plan = TrainingPlan(
            num_tokens=options.round_tokens,
            row_tokens=options.tokens,
            rows_per_step=8,
            evaluate_every=options.evaluate_every,
            seed=1000 * seed + index,
        )
        found = train(
            lm,
            refresher.pool.select(made.rows),
            plan,
            title=f"{run_folder.name}, seed {seed}, round {index}",
            evaluate=lambda model: _losses(columns, model, average),
        )
        trained = found.seconds - found.evaluation_seconds
        for place in range(1 if index else 0, len(found.losses)):
            share = found.tokens[place] / found.tokens[-1]
            curve["training_flops"].append(pass_flops * (tokens + found.tokens[place]))
            curve["training_seconds"].append(seconds + share * trained)
            curve["losses"].append(found.losses[place])
            for unit in spent:
                curve[f"cost_{unit}"].append(spent[unit])
        tokens, seconds = tokens + found.tokens[-1], seconds + trained
    records = refresher.table()
    spearman = [value for record in records if record["refreshed"] for value in record["fidelity"].values()]
    return {
        "curve": curve,
        "spearman": float(np.mean(spearman)) if spearman else None,
        "refreshes": sum(record["refreshed"] for record in records),
        "drifts": [record["drift"] for record in records],
        "agreements": [record["facts"].get("agreements_with_older_labels") for record in records],
    }


def _average(options: Any, folder: Path, lm: LanguageModel) -> WeightAverage | None:
    """Return the running average of the weights as the warm-up left it; None where the last weights are measured at."""
    if not options.average_decay:
        return None
    assert lm.optimizer is not None
    average = WeightAverage(lm.module, decay=options.average_decay)
    average.load(averaged_beside(folder / "model"))
    average.watch(lm.optimizer)
    return average


def _losses(columns: TargetColumns, lm: LanguageModel, average: WeightAverage | None) -> dict[str, float]:
    with nullcontext() if average is None else average.applied():
        return dict(zip(columns.names, columns.combine(columns.losses(lm)).tolist(), strict=True))


def _rule_options(options: Any) -> dict[str, Any]:
    return {"combine": options.combine, **({"share": options.top_share} if options.rule == "top_share" else {})}


def _figures(run: dict[str, Any], targets: dict[str, Any], aim: str) -> dict[str, Any]:
    """The smoothed loss that a run was for, beside its whole cost at every evaluation."""
    curve = run["curve"]
    names = list(targets) if aim == TOGETHER else [aim]
    plain = [float(np.mean([losses[name] for name in names])) for losses in curve["losses"]]
    smooth = [float(np.mean(plain[max(place + 1 - WINDOW, 0) : place + 1])) for place in range(len(plain))]
    return {
        "before": smooth[0],
        "after": smooth[-1],
        "lowest_at": float(np.argmin(smooth)) / max(len(smooth) - 1, 1),
        "rise": smooth[-1] - min(smooth),
        "curve": {"loss": smooth, **{key: value for key, value in curve.items() if key != "losses"}},
        "flops_share": curve["cost_flops"][-1] / curve["training_flops"][-1],
        "seconds_share": curve["cost_seconds"][-1] / curve["training_seconds"][-1],
        **{key: run[key] for key in ("spearman", "refreshes", "drifts", "agreements")},
    }


def _with_comparisons(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add each run's figures beside random's whole cost and loss, and beside what the whole-pool oracle gains."""
    for run in runs:
        peers = {peer["strategy"]: peer for peer in runs if peer["aim"] == run["aim"]}
        random, oracle = peers.get("random"), peers.get("oracle")
        if random is None:
            continue
        run["less_random"] = run["after"] - random["after"]
        budget = random["curve"]["training_flops"][-1]
        total = np.add(run["curve"]["training_flops"], run["curve"]["cost_flops"])
        run["at_equal_cost"] = float(np.interp(budget, total, run["curve"]["loss"])) if total[0] <= budget else None
        run["lowest_within_cost"] = min(
            (loss for loss, cost in zip(run["curve"]["loss"], total, strict=True) if cost <= budget), default=None
        )
        run["cost_to_random"] = _first_reached(total, run["curve"]["loss"], random["after"], unit=budget)
        if oracle is not None:
            gain = random["after"] - oracle["after"]
            run["share_of_oracle"] = (random["after"] - run["after"]) / gain if gain > 0 else None
    return runs


def _first_reached(cost: np.ndarray, losses: Sequence[float], loss: float, *, unit: float) -> float | None:
    """Cost, as a share of `unit`, at which a loss was first reached, interpolated; None if never."""
    for place, value in enumerate(losses):
        if value <= loss:
            if place == 0:
                return float(cost[0] / unit)
            share = (losses[place - 1] - loss) / (losses[place - 1] - value)
            return float((cost[place - 1] + share * (cost[place] - cost[place - 1])) / unit)
    return None


def _halves(targets: dict[str, Any], options: Any, *, seed: int) -> tuple[dict[str, TargetSet], list[TargetSet]]:
    """Split each target set into texts to label with and texts to judge by."""
    labelling, judging = {}, []
    for target in read_targets(targets):
        first = split_halves(target, seed=seed)
        for wanted, most in ((True, options.target_texts), (False, options.judge_texts)):
            part = read_targets({target.name: target.texts.select(np.flatnonzero(first == wanted))}, max_texts=most, seed=seed)
            if wanted:
                labelling[target.name] = part[0]
            else:
                judging += part
    return labelling, judging


def _table(results: list[dict[str, Any]], aims: list[str], strategies: list[str]) -> list[list[str]]:
    columns: tuple[str, ...] = ("before", "after", "less_random", "lowest_at", "rise")
    columns += ("at_equal_cost", "lowest_within_cost", "share_of_oracle", "cost_to_random")
    columns += ("flops_share", "seconds_share", "spearman", "refreshes")
    rows = []
    for aim in aims:
        for strategy in strategies:
            found = [run for run in results if run["aim"] == aim and run["strategy"] == strategy]
            rows.append([aim, strategy, *(_spread([run.get(column) for run in found]) for column in columns)])
    return rows


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    told = f"{np.mean(known):.3f} ({min(known):.3f} to {max(known):.3f})"
    return told if len(known) == len(values) else f"{told}, {len(values) - len(known)} of {len(values)} not"


if __name__ == "__main__":
    main()
