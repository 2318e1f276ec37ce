"""`InfluenceCallback`: refresh what is trained on, under the stock Hugging Face Trainer and TRL's SFTTrainer.

    callback = surrogate.training.InfluenceCallback(pool, targets, every=100, workdir="influence", tokenizer=tokenizer)
    trainer = Trainer(model, args, train_dataset=callback.train_dataset, data_collator=callback.data_collator,
                      callbacks=[callback])
    callback.attach(trainer)

One round is one epoch of the Trainer: the dataset has the length of a round, and at the beginning of each epoch, before a
loader's workers exist, it is filled anew. So a resumed training sees the batches of an uninterrupted one, with any number
of workers, from within a round as from its border (dropout draws other numbers after a resume if workers are kept alive,
under any Trainer). How long to train is said by `max_steps`.

Hooks are given neither the trainer nor its checkpoint. The trainer, whose `log` reaches TensorBoard, W&B and Trackio, is
therefore handed over with `attach`; the checkpoint is looked for where the arguments say (`resume_check`). What must survive
a resume stands in the Trainer's own state file, and in `workdir`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from oracle.errors import InputError, check_at_least
from oracle.language_model import DEFAULT_MAX_TOKENS, LanguageModel
from oracle.text_formats import TEXT_ID
from oracle.texts import list_text_ids, read_texts
from surrogate.training.pool_texts import PoolTexts, collate
from surrogate.training.refresher import Refresher
from surrogate.training.resume_check import check_resumed
from surrogate.training.round_feed import RoundFeed, metrics_of
from surrogate.training.selected_dataset import SelectedDataset
from surrogate.training.streaming import StreamRefresher

if TYPE_CHECKING:
    from datasets import Dataset


class UnreportedWarning(UserWarning):
    """The Trainer reports to a logger, and the callback cannot reach it."""


class InexactDropoutWarning(UserWarning):
    """A resumed training sees the same batches, and draws other random numbers in them."""


class InfluenceCallback(TrainerCallback, ExportableState):
    """Choose the texts of each round of a Trainer's training, by influence measured on the live model.

    Several processes work as the Trainer starts them: all choose the same texts and share the labelling. Under mixed
    precision labels are measured without it, unless `keep_autocast`.

    Args:
        pool: The texts to choose from: anything `oracle.read_texts` takes.
        targets: The named target sets; may be left out for a strategy that needs none.
        every: Optimiser steps of a round.
        workdir: Folder for rounds, labels, features and predictors; the same one for all processes and for a resumed run.
        strategy: Name of a strategy (`surrogate methods`), or an object of one.
        tokenizer: The model's tokenizer; None takes the Trainer's `processing_class`.
        max_tokens: Longer texts are cut there; None means 512, or the model's context if that is shorter.
        row_tokens: Pack the chosen texts into rows of so many tokens; None trains on single texts.
        base: A dataset of your own whose item i is text i of `callback.pool`; None tokenises the pool's texts.
        keep_autocast: Measure labels in the Trainer's mixed precision: cheaper, and only for methods by gradients (see
            `surrogate.training.full_precision`).
        window: The pool is a stream, of which so many texts at a time are chosen from, in `rounds_per_window` rounds (see
            `surrogate.training.streaming`). Resuming is then exact only as far as the stream repeats itself.
        **refresher_options: Further options of `Refresher` (`refresh_every`, `drift_threshold`, `consume_once`,
            `max_overhead`, `on_failure`, ...) and of the strategy; `num_rounds` follows from the Trainer's `max_steps`.

    Attributes:
        train_dataset: What the Trainer trains on.
        data_collator: What makes batches of it, unless `base` has items of another kind.
        refresher: The refresher, from the making of the Trainer on.

    Raises:
        InputError: The Trainer's arguments do not fit; raised when it is made or when training begins.
        MismatchError: A resumed model does not have the weights of its checkpoint, or `workdir` is of another run.
    """

    def __init__(
        self,
        pool: Any,
        targets: Any = None,
        *,
        every: int,
        workdir: str | Path,
        strategy: Any = "refresh",
        tokenizer: Any = None,
        max_tokens: int | None = None,
        row_tokens: int | None = None,
        base: Any = None,
        keep_autocast: bool = False,
        window: int | None = None,
        **refresher_options: Any,
    ) -> None:
        check_at_least("every", every, 1)
        self.every, self.keep_autocast = every, keep_autocast
        self._max_tokens, self._tokenizer = max_tokens, tokenizer
        self._stream: StreamRefresher | None = None
        self._refresher_options = {"targets": targets, "workdir": workdir, "strategy": strategy, **refresher_options}
        if window is None:
            self._texts = PoolTexts(read_texts(pool))
        else:
            self._stream = StreamRefresher(pool, window=window, **self._refresher_options)
            self._texts = self._stream.texts
        self._own_base = base is not None
        self.train_dataset = SelectedDataset(self._texts if base is None else base, row_tokens=row_tokens)
        self.data_collator: Callable[[list[Any]], Any] = collate
        self._feed: RoundFeed | None = None
        self._args: Any = None
        self._trainer: Any = None
        self._mark_seconds = 0.0  # since when training runs

    # ------------------------------------------------------------------ what users call

    @property
    def pool(self) -> Dataset:
        """The texts, without those that `read_texts` rejects; of a stream, those of the present window."""
        return self._texts.pool

    @property
    def refresher(self) -> Refresher | StreamRefresher:
        """The refresher; there is one as soon as the Trainer is made."""
        return self._running().refresher

    def attach(self, trainer: Any) -> Any:
        """Report through this trainer's `log`, and let it train on `train_dataset`.

        A trainer that was given another dataset has made its items itself from `callback.pool` (TRL's SFTTrainer tokenises):
        it goes on with these, of which each round now shows the chosen ones.

        Args:
            trainer: A transformers Trainer that has this callback.

        Returns:
            The trainer.

        Raises:
            InputError: It has not got this callback, or its dataset is not made of `callback.pool`, text by text.
        """
        self._running()
        if self not in trainer.callback_handler.callbacks:
            raise InputError(
                "a trainer that has not got this callback.",
                "the trainer that was made with callbacks=[callback]",
                "pass the callback when the trainer is made.",
            )
        self._trainer = trainer
        if trainer.train_dataset is not self.train_dataset:
            self._adopt(trainer.train_dataset)
            trainer.train_dataset = self.train_dataset
        return trainer

    def table(self) -> list[dict[str, Any]]:
        """Return one row per round: why, how well, how much (see `Refresher.table`)."""
        return self.refresher.table()

    def state(self) -> dict[str, Any]:
        """Return what the Trainer keeps in its checkpoints for this callback."""
        return {"args": {}, "attributes": {} if self._feed is None else {"feed": self._feed.state_dict()}}

    # ------------------------------------------------------------------ hooks

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the length of a round, now that batch size and processes are known."""
        _check_arguments(args)
        tokenizer = self._tokenizer if self._tokenizer is not None else kwargs.get("processing_class")
        if tokenizer is None and self._stream is None and self._texts.needs_tokenizer:
            raise InputError(
                "texts, and neither the callback nor the Trainer has a tokenizer.",
                "a Hugging Face tokenizer, or texts as input_ids",
                "pass InfluenceCallback(tokenizer=...) or Trainer(processing_class=...).",
            )
        context = getattr(getattr(kwargs.get("model"), "config", None), "max_position_embeddings", None)
        self._texts.tokenizer = tokenizer
        self._texts.max_tokens = self._max_tokens or min(DEFAULT_MAX_TOKENS, context or DEFAULT_MAX_TOKENS)
        if self.train_dataset.row_tokens is not None and not self._own_base:
            self.train_dataset.separator = self._texts.separator
        steps = self.every * args.gradient_accumulation_steps
        self.train_dataset.resize(steps * args.train_batch_size * args.world_size)
        self._args = args
        self._build()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a loader that does not fit, and go on where the checkpoint was."""
        feed = self._running()
        _check_arguments(args)
        self._check_loader(args, kwargs["train_dataloader"])
        if state.global_step:
            stored = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("feed")
            if stored is None:
                raise InputError(
                    f"training is resumed at step {state.global_step} from a checkpoint that was saved without this callback.",
                    "a checkpoint of a training with an InfluenceCallback",
                    "load the checkpoint's weights into the model and begin a new training.",
                )
            check_resumed(kwargs["model"], args, state.global_step)
            feed.load_state_dict(stored)
            if args.dataloader_num_workers and args.dataloader_persistent_workers:
                warnings.warn(
                    "the resumed training sees the same batches, but dropout draws other numbers than in an uninterrupted one: a "
                    "loader with persistent workers draws their seed once, and after a resume once more; "
                    "dataloader_persistent_workers=False resumes exactly.",
                    InexactDropoutWarning,
                    stacklevel=2,
                )
        else:
            feed.forget()
        if self._trainer is None and args.report_to:
            warnings.warn(
                f"rounds are not reported to {', '.join(args.report_to)}: the Trainer gives its callbacks no way to log. They "
                "are in trainer.state.log_history and in the workdir's rounds.jsonl; callback.attach(trainer) reports them.",
                UnreportedWarning,
                stacklevel=2,
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a round, or show again the one that training was resumed in."""
        feed = self._running()
        lm = LanguageModel(
            kwargs["model"],
            self._texts.tokenizer,
            optimizer=_inner_optimizer(kwargs["optimizer"]),
            max_tokens=self._texts.max_tokens,
        )
        present, begins = feed.enter(state.global_step, lm)
        if begins:
            self._report(metrics_of(present.record), state)
        self._mark_seconds = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the seconds of the step, with the wait for its data."""
        now_seconds = time.perf_counter()
        self._running().add_seconds(now_seconds - self._mark_seconds)
        self._mark_seconds = now_seconds

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out the seconds of the evaluation."""
        self._mark_seconds = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out the seconds of the saving."""
        self._mark_seconds = time.perf_counter()

    # ------------------------------------------------------------------ parts

    def _build(self) -> None:
        options = {"num_rounds": math.ceil(self._args.max_steps / self.every), **self._refresher_options}
        self._feed = RoundFeed(
            self._stream or Refresher(self.pool, **options),
            self.train_dataset,
            self._texts,
            every=self.every,
            world_size=self._args.world_size,
            max_steps=self._args.max_steps,
            keep_autocast=self.keep_autocast,
        )

    def _running(self) -> RoundFeed:
        if self._feed is None:
            raise InputError(
                "the callback belongs to no Trainer yet.",
                "a Trainer that was made with callbacks=[callback]",
                "pass it when the Trainer is made; add_callback comes too late to say how long a round is.",
            )
        return self._feed

    def _adopt(self, base: Any) -> None:
        """Take a dataset that was made of the pool; texts that it has dropped leave the pool as well."""
        own = [] if self._stream is not None else list_text_ids(self.pool)
        ids = list(base[TEXT_ID]) if TEXT_ID in (getattr(base, "column_names", None) or ()) else None
        if ids is None and len(base) == len(own):
            ids = own
        row_of = {text_id: row for row, text_id in enumerate(own)}
        rows = [row_of.get(text_id, -1) for text_id in ids or ()]
        if not rows or sorted(set(rows)) != rows or rows[0] < 0:
            raise InputError(
                f"the trainer's dataset has {len(base)} items, not the {len(own)} texts of the pool in their order.",
                "a dataset whose item i is text i of callback.pool, or with a column text_id",
                "pass train_dataset=callback.pool, without packing by the trainer (InfluenceCallback(row_tokens=...) packs).",
            )
        if len(rows) < len(own):
            self._texts.pool = self.pool.select(rows)
            self._build()
        self.train_dataset.base, self.train_dataset.separator, self._own_base = base, None, True

    def _check_loader(self, args: Any, loader: Any) -> None:
        wanted = self.every * args.gradient_accumulation_steps
        dataset = getattr(loader, "dataset", None)
        if dataset is not self.train_dataset or len(loader) != wanted:
            raise InputError(
                f"the Trainer's loader has {len(loader)} batches of a {type(dataset).__name__}, and a round {wanted} of this "
                "callback's train_dataset.",
                "train_dataset=callback.train_dataset, and the batch size that the Trainer was made with",
                "pass that dataset, or call callback.attach(trainer) before training; leave batches to the Trainer.",
            )

    def _report(self, metrics: dict[str, float], state: Any) -> None:
        if self._trainer is not None:
            self._trainer.log(metrics)
        else:
            state.log_history.append({**metrics, "epoch": state.epoch, "step": state.global_step})


def _check_arguments(args: Any) -> None:
    """Refuse what would make a round something else than an epoch of fixed length, or a resume inexact."""
    strategy = getattr(args, "train_sampling_strategy", "random")
    refused = (
        (args.max_steps <= 0, f"max_steps={args.max_steps}", "the number of optimiser steps in max_steps; an epoch is a round"),
        (args.ignore_data_skip, "ignore_data_skip=True", "False: a resumed round would begin again at its first batch"),
        (
            strategy not in ("random", "sequential") or getattr(args, "group_by_length", False),
            f"train_sampling_strategy={strategy!r}",
            "'random' or 'sequential': lengths are known only when a round begins",
        ),
        (args.auto_find_batch_size, "auto_find_batch_size=True", "False: it would change the length of a round in the middle"),
        (
            getattr(args, "restore_callback_states_from_checkpoint", False),
            "restore_callback_states_from_checkpoint=True",
            "False: it makes callbacks anew, without pool and targets; this one finds its state by itself",
        ),
        (bool(args.deepspeed), "deepspeed", "training without it: weights in parts cannot be measured"),
        (bool(args.fsdp), "fsdp", "training without it: weights in parts cannot be measured"),
    )
    for is_refused, given, accepted in refused:
        if is_refused:
            raise InputError(f"TrainingArguments with {given}.", accepted, "change this argument.")


def _inner_optimizer(optimizer: Any) -> Any:
    """The torch optimiser inside Accelerate's."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
