"""A pool that is a stream: each window of it is a pool of its own, read when training comes to it.

    workdir/window-00000/{texts.parquet, refresher.json, round-00000/, ...}

A window's texts are written down before the first round chooses among them, so that every process, every worker of a loader
and every resumed run finds the same ones. What comes after the last window that was read is taken from the stream again: a
resumed run passes over as many texts as were read, which is where it was only if the stream yields the same once more.
That is why a resume is called approximate, and said to be so.

Left out: a share of the whole training (warm-up, overhead) that goes over several windows, and the knowledge of an earlier
window's labels; each window begins with a ranking of its own.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from oracle.artifacts import read_json
from oracle.errors import InputError, InputTypeError, MismatchError, MissingFileError, check_count
from oracle.processes import working_together
from oracle.targets import read_targets
from oracle.texts import list_text_ids, read_texts, write_texts
from surrogate.training.pool_texts import PoolTexts
from surrogate.training.refresher import OWN_OPTIONS, Refresher
from surrogate.training.refresher_options import check_targets, make_strategy
from surrogate.training.round_identity import require_as_before
from surrogate.training.round_store import Round

if TYPE_CHECKING:
    from datasets import Dataset

    from oracle.language_model import LanguageModel

REFUSED = ("warmup_fraction", "final_fraction", "max_overhead", "num_rounds")  # about the whole training


class StreamResumeWarning(UserWarning):
    """A resumed training goes on in a stream that may not be the one it was."""


class WindowTexts(PoolTexts):
    """The texts of the present window, in whatever process they are asked for.

    Args:
        folder: Where the windows are.
        window: Most texts of a window.
    """

    def __init__(self, folder: Path, window: int) -> None:
        self.folder, self.window = folder, window
        self._number = torch.full((1,), -1, dtype=torch.long).share_memory_()  # of the window; -1 before the first
        self._loaded: tuple[int, Dataset] | None = None
        super().__init__(None)

    @property
    def version(self) -> int:
        """Number of the window that is shown."""
        return int(self._number)

    def show(self, number: int) -> None:
        """Show the texts of another window, in all processes that share this object."""
        self._number.fill_(number)

    @property
    def pool(self) -> Dataset:
        """The window's texts, from its file."""
        number = int(self._number)
        if number < 0:
            raise InputError(
                "the texts of a stream, of which no window was read yet.",
                "train_dataset=callback.train_dataset, which shows each window when training comes to it",
                "pass that; a trainer that tokenises texts in advance (TRL's SFTTrainer) cannot train on a stream.",
            )
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = number, read_texts(str(window_folder(self.folder, number) / "texts.parquet"))
        return self._loaded[1]

    @pool.setter
    def pool(self, value: Any) -> None:
        assert value is None  # windows come from their files

    def __len__(self) -> int:
        return self.window


