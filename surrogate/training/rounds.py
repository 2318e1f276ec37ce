"""`Rounds`: batches for a plain PyTorch loop, with the texts chosen anew at the start of each round.

    rounds = surrogate.training.Rounds(refresher, lm, every=100, batch_size=16, max_steps=1000)
    for batch in rounds:
        lm.module(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

The order of a round follows from its number and the seed, so a loop that is resumed by `state_dict` sees the batches that it
would have seen, with any number of workers. The loaders draw nothing from torch's global random state. Seconds of training, of
which selecting may cost a share (`max_overhead`), are those of the loop's body and of the wait for its batches; `paused` leaves
out what is no training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from oracle.errors import InputError, InputTypeError, check_count
from oracle.language_model import LanguageModel
from surrogate.training.pool_texts import PoolTexts, check_base, check_items, collate
from surrogate.training.refresher import Refresher
from surrogate.training.round_feed import RoundFeed
from surrogate.training.round_identity import require_as_before
from surrogate.training.round_reports import metrics_of
from surrogate.training.round_store import Round
from surrogate.training.selected_dataset import SelectedDataset, check_row_tokens, mixed
from surrogate.training.streaming import StreamRefresher
from surrogate.training.weight_average import WeightAverage

OWN_LOADER_OPTIONS = ("dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "collate_fn", "generator")


class Rounds:
    """Iterate over the micro-batches of a training that refreshes its selection.

    Where `torch.distributed` is initialised, every process iterates with its own copy of the model, all choose the
    same texts, and each trains on its part of every batch.

    Args:
        refresher: Chooses the texts: a `Refresher`, or a `StreamRefresher`.
        lm: The model that is being trained, with its optimiser: the plain modules, not what wraps them for several
            processes.
        every: Optimiser steps of a round.
        batch_size: Items per process and micro-batch.
        max_steps: Optimiser steps in all.
        grad_accumulation: Micro-batches per optimiser step; `completes_step` tells the last one.
        row_tokens: Pack the chosen texts into rows of so many tokens, with an end-of-text token after each of them, which
            items of your own (`base`) bring themselves; None trains on single texts.
        base: A dataset of your own whose item i is text i of `refresher.pool`; None tokenises the pool's texts.
        collate_fn: Makes a batch of items; by default pads `input_ids` and `labels`.
        shuffle: Mix each round's items; False keeps the order of the ranking, best first.
        keep_autocast: Measure labels in the mixed precision of Accelerate's training: cheaper, and only for methods by
            gradients (see `surrogate.training.full_precision`).
        average: Measure at this running average of the weights, which watches the optimiser; a checkpoint of the training
            needs its `state_dict` beside this one.
        seed: Decides the order.
        loader_options: Further options of `torch.utils.data.DataLoader`, such as `num_workers`.

    Attributes:
        step: Optimiser steps that were handed out; after the last micro-batch of a step it counts as done, so take
            `state_dict` after the optimiser has taken it.
        completes_step: Whether the optimiser takes a step after the present micro-batch.

    Raises:
        InputError: An option cannot be used.
    """

    def __init__(
        self,
        refresher: Refresher | StreamRefresher,
        lm: LanguageModel,
        *,
        every: int,
        batch_size: int,
        max_steps: int,
        grad_accumulation: int = 1,
        row_tokens: int | None = None,
        base: Any = None,
        collate_fn: Callable[[list[Any]], Any] = collate,
        shuffle: bool = True,
        keep_autocast: bool = False,
        average: WeightAverage | None = None,
        seed: int = 0,
        loader_options: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(refresher, (Refresher, StreamRefresher)) or not isinstance(lm, LanguageModel):
            raise InputTypeError(
                f"Rounds({type(refresher).__name__}, {type(lm).__name__}).",
                "a Refresher or StreamRefresher, and an oracle.LanguageModel",
                "write Rounds(Refresher(pool, targets, workdir=...), oracle.LanguageModel(module, tokenizer, optimizer), ...).",
            )
        sizes = {"every": every, "batch_size": batch_size, "max_steps": max_steps, "grad_accumulation": grad_accumulation}
        for name, value in sizes.items():
            check_count(name, value)
        taken = sorted(set(loader_options or {}) & set(OWN_LOADER_OPTIONS))
        if taken:
            raise InputError(
                f"loader_options with {', '.join(taken)}.", "options that Rounds does not set itself", "leave these out."
            )
        check_row_tokens(row_tokens, getattr(lm.module, "config", None))
        self.lm, self.batch_size, self.max_steps, self.grad_accumulation = lm, batch_size, max_steps, grad_accumulation
        self.shuffle, self.seed = shuffle, seed
        self.step, self.completes_step = 0, False
        self._rank, self._world_size = _place()
        texts = refresher.texts if isinstance(refresher, StreamRefresher) else PoolTexts(refresher.pool)
        texts.tokenizer, texts.max_tokens = lm.tokenizer, lm.max_tokens
        if base is not None:
            check_base(base, None if isinstance(refresher, StreamRefresher) else refresher.pool)
            if collate_fn is collate:
                check_items(base)
        dataset = SelectedDataset(
            texts if base is None else base,
            every * grad_accumulation * batch_size * self._world_size,
            row_tokens=row_tokens,
            separator=None if row_tokens is None or base is not None else texts.separator,
        )
        self.feed = RoundFeed(
            refresher,
            dataset,
            texts,
            every=every,
            world_size=self._world_size,
            max_steps=max_steps,
            keep_autocast=keep_autocast,
            average=average,
        )
        self._batches: list[list[int]] = []  # places of the dataset that this process still has to train on in the round
        self._loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=_BatchesLeft(self),
            collate_fn=collate_fn,
            generator=torch.Generator().manual_seed(seed),  # otherwise each pass draws from the global random state
            **(loader_options or {}),
        )

    @property
    def present(self) -> Round | None:
        """The round that is trained on."""
        return self.feed.present

    def metrics(self) -> dict[str, float]:
        """What the present round has to tell a logger, as flat names and numbers (see `metrics_of`)."""
        return {} if self.present is None else metrics_of(self.present.record)

    def __iter__(self) -> Iterator[Any]:
        """Go on after the last whole step, up to `max_steps`.

        A loop that is left before, by `break`, can be gone on with. One process closes the account then as at the end; several
        have to call `close`, all of them.
        """
        try:
            while self.step < self.max_steps:
                round_, _ = self.feed.enter(self.step, self.lm)
                self._batches = self._places(round_.index)[: (self.max_steps - self.step) * self.grad_accumulation]
                start_seconds = time.perf_counter()
                for number, batch in enumerate(self._loader, start=1):
                    self.completes_step = number % self.grad_accumulation == 0
                    self.step += int(self.completes_step)
                    yield _to_device(batch, self.lm.device)
                    now_seconds = time.perf_counter()
                    self.feed.add_seconds(now_seconds - start_seconds)
                    start_seconds = now_seconds
        except GeneratorExit:  # one process may have left alone, and would wait here for the others
            if self._world_size == 1:
                self.feed.finish(self.step, is_left=True)
            raise
        self.close()

    def close(self) -> None:
        """Close the account of a training that ends here (`overhead.json`), and let other processes train with its workdir."""
        self.feed.finish(self.step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done in the block, an evaluation or a checkpoint, out of the seconds of training.

        Example:
            >>> with rounds.paused():  # doctest: +SKIP
            ...     evaluate(module)
        """
        start_seconds = time.perf_counter()
        try:
            yield
        finally:
            self.feed.add_seconds(start_seconds - time.perf_counter())

    def _places(self, index: int) -> list[list[int]]:
        """This process's micro-batches of the round that are still to come."""
        num_items, every = self.feed.dataset.num_items, self.feed.every
        order = mixed(num_items, index=index, seed=self.seed) if self.shuffle else torch.arange(num_items).numpy()
        by_batch = order.reshape(every * self.grad_accumulation, self._world_size, self.batch_size)
        done = self.step % every * self.grad_accumulation
        return by_batch[done:, self._rank].tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint of the training needs beside model, optimiser and random state; JSON values."""
        return {"step": self.step, "seed": self.seed, "shuffle": self.shuffle, "feed": self.feed.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            MismatchError: It is of a training with rounds of another size or order, or of another workdir.
            MissingFileError: The rounds are not in the workdir.
        """
        require_as_before(state, {"seed": self.seed, "shuffle": self.shuffle}, what="order of batches")
        self.feed.load_state_dict(state["feed"])
        self.step = int(state["step"])


class _BatchesLeft(torch.utils.data.Sampler):
    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.rounds._batches)

    def __len__(self) -> int:
        return len(self.rounds._batches)


def _place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    return batch.to(device) if isinstance(batch, torch.Tensor) else batch
