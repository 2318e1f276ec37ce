"""An iterator in a thread: the same items, the same errors, and no thread left behind."""

from __future__ import annotations

import threading
import time

import pytest

from surrogate.scoring.read_ahead import read_ahead


def num_threads():
    return sum(thread.name.startswith("read-ahead") for thread in threading.enumerate())


def test_items_come_in_order_from_another_thread():
    seen = []

    def items():
        for number in range(50):
            seen.append(threading.current_thread())
            yield number

    assert list(read_ahead(items())) == list(range(50))
    assert threading.main_thread() not in seen and num_threads() == 0


def test_it_runs_at_most_so_far_ahead():
    made = []

    def items():
        for number in range(20):
            made.append(number)
            yield number

    ahead = read_ahead(items(), depth=2)
    next(ahead)
    time.sleep(0.05)
    assert len(made) <= 4  # one is out, two wait, one is in hand
    ahead.close()


def test_errors_are_raised_where_the_items_are_used():
    def items():
        yield 1
        raise ValueError("broken")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="broken"):
        next(ahead)


def test_leaving_early_closes_the_iterator():
    closed = []

    def items():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    for _ in read_ahead(items()):
        break
    assert closed == [True] and num_threads() == 0
