"""Oracle methods judged by retrained models: methods by judge by cost.

A small Llama is warmed up on the pool; texts of known worth are hidden in a sample of it, every method labels the sample,
and the checkpoint is retrained on random subsets of the sample, without the top share by each method's labels and on that
share alone. Two controls show what a figure is worth: random labels, and the texts' lengths in tokens.

    python benchmarks/oracle_judge.py --methods grad_dot grad_dot:preconditioner=none one_step
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from setting import arguments, claim, load_pool, report, shape_arguments, start, warmed_up_as_asked

import oracle
from oracle import plugins
from oracle.judging.datamodelling import Score
from oracle.judging.planted import Planted
from oracle.judging.retraining import RetrainingPlan, hash_order
from oracle.judging.verdicts import Judgement, Verdict
from oracle.labels import Labels
from oracle.language_model import LanguageModel
from oracle.measure import METHODS, label, method_names
from oracle.methods import needs_of
from oracle.texts import list_text_ids
from surrogate.option_strings import parse_options

REFERENCE = "one_step"
DEFAULT_METHODS = ("grad_dot", "grad_dot:preconditioner=none", "one_step", "two_forward")
CONTROLS = ("random", "tokens")
OTHER_TEXTS = {"ekfac": "fit_texts", "rollout": "companions"}  # options that name texts beside those that are labelled


def main() -> None:
    """Run the benchmark."""
    options = _options()
    start(options)
    pool, targets = load_pool(options)
    folder = options.workdir / "judge"
    ignored = ("workdir", "threads", "methods", "controls", "subsets", "seeds")
    claim(folder / "options.json", {name: value for name, value in vars(options).items() if name not in ignored})
    lm = warmed_up_as_asked(folder / "model", pool, options, rows_per_step=8)
    target_sets = oracle.read_targets(targets, max_texts=options.target_texts, seed=options.seed)
    chosen = set(hash_order(list_text_ids(pool), f"sample:{options.seed}")[: options.sample])
    sample = pool.select([row for row, text_id in enumerate(list_text_ids(pool)) if text_id in chosen])
    planted = oracle.plant(sample, target_sets, num_per_kind=options.planted, seed=options.seed)
    labels = {
        spec: _label(spec, lm, planted, target_sets, sample=sample, workdir=folder / "labels", seed=options.seed)
        for spec in options.methods
    }
    labels |= {name: _control(name, lm, planted, target_sets, seed=options.seed) for name in options.controls}
    judgement = oracle.judge(
        lm,
        sample,
        target_sets,
        labels,
        workdir=folder / "retrained",
        planted=planted,
        plan=RetrainingPlan(batch_size=options.batch_size),
        num_subsets=options.subsets,
        share=options.share,
        num_seeds=options.seeds,
        seed=options.seed,
    )
    print(judgement.table())
    print()
    extras = {name: _extras(name, labels, judgement, list_text_ids(sample)) for name in labels}
    report(
        f"{lm.num_parameters / 1e6:.2f}M parameters, {len(sample)} texts and {len(planted.table)} planted, "
        f"{judgement.cost['num_models']:.0f} retrained models; a pass is one forward and backward pass over the text",
        [
            "method",
            f"agreement with {REFERENCE}",
            "noise ceiling of the labels",
            f"lds minus that of {REFERENCE}",
            "passes per text",
            "with preparing",
        ],
        [_row(name, extras[name], judgement.methods[name]) for name in labels],
        {
            "benchmark": "oracle_judge",
            "parameters": lm.num_parameters,
            "planted_per_kind": options.planted,
            "extras": {name: {key: _plain(value) for key, value in found.items()} for name, found in extras.items()},
            **judgement.as_dict(),
        },
    )


def _options() -> Any:
    parser = arguments(__doc__.splitlines()[0])
    known = method_names()
    default = [spec for spec in DEFAULT_METHODS if spec.partition(":")[0] in known]
    parser.add_argument("--methods", nargs="+", default=default, metavar="NAME[:OPTION=VALUE,...]", help="methods to judge")
    parser.add_argument("--controls", nargs="*", default=list(CONTROLS), choices=CONTROLS, help="labels that measure nothing")
    parser.add_argument("--sample", type=int, default=256, help="labelled texts of the pool")
    parser.add_argument("--planted", type=int, default=16, help="planted texts of each kind")
    parser.add_argument("--subsets", type=int, default=32, help="random halves of the sample to retrain on")
    parser.add_argument("--share", type=float, default=0.2, help="top and bottom share to remove and to add")
    parser.add_argument("--seeds", type=int, default=3, help="retrained models per subset and share")
    parser.add_argument("--batch-size", type=int, default=8, help="texts per step of a retrained model")
    shape_arguments(parser, width=96, layers=3, warmup_tokens=400_000)
    parser.add_argument("--target-texts", type=int, default=32, help="target texts per set")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _label(
    spec: str, lm: LanguageModel, planted: Planted, target_sets: list[Any], *, sample: Any, workdir: Any, seed: int
) -> Labels:
    """Label with a method given as `name` or `name:option=value,...`; ekfac and rollout get the sample as other texts."""
    name, _, given = spec.partition(":")
    needs = needs_of(plugins.load(METHODS, name))
    method_options = parse_options(given.split(",") if given else [])
    if name in OTHER_TEXTS and "factors" not in method_options:
        method_options.setdefault(OTHER_TEXTS[name], sample)
    return label(
        lm,
        planted.texts,
        target_sets if needs.targets else None,
        method=name,
        workdir=workdir / re.sub(r"[^A-Za-z0-9_.=-]", "_", spec),
        seed=seed,
        **method_options,
    )


def _control(name: str, lm: LanguageModel, planted: Planted, target_sets: list[Any], *, seed: int) -> Labels:
    """Make labels that measure nothing: random ones, or the texts' numbers of tokens."""
    text_ids = sorted(list_text_ids(planted.texts))
    shape = (len(text_ids), len(target_sets))
    if name == "random":
        values = np.random.default_rng(seed).normal(size=shape)
    else:
        lengths = {text.text_id: len(text.input_ids) for text in lm.encode(planted.texts)}
        values = np.broadcast_to(np.array([[lengths[text_id]] for text_id in text_ids]), shape)
    return Labels.from_values(values, text_ids, [target.name for target in target_sets], units=name)


