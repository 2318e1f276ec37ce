"""Tree attribution against values of the published code (tree_influence 0.1.7), and against retraining.

A reference folder holds per model `tree_influence_<name>.txt` (the LightGBM model) and `.npz` (X_train, y_train, X_test,
y_test, and `inf_<method>` (n_train, n_test)); where there is a `_lds50.npz` (mask of random half subsets, loss after
retraining on each), the linear datamodelling score of both is compared too: Spearman's correlation, over the subsets, of
the sum of influences with minus the loss, averaged over test rows.

Differences are relative to the largest influence. Methods that leave out a defect of the published code, or solve
exactly what it solves roughly, have no bound on the difference; their score is shown beside the published one.

    python benchmarks/attribution_parity.py --reference DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata
from setting import report

from surrogate.attribution import TREX, BoostIn, LeafInfluence, LeafRefit, LeafSimilarity

LDS_TOLERANCE = 0.02


@dataclass(frozen=True)
class Method:
    """How a method of the reference is called here, and how far it may differ, relative to the largest influence."""

    make: Callable[[Any], Any]
    tolerance: float | None


METHODS = {
    "boostin": Method(BoostIn, 1e-10),
    "boostin_w1": Method(lambda model: BoostIn(model, weighting="count"), 1e-10),
    "boostin_w2": Method(lambda model: BoostIn(model, weighting="squared_count"), 1e-10),
    "leafsim": Method(LeafSimilarity, 1e-10),
    "leafinf_sp": Method(lambda model: LeafInfluence(model, single_point=True), 1e-10),
    "leafinf": Method(LeafInfluence, 1e-6),  # the published code goes on from leaf values that it computed again
    "leafrefit": Method(LeafRefit, None),
    "trex": Method(TREX, None),
}


def main() -> None:
    """Compare all models and methods of the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="folder with the models and values")
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=list(METHODS), help="methods to compare")
    options = parser.parse_args()
    names = sorted(path.stem for path in options.reference.glob("tree_influence_*.txt"))
    if not names:
        parser.error(f"{options.reference} holds no tree_influence_<name>.txt")
    results = [found for name in names for found in _compare(options.reference / name, options.methods)]
    header = ["model", "method", "largest difference", "allowed", "LDS", "published", ""]
    report("Attribution against tree_influence 0.1.7", header, [_row(result) for result in results], {"results": results})
    if not all(result["is_equal"] for result in results):
        sys.exit(1)


def _compare(stem: Path, methods: list[str]) -> list[dict[str, Any]]:
    data = np.load(stem.with_suffix(".npz"))
    subsets = np.load(f"{stem}_lds50.npz") if Path(f"{stem}_lds50.npz").exists() else None
    results = []
    for name in methods:
        if f"inf_{name}" not in data:
            continue
        method = METHODS[name]
        published = data[f"inf_{name}"]
        fitted = method.make(stem.with_suffix(".txt")).fit(data["X_train"], data["y_train"])
        influence = fitted.attribute(data["X_test"], data["y_test"])
        difference = float(np.abs(influence - published).max() / np.abs(published).max())
        result = {"model": stem.name.removeprefix("tree_influence_"), "method": name, "difference": difference}
        result |= {"tolerance": method.tolerance, "is_equal": method.tolerance is None or difference <= method.tolerance}
        if subsets is not None:
            scores = [datamodelling_score(values, subsets["mask"], subsets["loss"]) for values in (influence, published)]
            result |= {"lds": scores[0], "lds_published": scores[1]}
            if method.tolerance is not None:
                result["is_equal"] &= abs(scores[0] - scores[1]) <= LDS_TOLERANCE
        results.append(result)
    return results


def datamodelling_score(influence: np.ndarray, mask: np.ndarray, loss: np.ndarray) -> float:
    """Return the mean over test rows of the rank correlation, over subsets, of summed influence and minus the loss.

    Args:
        influence: (n_train, n_test).
        mask: (M, n_train) which rows each subset holds.
        loss: (M, n_test) after training on it.
    """
    predicted, measured = rankdata(mask @ influence, axis=0), rankdata(-loss, axis=0)
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(predicted.T, measured.T, strict=True)]))


def _row(result: dict[str, Any]) -> list[str]:
    allowed = "-" if result["tolerance"] is None else f"{result['tolerance']:.0e}"
    scores = [f"{result[key]:.3f}" if key in result else "-" for key in ("lds", "lds_published")]
    return [
        result["model"],
        result["method"],
        f"{result['difference']:.1e}",
        allowed,
        *scores,
        "" if result["is_equal"] else "DIFFERS",
    ]


if __name__ == "__main__":
    main()
