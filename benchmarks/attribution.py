"""Speed and memory of tree attribution on one core: `BoostIn` and `TREX`, each in a process of its own.

Beside them runs what a user would write with SciPy: BoostIn as the product of two sparse matrices of leaves. With
`--reference-python`, an interpreter that has tree_influence (Brophy et al. 2023), its code runs in the same turns on the
same model. The floor is what no method can leave out: LightGBM's routing of all rows, and one multiplication and addition
for each (training row, test row, tree) that share a leaf, here as products of vectors that stay in the cache; a method
must look up where each of them belongs as well. Figures are medians over the turns; ratios are taken within a turn. Times
are CPU seconds from the trained model to the whole matrix: reading the model, fitting and attributing. Peaks are whole
processes, matrix and imports included.

    python benchmarks/attribution.py
    python benchmarks/attribution.py --data DATA.npz --model MODEL.txt --reference-python PYTHON
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

FLOOR, JOIN, PUBLISHED = "floor", "scipy join", "tree_influence"
WORKERS = {"boostin": "BoostIn", "trex": "TREX", "floor": FLOOR, "join": JOIN}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
SHAPE: dict[str, Any] = {
    "n_estimators": 200,
    "num_leaves": 31,
    "learning_rate": 0.1,
    "n_jobs": 1,
    "verbosity": -1,
    "deterministic": True,
}


def main() -> None:
    """Run all methods in turns and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, help="training rows of the generated regression")
    parser.add_argument("--features", type=int, default=384)
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--data", type=Path, help="npz with X_train, y_train, X_test, y_test instead of generated rows")
    parser.add_argument("--model", type=Path, help="the LightGBM model file that belongs to --data; trained here without it")
    parser.add_argument("--reference-python", help="interpreter that has tree_influence installed")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--worker", choices=sorted(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model and not options.data:
        parser.error("--model needs --data")
    if options.worker:
        print(json.dumps(_work(options.worker, options.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder, options)
        commands = {title: [sys.executable, __file__, "--worker", worker, "--folder", name] for worker, title in WORKERS.items()}
        if options.reference_python:
            script = str(Path(__file__).with_name("attribution_published.py"))
            for worker in ("boostin", "trex"):
                commands[f"{WORKERS[worker]} of {PUBLISHED}"] = [options.reference_python, script, worker, name]
        turns = [{title: _run(command) for title, command in commands.items()} for _ in range(options.turns)]
        _report(turns, _agreement(folder), options, folder)


def _prepare(folder: Path, options: argparse.Namespace) -> None:
    """Put data.npz and model.txt into the folder."""
    import lightgbm as lgb

    if options.data:
        data = dict(np.load(options.data))
    else:
        rng = np.random.default_rng(0)
        X = rng.normal(size=(options.rows + options.test_rows, options.features)).astype(np.float32)
        y = 2.0 * (X[:, 0] > 0.5) + np.sin(2.0 * X[:, 1]) + X[:, 2] * X[:, 3] + 0.3 * X[:, 4:20].sum(axis=1)
        y = y.astype(np.float64) + 0.5 * rng.normal(size=len(y))
        parts = np.split(np.arange(len(y)), [options.rows])
        data = {"X_train": X[parts[0]], "y_train": y[parts[0]], "X_test": X[parts[1]], "y_test": y[parts[1]]}
    np.savez(folder / "data.npz", **{name: data[name] for name in ("X_train", "y_train", "X_test", "y_test")})
    if options.model:
        (folder / "model.txt").write_text(options.model.read_text())
        return
    model = lgb.LGBMRegressor(**SHAPE).fit(data["X_train"], data["y_train"])
    model.booster_.save_model(folder / "model.txt")


def _run(command: list[str]) -> dict[str, Any]:
    """Run a method in a process of its own, on one core, and return its figures."""
    answer = subprocess.run(command, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{answer.stderr}")
    return json.loads(answer.stdout.splitlines()[-1])


def _work(worker: str, folder: Path) -> dict[str, Any]:
    """One method from the model file to the matrix."""
    import lightgbm as lgb

    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    data = np.load(folder / "data.npz")
    X, y, X_test, y_test = (data[name] for name in ("X_train", "y_train", "X_test", "y_test"))
    booster = lgb.Booster(model_file=folder / "model.txt")
    num_pairs = _num_pairs(booster, X, X_test) if worker == "floor" else 0
    if worker == "join":
        import scipy.sparse  # noqa: F401  # before the clock starts
    elif worker != "floor":
        from surrogate.attribution import TREX, BoostIn

        method = BoostIn(booster) if worker == "boostin" else TREX(booster, offset="zero", halve=True)
    before_mib, wall, start = _peak_mib(), time.perf_counter(), time.process_time()
    middle = start
    if worker == "floor":
        for rows in (X, X_test):
            booster.predict(rows, pred_leaf=True)
        middle = time.process_time()
        for _ in range(num_pairs // len(y)):
            np.dot(y, y)
    elif worker == "join":
        influence = _sparse_join(booster, data)
    else:
        method.fit(X, y)
        middle = time.process_time()
        influence = method.attribute(X_test, y_test)
    seconds = {"fit": middle - start, "attribute": time.process_time() - middle}
    figures = {
        "cpu_seconds": seconds,
        "wall_seconds": time.perf_counter() - wall,
        "before_mib": before_mib,
        "peak_mib": _peak_mib(),
    }
    if worker == "floor":
        figures["leaf_sharing_pairs"] = num_pairs
    else:
        np.save(folder / f"{worker}.npy", influence)
    return figures


def _sparse_join(booster: Any, data: Any) -> np.ndarray:
    """BoostIn for squared error without weights, as two sparse matrices of leaves and their product."""
    from scipy.sparse import csr_array

    y, y_test = data["y_train"], data["y_test"]
    leaves, of_test = (booster.predict(data[name], pred_leaf=True) for name in ("X_train", "X_test"))
    num_trees = leaves.shape[1]
    text = booster.model_to_string().split("\nTree=")[1:]
    values = [np.array(tree.split("leaf_value=")[1].split("\n")[0].split(), dtype=float) for tree in text]
    tail = text[-1]
    rate, ridge = (float(tail.split(f"[{name}: ")[1].split("]")[0]) for name in ("learning_rate", "lambda_l2"))
    values[0] = values[0] - y.mean()
    scores, test_scores = np.full(len(y), y.mean()), np.full(len(y_test), y.mean())
    pulls, gradients = np.empty(leaves.shape), np.empty(of_test.shape)
    for tree, step in enumerate(values):
        mine, theirs = leaves[:, tree], of_test[:, tree]
        counts = np.bincount(mine, minlength=len(step))
        pulls[:, tree] = rate * (scores - y + step[mine]) / (counts[mine] + ridge)
        gradients[:, tree] = test_scores - y_test
        scores += step[mine]
        test_scores += step[theirs]
    starts = np.concatenate([[0], np.cumsum([len(step) for step in values])])
    sides = []
    for numbers, entries in ((leaves, pulls), (of_test, gradients)):
        indptr = np.arange(0, numbers.size + 1, num_trees)
        sides.append(csr_array((entries.ravel(), (numbers + starts[:-1]).ravel(), indptr), shape=(len(numbers), starts[-1])))
    return (sides[0] @ sides[1].T).toarray()


def _num_pairs(booster: Any, X: np.ndarray, X_test: np.ndarray) -> int:
    leaves, of_test = (booster.predict(rows, pred_leaf=True) for rows in (X, X_test))
    most = int(leaves.max()) + 1
    pairs = zip(leaves.T, of_test.T, strict=True)
    return sum(int(np.bincount(mine, minlength=most)[theirs].sum()) for mine, theirs in pairs)


def _peak_mib() -> float:
    """Return this process's largest resident size so far, in MiB; the kernel starts it anew for every program."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _agreement(folder: Path) -> dict[str, float]:
    """Return the largest differences to other code's matrices, relative to the largest influence."""
    found = {}
    for name, mine, other in (
        ("BoostIn and scipy join", "boostin", "join"),
        ("BoostIn and published", "boostin", "published_boostin"),
        ("TREX and published", "trex", "published_trex"),
    ):
        if (folder / f"{other}.npy").exists():
            a, b = np.load(folder / f"{mine}.npy"), np.load(folder / f"{other}.npy")
            found[name] = float(np.abs(a - b).max() / np.abs(b).max())
    return found


def _report(turns: list[dict[str, Any]], agreement: dict[str, float], options: argparse.Namespace, folder: Path) -> None:
    from setting import report

    def seconds(turn: dict[str, Any], title: str) -> float:
        return sum(turn[title]["cpu_seconds"].values())

    rows, results = [], {}
    for title in turns[0]:
        figures = [turn[title] for turn in turns]
        result = {part: statistics.median(one["cpu_seconds"][part] for one in figures) for part in ("fit", "attribute")}
        result["cpu_seconds"] = statistics.median(seconds(turn, title) for turn in turns)
        result |= {name: statistics.median(one[name] for one in figures) for name in ("peak_mib", "before_mib", "wall_seconds")}
        result["times_floor"] = statistics.median(seconds(turn, title) / seconds(turn, FLOOR) for turn in turns)
        result["times_scipy_join"] = statistics.median(seconds(turn, JOIN) / seconds(turn, title) for turn in turns)
        published = f"{title if title in WORKERS.values() else ''} of {PUBLISHED}"
        if published in turns[0]:
            result["times_published"] = statistics.median(seconds(turn, published) / seconds(turn, title) for turn in turns)
        results[title] = {name: round(value, 4) for name, value in result.items()}
        names = ("times_floor", "times_scipy_join", "times_published")
        ratios = [f"{result[name]:.1f}x" if name in result else "" for name in names]
        parts = [f"{result[name]:.2f}" for name in ("fit", "attribute", "cpu_seconds")]
        rows.append([title, *parts, *ratios, f"{result['before_mib']:.0f}", f"{result['peak_mib']:.0f}"])
    num_pairs = turns[0][FLOOR]["leaf_sharing_pairs"]
    data = np.load(folder / "data.npz")
    shape = [*data["X_train"].shape, len(data["X_test"])]
    report(
        f"{shape[0]:,} x {shape[1]} training rows, {shape[2]:,} test rows, one core; {num_pairs / 1e6:.0f} million leaf-sharing "
        f"pairs; largest differences: {', '.join(f'{name} {value:.1e}' for name, value in agreement.items())}",
        ["", "fit s", "attribute s", "CPU s", "of floor", "speed of scipy join", "speed of published", "MiB before", "MiB peak"],
        rows,
        {
            "benchmark": "attribution",
            "shape": shape,
            "leaf_sharing_pairs": num_pairs,
            "turns": options.turns,
            "methods": results,
            "largest_differences": agreement,
        },
    )


if __name__ == "__main__":
    main()
