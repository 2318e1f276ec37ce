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

from oracle.errors import InputError, InputTypeError, MissingFileError, check_count
from oracle.language_model import DEFAULT_MAX_TOKENS, LanguageModel
from oracle.targets import read_targets
from oracle.texts import read_texts
from surrogate.training.pool_texts import PoolTexts, check_base, collate
from surrogate.training.refresher import Refresher
from surrogate.training.resume_check import check_resumed, find_checkpoint
from surrogate.training.round_feed import RoundFeed
from surrogate.training.round_reports import metrics_of
from surrogate.training.selected_dataset import SelectedDataset, check_row_tokens
from surrogate.training.streaming import StreamRefresher
from surrogate.training.trainer_checks import (
    check_arguments,
    check_loader,
    check_order,
    inner_optimizer,
    order_of,
    rows_in_pool,
    tell_of_long_items,
    tell_of_other_masks,
)
from surrogate.training.weight_average import WeightAverage

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
        max_tokens: Longer texts are cut there; None means the `max_length` of TRL's arguments, else 512, and the model's context
            if that is shorter.
        row_tokens: Pack the chosen texts into rows of so many tokens, with an end-of-text token after each of them, which
            items of your own (`base`) bring themselves; None trains on single texts.
        base: A dataset of your own whose item i is text i of `callback.pool`; None tokenises the pool's texts.
        keep_autocast: Measure labels in the Trainer's mixed precision: cheaper, and only for methods by gradients (see
            `surrogate.training.full_precision`).
        average_decay: Measure at a running average of the weights with this decay (`WeightAverage`), which checkpoints then
            hold beside the weights; None measures at the last weights, whose labels are noisy at a constant learning rate.
        window: The pool is a stream, of which so many texts at a time are chosen from, in `rounds_per_window` rounds (see
            `surrogate.training.streaming`). Resuming is then exact only as far as the stream repeats itself.
        **refresher_options: Further options of `Refresher` (`refresh_every`, `drift_threshold`, `consume_once`,
            `max_overhead`, `on_failure`, ...) and of the strategy; `num_rounds` follows from the Trainer's `max_steps`.

    Attributes:
        train_dataset: What the Trainer trains on.
        data_collator: What makes batches of it, unless `base` has items of another kind.
        refresher: The refresher, from the making of the Trainer on.

    Raises:
        InputError: An option cannot be used; or, raised when the Trainer is made or training begins, its arguments do not fit.
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
        average_decay: float | None = None,
        window: int | None = None,
        **refresher_options: Any,
    ) -> None:
        check_count("every", every)
        if max_tokens is not None:
            check_count("max_tokens", max_tokens, minimum=2)
        if isinstance(tokenizer, str):
            raise InputTypeError(
                f"tokenizer={tokenizer!r}.", "a Hugging Face tokenizer", "pass AutoTokenizer.from_pretrained(...) of that name."
            )
        self.every, self.keep_autocast, self.average_decay = every, keep_autocast, average_decay
        self._max_tokens, self._tokenizer = max_tokens, tokenizer
        self._stream: StreamRefresher | None = None
        sets = None if targets is None else read_targets(targets)
        self._refresher_options = {"targets": sets, "workdir": workdir, "strategy": strategy, **refresher_options}
        if window is None:
            self._texts = PoolTexts(read_texts(pool))
            # Made once more when the number of rounds is known; now, so that a mistake is told before a large model is loaded.
            Refresher(self._texts.pool, **{"num_rounds": 1, **self._refresher_options})
        else:
            self._stream = StreamRefresher(pool, window=window, **self._refresher_options)
            self._texts = self._stream.texts
        if base is not None:
            check_base(base, None if self._stream is not None else self._texts.pool)
        self._own_base = base is not None
        self.train_dataset = SelectedDataset(self._texts if base is None else base, row_tokens=row_tokens)
        self.data_collator: Callable[[list[Any]], Any] = collate
        self._feed: RoundFeed | None = None
        self._args: Any = None
        self._trainer: Any = None
        self._begun: Any = None  # the state of the training that was begun last
        self._begun_at = 0  # its step when it began
        self._watching: Any = None  # what ends the average's watch of the optimiser
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
        if self not in trainer.callback_handler.callbacks:
            raise InputError(
                "a trainer that has not got this callback.",
                "the trainer that was made with callbacks=[callback]",
                "pass the callback when the trainer is made.",
            )
        if self._args is not trainer.args:  # it came by add_callback, after the trainer was made
            handed = {"model": trainer.model, "processing_class": trainer.processing_class}
            self.on_init_end(trainer.args, trainer.state, trainer.control, **handed)
        self._trainer = trainer
        if trainer.train_dataset is not self.train_dataset:
            self._adopt(trainer)
            trainer.train_dataset = self.train_dataset
        return trainer

    def table(self) -> list[dict[str, Any]]:
        """Return one row per round: why, how well, how much (see `Refresher.table`)."""
        return self.refresher.table()

    def state(self) -> dict[str, Any]:
        """Return what the Trainer keeps in its checkpoints for this callback."""
        if self._feed is None:
            return {"args": {}, "attributes": {}}
        return {"args": {}, "attributes": {"feed": self._feed.state_dict(), "order": order_of(self._args)}}

    # ------------------------------------------------------------------ hooks

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the length of a round, now that batch size and processes are known."""
        check_arguments(args)
        self._trainer, self._begun = None, None
        tokenizer = self._tokenizer if self._tokenizer is not None else kwargs.get("processing_class")
        if tokenizer is None and self._stream is None and self._texts.needs_tokenizer:
            raise InputError(
                "texts, and neither the callback nor the Trainer has a tokenizer.",
                "a Hugging Face tokenizer, or texts as input_ids",
                "pass InfluenceCallback(tokenizer=...) or Trainer(processing_class=...).",
            )
        config = getattr(kwargs.get("model"), "config", None)
        context = getattr(config, "max_position_embeddings", None)
        check_row_tokens(self.train_dataset.row_tokens, config)
        self._texts.tokenizer = tokenizer
        most = getattr(args, "max_length", None) or DEFAULT_MAX_TOKENS
        self._texts.max_tokens = min(most, context or most) if self._max_tokens is None else self._max_tokens
        if self.train_dataset.row_tokens is not None and not self._own_base:
            self.train_dataset.separator = self._texts.separator
        steps = self.every * args.gradient_accumulation_steps
        self.train_dataset.resize(steps * args.train_batch_size * args.world_size)
        self._args = args
        self._build()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a loader that does not fit, and go on where the checkpoint was."""
        feed = self._running()
        if state is self._begun:
            raise InputError(
                "a trainer that has this callback twice.", "each callback once", "leave one of them out of callbacks=[...]."
            )
        self._begun, self._begun_at = state, state.global_step
        check_arguments(args)
        num_batches = self.every * args.gradient_accumulation_steps
        loader = kwargs["train_dataloader"]
        check_loader(loader, self.train_dataset, num_batches=num_batches, is_own_base=self._own_base)
        if state.global_step:
            stored = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
            if not {"feed", "order"} <= set(stored):
                raise InputError(
                    f"training is resumed at step {state.global_step} from a checkpoint that was saved without this callback.",
                    "a checkpoint of a training with an InfluenceCallback",
                    "load the checkpoint's weights into the model and begin a new training.",
                )
            check_order(args, stored["order"])
            check_resumed(kwargs["model"], args, state.global_step)
            feed.load_state_dict(stored["feed"])
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
        self._begin_average(args, state, kwargs["model"], inner_optimizer(kwargs["optimizer"]))
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
        if state.global_step % self.every and state.global_step != self._begun_at:
            raise InputError(
                f"an epoch that ended at step {state.global_step}, within a round of {self.every} steps.",
                "epochs that end with their round",
                "let no other callback set should_epoch_stop; should_training_stop ends a training anywhere.",
            )
        lm = LanguageModel(
            kwargs["model"],
            self._texts.tokenizer,
            optimizer=inner_optimizer(kwargs["optimizer"]),
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
        """Put the average beside the weights, and leave out the seconds of the saving."""
        average = self._running().average
        if average is not None and state.is_world_process_zero:
            average.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._mark_seconds = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the account, and say where the promise on cost was not kept."""
        self._running().finish(state.global_step)
        self._end_watch()

    # ------------------------------------------------------------------ parts

    def _begin_average(self, args: Any, state: Any, model: Any, optimizer: Any) -> None:
        """Average the weights from here on; after a resume, from where the checkpoint was."""
        self._end_watch()
        if self.average_decay is None:
            return
        average = WeightAverage(model, decay=self.average_decay)
        if state.global_step:
            folder = find_checkpoint(args, state.global_step)
            if folder is None:
                raise MissingFileError(
                    f"training goes on at step {state.global_step}, and its checkpoint, which has the average of the weights, is "
                    f"not in {args.output_dir}.",
                    "the folder of the checkpoint, told to the callback too",
                    "name it in TrainingArguments(resume_from_checkpoint=...) beside trainer.train(resume_from_checkpoint=...).",
                )
            average.load(folder)
        self._running().average, self._watching = average, average.watch(optimizer)

    def _end_watch(self) -> None:
        if self._watching is not None:
            self._watching.remove()
        self._watching = None

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
                "pass it when the Trainer is made, or call callback.attach(trainer) after add_callback.",
            )
        return self._feed

    def _adopt(self, trainer: Any) -> None:
        """Take a trainer's dataset that was made of the pool; texts that it has dropped leave the pool as well."""
        base = trainer.train_dataset
        if self._stream is not None:
            raise InputError(
                "a stream, and a trainer with a dataset of its own.",
                "train_dataset=callback.train_dataset",
                "pass that; the windows of a stream are not known when the trainer is made.",
            )
        if self.train_dataset.row_tokens is not None and "labels" not in (getattr(base, "column_names", None) or ()):
            raise InputError(
                "row_tokens, and a trainer's dataset whose items have no labels.",
                "items with input_ids and labels, or no row_tokens",
                "leave row_tokens out: packed, such items would be predicted whole, also what the trainer masks.",
            )
        rows = rows_in_pool(base, self.pool)
        if len(rows) < len(self.pool):
            self._texts.pool = self.pool.select(rows)
            self._build()
        if "input_ids" in base[0]:
            tell_of_long_items(base, max_tokens=self._texts.max_tokens)
            tell_of_other_masks(base, trainer.args, self._texts)
        self.train_dataset.replace_base(base)
        self._own_base = True

    def _report(self, metrics: dict[str, float], state: Any) -> None:
        if self._trainer is not None:
            self._trainer.log(metrics)
        else:
            state.log_history.append({**metrics, "epoch": state.epoch, "step": state.global_step})
