"""Rounds on disk: what was chosen, by which ranking, why, and what it cost.

    refresher.json  rounds.jsonl  overhead.json  round-00003/{ranking/, selection.parquet, round.json}

`round.json` is written last, so its existence means complete. A ranking in the making lies in `ranking/` with the identity
of what it is made from, and is thrown away when that changes. Finished rounds that are made anew, because training went
back and on in another way, are put into `replaced/`. A process that makes rounds holds `.lock` meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oracle.artifacts import atomic_path, read_json, require_same, storing, write_json
from oracle.errors import InputTypeError, MismatchError, MissingFileError
from oracle.labels import Labels
from surrogate.fidelity import Fidelity
from surrogate.scores import Scores
from surrogate.selection import Selection
from surrogate.training.held_files import give_up, hold
from surrogate.training.strategies import Ranking

OPTIONS_FILE, TABLE_FILE, ROUND_FILE, SELECTION_FILE = "refresher.json", "rounds.jsonl", "round.json", "selection.parquet"
OVERHEAD_FILE, LOCK_FILE, REPLACED_FOLDER = "overhead.json", ".lock", "replaced"
VALUE_PREFIX = "value."  # of the columns by which texts were ranked, one for each target set, whatever that is called


class ReplacedRoundsWarning(UserWarning):
    """Training has gone back and on in another way, and rounds of before are replaced."""


@dataclass(frozen=True)
class Round:
    """What to train on until the next round.

    Attributes:
        index: Number of the round, from 0.
        rows: (K,) row numbers of the pool, best first.
        text_ids: K ids.
        record: The round's row in the table of decisions and costs.
    """

    index: int
    rows: np.ndarray
    text_ids: list[str]
    record: dict[str, Any]


@dataclass(frozen=True)
class HeldRanking:
    """A ranking in use: the round it was made in (-1 for an order at random), and what it says."""

    round: int
    scores: Scores
    labels: Labels | None = None
    fidelity: Fidelity | None = None


class RoundStore:
    """The folder of a refresher.

    Args:
        folder: Made when first written to.
    """

    def __init__(self, folder: str | Path) -> None:
        if not isinstance(folder, (str, os.PathLike)):
            raise InputTypeError(f"workdir={folder!r}.", "the path of a folder", "name the folder that the rounds are kept in.")
        self.folder = Path(folder)

    def hold(self) -> None:
        """Keep other processes from making rounds here until this one ends, or training does.

        Raises:
            MismatchError: Another process makes rounds here now.
        """
        with storing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            is_held = hold(self.folder / LOCK_FILE)
        if not is_held:
            raise MismatchError(
                f"another training that runs now makes its rounds in {self.folder}.",
                "a workdir that no other live process trains with",
                "give each training a workdir of its own, or wait for the other one to end.",
            )

    def give_up(self) -> None:
        """Let other processes make rounds here."""
        give_up(self.folder / LOCK_FILE)

    def claim(self, options: Mapping[str, Any]) -> None:
        """Keep the options of the run, or refuse those of another one.

        Raises:
            MismatchError: The folder was made with other options, another pool or other targets.
        """
        path = self.folder / OPTIONS_FILE
        if path.exists():
            require_same(
                read_json(path),
                options,
                where=self.folder,
                remedy="resume with what the training was begun with (only max_overhead and allow_low_fidelity may change), or "
                "begin a new training with another workdir. first_selected is the first round that is not random: to train for "
                "longer with a warmup_fraction or final_fraction, pass the num_rounds that training was begun with.",
            )
        else:
            write_json(path, dict(options))

    def round_folder(self, index: int) -> Path:
        """Where a round's files are."""
        return self.folder / f"round-{index:05d}"

    def ranking_folder(self, index: int) -> Path:
        """Where the files of the refresh at the start of a round are."""
        return self.round_folder(index) / "ranking"

    def stored(self, index: int, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the record of a finished round with this identity; None where there is none."""
        path = self.round_folder(index) / ROUND_FILE
        record = read_json(path) if path.exists() else None
        return record if record is not None and record["identity"] == dict(identity) else None

    def check_unused(self) -> None:
        """Refuse to begin where the rounds of another training stand, which the new ones would replace.

        Raises:
            MismatchError: They do.
        """
        if (self.round_folder(0) / ROUND_FILE).exists():
            raise MismatchError(
                f"{self.folder} holds the rounds of a training that began otherwise: from other weights, at another learning "
                "rate, with rounds of another size or another max_overhead.",
                "the workdir of this very training, or a new one",
                "give each training a workdir of its own, or delete the folder if its rounds are not wanted.",
            )

    def records(self, num_rounds: int) -> list[dict[str, Any]]:
        """Return the records of the first rounds.

        Raises:
            MissingFileError: There are not so many.
        """
        paths = [self.round_folder(index) / ROUND_FILE for index in range(num_rounds)]
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise MissingFileError(
                f"there is no file {missing[0]}, and training has come to round {num_rounds}.",
                "the workdir of the run that is resumed",
                "name the workdir that the interrupted run had, or train from the start; rounds that another resume has "
                f"replaced are in {self.folder / REPLACED_FOLDER}.",
            )
        return [read_json(path) for path in paths]

    def selected_ids(self, index: int) -> list[str]:
        """Return the text_ids of a finished round, best first."""
        import pyarrow.parquet as pq

        return list(pq.read_table(self.round_folder(index) / SELECTION_FILE, columns=["text_id"])["text_id"].to_pylist())

    def begin_ranking(self, index: int, identity: Mapping[str, Any]) -> None:
        """Keep what a refresh in the making has finished if it is of the same identity, and nothing else."""
        path = self.ranking_folder(index) / "identity.json"
        if not (path.exists() and read_json(path) == dict(identity)):
            self._set_aside(index)
            shutil.rmtree(self.ranking_folder(index), ignore_errors=True)
            write_json(path, dict(identity))

    def save_ranking(self, index: int, ranking: Ranking) -> None:
        """Keep a ranking for the rounds that follow."""
        folder = self.ranking_folder(index)
        ranking.scores.save(folder / "scores.parquet")
        if ranking.labels is not None:
            ranking.labels.save(folder / "used_labels")
        write_json(folder / "ranking.json", {"fidelity": None if ranking.fidelity is None else ranking.fidelity.as_dict()})

    def load_ranking(self, index: int) -> HeldRanking:
        """Return the ranking that was made at the start of a round."""
        folder = self.ranking_folder(index)
        fidelity = read_json(folder / "ranking.json")["fidelity"]
        return HeldRanking(
            index,
            Scores.load(folder / "scores.parquet"),
            Labels.load(folder / "used_labels") if (folder / "used_labels").exists() else None,
            None if fidelity is None else Fidelity.from_dict(fidelity),
        )

    def write_account(self, report: Mapping[str, Any]) -> None:
        """Keep what selecting cost in all, at the end of training."""
        write_json(self.folder / OVERHEAD_FILE, dict(report))
        self.give_up()

    def write(self, record: Mapping[str, Any], selection: Selection, earlier: list[dict[str, Any]]) -> None:
        """Finish a round; later ones, which followed from another past, make way."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        index = int(record["index"])
        self._set_aside(index)
        table = pa.table(
            {
                "text_id": selection.text_ids,
                "reason": selection.reasons,
                "combined": selection.combined,
                **{VALUE_PREFIX + name: selection.values[:, column] for column, name in enumerate(selection.target_names)},
            }
        )
        with atomic_path(self.round_folder(index) / SELECTION_FILE) as partial:
            pq.write_table(table, partial)
        lines = [json.dumps(row, ensure_ascii=False) for row in [*earlier, dict(record)]]
        with atomic_path(self.folder / TABLE_FILE) as partial:
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(self.round_folder(index) / ROUND_FILE, dict(record))

    def _set_aside(self, index: int) -> None:
        """Make way for a round: those from it on followed from another past. What they have finished is kept elsewhere."""
        later = sorted(path for path in self.folder.glob("round-*") if int(path.name.removeprefix("round-")) >= index)
        finished = [path for path in later if (path / ROUND_FILE).exists()]
        for path in finished:
            kept = self.folder / REPLACED_FOLDER / f"{path.name}-{read_json(path / ROUND_FILE)['chain'][:8]}"
            shutil.rmtree(kept, ignore_errors=True)  # the very same round, replaced before
            kept.parent.mkdir(exist_ok=True)
            path.replace(kept)
        for path in set(later) - set(finished):
            if path != self.round_folder(index):
                shutil.rmtree(path)
        if finished:
            warnings.warn(
                f"training goes on from round {index} in another way than before (other weights, options or sizes), so "
                f"{', '.join(path.name for path in finished)} of {self.folder} are replaced; the old ones are kept in "
                f"{REPLACED_FOLDER}/. Checkpoints that were saved in them cannot be resumed with this workdir.",
                ReplacedRoundsWarning,
                stacklevel=2,
            )


def mean_by_target(values: np.ndarray, names: list[str]) -> dict[str, float]:
    """Mean of each column of (K, C) values, by name; nothing where there are no rows."""
    return {name: float(np.mean(values[:, column])) for column, name in enumerate(names)} if len(values) else {}