class StreamRefresher:
    """A `Refresher` for each window of a stream, in turn; used like one.

    Args:
        stream: Texts as strings or dicts: a `datasets.IterableDataset`, or anything that can be iterated over again and
            again. Where it ends it begins anew.
        targets: The named target sets, as for `Refresher`.
        workdir: Folder of the windows; the same one for all processes and for a resumed run.
        window: Texts of a window.
        rounds_per_window: Rounds that choose among them.
        strategy: Name of a strategy, or an object of one.
        **options: Options of `Refresher`, but for those about the whole training (`REFUSED`), and of the strategy.

    Raises:
        InputError: An option cannot be used; of when and how often to refresh it is told when the first window is opened.
        MismatchError: `workdir` has the windows of another stream; raised when the first one is opened.
    """

    def __init__(
        self,
        stream: Iterable[Any],
        targets: Any = None,
        *,
        workdir: str | Path,
        window: int,
        rounds_per_window: int = 1,
        strategy: Any = "refresh",
        **options: Any,
    ) -> None:
        check_count("window", window)
        check_count("rounds_per_window", rounds_per_window)
        if isinstance(stream, (str, Path, Mapping)):
            raise InputTypeError(
                f"a stream, window={window}, that is a {type(stream).__name__}: {str(stream)[:80]!r}.",
                "an iterable of texts as strings or dicts",
                "pass for example datasets.load_dataset('parquet', data_files='pool/*.parquet', split='train', streaming=True).",
            )
        refused = sorted(set(options) & set(REFUSED))
        if refused or iter(stream) is stream:
            raise InputError(
                f"a stream, and {', '.join(refused)}." if refused else "a stream that can be read only once.",
                "a stream that can be begun anew, and no option about the whole training",
                "leave the option out, or pass an iterable such as a datasets.IterableDataset, not its iterator.",
            )
        of_strategy = {name: value for name, value in options.items() if name not in OWN_OPTIONS}
        self.strategy = make_strategy(strategy, of_strategy, other_options=OWN_OPTIONS)
        self.targets = [] if targets is None else read_targets(targets)
        check_targets(self.strategy, self.targets)
        self.options = {name: value for name, value in options.items() if name in OWN_OPTIONS}
        self.stream, self.folder = stream, Path(workdir)
        self.window, self.rounds_per_window = window, rounds_per_window
        self.texts = WindowTexts(self.folder, window)
        self.num_rounds_done = 0
        self._current: tuple[int, Refresher] | None = None
        self._reader: tuple[int, Iterator[Any]] | None = None  # windows read so far, and the stream after them
        self._is_resumed = False

    @property
    def pool(self) -> Dataset:
        """The present window."""
        return self.texts.pool

    def open_next(self) -> None:
        """Read the window of the next round, if it is not there yet; every process has to call it."""
        self._open(self.num_rounds_done // self.rounds_per_window)

    def next_round(self, lm: LanguageModel | None = None, **options: Any) -> Round:
        """Choose the texts of the next round among those of its window (see `Refresher.next_round`)."""
        number, local = divmod(self.num_rounds_done, self.rounds_per_window)
        refresher = self._open(number)
        if refresher.num_rounds_done != local:
            refresher.rewind(local)
        made = refresher.next_round(lm, **options)
        self.num_rounds_done += 1
        return self._numbered(number, made)

    def round_at(self, index: int) -> Round:
        """Return a round that was made before, and show its window."""
        number, local = divmod(index, self.rounds_per_window)
        if not 0 <= index < self.num_rounds_done:
            raise MissingFileError(f"round {index} of {self.num_rounds_done}.", "a round that was made", "call next_round first.")
        refresher = self._open(number)
        if refresher.num_rounds_done <= local:
            refresher.rewind(local + 1)
        return self._numbered(number, refresher.round_at(local))

    def rewind(self, num_rounds: int) -> None:
        """Go on as after so many rounds (see `Refresher.rewind`)."""
        self.num_rounds_done, self._is_resumed = num_rounds, num_rounds > 0
        self._reader = None
        if num_rounds:
            number, local = divmod(num_rounds - 1, self.rounds_per_window)
            self._open(number, must_exist=True).rewind(local + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint of the training needs (see `Refresher.state_dict`)."""
        current = {} if self._current is None else self._current[1].state_dict()
        return {
            "num_rounds": self.num_rounds_done,
            "chain": current.get("chain", ""),
            **self._size(),
        }

    def _size(self) -> dict[str, int]:
        return {"window": self.window, "rounds_per_window": self.rounds_per_window}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken (see `Refresher.load_state_dict`).

        Raises:
            MismatchError: It is of windows of another size, by which the place in the stream is counted, or of another run.
        """
        require_as_before(state, self._size(), what="size of windows")
        self.rewind(int(state["num_rounds"]))
        if self.state_dict()["chain"] != state["chain"]:
            raise MismatchError(
                f"the {state['num_rounds']} rounds in {self.folder} are not those of the checkpoint.",
                "the workdir that belongs to the checkpoint",
                "give each run a workdir of its own.",
            )

    def table(self) -> list[dict[str, Any]]:
        """Return one row per round, over all windows."""
        rows = []
        for index in range(self.num_rounds_done):
            number, local = divmod(index, self.rounds_per_window)
            record = read_json(window_folder(self.folder, number) / f"round-{local:05d}" / "round.json")
            rows.append({**record, "index": index, "window": number})
        return rows

    def close(self) -> None:
        """Let other processes make rounds in the window that was opened last."""
        if self._current is not None:
            self._current[1].store.give_up()

    # ------------------------------------------------------------------ windows

    def _open(self, number: int, *, must_exist: bool = False) -> Refresher:
        """Return the refresher of a window, which the first process reads from the stream where it is not there yet."""
        if self._current is None or self._current[0] != number:
            path = window_folder(self.folder, number) / "texts.parquet"
            if must_exist and not path.exists():
                raise MissingFileError(
                    f"there is no file {path}, and training has come to it.",
                    "the workdir of the run that is resumed",
                    "name the workdir that the interrupted run had, or train from the start.",
                )
            with working_together() as processes:
                processes.on_first(lambda: self._compare(number, path) if path.exists() else self._read(number, path))
            self.close()
            self.texts.show(number)
            options = {"strategy": self.strategy, "num_rounds": self.rounds_per_window, **self.options}
            self._current = number, Refresher(self.texts.pool, self.targets or None, workdir=path.parent, **options)
        return self._current[1]

    def _compare(self, number: int, path: Path) -> None:
        """Refuse a window of another stream, where training begins anew; a resumed one would have to read the stream for that."""
        if self._is_resumed:
            return
        if list_text_ids(read_texts(self._rows_of(number))) != list_text_ids(read_texts(str(path))):
            raise MismatchError(
                f"{path} does not hold the texts of the stream from {number * self.window} to {(number + 1) * self.window}.",
                "the workdir of a training on this stream, or an empty one",
                "name another workdir.",
            )

    def _read(self, number: int, path: Path) -> None:
        if self._is_resumed and number and (self._reader is None or self._reader[0] != number):
            warnings.warn(
                f"the stream is begun anew and its first {number * self.window} texts are passed over: the resumed training sees "
                "the texts that it would have seen only if the stream yields the same ones again.",
                StreamResumeWarning,
                stacklevel=2,
            )
        write_texts(read_texts(self._rows_of(number)), path)

    def _rows_of(self, number: int) -> list[Any]:
        """Read a window from the stream, which goes on behind the last one that was read."""
        if self._reader is None or self._reader[0] != number:
            self._reader = number, itertools.islice(_endless(self.stream), number * self.window, None)
        rows = list(itertools.islice(self._reader[1], self.window))
        self._reader = number + 1, self._reader[1]
        return rows

    def _numbered(self, number: int, made: Round) -> Round:
        index = number * self.rounds_per_window + made.index
        return replace(made, index=index, record={**made.record, "index": index, "window": number})


def window_folder(folder: Path, number: int) -> Path:
    """Where a window's files are."""
    return folder / f"window-{number:05d}"


def _endless(stream: Iterable[Any]) -> Iterator[Any]:
    """Yield the stream again and again.

    Raises:
        InputError: It is empty.
    """
    while True:
        is_empty = True
        for row in stream:
            is_empty = False
            yield row
        if is_empty:
            raise InputError("a stream without texts.", "texts as strings or dicts", "check where it reads from.")
