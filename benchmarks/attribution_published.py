"""The published attribution code (tree_influence) on one model: run by `attribution.py` in an interpreter that has it.

It needs the scikit-learn estimator that training returned; where there is only a model file, an estimator is fitted on a
few rows and given the file's trees.

    PYTHON benchmarks/attribution_published.py METHOD FOLDER

Imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import lightgbm as lgb
import numpy as np
from tree_influence.explainers import BoostIn, Trex

METHODS = {"boostin": BoostIn, "trex": Trex}


def peak_mib() -> float:
    """Return the largest resident size of this process so far, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    """Fit, attribute all test rows, keep the result, print figures as JSON."""
    method, folder = sys.argv[1], Path(sys.argv[2])
    data = np.load(folder / "data.npz")
    X, y, X_test, y_test = (data[name] for name in ("X_train", "y_train", "X_test", "y_test"))
    text = (folder / "model.txt").read_text()
    given = dict(line.strip("[]").split(": ", 1) for line in text.splitlines() if line.startswith("[") and ": " in line)
    model = lgb.LGBMRegressor(n_estimators=1, num_leaves=4, verbosity=-1).fit(X[:200], y[:200])
    model._Booster = lgb.Booster(model_str=text)
    model.set_params(learning_rate=float(given["learning_rate"]), reg_lambda=float(given["lambda_l2"]))
    before_mib, start, start_cpu = peak_mib(), time.perf_counter(), time.process_time()
    fitted = METHODS[method]().fit(model, X, y)
    middle_cpu = time.process_time()
    influence = fitted.get_local_influence(X_test, y_test)
    seconds = {"fit": middle_cpu - start_cpu, "attribute": time.process_time() - middle_cpu}
    figures = {
        "cpu_seconds": seconds,
        "wall_seconds": time.perf_counter() - start,
        "before_mib": before_mib,
        "peak_mib": peak_mib(),
    }
    np.save(folder / f"published_{method}.npy", influence)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
