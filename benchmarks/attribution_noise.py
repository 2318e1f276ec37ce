"""Planted wrong labels: who finds them, from a model that was trained on them.

Of each data set a share of the labels is made wrong: another class, or for regression the target of another row. LightGBM
is trained on that, and every method ranks the rows. Shown is the average precision of each ranking (1: all wrong labels
first; their share: chance), as the mean over draws and two models: LightGBM's defaults, and smaller trees with a lambda.

Self-influence is a row's influence on its own loss. `LeafRefit` costs rows times rows times trees; it is left out where that
is more than `--refit-limit`.

    python benchmarks/attribution_noise.py
    python benchmarks/attribution_noise.py --data spambase.csv wine_quality.csv      # the last column is the label
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pandas as pd
from setting import report
from sklearn import datasets
from sklearn.metrics import average_precision_score

from surrogate.attribution import TREX, BoostIn, LeafInfluence, LeafRefit
from surrogate.attribution.label_suspects import label_suspects

BUNDLED = ("breast_cancer", "diabetes", "digits", "friedman1", "two_classes")
MODELS = {
    "defaults": {"n_estimators": 100},
    "lambda": {"n_estimators": 100, "num_leaves": 15, "learning_rate": 0.05, "reg_lambda": 5.0},
}
SUSPECTS = "label_suspects"
MOST_CLASSES = 20  # a numeric label column with more values is a regression


def main() -> None:
    """Plant, train, rank and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", choices=BUNDLED, default=list(BUNDLED), help="scikit-learn's own data sets")
    parser.add_argument("--data", nargs="*", type=Path, default=[], help="csv files with the label in the last column")
    parser.add_argument("--share", type=float, default=0.05, help="share of the labels that is made wrong")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1500, help="rows of each set, at most")
    parser.add_argument("--refit-limit", type=float, default=2e9, help="rows x rows x trees up to which LeafRefit runs")
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    for name, X, y in _tables(options):
        for draw in range(options.draws):
            wrong_y, is_wrong = _with_wrong_labels(y, options.share, np.random.default_rng(draw))
            for settings in MODELS.values():
                model = (lgb.LGBMClassifier if y.dtype.kind == "i" else lgb.LGBMRegressor)(**settings, n_jobs=1, verbosity=-1)
                model.fit(X, wrong_y)
                for method, ranking in _rankings(model, X, wrong_y, options).items():
                    found.setdefault(name, {}).setdefault(method, []).append(average_precision_score(is_wrong, ranking))
    precision = {name: {method: statistics.mean(values) for method, values in of.items()} for name, of in found.items()}
    methods = list(dict.fromkeys(method for of in precision.values() for method in of))
    complete = [method for method in methods if all(method in of for of in precision.values())]
    means = {method: statistics.mean(of[method] for of in precision.values()) for method in complete}
    rows = [
        [
            method,
            *(f"{of[method]:.3f}" if method in of else "" for of in precision.values()),
            f"{means[method]:.3f}" if method in means else "",
        ]
        for method in methods
    ]
    report(
        f"{100 * options.share:.0f} % wrong labels: average precision, mean of {options.draws} draws and {len(MODELS)} models",
        ["", *precision, "mean"],
        rows,
        {"benchmark": "attribution_noise", "share": options.share, "draws": options.draws, "precision": precision, "mean": means},
    )


def _rankings(model: Any, X: np.ndarray, y: np.ndarray, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Return what each method gives every row, larger meaning more suspicious."""
    suspects = label_suspects(model, X, y)
    rankings = {SUSPECTS: suspects.losses, "training loss": suspects.training_losses}
    methods: dict[str, Any] = {
        "BoostIn": BoostIn(model),
        "BoostIn, by count": BoostIn(model, weighting="count"),
        "LeafInfluence, single point": LeafInfluence(model, single_point=True),
        "TREX": TREX(model),
    }
    if len(X) ** 2 * model.booster_.num_trees() <= options.refit_limit:
        methods |= {"LeafInfluence": LeafInfluence(model), "LeafRefit": LeafRefit(model)}
    rankings |= {f"{name}: self-influence": method.fit(X, y).self_influence() for name, method in methods.items()}
    return {**rankings, "random": np.random.default_rng(0).random(len(X))}


def _with_wrong_labels(y: np.ndarray, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return labels of which a share is wrong, and which these are."""
    chosen = rng.choice(len(y), max(1, round(share * len(y))), replace=False)
    wrong = y.copy()
    if y.dtype.kind == "i":
        wrong[chosen] = (y[chosen] + rng.integers(1, y.max() + 1, len(chosen))) % (y.max() + 1)
    else:
        wrong[chosen] = y[(chosen + rng.integers(1, len(y), len(chosen))) % len(y)]
    return wrong, wrong != y


def _tables(options: argparse.Namespace) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield name, features and labels: class numbers as integers, targets of a regression as floats."""
    for name in options.sets:
        if name == "friedman1":
            X, y = datasets.make_friedman1(1000, noise=1.0, random_state=0)
        elif name == "two_classes":
            X, y = datasets.make_classification(1000, 20, n_informative=8, flip_y=0.0, random_state=0)
        else:
            X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        yield name, X[: options.rows], y[: options.rows].astype(int if y.dtype.kind in "iu" else float)
    for path in options.data:
        table = pd.read_csv(path)
        table = table.sample(min(options.rows, len(table)), random_state=0)
        numbers = table.apply(lambda column: column if column.dtype.kind in "biuf" else pd.factorize(column)[0])
        label = table.iloc[:, -1]
        is_regression = label.dtype.kind in "iuf" and label.nunique() > MOST_CLASSES
        y = label.to_numpy(float) if is_regression else pd.factorize(label, sort=True)[0].astype(int)
        yield path.stem, numbers.iloc[:, :-1].to_numpy(float), y


if __name__ == "__main__":
    main()
