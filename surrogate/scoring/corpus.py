"""`score_corpus`: every file of a source scored by one predictor, with any engine, resumable and exact.

A run lists the source, cuts large files into shards, leaves out what is finished, and hands the rest to an engine, which
loops over `score_shard`. A file that changed since it was scored is scored anew; one that left the source keeps its
scores, and the manifest names it. Several machines share the work as an array, each with a rank.
"""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import socket
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oracle import plugins
from oracle.errors import InputError, InputTypeError, check_choice, check_count, closest
from oracle.text_formats import FORMATS
from surrogate.scoring.checks import check_apart, check_columns, check_folder, check_names, check_rank
from surrogate.scoring.files import CorpusSource, list_inputs
from surrogate.scoring.layout import ScoreOptions
from surrogate.scoring.lock import locked
from surrogate.scoring.manifest import changed_files, write_manifest
from surrogate.scoring.outputs import (
    CORPUS_FILE,
    MANIFEST_FILE,
    ShardReport,
    corpus_identity,
    finished_report,
    local_folder,
    open_output,
)
from surrogate.scoring.planning import ROWS_FILE, plan_shards
from surrogate.scoring.positions import positions_fingerprint
from surrogate.scoring.progress import scoring_progress
from surrogate.scoring.score_files import is_own
from surrogate.scoring.scored_corpus import ScoredCorpus
from surrogate.scoring.scorer import PredictorLike, Scorer, read_identity
from surrogate.scoring.segments import PARTIAL_FOLDER
from surrogate.scoring.shard import CHECKPOINT_SECONDS, ScoreTask, Shard

if TYPE_CHECKING:
    from surrogate.predictor import InfluencePredictor

ENGINES = "surrogate.scoring.engines"
PREDICTOR_FOLDER = "predictor"
OWN_FOLDERS = ("scores", "quarantine", "reports", "segments", PREDICTOR_FOLDER, PARTIAL_FOLDER)
PASSED_ON = ("shards", "task", "on_rows")  # what an engine gets of `score_corpus` and not of its caller


class ChangedInputWarning(UserWarning):
    """Files changed since they were scored, and are scored anew."""


def score_corpus(
    predictor: InfluencePredictor | str | Path,
    source: CorpusSource,
    output: str | Path,
    *,
    engine: str = "local",
    text_column: str = "text",
    format: str = "auto",
    split: str = "train",
    columns: Sequence[str] = (),
    max_chars: int = ScoreOptions.max_chars,
    only: str | Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    **engine_options: Any,
) -> ScoredCorpus:
    """Score a corpus of any size and write a score file for each of its files.

    A run that was killed goes on where it stopped, and its files are those of a run that was not, byte for byte; so are
    those of any engine and any number of workers. Rows and files that cannot be scored are put aside with the reason.

    Args:
        predictor: A predictor's folder, or a fitted predictor, which is saved beside the scores.
        source: Paths, globs, folders or fsspec URLs of parquet, JSON lines (also packed) or arrow, or a hub dataset.
        output: The output folder, on a disk that all workers see.
        engine: "local" (options: workers) or "ray".
        text_column: The column with the text; `a.b` is the field b of the column a.
        format: text, completion, chat, tokens, or auto, as `oracle.read_texts` takes them.
        split: The split of a hub dataset.
        columns: Columns of the input that are written beside the scores.
        max_chars: A longer text is scored by its first so many characters.
        only: A selection's folder (or one of `surrogate.scoring.positions`): no other rows are scored.
        rank: The number of this machine of an array, such as SLURM_ARRAY_TASK_ID.
        world_size: How many machines there are.
        checkpoint_seconds: What a killed worker loses at most, in seconds of its work.
        **engine_options: Options of the engine.

    Returns:
        The scored corpus; its manifest tells what was put aside.

    Raises:
        MissingFileError: Something that was named is not there.
        MismatchError: The output folder holds scores of another predictor or of other options.
        LockedError: Another run works on the output folder.
        StorageError: The disk is full; what was finished stays.
        InputError: An option cannot be used, the output folder is inside the source or holds something else, or the first
            files have no column of the text or of what is to be passed through.

    Example:
        >>> scored = surrogate.score_corpus("runs/demo/predictors/trees", "pool/*.parquet", "scored")  # doctest: +SKIP
        >>> scored.manifest["num_scored"], scored.manifest["num_bad"]                                  # doctest: +SKIP
    """
    check_rank(rank, world_size)
    options = _options(text_column=text_column, format=format, columns=columns, max_chars=max_chars, only=only)
    run_engine = _engine(engine, engine_options)
    folder = local_folder(output)
    check_apart(source, folder)
    check_folder(folder, mark=CORPUS_FILE, own=(*OWN_FOLDERS, MANIFEST_FILE, ROWS_FILE))
    listing = list_inputs(source, split=split)
    check_names(listing)
    check_columns(listing, options)
    run = {"engine": engine, "options": engine_options, "rank": rank, "world_size": world_size, "num_rows": 0}
    with locked(folder, rank=rank, world_size=world_size):
        _remove_leftovers(folder)
        known = str(predictor) if isinstance(predictor, (str, Path)) else Scorer(predictor)
        open_output(folder, corpus_identity(read_identity(known), options))
        usable = known if isinstance(known, str) else _saved(known, folder, workers=engine_options.get("workers"))
        run["predictor"] = os.path.abspath(known if isinstance(known, str) else folder / PREDICTOR_FOLDER)
        task = ScoreTask(usable, str(folder), options, checkpoint_seconds)
        if changed := changed_files(folder, listing.files):
            message = f"{len(changed)} files changed and are scored anew, first {changed[0]}"
            warnings.warn(message, ChangedInputWarning, stacklevel=2)
        start_seconds = time.perf_counter()
        try:
            shards = _unfinished(plan_shards(listing.files, folder, world_size=world_size)[rank::world_size], folder)
            sizes = _shard_bytes(shards)
            with scoring_progress(sum(sizes.values()), len(shards)) as progress:
                for report in run_engine(shards, task, on_rows=progress.add_rows, **engine_options):
                    progress.add_shard(sizes[report.name], report.counts.num_rows)
                    run["num_rows"] = progress.num_rows
        finally:
            run["seconds"] = round(time.perf_counter() - start_seconds, 3)
            manifest = write_manifest(folder, listing, run)
        if manifest["complete"] and world_size == 1:  # another machine of an array may be writing its manifest
            shutil.rmtree(folder / PARTIAL_FOLDER, ignore_errors=True)
    return ScoredCorpus(folder)


