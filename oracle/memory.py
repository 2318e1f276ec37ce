"""A device that runs out of memory gets smaller batches, and the work is done again.

A text's value does not depend on the batch it is in, so this changes nothing beyond rounding. What accelerators raise counts:
torch's own `OutOfMemoryError`, and the `RuntimeError` of a library of theirs that got none (cuBLAS, cuDNN); a CPU that runs out
has no error of its own.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from oracle.encoding import Batch
from oracle.errors import TooLittleMemoryError
from oracle.language_model import LanguageModel
from oracle.target_columns import TargetColumns

T = TypeVar("T")

NO_MEMORY_TOLD = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED")


class SmallerBatchWarning(UserWarning):
    """The device ran out of memory, and batches were made smaller."""


@contextmanager
def batch_size_kept(lm: LanguageModel | None) -> Iterator[None]:
    """Put the model's `batch_tokens` back after a block."""
    if lm is None:
        yield
        return
    saved = lm.batch_tokens
    try:
        yield
    finally:
        lm.batch_tokens = saved


def within_memory(work: Callable[[], T], lm: LanguageModel, columns: TargetColumns, *, longest: int) -> T:
    """Do `work`; where the device runs out of memory, halve the batches and do it again.

    Args:
        work: What to do; it may be done several times.
        lm: Its `batch_tokens` are halved, and stay so.
        columns: The target texts' batches are split accordingly, in place.
        longest: Tokens of the longest text that `work` batches besides the target texts.

    Raises:
        TooLittleMemoryError: Batches hold one text already.
    """
    first = lm.batch_tokens or lm.default_batch_tokens
    while True:
        given = lm.batch_tokens or lm.default_batch_tokens
        try:
            result = work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            longest_of_all = max([longest, 1, *(batch.input_ids.shape[1] for batch in columns.batches)])
            if given <= longest_of_all:
                raise TooLittleMemoryError(
                    f"{lm.device} has no memory for one text of {longest_of_all} tokens alone: {error}",
                    "texts that fit into the memory beside the model",
                    "lower max_tokens, load the model in bfloat16, or choose a method that needs less. "
                    "With a workdir, finished blocks are kept.",
                ) from error
        else:
            if given < first:
                told = f"{lm.device} ran out of memory; from now on batches have at most {given} tokens instead of {first}."
                warnings.warn(told, SmallerBatchWarning, stacklevel=2)
            return result
        # Only here, with the error gone, are the tensors free that its frames held.
        lm.batch_tokens = given // 2
        split_batches(columns, batch_tokens=lm.batch_tokens)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error tells that a device has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, TooLittleMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(told in str(error) for told in NO_MEMORY_TOLD)


def split_batches(columns: TargetColumns, *, batch_tokens: int) -> None:
    """Split the target texts' batches, in place, until they have at most `batch_tokens` tokens or one text."""
    pairs = [
        (part_of_batch, part)
        for batch, part in zip(columns.batches, columns.batch_parts, strict=True)
        for part_of_batch in _split(batch, batch_tokens)
    ]
    columns.batches[:] = [batch for batch, _ in pairs]
    columns.batch_parts[:] = [part for _, part in pairs]


def _split(batch: Batch, batch_tokens: int) -> list[Batch]:
    num_texts, length = batch.input_ids.shape
    size = max(batch_tokens // length, 1)
    return [
        Batch(batch.input_ids[start : start + size], batch.labels[start : start + size], batch.positions[start : start + size])
        for start in range(0, num_texts, size)
    ]
