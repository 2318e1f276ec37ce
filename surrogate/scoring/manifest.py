"""The manifest: every file of a corpus and what became of it, the totals, what it cost, and what is still missing.

It is put together from the reports of the files, so that any worker can write it at any time and nothing is lost with
the process that wrote it before.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from oracle.artifacts import provenance, read_json
from oracle.errors import InputError
from surrogate.scoring.files import InputFile, Listing
from surrogate.scoring.outputs import CORPUS_FILE, DONE, MANIFEST_FILE, ShardReport
from surrogate.scoring.segments import Counts, write_placed

MANIFEST_LOCK = ".manifest.lock"


def read_manifest(output: Path) -> dict[str, Any]:
    """Return the manifest of an output folder.

    Raises:
        MissingFileError: There is none.
    """
    return dict(read_json(output / MANIFEST_FILE))


def read_reports(output: Path) -> list[ShardReport]:
    """Return the reports of all finished files, by name."""
    reports = []
    for path in sorted((output / "reports").rglob("*.json")):
        with suppress(InputError):  # finished anew at this moment, or half of one
            reports.append(ShardReport.from_dict(read_json(path)))
    return sorted(reports, key=lambda report: report.input_name)


def write_manifest(output: Path, listing: Listing, run: dict[str, Any]) -> dict[str, Any]:
    """Put the manifest together and write it.

    Args:
        output: The output folder.
        listing: The files that the source names now.
        run: What this run did; it is added to those before.

    Returns:
        The manifest.
    """
    with _one_at_a_time(output):
        try:
            runs = read_manifest(output)["runs"]
        except InputError:  # none, or half of one on a disk that was full
            runs = []
        manifest = _manifest(output, listing, [*runs, {**run, "host": socket.gethostname(), **provenance()}])
        write_placed(output, output / MANIFEST_FILE, manifest)
    return manifest


def _manifest(output: Path, listing: Listing, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    stamps = {file.name: file.stamp for file in listing.files}
    reports = read_reports(output)
    current = [report for report in reports if stamps.get(report.input_name) == report.stamp]
    finished = {report.input_name for report in current}
    missing = [file.name for file in listing.files if file.name not in finished]
    total = Counts()
    for report in current:
        total.add(dataclasses.replace(report.counts, errors=[], notes={}))
    by_status: dict[str, int] = {}
    for report in current:
        by_status[report.status] = by_status.get(report.status, 0) + 1
    return {
        **read_json(output / CORPUS_FILE),
        "complete": not missing,
        "clean": not missing and not listing.failed and not total.bad_reasons and set(by_status) <= {DONE},
        "num_files": len(listing.files) + len(listing.failed),
        "files_by_status": by_status,
        **_summary(total),
        "seconds": {kind: round(seconds, 3) for kind, seconds in total.seconds.items()},
        "flops": total.flops,
        "missing": missing,
        "not_listed": listing.failed,
        "num_ignored": listing.num_ignored,
        "not_in_source": [report.input_name for report in reports if report.input_name not in stamps],
        "files": [_entry(report) for report in current],
        "runs": list(runs),
    }


def _entry(report: ShardReport) -> dict[str, Any]:
    counts = report.counts
    seconds = counts.seconds.get("total", 0.0)
    return {
        "name": report.input_name,
        "url": report.url,
        "stamp": report.stamp,
        "status": report.status,
        **_summary(counts),
        "errors": counts.errors,
        "notes": counts.notes,
        "seconds": round(seconds, 3),
        "rows_per_second": round(counts.num_rows / seconds, 1) if seconds else 0.0,
    }


def _summary(counts: Counts) -> dict[str, Any]:
    return {
        "num_rows": counts.num_rows,
        "num_scored": counts.num_scored,
        "num_bad": sum(counts.bad_reasons.values()),
        "bad_reasons": dict(sorted(counts.bad_reasons.items(), key=lambda item: (-item[1], item[0]))),
        "num_cut": counts.num_cut,
    }


@contextmanager
def _one_at_a_time(output: Path) -> Iterator[None]:
    """Let the workers of an array write the manifest one after the other, where the file system has locks."""
    import fcntl

    number = os.open(output / MANIFEST_LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def changed_files(output: Path, files: Sequence[InputFile]) -> list[str]:
    """Return the names of files that were scored in another state than their present one."""
    stamps = {file.name: file.stamp for file in files}
    return [report.input_name for report in read_reports(output) if stamps.get(report.input_name, report.stamp) != report.stamp]
