"""Blocks of work on all of torch's threads, each block on one of them: the same results for any number of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_SETTING = threading.Lock()  # the number of threads is one for the whole process


def each_on_one_thread(work: Callable[[T], None], blocks: Sequence[T]) -> None:
    """Do `work` for every block, as many at a time as torch has threads; what a block raises is raised.

    Torch's settings for one thread, such as `torch.no_grad`, are the caller's only; `work` makes its own.
    """
    with _SETTING:
        num_threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            if num_threads == 1 or len(blocks) == 1:
                for block in blocks:
                    work(block)
                return
            with ThreadPoolExecutor(min(num_threads, len(blocks)), thread_name_prefix="blocks") as pool:
                for done in [pool.submit(work, block) for block in blocks]:
                    done.result()
        finally:
            torch.set_num_threads(num_threads)
