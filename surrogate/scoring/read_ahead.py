"""Run an iterator in a thread, a few items ahead: reading and tokenising go on while the item before is encoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def read_ahead(items: Generator[T, None, None], *, depth: int = 2) -> Iterator[T]:
    """Yield the items of a generator that runs in another thread, at most `depth` items ahead.

    What the generator raises is raised here. When this one is closed, that one is closed too.
    """
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as executor:
        ahead: deque[Any] = deque(executor.submit(next, items, end) for _ in range(depth))
        try:
            while (item := ahead.popleft().result()) is not end:
                ahead.append(executor.submit(next, items, end))
                yield item
        finally:
            for future in ahead:
                future.cancel()
            executor.submit(items.close).result()