def _options(*, text_column: str, format: str, columns: Sequence[str], max_chars: int, only: str | Path | None) -> ScoreOptions:
    check_choice("format", format, ("auto", *FORMATS))
    check_count("max_chars", max_chars)
    if text_column != "text" and format not in ("auto", "text"):
        raise InputError(
            f"text_column={text_column!r} has no effect with format={format!r}.",
            "format='text' or 'auto'",
            "leave out one of the two.",
        )
    if isinstance(columns, str):
        raise InputTypeError(f"columns={columns!r} is one string.", "a list of names", f"pass columns=[{columns!r}].")
    columns = tuple(columns)
    taken = [name for name in columns if is_own(name) or columns.count(name) > 1]
    if taken:
        raise InputError(
            f"the column {taken[0]!r} cannot be passed through: scores have a column of that name, or it is named twice.",
            "names of columns of the input, each once; text_id and position are written anyway",
            "leave it out, or rename it in the input.",
        )
    if only is not None:
        positions_fingerprint(only)  # they are complete
    return ScoreOptions(text_column, format, columns, max_chars, "" if only is None else os.path.abspath(only))


def _engine(name: str, options: dict[str, Any]) -> Callable[..., Iterator[ShardReport]]:
    """Return an engine; options that it does not have are refused."""
    check_choice("engine", name, plugins.names(ENGINES))
    run_engine: Callable[..., Iterator[ShardReport]] = importlib.import_module(f"{ENGINES}.{name}").run
    known = [parameter for parameter in inspect.signature(run_engine).parameters if parameter not in PASSED_ON]
    for option in options:
        if option not in known:
            raise InputError(
                f"{option!r} is no option of the engine {name!r}{closest(option, known)}.",
                ", ".join(known),
                "leave it out, or correct its name.",
            )
    return run_engine


def _saved(scorer: Scorer, output: Path, *, workers: int | None) -> PredictorLike:
    """Save a predictor object beside its scores; return what workers take: its folder, or itself where there are none."""
    folder = output / PREDICTOR_FOLDER
    if not folder.exists() or read_identity(folder) != scorer.identity:
        scorer.predictor.save(folder)
    return scorer if workers == 0 else str(folder)


def _unfinished(shards: Sequence[Shard], output: Path) -> list[Shard]:
    """Leave out the shards of finished files; only now, so that machines that begin later divide the files alike."""
    is_open = {}
    for file in {shard.file.name: shard.file for shard in shards}.values():
        report = finished_report(output, file)
        is_open[file.name] = report is None or report.counts.may_pass
    return [shard for shard in shards if is_open[shard.file.name]]


def _shard_bytes(shards: Sequence[Shard]) -> dict[str, float]:
    """Return about how many bytes each shard is of, by name."""
    num_parts = Counter(shard.file.name for shard in shards)
    return {shard.name: shard.file.num_bytes / num_parts[shard.file.name] for shard in shards}


def _remove_leftovers(output: Path) -> None:
    """Remove what processes of this machine left half written when they were killed."""
    for path in (output / PARTIAL_FOLDER).glob(f"{socket.gethostname()}-*"):
        process = path.name.removeprefix(f"{socket.gethostname()}-").partition("-")[0]
        try:
            os.kill(int(process), 0)
        except (ProcessLookupError, ValueError):
            path.unlink(missing_ok=True)
        except PermissionError:
            continue
