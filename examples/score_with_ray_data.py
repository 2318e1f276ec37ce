"""Scoring inside a Ray Data pipeline: `ScoreBatch` is a class for `map_batches`. Ray must be installed (`[ray]`).

    pip install 'influence-surrogate[ray]'
    python examples/score_with_ray_data.py runs/demo/predictors/trees corpus runs/ray    # corpus: a folder of parquet files

Ray Data writes blocks from many machines and does not know which of them came through when it is killed: start again with an
empty folder. `surrogate score --engine ray`, which scores file by file, goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

from surrogate.scoring import ScoreBatch

try:
    import ray
except ModuleNotFoundError:
    sys.exit("this example needs Ray, which is not installed; run: pip install 'influence-surrogate[ray]'")


def main(predictor: Path, source: Path, output: Path, *, workers: int | None = None) -> Path:
    """Score a folder of parquet files with a column `text` and write their rows with the scores beside them."""
    output.mkdir(parents=True)  # refuses a folder that is there already
    if not ray.is_initialized():
        ray.init()  # joins the cluster in RAY_ADDRESS, or starts one here
    workers = workers or max(1, int(ray.cluster_resources()["CPU"]) - 1)  # one is left to read and write, or nothing moves

    # All machines see these folders under the same paths, so they are not relative.
    scored = ray.data.read_parquet(str(source.resolve())).map_batches(
        ScoreBatch,
        fn_constructor_args=(str(predictor.resolve()),),  # loaded once per worker, not once per batch
        batch_size=2048,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    scored.write_parquet(str(output.resolve()))
    return output


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/score_with_ray_data.py PREDICTOR CORPUS OUTPUT")
    print(main(*map(Path, sys.argv[1:])))
