"""Work on several threads: every block once, on one of torch's threads, and the setting put back."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from surrogate import InfluenceNetwork
from surrogate.threads import each_on_one_thread


@pytest.fixture(params=[1, 3])
def num_threads(request):
    saved = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(saved)


def test_every_block_is_done_once_on_one_of_torchs_threads(num_threads):
    seen = []
    each_on_one_thread(lambda block: seen.append((block, torch.get_num_threads())), range(20))
    assert sorted(seen) == [(block, 1) for block in range(20)]
    assert torch.get_num_threads() == num_threads


def test_blocks_run_at_the_same_time():
    saved = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        barrier = threading.Barrier(2, timeout=20)
        each_on_one_thread(lambda block: barrier.wait(), range(4))  # a single thread would wait in vain
    finally:
        torch.set_num_threads(saved)


def test_what_a_block_raises_is_raised_and_the_setting_put_back(num_threads):
    def fails(block):
        if block == 7:
            raise ValueError("block 7")

    with pytest.raises(ValueError, match="block 7"):
        each_on_one_thread(fails, range(20))
    assert torch.get_num_threads() == num_threads


def test_scores_do_not_depend_on_the_number_of_threads():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(9000, 30)).astype(np.float32)
    network = InfluenceNetwork(hidden="16", ensemble=2, max_epochs=2).fit(X[:200], np.tanh(X[:200, :2]))
    saved, found = torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        try:
            with torch.inference_mode():
                found.append(network.predict(X, return_spread=True))
        finally:
            torch.set_num_threads(saved)
    for scores, spreads in found[1:]:
        assert scores.tobytes() == found[0][0].tobytes() and spreads.tobytes() == found[0][1].tobytes()
    apart = np.concatenate([network.predict(X[start : start + 100]) for start in range(0, 9000, 100)])
    np.testing.assert_allclose(apart, found[0][0], rtol=1e-5, atol=1e-6)
