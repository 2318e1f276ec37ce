"""Run an iterator in a thread, a few items ahead: reading and tokenising go on while the item before is encoded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, Full, Queue
from typing import Any, TypeVar

T = TypeVar("T")

LOOK_SECONDS = 0.1  # how soon either side sees that the other has stopped


def read_ahead(items: Iterator[T], *, depth: int = 2) -> Iterator[T]:
    """Yield the items of an iterator that runs in another thread, at most `depth` items ahead.

    What the iterator raises is raised here. When this generator is closed, the iterator is closed too.
    """
    queue: Queue[Any] = Queue(depth)
    stopped, end = threading.Event(), object()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                queue.put(item, timeout=LOOK_SECONDS)
                return True
            except Full:
                continue
        return False

    def run() -> None:
        try:
            for item in items:
                if not put(item):
                    return
        finally:
            items.close()  # type: ignore[attr-defined]
            put(end)

    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as executor:
        running = executor.submit(run)
        try:
            while True:
                try:
                    item = queue.get(timeout=LOOK_SECONDS)
                except Empty:
                    continue
                if item is end:
                    break
                yield item
            running.result()
        finally:
            stopped.set()
