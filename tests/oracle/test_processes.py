"""Several processes label one sample: the same bytes as one, and where one fails all stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from oracle.errors import MismatchError
from oracle.labels import Labels
from oracle.processes import Processes, working_together

SCRIPT = textwrap.dedent("""
    import json, os, sys, warnings
    from pathlib import Path
    import torch, transformers, oracle
    from oracle import plugins

    folder, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if world_size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                      intermediate_size=64, max_position_embeddings=64)
    module = transformers.LlamaForCausalLM(config)
    lm = oracle.LanguageModel(module, optimizer=torch.optim.AdamW(module.parameters(), lr=1e-3), max_tokens=64, device="cpu")
    rows = [{"input_ids": torch.randint(3, 99, (8 + i,), generator=torch.Generator().manual_seed(i)).tolist()} for i in range(24)]
    sample, targets, own = rows[:15], {"t": rows[16:]}, folder / f"of_{world_size}"
    measured = {}

    def label(name, **settings):
        labels = oracle.label(lm, sample, targets, **{"method": "grad_dot", "block_size": 2, **settings})
        labels.save(own / f"{name}_returned_{rank}")

    def count_blocks(plugin, name):
        original = plugin.measure
        def measure(self, encoded):
            measured[name] = measured.get(name, 0) + 1
            return original(self, encoded)
        plugin.measure = measure
        return original

    def refused(name, **settings):
        try:
            label(name, **settings)
        except (ValueError, RuntimeError, ArithmeticError) as error:
            (own / f"{name}_error_{rank}.json").write_text(json.dumps([type(error).__name__, str(error)]))

    plugin = plugins.load("oracle.methods", "grad_dot")
    original = count_blocks(plugin, "with_folder")
    label("with_folder", workdir=own / "with_folder")
    plugin.measure = original
    label("in_memory", method="one_step")
    label("one_block", block_size=100, workdir=own / "one_block")
    label("whole", method="target_similarity")
    by_rank = {"forward_mode": rank == 0, "error": 1.0}  # the first process chooses for all
    plugins.load("oracle.methods", "two_forward").rehearse = lambda self, encoded: by_rank
    label("chosen", method="two_forward")
    oracle.label(lm, sample[:6], targets, method="grad_dot", block_size=2, workdir=own / "grown")
    label("grown", workdir=own / "grown")
    (own / f"measured_{rank}.json").write_text(json.dumps(measured))
    if world_size > 1:
        def fails(self, encoded):
            if rank == 1:
                raise ArithmeticError("a block that fails")
            return original(self, encoded)
        plugin.measure = fails
        refused("failing", workdir=own / "failing")
        plugin.measure = original
        label("failing", workdir=own / "failing")
        refused("unlike", block_size=2 + rank)
        refused("apart", workdir=own / f"apart_{rank}")
        refused("ahead", workdir=own / ("ahead" if rank else "with_folder"))
        def dies(self, encoded):
            if rank == 1:
                os._exit(0)
            return original(self, encoded)
        plugin.measure = dies
        refused("killed", workdir=own / "killed")
        os._exit(0)  # the default group misses a member by now
""")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    for world_size in (1, 2):
        (folder / f"of_{world_size}").mkdir()
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(rank), str(world_size)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, world_size in ((0, 1), (0, 2), (1, 2))
    ]
    for process in running:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    return folder


def comparable(folder, name):
    """The labels' meta but for the seconds and, where not all is measured, for the batch that checked the gradients."""
    meta = Labels.load(folder).meta
    if name == "grown":
        meta["facts"].pop("self_check_relative_error")
    return {**meta, "cost": {key: value for key, value in meta["cost"].items() if not key.endswith("seconds")}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["with_folder", "in_memory", "one_block", "whole", "chosen", "grown"])
def test_two_processes_end_with_the_bytes_of_one(name, results):
    expected = results / "of_1" / f"{name}_returned_0"
    found = [results / "of_2" / f"{name}_returned_{rank}" for rank in range(2)]
    if name in ("with_folder", "one_block", "grown"):
        expected, found = results / "of_1" / name, [*found, results / "of_2" / name]
    for folder in found:
        assert (folder / "labels.parquet").read_bytes() == (expected / "labels.parquet").read_bytes(), folder
        assert comparable(folder, name) == comparable(expected, name)


@pytest.mark.slow
def test_the_blocks_are_shared(results):
    counts = [json.loads((results / "of_2" / f"measured_{rank}.json").read_text()) for rank in range(2)]
    assert [each["with_folder"] for each in counts] == [4, 4]
    cost = Labels.load(results / "of_2/with_folder").meta["cost"]
    assert cost["num_measured_now"] == cost["num_labelled"] == 15
    assert cost["label_seconds"] > 0


@pytest.mark.slow
def test_where_one_process_fails_all_stop_and_the_rest_is_kept(results):
    errors = [json.loads((results / "of_2" / f"failing_error_{rank}.json").read_text()) for rank in range(2)]
    assert errors[1] == ["ArithmeticError", "a block that fails"]
    assert errors[0][0] == "OtherProcessError"
    assert "process 1 of 2 failed, so all stop: ArithmeticError: a block that fails" in errors[0][1]
    again = Labels.load(results / "of_2/failing_returned_0")
    assert again.meta["cost"]["num_measured_now"] == 7  # the first process had finished its 4 blocks


@pytest.mark.slow
def test_processes_that_were_asked_different_things_refuse(results):
    for rank in range(2):
        name, message = json.loads((results / "of_2" / f"unlike_error_{rank}.json").read_text())
        assert name == "MismatchError" and "block_size: 2 and 3" in message


@pytest.mark.slow
def test_folders_that_are_not_shared_are_noticed(results):
    name, message = json.loads((results / "of_2/apart_error_0.json").read_text())
    assert name == "InputError" and "a workdir that all processes share" in message
    assert json.loads((results / "of_2/apart_error_1.json").read_text())[0] == "OtherProcessError"


@pytest.mark.slow
def test_a_process_that_dies_leaves_no_other_waiting(results):
    name, _ = json.loads((results / "of_2/killed_error_0.json").read_text())
    assert name in ("RuntimeError", "DistBackendError", "DistNetworkError")


def test_one_process_needs_no_group():
    with working_together() as processes:
        assert processes == Processes(0, 1, None)
        assert processes.gather("x") == ["x"]
        assert processes.first_then_others(lambda: 7) == 7
        with pytest.raises(KeyError), processes.all_or_none():
            raise KeyError


def test_processes_are_compared_with_the_first(monkeypatch):
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, {**value, "seed": 1}])
    with pytest.raises(MismatchError, match="process 0 and process 1 were not asked the same: seed: 0 and 1"):
        Processes(0, 2).require_same({"seed": 0, "method": "grad_dot"})


@pytest.mark.slow
def test_a_folder_that_only_one_process_sees_finished_stops_both(results):
    for rank in range(2):
        name, message = json.loads((results / f"of_2/ahead_error_{rank}.json").read_text())
        assert name == "InputError" and "finished labels of this sample for process 0, and not for process 1" in message
