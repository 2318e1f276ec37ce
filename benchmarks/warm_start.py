"""What old labels and old surrogates are worth at a refresh, for each surrogate, on made-up influence that drifts.

300 texts have labels of time 1, 300 others of time 2. True influence at time 2 is `kept` times that of time 1 plus a new
part; labels are noisy, heavy-tailed and five times smaller at time 2. Four ways to a surrogate of time 2, judged by
Spearman with the truth on 1,000 further texts: the surrogate of time 1 as it is; fitted on new labels only; on new and
old ones, put on one scale, the old with half weight; on new labels with `warm_start` from the surrogate of time 1.

Features are dense (200 columns of 20 hidden directions; half of the influence is linear, half is products and thresholds
of directions) or sparse (1,500 columns, of which 60 count, others at time 2 than at time 1).

    python benchmarks/warm_start.py --seeds 8
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from setting import arguments, report, start

from oracle import plugins
from oracle.comparison import spearman
from oracle.labels import Labels
from surrogate.labelled_rows import on_new_scale

NUM_TEST = 1000
OLD_WEIGHT = 0.5
WAYS = ("of time 1", "new only", "new and old", "warm start")


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.splitlines()[0], pool=False)
    parser.add_argument("--seeds", type=int, default=8, help="worlds for each setting")
    parser.add_argument("--labels", type=int, default=300, help="labelled texts of each time")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.0, 0.7, 0.95], help="correlation of influence then and now")
    parser.add_argument("--noise", type=float, default=1.0, help="of a label, beside a true spread of 1")
    options = parser.parse_args()
    start(options)
    results = []
    for features in ("dense", "sparse"):
        for kept in options.kept:
            for name in ("ridge", "trees", "network"):
                begin = time.perf_counter()
                found = np.array([_one_world(features, name, kept, seed=seed, options=options) for seed in range(options.seeds)])
                results.append(
                    {
                        "features": features,
                        "kept": kept,
                        "surrogate": name,
                        "spearman": dict(zip(WAYS, found.mean(axis=0).round(4).tolist(), strict=True)),
                        "standard_error_of_gain": dict(zip(WAYS, _gain_error(found).round(4).tolist(), strict=True)),
                        "seconds": round(time.perf_counter() - begin, 1),
                    }
                )
    report(
        f"Spearman with true influence at time 2, mean of {options.seeds} worlds (in brackets: standard error of the gain on "
        f"new labels only); {options.labels} labels of each time",
        ["features", "kept", "surrogate", *WAYS],
        [[r["features"], f"{r['kept']:g}", r["surrogate"], *(_cell(r, way) for way in WAYS)] for r in results],
        {"benchmark": "warm_start", "seeds": options.seeds, "labels": options.labels, "noise": options.noise, "results": results},
    )


def _gain_error(found: np.ndarray) -> np.ndarray:
    """Standard error over worlds of each way's gain on new labels only; found is (worlds, ways)."""
    gain = found - found[:, [WAYS.index("new only")]]
    return gain.std(axis=0, ddof=1) / np.sqrt(len(found)) if len(found) > 1 else np.full(len(WAYS), np.nan)


def _cell(result: dict[str, Any], way: str) -> str:
    value = f"{result['spearman'][way]:.3f}"
    return value if way == "new only" else f"{value} ({result['standard_error_of_gain'][way]:.3f})"


def _one_world(features: str, name: str, kept: float, *, seed: int, options: Any) -> list[float]:
    """Return the Spearman of each way in one world."""
    num = options.labels
    X, truth, labels = _world(features, kept, num_texts=2 * num + NUM_TEST, noise=options.noise, seed=seed)
    old, new, test = slice(0, num), slice(num, 2 * num), slice(2 * num, None)
    made = (Labels.from_values(values, [str(n) for n in range(num)], ["t"]) for values in (labels[0][old], labels[1][new]))
    old_labels, new_labels = made
    earlier, alone, both, warm = (
        plugins.create("surrogate.models", name, {"seed": seed} if name != "ridge" else {}) for _ in WAYS
    )
    earlier.fit(X[old], old_labels.values)
    alone.fit(X[new], new_labels.values)
    both.fit(
        np.concatenate([X[new], X[old]]),
        np.concatenate([new_labels.values, on_new_scale(old_labels, new_labels)]),
        sample_weight=np.repeat([1.0, OLD_WEIGHT], num),
    )
    warm.fit(X[new], new_labels.values, warm_start=earlier)
    return [spearman(surrogate.predict(X[test])[:, 0], truth[test]) for surrogate in (earlier, alone, both, warm)]


def _world(
    features: str, kept: float, *, num_texts: int, noise: float, seed: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return features (N, D), true influence at time 2 (N,), and labels (N, 1) of both times."""
    rng, then, now = (np.random.default_rng([seed, stream]) for stream in range(3))
    if features == "dense":
        hidden = rng.normal(size=(num_texts, 20)) / (1 + np.arange(20) / 5.0)
        X = hidden @ rng.normal(size=(20, 200)) / np.sqrt(20) + 0.1 * rng.normal(size=(num_texts, 200))
        first, other = _smooth(hidden, then), _smooth(hidden, now)
    else:
        X = rng.random((num_texts, 1500)) < rng.beta(0.3, 6.0, size=1500)
        first, other = (_standardised(X[:, r.choice(1500, 60, replace=False)] @ r.normal(size=60)) for r in (then, now))
    second = kept * first + np.sqrt(1 - kept**2) * other
    labels = [
        size * np.sinh(truth + noise * rng.normal(size=num_texts))[:, None] for size, truth in ((1.0, first), (0.2, second))
    ]
    return X.astype(np.float32), second, labels


def _smooth(hidden: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return influence (N,), half linear, half products and thresholds of hidden directions (N, 20)."""
    linear, directions = hidden @ rng.normal(size=20), hidden @ rng.normal(size=(20, 3))
    bent = directions[:, 0] * directions[:, 1] + 2 * np.abs(directions[:, 2])
    return _standardised(_standardised(linear) + _standardised(bent))


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()


if __name__ == "__main__":
    main()
