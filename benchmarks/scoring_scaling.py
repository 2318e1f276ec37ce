"""Parts of `scoring.py`: memory by the number of texts, the same bytes from any engine, and what a trillion tokens cost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scoring_speed import ENCODERS, QUICK, WORKER, Part, cpu_seconds
from scoring_texts import Halves, fit_predictor, write_files, write_generated

from surrogate import InfluenceNetwork, score_corpus
from surrogate.features.hashed_ngrams import HashedNgrams

MEMORY_COLUMNS = 256
OBJECT_STORE_BYTES = 2**27
TRILLION = 1e12
DAYS = {"a day": 1, "a week": 7}
READ_BYTES = 2**20


def memory(strings: Sequence[str], options: Any, folder: Path) -> Part:
    """Measure the peak of resident memory beyond the loaded model, by the number of texts in one file."""
    encoder = HashedNgrams(dim=MEMORY_COLUMNS, word_ngrams="1")
    predictor = fit_predictor(
        [encoder], "ridge", Halves.of(strings, num_tokens=options.tokens).texts(0, 1000), num_targets=options.targets,
        folder=folder / "predictor",
    )  # fmt: skip
    model_mib = _child("loaded", predictor)["rss_mib"]
    workers = options.memory_workers or len(os.sched_getaffinity(0))
    rows, figures = [], []
    for num_rows in options.memory_rows:
        source, output = folder / "generated" / "texts.parquet", folder / "scored"
        begin = time.perf_counter()
        write_generated(source, strings, num_rows=num_rows)
        written = time.perf_counter() - begin
        num_bytes = source.stat().st_size
        shutil.rmtree(output, ignore_errors=True)
        found = _child("memory", predictor, source, output, workers)
        for path in (source.parent, output):
            shutil.rmtree(path)
        if found["num_scored"] != num_rows:
            raise SystemExit(f"{found['num_scored']} of {num_rows} texts were scored")
        peaks = found["worker_mib"][-workers:]
        driver, of_workers = found["driver_mib"] - found["before_mib"], sum(peaks) - len(peaks) * model_mib
        whole_mib = found["driver_mib"] + sum(peaks)
        figures.append(
            {
                "rows": num_rows,
                "beyond_model_mib": driver + of_workers,
                "driver_mib": driver,
                "workers_mib": of_workers,
                "whole_mib": whole_mib,
                "file_bytes": num_bytes,
                "seconds": found["seconds"],
            }
        )
        shown = [driver + of_workers, driver, of_workers, whole_mib, num_bytes / 2**20, written, found["seconds"]]
        rows.append([f"{num_rows:,} texts", *(f"{value:.0f}" for value in shown)])
    title = (
        f"memory: hashed_ngrams of {MEMORY_COLUMNS} columns and ridge, one file with row groups of a million rows, {workers} "
        f"workers; MiB of peaks beyond the model ({model_mib:.0f} MiB a worker), which no two processes need reach at once"
    )
    header = ["", "beyond model", "of it driver", "workers", "with model", "file MiB", "s to write", "s to score"]
    growth = figures[-1]["beyond_model_mib"] / figures[0]["beyond_model_mib"]
    return title, header, rows, {"sizes": figures, "workers": workers, "model_mib": model_mib, "last_over_first": growth}


def _child(*command: Any) -> dict[str, Any]:
    answer = subprocess.run([sys.executable, str(WORKER), *map(str, command)], stdout=subprocess.PIPE, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"{WORKER} {' '.join(map(str, command))} failed")
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def scaling(strings: Sequence[str], options: Any, folder: Path) -> Part:
    """Score one corpus by every engine and hold the bytes of all outputs against each other."""
    halves = Halves.of(strings, num_tokens=options.tokens)
    name = options.scaling_encoder
    predictor = fit_predictor(
        ENCODERS[name](),
        InfluenceNetwork(**QUICK),
        halves.texts(0, 1000),
        num_targets=options.targets,
        folder=folder / "predictor",
    )
    write_files(folder / "texts", halves, num_rows=options.scaling_rows, num_files=options.files)
    ways: dict[str, Callable[..., Any]] = {
        f"local, {count} workers" if count else "local, in the caller's process": partial(score_corpus, workers=count)
        for count in (0, 1, 2)
    }
    is_there = find_spec("ray") is not None
    if is_there:
        ways |= {f"Ray, {count} workers": partial(score_corpus, engine="ray", workers=count) for count in (1, 2, 4)}
        ways["Ray, a cluster of two nodes"] = _on_two_nodes
    rows, figures, digests = [], {}, {}
    for way, score in ways.items():
        output = folder / "scored"
        shutil.rmtree(output, ignore_errors=True)
        wall, cpu = time.perf_counter(), cpu_seconds()
        manifest = score(predictor, folder / "texts", output).manifest
        spent, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        if manifest["num_scored"] != options.scaling_rows:
            raise SystemExit(f"{way}: {manifest['num_scored']} of {options.scaling_rows} texts were scored")
        digests[way] = _digests(output)
        in_shards = manifest["seconds"]["total"]
        figures[way] = {"seconds": spent, "seconds_in_shards": in_shards, **({} if "Ray" in way else {"cpu_seconds": cpu})}
        rows.append([way, f"{spent:.1f}", "-" if "Ray" in way else f"{cpu:.1f}", f"{in_shards:.1f}"])
    first = next(iter(digests))
    different = [way for way, found in digests.items() if found != digests[first]]
    if different:
        raise SystemExit(f"not the bytes of {first}: {', '.join(different)}")
    if not is_there:
        rows.append(["Ray: left out, it is not installed", "-", "-", "-"])
    title = (
        f"scaling: {options.scaling_rows:,} texts in {options.files} files, {name} and network; all outputs are equal "
        f"byte for byte ({len(digests[first])} files); with start-up"
    )
    header = ["", "wall s", "CPU s", "s in shards, summed"]
    return (
        title,
        header,
        rows,
        {"encoder": name, "rows": options.scaling_rows, "ways": figures, "equal_bytes": True, "ray": is_there},
    )


def _on_two_nodes(predictor: Path, source: Path, output: Path) -> Any:
    """Score on a cluster of two nodes of one CPU each, on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    from surrogate.scoring.engines.ray import own_variables

    small = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES}
    with own_variables():
        cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        try:
            cluster.add_node(**small)
            ray.init(address=cluster.address, log_to_driver=False)
            scored = score_corpus(predictor, source, output, engine="ray")
            ray.shutdown()
        finally:
            cluster.shutdown()
    return scored


