"""How well surrogates predict an exact oracle, by features and by number of labels.

A small GPT-NeoX is warmed up on the pool, a sample is labelled with `grad_dot`, a fixed part of it is held out
(near-duplicates together), and every combination of features and surrogate is fitted on growing parts of the rest.
A proxy of an eighth of the size, warmed up on the same texts, gives `model_state` features in place of the model's own.

    python benchmarks/fidelity.py --pool 'pool-*.parquet' --target math=math_dev.jsonl code=code_dev.jsonl
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from setting import arguments, load_pool, report, shape_arguments, start, warmed_up_as_asked

from oracle import plugins
from oracle.comparison import noise_ceiling
from oracle.labels import Labels
from oracle.measure import label
from surrogate.feature_cache import FeatureCache
from surrogate.features.model_state import ModelState
from surrogate.fidelity import measure_fidelity
from surrogate.pipeline import Run
from surrogate.predictor import strings_of
from surrogate.splits import grouped_holdout, near_duplicate_groups

CURVE = (300, 600, 1200, 2400)
CURVE_SETS = ("text", "live")  # for these every surrogate gets the whole curve, for the others only ridge
SETS = {
    "text": ["hashed_ngrams", "text_stats"],
    "text + proxy": ["hashed_ngrams", "text_stats", "proxy"],
    "proxy": ["proxy"],
    "live": ["live"],
    "text + live": ["hashed_ngrams", "text_stats", "live"],
}


def main() -> None:
    """Run the benchmark."""
    options = _options()
    start(options)
    pool, targets = load_pool(options)
    run = Run(options.workdir / "fidelity")
    run.set_pool(pool)
    lm = warmed_up_as_asked(run.folder / "model", pool, options, architecture="neox")
    proxy_shape = {"width": options.proxy_width, "num_layers": max(options.layers // 3, 1)}
    proxy = warmed_up_as_asked(run.folder / "proxy", pool, options, architecture="neox", **proxy_shape)
    sample = run.sample(min(options.labels, len(pool)), seed=options.seed)
    own = {"max_target_texts": options.target_texts}
    labels = label(lm, sample, targets, method="grad_dot", workdir=run.folder / "labels", seed=options.seed, **own)
    blocks = {
        "hashed_ngrams": plugins.create("surrogate.features", "hashed_ngrams", {}),
        "text_stats": plugins.create("surrogate.features", "text_stats", {}),
        "live": ModelState(model=lm, targets=targets, **own),
        "proxy": ModelState(model=proxy, targets=targets, **own),
    }
    cache = FeatureCache(run.folder / "features")
    features = {name: cache.features(encoder, sample) for name, encoder in blocks.items()}
    groups = near_duplicate_groups(strings_of(sample))
    held_out = grouped_holdout(groups, fraction=options.holdout, seed=options.seed, keys=labels.text_ids)
    sources = np.array(sample["source"]) if "source" in sample.column_names else None
    results = _results(features, labels, held_out=held_out, groups=groups, sources=sources)
    share = proxy.num_parameters / lm.num_parameters
    flops = proxy.forward_flops_per_token / lm.forward_flops_per_token
    report(
        f"held-out Spearman on {int(held_out.sum())} texts of {'?' if sources is None else len(set(sources))} sources; "
        f"model {lm.num_parameters / 1e6:.2f}M, "
        f"proxy {share:.3f} of its parameters and {flops:.3f} of its FLOPs",
        ["", *labels.target_names, "mean", "within source", "fit s"],
        _table(results, labels),
        {
            "benchmark": "fidelity",
            "pool": len(pool),
            "held_out": int(held_out.sum()),
            "parameters": lm.num_parameters,
            "proxy_parameter_share": share,
            "proxy_flops_share": flops,
            "noise_ceiling": noise_ceiling(labels),
            "results": results,
            "label_cost": labels.meta["cost"],
        },
    )


def _options() -> Any:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, default=3000, help="labelled texts, the held-out fifth among them")
    parser.add_argument("--holdout", type=float, default=0.2, help="share of the labelled texts that is held out")
    shape_arguments(parser, layers=6)
    parser.add_argument("--proxy-width", type=int, default=40, help="with a third of the layers, an eighth of the parameters")
    parser.add_argument("--target-texts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _results(
    features: dict[str, np.ndarray],
    labels: Labels,
    *,
    held_out: np.ndarray,
    groups: np.ndarray,
    sources: np.ndarray | None,
) -> list[dict[str, Any]]:
    """Fidelity of every surrogate on every set of features, for all labels or along the whole curve."""
    num_fit = int((~held_out).sum())
    counts = [*(count for count in CURVE if count < num_fit), num_fit]
    results = []
    for set_name, names in SETS.items():
        matrix = np.concatenate([features[name] for name in names], axis=1)
        for surrogate_name in ("ridge", "trees", "network"):
            for count in counts if surrogate_name == "ridge" or set_name in CURVE_SETS else counts[-1:]:
                found = _measure(
                    matrix, labels, held_out=held_out, groups=groups, count=count, surrogate=surrogate_name, sources=sources
                )
                results.append({"features": set_name, **found})
    return results


def _table(results: list[dict[str, Any]], labels: Labels) -> list[list[str]]:
    """One row per features, surrogate and number of labels, and the noise ceiling as the last."""
    names, ceiling = labels.target_names, noise_ceiling(labels)
    rows = [
        [
            f"{r['features']}, {r['surrogate']}, {r['labels']} labels",
            *(f"{r['spearman'][name]:.3f}" for name in names),
            f"{r['mean']:.3f}",
            f"{r['within_mean']:.3f}" if r["within_mean"] is not None else "-",
            f"{r['seconds']:.1f}",
        ]
        for r in results
    ]
    mean = np.mean([ceiling[name] for name in names])
    return [*rows, ["noise ceiling", *(f"{ceiling[name]:.3f}" for name in names), f"{mean:.3f}", "-", "-"]]


def _measure(matrix, labels, *, held_out, groups, count, surrogate, sources):
    fit_rows = np.flatnonzero(~held_out)[:count]
    test_rows = np.flatnonzero(held_out)
    begin = time.perf_counter()
    model = plugins.create("surrogate.models", surrogate, {}).fit(
        matrix[fit_rows], labels.values[fit_rows], groups=groups[fit_rows]
    )
    seconds = time.perf_counter() - begin
    found = measure_fidelity(
        model.predict(matrix[test_rows]),
        labels.values[test_rows],
        target_names=labels.target_names,
        sources=None if sources is None else list(sources[test_rows]),
        num_bootstrap=100,
    )
    within = [row.spearman_within_source for row in found if row.spearman_within_source is not None]
    return {
        "surrogate": surrogate,
        "labels": len(fit_rows),
        "spearman": {row.target: round(row.spearman, 4) for row in found},
        "within_source": {row.target: row.spearman_within_source for row in found},
        "top_recall": {row.target: round(row.top_recall, 4) for row in found},
        "mean": round(float(np.mean([row.spearman for row in found])), 4),
        "within_mean": round(float(np.mean(within)), 4) if within else None,
        "seconds": round(seconds, 2),
    }


if __name__ == "__main__":
    main()
