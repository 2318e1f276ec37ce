"""What a Hugging Face Trainer is asked before it trains on rounds: its arguments, its loader, the dataset it has made."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, default_data_collator

from oracle.encoding import IGNORED
from oracle.errors import InputError
from oracle.text_formats import FORMATS, TEXT_ID
from oracle.texts import list_text_ids, text_format
from surrogate.training.pool_texts import PoolTexts, check_items, collate, labels_of
from surrogate.training.round_identity import require_as_before

if TYPE_CHECKING:
    from datasets import Dataset

ORDER_ARGUMENTS = ("train_sampling_strategy", "data_seed", "seed")  # decide the order of a round's items
NUM_LOOKED_AT = 256  # of a trainer's own items, to see how long they are
NUM_MASKS_LOOKED_AT = 16  # of them, to see which tokens are predicted
MASK_TOLERANCE = 1.25  # between the shares of tokens predicted and measured there


class LongItemsWarning(UserWarning):
    """A trainer's own items are longer than the texts that are measured."""


class OtherMaskWarning(UserWarning):
    """A trainer's own items are predicted in other parts than the texts that are measured."""


def check_arguments(args: Any) -> None:
    """Refuse what would make a round something else than an epoch of fixed length, or a resume inexact.

    Raises:
        InputError: An argument cannot be used.
    """
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


def check_loader(loader: Any, dataset: Any, *, num_batches: int, is_own_base: bool) -> None:
    """Refuse a loader that does not show the rounds, or whose collator cannot make batches of them.

    Args:
        loader: What the Trainer trains on.
        dataset: The callback's dataset.
        num_batches: Batches of a round.
        is_own_base: Whether the user made the items; how these are batched is then theirs to know.

    Raises:
        InputError: It does not fit.
    """
    found: Any = getattr(loader, "dataset", None)
    if found is not dataset or len(loader) != num_batches:
        raise InputError(
            f"the Trainer's loader has {len(loader)} batches of a {type(found).__name__}, and a round {num_batches} of this "
            "callback's train_dataset.",
            "train_dataset=callback.train_dataset, and the batch size that the Trainer was made with",
            "pass that dataset, or call callback.attach(trainer) before training; leave batches to the Trainer.",
        )
    collator = getattr(loader, "collate_fn", None)
    collator = getattr(collator, "data_collator", collator)  # inside what removes columns
    if is_own_base and collator is collate:
        check_items(found.base)
    pads_no_labels = collator is default_data_collator or isinstance(collator, DataCollatorWithPadding)
    if not is_own_base and (pads_no_labels or type(collator) is DataCollatorForLanguageModeling):
        raise InputError(
            f"the data collator {getattr(collator, '__name__', type(collator).__name__)}, which does not pad the items' labels, "
            "or makes new ones that predict prompts too.",
            "a collator that pads input_ids and the labels that items have",
            "pass data_collator=callback.data_collator when the Trainer is made.",
        )


def order_of(args: Any) -> dict[str, Any]:
    """Return the arguments that decide in which order a round's items come, as JSON values."""
    return {name: getattr(args, name, None) for name in ORDER_ARGUMENTS}


def check_order(args: Any, stored: Mapping[str, Any]) -> None:
    """Refuse to go on with the items of a round in another order.

    Raises:
        MismatchError: An argument differs from that of the checkpoint.
    """
    require_as_before(stored, order_of(args), what="order of batches")


def rows_in_pool(base: Any, pool: Dataset) -> list[int]:
    """Return which texts of the pool a dataset that was made of it has kept, in their order.

    Args:
        base: A dataset with a column `text_id`, or with the pool's own texts in all rows and in their order.
        pool: The pool.

    Raises:
        InputError: It has others, or they are in another order, or it does not say which it has.
    """
    own, columns = list_text_ids(pool), getattr(base, "column_names", None) or ()
    row_of = {text_id: row for row, text_id in enumerate(own)}
    rows: list[int] = []
    if TEXT_ID in columns:
        rows = [row_of.get(text_id, -1) for text_id in base[TEXT_ID]]
    elif len(base) == len(own) and _has_texts(base, pool, columns):
        rows = list(range(len(own)))
    if not rows or sorted(set(rows)) != rows or rows[0] < 0:
        raise InputError(
            f"the trainer's dataset has {len(base)} items, and nothing says that they are the {len(own)} texts of the pool in "
            "their order.",
            "a dataset made of callback.pool that keeps its column text_id, or its texts",
            "pass train_dataset=callback.train_dataset; to SFTTrainer, which tokenises, callback.pool, without its packing "
            "(InfluenceCallback(row_tokens=...) packs); or give InfluenceCallback(base=...) a dataset whose item i is text i of "
            "callback.pool.",
        )
    return rows


def tell_of_long_items(base: Any, *, max_tokens: int) -> None:
    """Warn where a trainer's own items, of which the first are looked at, are longer than the texts that are measured."""
    longest = max((len(base[row].get("input_ids", ())) for row in range(min(len(base), NUM_LOOKED_AT))), default=0)
    if longest > max_tokens:
        warnings.warn(
            f"the trainer's items have up to {longest} tokens, and texts are measured up to {max_tokens} of them; pass "
            "InfluenceCallback(max_tokens=...) with the length that is trained on.",
            LongItemsWarning,
            stacklevel=4,
        )


def tell_of_other_masks(base: Any, args: Any, texts: PoolTexts) -> None:
    """Warn where training predicts clearly more or less of the first items than is measured: other turns of a chat.

    Args:
        base: The trainer's own items, with `labels`, or with the masks that TRL's collator makes labels of.
        args: The trainer's arguments.
        texts: The same texts as they are measured.
    """
    rows = range(min(len(base), NUM_MASKS_LOOKED_AT))
    items, measured = [base[row] for row in rows], texts.encode(list(rows))
    num_tokens = sum(sum(item.get("attention_mask", [1] * len(item["input_ids"]))) for item in items)
    labels = [token for text in measured for token in text.labels]
    of_texts = sum(token != IGNORED for token in labels) / max(len(labels), 1)
    predicted, expected = sum(_num_predicted(item, args) for item in items), of_texts * num_tokens
    if abs(predicted - expected) <= len(rows):  # an end-of-text token more or less
        return
    of_items = predicted / max(num_tokens, 1)
    if not of_texts / MASK_TOLERANCE <= of_items <= of_texts * MASK_TOLERANCE:
        warnings.warn(
            f"the trainer predicts {of_items:.0%} of the tokens of its first {len(rows)} items, and {of_texts:.0%} are measured: "
            "the loss of chats is measured on the assistant's turns, of prompts and completions on the completions. Pass "
            "SFTConfig(assistant_only_loss=True) for chats, completion_only_loss=True for completions, or a pool of plain texts.",
            OtherMaskWarning,
            stacklevel=4,
        )


def _num_predicted(item: Mapping[str, Any], args: Any) -> int:
    own = dict(item)
    if getattr(args, "completion_only_loss", None) is False:
        own.pop("completion_mask", None)
    return sum(token != IGNORED for token in labels_of(own))


def _has_texts(base: Any, pool: Dataset, columns: Sequence[str]) -> bool:
    names = FORMATS[text_format(pool)]
    return set(names) <= set(columns) and all(list(base[name]) == list(pool[name]) for name in names)


def inner_optimizer(optimizer: Any) -> Any:
    """Return the torch optimiser inside Accelerate's."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
