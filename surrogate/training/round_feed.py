"""Between a `Refresher` and a training loop: at which step which round begins, what it shows, and how much was trained.

A round is `every` optimiser steps. At its first step the refresher chooses; within it, after a resume, the choice that
stands on disk is shown again. FLOPs of training are counted as 3 forward passes over every token (a step backward costs
twice a step forward), seconds are those that the loop reports; both are sums over all processes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle.errors import check_count
from oracle.processes import working_together
from surrogate.training.full_precision import without_autocast
from surrogate.training.pool_texts import PoolTexts
from surrogate.training.refresher import Refresher
from surrogate.training.round_identity import require_as_before
from surrogate.training.round_reports import OverheadWarning, tell
from surrogate.training.round_store import Round
from surrogate.training.selected_dataset import UNKNOWN, SelectedDataset
from surrogate.training.streaming import StreamRefresher

if TYPE_CHECKING:
    from oracle.language_model import LanguageModel
    from surrogate.training.weight_average import WeightAverage

FLOPS_PER_FORWARD = 3.0  # forward and backward
LENGTH_SAMPLE = 512  # texts whose mean length stands for the pool's


class RoundCountWarning(UserWarning):
    """The refresher was told of another number of rounds than training has."""


class RoundFeed:
    """Show the texts of each round in a dataset, and keep account of the training.

    Args:
        refresher: Chooses.
        dataset: Where the chosen texts are shown; its length is one round over all processes.
        texts: The pool's texts as tokens, to count them.
        every: Optimiser steps of a round.
        world_size: Processes that train.
        max_steps: Steps of the whole training, where they are known.
        keep_autocast: Leave the mixed precision that Accelerate has put around the model in place while it is measured.
        average: Measure at this running average of the weights.
    """

    def __init__(
        self,
        refresher: Refresher | StreamRefresher,
        dataset: SelectedDataset,
        texts: PoolTexts,
        *,
        every: int,
        world_size: int = 1,
        max_steps: int | None = None,
        keep_autocast: bool = False,
        average: WeightAverage | None = None,
    ) -> None:
        check_count("every", every)
        _tell_of_other_rounds(refresher, every=every, max_steps=max_steps)
        self.refresher, self.dataset, self.texts = refresher, dataset, texts
        self.every, self.world_size, self.max_steps, self.keep_autocast = every, world_size, max_steps, keep_autocast
        self.average = average
        self.present: Round | None = None
        self._rounds_counted, self._tokens_before = 0, 0  # whole rounds that were trained on, and their tokens
        self._seconds = 0.0
        self._counted: Any = None  # items of a user's own, whose tokens the refresher knows
        self._mean_tokens: tuple[int, float] | None = None  # version of the texts, and their mean length
        self._version = texts.version
        self._flops_per_token: float | None = None  # of training; None before the first round
        self._told: set[type[Warning]] = set()  # what is said once

    # ------------------------------------------------------------------ rounds

    def enter(self, step: int, lm: LanguageModel) -> tuple[Round, bool]:
        """Show the texts of the round that `step` lies in; choose them if it is its first step.

        Args:
            step: Optimiser steps done so far.
            lm: The live model and its optimiser; they are left as they are.

        Returns:
            The round, and whether it begins now.

        Raises:
            MissingFileError: Training was resumed within a round that is not in the workdir.
        """
        index, offset = divmod(step, self.every)
        begins = offset == 0
        wanted = index if begins else index + 1
        if self.refresher.num_rounds_done != wanted:
            self.refresher.rewind(wanted)
        self._flops_per_token = FLOPS_PER_FORWARD * lm.forward_flops_per_token
        if begins:
            self._count_until(index)
            with nullcontext() if self.keep_autocast else without_autocast(lm.module):
                self.present = self._next(step, lm)
        else:
            self.present = self.refresher.round_at(index)
        self.dataset.select(self.present.rows)
        if begins:
            repeats = self.dataset.repeats
            tell(self.present.record, step=step, repeats=repeats, optimizer=lm.optimizer, told=self._told)
        return self.present, begins

    def finish(self, step: int, *, is_left: bool = False) -> dict[str, Any] | None:
        """Close the account of a training that ends after `step` steps, and say where it does not keep the promise.

        Args:
            step: Optimiser steps done.
            is_left: The loop was left, perhaps to be gone on with; nothing is said.

        Returns:
            What `Overhead.report` returns, which `overhead.json` in the workdir keeps; None of a stream, which has no such
            account, and where no round began.
        """
        if isinstance(self.refresher, StreamRefresher):
            self.refresher.close()
            return None
        if self._flops_per_token is None:
            return None
        index, done = divmod(step, self.every)
        self._count_until(index)
        tokens = self._tokens_before + (self._tokens_of(index) * done / self.every if done else 0.0)
        account, store = self.refresher.overhead, self.refresher.store
        account.observe(flops=self._flops_per_token * tokens, seconds=self._seconds * self.world_size)
        is_over = self.max_steps is not None and step >= self.max_steps
        account.planned_flops = account.trained.flops if is_over else self._planned_flops()
        report = account.report()
        with working_together() as processes:
            processes.on_first(lambda: store.write_account(report))
        if report["is_kept"] is False and not is_left:
            told = f"selecting cost more than max_overhead={report['max_overhead']:g} of the training: {report['why_not']}"
            warnings.warn(told, OverheadWarning, stacklevel=3)
        return report

    def _next(self, step: int, lm: LanguageModel) -> Round:
        if isinstance(self.refresher, StreamRefresher):
            self.refresher.open_next()
            if self._version != self.texts.version:
                self._version = self.texts.version
                self.dataset.forget_lengths()
        if self.dataset.row_tokens is None:
            size = {"num_texts": self.dataset.num_items}
        else:
            self._count_own_items()
            size = {"num_tokens": self._tokens_to_ask_for()}
        assert self._flops_per_token is not None
        coming = self._flops_per_token * self._tokens_expected()
        return self.refresher.next_round(
            lm,
            **size,
            step=step,
            trained_flops=self._flops_per_token * self._tokens_before,
            trained_seconds=self._seconds * self.world_size,
            coming_flops=coming,
            planned_flops=self._planned_flops(),
            average=self.average,
        )

    # ------------------------------------------------------------------ account

    def add_seconds(self, seconds: float) -> None:
        """Count wall-clock seconds of training, of this process."""
        self._seconds += seconds

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, as JSON values; rounds themselves are in the refresher's workdir."""
        return {
            **self._shape(),
            "refresher": self.refresher.state_dict(),
            "rounds_counted": self._rounds_counted,
            "tokens_before": self._tokens_before,
            "seconds": self._seconds,
        }

    def _shape(self) -> dict[str, Any]:
        """What must be the same after a resume."""
        dataset = self.dataset
        return {
            "every": self.every,
            "num_items": dataset.num_items,
            "row_tokens": dataset.row_tokens,
            "separator": dataset.separator,
            "max_tokens": self.texts.max_tokens,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            MismatchError: It is of a training with rounds of another size, or of another workdir.
            MissingFileError: The rounds are not in the workdir.
        """
        what = "steps per round, items per step (batch size, accumulation, processes) and tokens"
        require_as_before(state, self._shape(), what=what)
        self.refresher.load_state_dict(state["refresher"])
        self._rounds_counted, self._tokens_before = int(state["rounds_counted"]), int(state["tokens_before"])
        self._seconds = float(state["seconds"])

    def forget(self) -> None:
        """Go back to the beginning of training."""
        self.refresher.rewind(0)
        self._rounds_counted, self._tokens_before, self._seconds = 0, 0, 0.0
        self._told.clear()

    # ------------------------------------------------------------------ tokens

    def _count_until(self, index: int) -> None:
        """Count the tokens of the rounds before this one that were not counted yet."""
        while self._rounds_counted < index:
            self._tokens_before += self._tokens_of(self._rounds_counted)
            self._rounds_counted += 1

    def _tokens_of(self, index: int) -> int:
        """Tokens that a round shows, with repeats; texts that the loaders have shown need not be tokenised again for that."""
        if self.dataset.row_tokens is not None:
            return self.dataset.num_items * self.dataset.row_tokens
        rows = self.refresher.round_at(index).rows
        with working_together() as processes:
            lengths = np.max(processes.gather(self.dataset.known_lengths(rows)), axis=0)  # each process has shown its part
        for read in (self.dataset.read_lengths, self._encoded_lengths):
            missing = np.flatnonzero(lengths == UNKNOWN)
            if len(missing):
                lengths[missing] = read(rows[missing])
        return int(np.resize(lengths, self.dataset.num_items).sum())  # resize repeats from the beginning, as the dataset does

    def _count_own_items(self) -> None:
        """Let rounds of so many tokens count those of a user's own items, of which each may have others than its text."""
        base = self.dataset.base
        if base is not self.texts and base is not self._counted and isinstance(self.refresher, Refresher):
            self._counted, self._mean_tokens = base, None
            self.refresher.count_tokens_by(self.dataset.read_lengths(np.arange(len(base))))

    def _encoded_lengths(self, rows: np.ndarray) -> np.ndarray:
        if self._counted is not None:
            return self.dataset.read_lengths(rows)
        return np.array([len(text.input_ids) for text in self.texts.encode(rows.tolist())], dtype=np.int64)

    def _tokens_expected(self) -> float:
        """About how many tokens a further round shows: as those so far did, and before there is one, as the pool's texts do."""
        if self.dataset.row_tokens is not None:
            return float(self.dataset.num_items * self.dataset.row_tokens)
        if self._rounds_counted:
            return self._tokens_before / self._rounds_counted
        return self.dataset.num_items * self._mean_length()

    def _planned_flops(self) -> float | None:
        """FLOPs of the whole training, as far as is known by now; None without an end."""
        if self.max_steps is None or self._flops_per_token is None:
            return None
        rounds_left = self.max_steps / self.every - self._rounds_counted
        return self._flops_per_token * (self._tokens_before + self._tokens_expected() * max(rounds_left, 0.0))

    def _tokens_to_ask_for(self) -> int:
        """Tokens of texts that fill a round of packed rows, together with about as many separators as they bring."""
        assert self.dataset.row_tokens is not None
        rows, separators = self.dataset.num_items * self.dataset.row_tokens, 0 if self.dataset.separator is None else 1
        mean = max(self._mean_length(), 1.0)
        return max(int(rows * mean / (mean + separators)), 1)

    def _mean_length(self) -> float:
        """Mean tokens of the pool's texts, by a sample of them at equal distances."""
        version, num_texts = self.texts.version, len(self.texts.pool)
        if self._mean_tokens is None or self._mean_tokens[0] != version:
            rows = np.unique(np.linspace(0, num_texts - 1, min(LENGTH_SAMPLE, num_texts)).astype(int))
            self._mean_tokens = version, float(np.mean(self._encoded_lengths(rows)))
        return self._mean_tokens[1]


def _tell_of_other_rounds(refresher: Refresher | StreamRefresher, *, every: int, max_steps: int | None) -> None:
    told = refresher.schedule.num_rounds if isinstance(refresher, Refresher) else None
    if told is None or max_steps is None or told == math.ceil(max_steps / every):
        return
    warnings.warn(
        f"num_rounds={told}, and {max_steps} steps in rounds of every={every} are {math.ceil(max_steps / every)} rounds: shares "
        f"of the training (warm-up, final phase, overhead) and plans are of {told}. Pass every={math.ceil(max_steps / told)}, or "
        "leave num_rounds out, unless training goes on for longer than it was begun for.",
        RoundCountWarning,
        stacklevel=4,
    )
