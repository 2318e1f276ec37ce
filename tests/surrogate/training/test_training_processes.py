"""Whole trainings in processes of their own: two that work together, and one that is killed and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

SCRIPT = textwrap.dedent("""
    import json, os, signal, sys, traceback
    from dataclasses import dataclass
    from pathlib import Path
    from typing import ClassVar
    import torch, transformers, oracle, oracle.measure, oracle.methods.grad_dot, accelerate, datasets
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from surrogate.training import InfluenceCallback, Refresher, Rounds

    def run(folder, job):
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        generators = [torch.Generator().manual_seed(i) for i in range(60)]
        rows = [{"input_ids": torch.randint(3, 99, (4 + i % 9,), generator=g).tolist()} for i, g in enumerate(generators)]
        targets = {"goal": rows[52:]}

        @dataclass(kw_only=True)
        class Labels(oracle.plugins.load("surrogate.training.strategies", "oracle")):
            plugin_name: ClassVar[str] = "labels"

            def rank(self, context):
                found = super().rank(context)
                if job.get("dies_in_refresh") == context.folder.parent.name:
                    os.kill(os.getpid(), signal.SIGKILL)
                return found

        class Recorder(TrainerCallback):
            def __init__(self):
                self.batches = []

            def record(self, module, args, kwargs):
                if module.training:
                    self.batches.append(kwargs["input_ids"].tolist())

            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == job.get("dies_at"):
                    os.kill(os.getpid(), signal.SIGKILL)

        torch.manual_seed(0)
        config = transformers.LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                          intermediate_size=64, max_position_embeddings=64, attention_dropout=0.2)
        model, recorder = transformers.LlamaForCausalLM(config), Recorder()
        model.register_forward_pre_hook(recorder.record, with_kwargs=True)
        settings = {"every": 3, "workdir": folder / job["workdir"], "strategy": Labels()}

        def by_trainer():
            callback = InfluenceCallback(rows[:52], targets, max_tokens=64, **settings)
            args = TrainingArguments(output_dir=str(folder / job["workdir"] / "out"), max_steps=8, per_device_train_batch_size=2,
                                     use_cpu=True, report_to=[], disable_tqdm=True, save_steps=1, logging_strategy="no",
                                     learning_rate=1e-2, ddp_backend="gloo" if world_size > 1 else None)
            trainer = Trainer(model, args, train_dataset=callback.train_dataset, data_collator=callback.data_collator,
                              callbacks=[recorder, callback])
            callback.attach(trainer)
            trainer.train(resume_from_checkpoint=job.get("resume"))
            return callback.refresher

        def by_loop():
            if world_size > 1:
                torch.distributed.init_process_group("gloo")
            wrapped = torch.nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            refresher = Refresher(rows[:52], targets, workdir=settings["workdir"], strategy=settings["strategy"])
            lm = oracle.LanguageModel(model, optimizer=optimizer, max_tokens=64, device="cpu")
            rounds = Rounds(refresher, lm, every=3, batch_size=2, max_steps=8)
            saved = settings["workdir"] / f"state{rank}.pt"
            if job.get("resume"):
                state = torch.load(saved, weights_only=False)
                model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
                rounds.load_state_dict(state["rounds"]), torch.set_rng_state(state["random"])
            model.train()
            for batch in rounds:
                wrapped(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rounds": rounds.state_dict(),
                         "random": torch.get_rng_state()}
                torch.save(state, saved.with_suffix(".partial"))
                os.replace(saved.with_suffix(".partial"), saved)
                if rounds.step == job.get("dies_at"):
                    os.kill(os.getpid(), signal.SIGKILL)
            return refresher

        refresher = {"trainer": by_trainer, "loop": by_loop}[job["kind"]]()
        result = {
            "weights": oracle.LanguageModel(model, device="cpu").fingerprint(),
            "batches": recorder.batches,
            "rounds": [refresher.round_at(index).text_ids for index in range(refresher.num_rounds_done)],
            "labels": [record["num_labels"] for record in refresher.table()],
        }
        (folder / job["workdir"] / f"result{rank}.json").write_text(json.dumps(result))
        if world_size > 1:
            torch.distributed.destroy_process_group()

    # A server: each line on stdin is a list of [job, environment] that run at the same time, in forks of this process.
    folder = Path(sys.argv[1])
    for line in sys.stdin:
        children = []
        for job, environment in json.loads(line):
            child = os.fork()
            if child == 0:
                os.environ.update(environment)
                log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1), os.dup2(log, 2)
                code = 1
                try:
                    run(folder, job)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)