def _extras(name: str, labels: dict[str, Labels], judgement: Judgement, text_ids: list[str]) -> dict[str, Any]:
    """Agreement with the reference, the labels' noise ceiling and the paired difference of scores; means over the targets."""
    found: dict[str, Any] = {"agreement": None, "noise_ceiling": None, "lds_minus_reference": None}
    own = labels[name].take(text_ids)
    ceilings = [ceiling for ceiling in oracle.noise_ceiling(own).values() if ceiling is not None]
    if ceilings:
        found["noise_ceiling"] = float(np.mean(ceilings))
    if REFERENCE in labels:
        reference = labels[REFERENCE].take(text_ids)
        if set(own.target_names) & set(reference.target_names):
            found["agreement"] = float(np.mean([row.spearman for row in oracle.agreement(own, reference).values()]))
        score, other = judgement.methods[name].lds_mean, judgement.methods[REFERENCE].lds_mean
        if score is not None and other is not None and name != REFERENCE:
            found["lds_minus_reference"] = score.minus(other)
    return found


def _row(name: str, extras: dict[str, Any], verdict: Verdict) -> list[str]:
    cells = ["-" if extras[key] is None else f"{extras[key]:.3f}" for key in ("agreement", "noise_ceiling")]
    difference, cost = extras["lds_minus_reference"], verdict.cost
    shown = "-" if difference is None else f"{difference.value:+.3f} ({difference.low:+.2f} to {difference.high:+.2f})"
    passes = ["-", "-"] if cost is None else [f"{cost.passes_per_text:.2f}", f"{cost.passes_with_preparing:.2f}"]
    return [name, *cells, shown, *passes]


def _plain(value: Any) -> Any:
    return {"value": value.value, "low": value.low, "high": value.high} if isinstance(value, Score) else value


if __name__ == "__main__":
    main()