def _digests(output: Path) -> dict[str, str]:
    """Return a hash of each file of scores and of bad rows."""
    found = {}
    for path in sorted([*(output / "scores").rglob("*"), *(output / "quarantine").rglob("*")]):
        if path.is_file():
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while data := file.read(READ_BYTES):
                    digest.update(data)
            found[path.relative_to(output).as_posix()] = digest.hexdigest()
    return found


def trillion(measured: dict[str, Any], options: Any) -> Part:
    """Estimate what scoring 10^12 tokens costs, from the rates that `throughput` measured."""
    num_texts = TRILLION / measured["tokens_per_text"]
    rows, figures = [], {}
    for name, found in measured["encoders"].items():
        cores, result = max(((int(count), result) for count, result in found["by_cores"].items()), key=lambda pair: pair[0])
        core_hours = num_texts * cores / result["scored_per_second"] / 3600
        machine_days = core_hours / 24 / options.machine_cores
        megabytes = measured["bytes_per_text"] * result["scored_per_second"] / cores * options.machine_cores / 1e6
        figures[name] = {
            "core_hours": core_hours,
            "machines": {span: machine_days / days for span, days in DAYS.items()},
            "read_megabytes_per_second": megabytes,
        }
        rows.append(
            [name, f"{result['scored_per_second'] / cores:,.1f}", f"{core_hours:,.0f}"]
            + [f"{machine_days / days:,.1f}" for days in DAYS.values()]
            + [f"{megabytes:,.0f}"]
        )
    title = (
        f"a trillion tokens, on paper: {num_texts / 1e9:.1f} billion texts of {measured['tokens_per_text']:.0f} tokens and "
        f"{num_texts * measured['bytes_per_text'] / 1e12:.1f} TB, machines of {options.machine_cores} cores. Assumed:\n"
        "- a core is as fast there as one of this machine's is with all of them at work, and storage keeps up;\n"
        "- files do not wait for each other, so that twice the machines take half the time;\n"
        "- a worker's start is nothing beside the hours that it works;\n"
        "- texts are of that length; MiniLM reads 256 tokens of each, so longer ones cost it less per token."
    )
    header = ["", "texts per core and second", "core-hours", *(f"machines for {span}" for span in DAYS), "MB/s read by each"]
    return title, header, rows, {"machine_cores": options.machine_cores, "encoders": figures}