""")


class Server:
    """Runs jobs in forks of a process that has imported everything; each has a folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "server.py").write_text(SCRIPT)
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "server.py"), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def exit_codes(self, job, *, world_size=1):
        """Run a job on so many processes and return how each ended."""
        (self.folder / job["workdir"]).mkdir(exist_ok=True)
        environments = [{}]
        if world_size > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
            meeting |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
            environments = [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
        self.process.stdin.write(json.dumps([[job, environment] for environment in environments]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def results(self, job, *, world_size=1):
        """Run a job that ends well and return what each of its processes says."""
        codes = self.exit_codes(job, world_size=world_size)
        assert codes == [0] * world_size, (self.folder / "log.txt").read_text()[-3000:]
        return [json.loads((self.folder / job["workdir"] / f"result{rank}.json").read_text()) for rank in range(world_size)]

    def checkpoint(self, job, step):
        """Say what a job is resumed from; the loop has only its last state."""
        return (
            {"resume": str(self.folder / job["workdir"] / f"out/checkpoint-{step}")}
            if job["kind"] == "trainer"
            else {"resume": True}
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("trainings"))
    yield server
    server.process.stdin.close()
    server.process.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainer", "loop"])
def test_two_processes_train_on_one_selection_each_on_its_part(kind, server):
    job = {"kind": kind, "workdir": f"{kind}_two"}
    first, second = server.results(job, world_size=2)
    assert first["rounds"] == second["rounds"] and first["weights"] == second["weights"]
    assert first["labels"] == [52, 40, 28]
    assert len(first["batches"]) == len(second["batches"]) == 8
    for index in range(2):
        rows = [row for side in (first, second) for batch in side["batches"][3 * index : 3 * index + 3] for row in batch]
        shown = {tuple(token for token in row if token) for row in rows}
        assert len(rows) == len(shown) == len(first["rounds"][index]) == 12  # each text of the round on one process, once
    if kind == "trainer":
        again = server.results({**job, **server.checkpoint(job, 4)}, world_size=2)
        assert [each["weights"] for each in again] == [first["weights"]] * 2
        assert [each["batches"] for each in again] == [first["batches"][4:], second["batches"][4:]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainer", "loop"])
def test_a_training_killed_and_resumed_has_the_bytes_of_one_that_was_not(kind, server):
    """Killed within a round, and again within the refresh after it."""
    whole, broken = {"kind": kind, "workdir": f"{kind}_whole"}, {"kind": kind, "workdir": f"{kind}_broken"}
    (expected,) = server.results(whole)
    for death in ({"dies_at": 5}, {"dies_in_refresh": "round-00002", **server.checkpoint(broken, 4)}):
        assert server.exit_codes({**broken, **death}) == [-signal.SIGKILL]
    (resumed,) = server.results({**broken, **server.checkpoint(broken, 6)})
    assert resumed["weights"] == expected["weights"] and resumed["rounds"] == expected["rounds"]
    assert resumed["batches"] == expected["batches"][6:]
    names = [f"round-{index:05d}/selection.parquet" for index in range(3)]
    for name in [*names, *(["out/checkpoint-8/model.safetensors"] if kind == "trainer" else [])]:
        one, other = ((server.folder / job["workdir"] / name).read_bytes() for job in (whole, broken))
        assert one == other, name
