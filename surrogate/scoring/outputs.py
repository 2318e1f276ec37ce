"""The output folder: what stands where in it, what all its scores have in common, and the report of each file.

corpus.json                predictor, targets, units and options of all score files; a run with others is refused
manifest.json              all files with their counts, and the totals
row_counts.json            how many rows large files have, by which they are cut
scores/<name>.parquet      the scores of an input file; <name> is its path below the source
quarantine/<name>.jsonl    its rows without a score: position, reason, how the text begins
reports/<name>.json        its report, written last: its existence means that the file is finished
segments/<name>/           pieces of files that are not finished
predictor/                 the predictor, where an object was given
.partial/, .lock*          what is being written, and who works on the folder
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oracle.artifacts import read_json, require_same
from oracle.errors import InputError, MissingFileError
from surrogate.scoring.files import InputFile
from surrogate.scoring.layout import ScoreOptions
from surrogate.scoring.positions import positions_fingerprint
from surrogate.scoring.score_files import SCHEMA_VERSION, ScoreHeader
from surrogate.scoring.scorer import PredictorIdentity
from surrogate.scoring.segments import Counts, size_of, write_placed

URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # one slash is left of two where a URL was made a path
CORPUS_FILE, MANIFEST_FILE = "corpus.json", "manifest.json"
DONE, DAMAGED, FAILED = "done", "damaged", "failed"


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard or a file.

    Attributes:
        name: Of the shard.
        input_name: Of its file.
        status: "done"; "damaged" where a part of the file could not be read; "failed" where nothing of it could.
        counts: Rows, bad rows, errors, seconds and FLOPs.
        skipped: Whether it was finished before.
        url: What opens the input file.
        stamp: The state of the file that was scored.
        score_bytes: Size of the score file, by which one that was cut short is known (a machine that loses its power may
            keep the name of a file and not what is in it).
    """

    name: str
    input_name: str
    status: str
    counts: Counts = field(default_factory=Counts)
    skipped: bool = False
    url: str = ""
    stamp: str = ""
    score_bytes: int = 0

    @property
    def num_bad(self) -> int:
        """Rows without a score."""
        return sum(self.counts.bad_reasons.values())

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> ShardReport:
        """Return what `as_dict` returned as a report again."""
        return cls(**{**stored, "counts": Counts(**stored["counts"])})


def corpus_identity(predictor: PredictorIdentity, options: ScoreOptions) -> dict[str, Any]:
    """Return what all score files of an output folder have in common, as JSON keeps it."""
    return {
        "schema_version": SCHEMA_VERSION,
        **dataclasses.asdict(predictor),
        "encoders": list(predictor.encoders),
        "target_names": list(predictor.target_names),
        "options": {
            **dataclasses.asdict(options),
            "columns": list(options.columns),
            "only": positions_fingerprint(options.only) if options.only else "",
        },
    }


def open_output(output: Path, identity: dict[str, Any]) -> None:
    """Begin an output folder, or see that the one that is there has scores of the same predictor and options.

    Raises:
        MismatchError: It has not; the differences are listed.
    """
    path = output / CORPUS_FILE
    try:
        stored = read_json(path)
    except MissingFileError:
        write_placed(output, path, identity)
        return
    require_same(stored, identity, where=output)


def score_header(identity: dict[str, Any], file: InputFile) -> ScoreHeader:
    """Return what the score file of an input file says of itself."""
    fields = {name: value for name, value in identity.items() if name != "schema_version"}
    return ScoreHeader(**fields, input_name=file.name, input_bytes=file.num_bytes)


def output_name(input_name: str) -> str:
    """Return the name of the score file of an input file."""
    return input_name if input_name.lower().endswith(".parquet") else f"{input_name}.parquet"


def score_path(output: Path, input_name: str) -> Path:
    """Return where the score file of an input file is."""
    return output / "scores" / output_name(input_name)


def quarantine_path(output: Path, input_name: str) -> Path:
    """Return where the bad rows of an input file are."""
    return output / "quarantine" / f"{output_name(input_name)}.jsonl"


def report_path(output: Path, input_name: str) -> Path:
    """Return where the report of an input file is."""
    return output / "reports" / f"{output_name(input_name)}.json"


def finished_report(output: Path, file: InputFile) -> ShardReport | None:
    """Return the report of a file that is finished in its present state; None if it is not."""
    try:
        report = ShardReport.from_dict(read_json(report_path(output, file.name)))
    except InputError:  # there is none, or half of one
        return None
    is_there = report.status == FAILED or size_of(score_path(output, file.name)) == report.score_bytes
    return report if is_there and report.stamp == file.stamp else None


def local_folder(output: str | Path) -> Path:
    """Return an output folder as a path.

    Raises:
        InputError: It is a URL: renaming, which makes files complete or absent, and locks need a file system.
    """
    if URL.match(str(output)):
        raise InputError(
            f"the output folder {str(output)!r} is a URL.",
            "a folder on a disk that all workers see; sources may be URLs",
            "write to a folder, or to a mounted bucket, and copy the finished folder: aws s3 sync, rclone, gsutil rsync.",
        )
    return Path(output)
