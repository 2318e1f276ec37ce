"""TREX and LeafRefit against the published code (tree_influence 0.1.7), where they differ from it on purpose.

TREX is given the published row weights, and must then give the published influences; with its own exact solver it shows how
far the published descent stopped from the minimum. LeafRefit differs because the published code evaluates gradients after a
round that it compares with gradients before it. A loop here makes the same slip, and must give the published influences.
Reference folder as for `attribution_parity.py`.

    python benchmarks/attribution_parity_trex.py --reference DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from attribution_parity import datamodelling_score
from scipy.stats import spearmanr
from setting import report

from surrogate.attribution import TREX, LeafRefit
from surrogate.attribution.leaf_refit import leaf_values

TOLERANCE = 1e-10  # of the largest influence
VARIANTS = {"trex": {}, "trex_predicted": {"target": "predictions"}, "trex_lp": {"kernel": "leaf_path"}}


def main() -> None:
    """Compare all models of the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="folder with the models and values")
    options = parser.parse_args()
    results = []
    for path in sorted(options.reference.glob("tree_influence_*.txt")):
        results += _trex(path) + _leaf_refit(path)
    if not results:
        parser.error(f"{options.reference} holds no tree_influence_<name>.txt")
    header = ["model", "", "largest difference", "Spearman", "LDS", "published"]
    rows = [
        [
            result["model"],
            result["what"],
            f"{result['difference']:.1e}",
            f"{result['spearman']:.6f}",
            *(f"{result[name]:.3f}" if name in result else "-" for name in ("lds", "lds_published")),
        ]
        for result in results
    ]
    report("TREX and LeafRefit against tree_influence 0.1.7", header, rows, {"results": results})
    if any(result["must_agree"] and result["difference"] > TOLERANCE for result in results):
        sys.exit(1)


def _trex(path: Path) -> list[dict[str, Any]]:
    data = np.load(path.with_suffix(".npz"))
    train, test = (data["X_train"], data["y_train"]), (data["X_test"], data["y_test"])
    as_published = {"offset": "zero", "halve": str(data["kind"]) == "regression"}
    results = []
    for name, changes in VARIANTS.items():
        if f"inf_{name}" not in data:
            continue
        published = data[f"inf_{name}"]
        method = TREX(path, **as_published, **changes).fit(*train)
        results.append(_result(path, f"{name}, own solver", method.attribute(*test), published))
        given = method.use_alphas(data[f"{name}_alpha"]).attribute(*test)
        results.append(_result(path, f"{name}, published weights", given, published, must_agree=True))
    if "inf_trex" in data:
        results.append(_result(path, "trex, defaults here", TREX(path).fit(*train).attribute(*test), data["inf_trex"]))
    return results


def _leaf_refit(path: Path) -> list[dict[str, Any]]:
    data = np.load(path.with_suffix(".npz"))
    if "inf_leafrefit" not in data:
        return []
    method = LeafRefit(path).fit(data["X_train"], data["y_train"])
    right = method.attribute(data["X_test"], data["y_test"])
    slipped = _with_the_published_slip(method, data["X_test"], data["y_test"])
    return [
        _result(path, "leafrefit", right, data["inf_leafrefit"]),
        _result(path, "leafrefit, with the slip", slipped, data["inf_leafrefit"], must_agree=True),
    ]


def _with_the_published_slip(method: LeafRefit, X_test: np.ndarray, y_test: np.ndarray) -> np.ndarray:
    """Leave one out with gradients of the changed scores after the round, against gradients before it; one output."""
    rows, ensemble = method.rows_, method.rows_.ensemble
    y, targets, of_test = rows.y, ensemble.encode_targets(y_test), ensemble.leaves(X_test)
    num_rows, objective = len(y), ensemble.objective
    kept = 1.0 - np.eye(num_rows)
    moved, moved_test = np.zeros((num_rows, num_rows)), np.zeros((num_rows, len(targets)))
    before = np.full(len(targets), ensemble.init_scores[0])
    scores = list(ensemble.raw_scores_by_round(rows.leaves))
    for tree in range(ensemble.num_rounds):
        member = np.eye(len(ensemble.leaf_values[tree]))[rows.leaves[:, tree]]  # (n, L)
        late = scores[tree + 1][:, 0] + moved
        g, h = (side.reshape(num_rows, num_rows) for side in objective.gradients(late.reshape(-1, 1), np.tile(y, num_rows)))
        old_g, old_h = objective.gradients(scores[tree], y)
        made_of = {"penalties": method.penalties_[tree], "rate": method.statistics_.learning_rates[tree], "reg_alpha": 0.0}
        new = leaf_values((g * kept) @ member, (h * kept) @ member, **made_of)  # (n, L)
        old = leaf_values(old_g[:, 0] @ member, old_h[:, 0] @ member, **made_of)
        moved += (new - old)[:, rows.leaves[:, tree]] * kept
        moved_test += (new - old)[:, of_test[:, tree]]
        before += old[of_test[:, tree]]
    losses = [objective.loss((before + change)[:, None], targets) for change in moved_test]
    return np.stack(losses) - objective.loss(before[:, None], targets)


def _result(path: Path, what: str, influence: np.ndarray, published: np.ndarray, *, must_agree: bool = False) -> dict[str, Any]:
    result = {
        "model": path.stem.removeprefix("tree_influence_"),
        "what": what,
        "must_agree": must_agree,
        "difference": float(np.abs(influence - published).max() / np.abs(published).max()),
        "spearman": float(np.mean([spearmanr(a, b)[0] for a, b in zip(influence.T, published.T, strict=True)])),
    }
    subsets = path.with_name(f"{path.stem}_lds50.npz")
    if subsets.exists():
        held = np.load(subsets)
        result["lds"] = datamodelling_score(influence, held["mask"], held["loss"])
        result["lds_published"] = datamodelling_score(published, held["mask"], held["loss"])
    return result


if __name__ == "__main__":
    main()
