"""Ray: the bytes of the local engine; dead workers, lost nodes and poisoned files survived; no cluster stopped but its own."""

import dataclasses
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from oracle.errors import InputError, MismatchError
from surrogate.scoring.corpus import score_corpus
from surrogate.scoring.files import list_inputs
from surrogate.scoring.outputs import DONE, ShardReport
from surrogate.scoring.segments import Counts
from surrogate.scoring.shard import ScoreTask, Shard

ray = pytest.importorskip("ray")
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

from surrogate.scoring.engines.ray import OWN_CLUSTER, own_variables, run  # noqa: E402

NUM_FILES, NUM_ROWS = 8, 20


@pytest.fixture(scope="module")
def source(make_jsonl, make_texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(NUM_FILES):
        make_jsonl(folder / f"{number:02d}.jsonl", [{"text": text} for text in make_texts(NUM_ROWS, seed=number)])
    return folder


@pytest.fixture
def two_nodes():
    """A cluster of two nodes with one CPU each, which the caller has joined."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 2**27}
    with own_variables():
        cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        second = cluster.add_node(**small)
        ray.init(address=cluster.address, log_to_driver=False)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        for node in (cluster.head_node, second):  # a busy machine may take long to start the first worker
            there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            ray.get(ray.remote(lambda: os.getpid()).options(num_cpus=1, scheduling_strategy=there).remote())
        yield cluster, second
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        ray.shutdown()
        cluster.shutdown()


def score_bytes(folder):
    return {path.name: path.read_bytes() for path in (folder / "scores").iterdir()}


@dataclasses.dataclass(frozen=True)
class DeadlyTask(ScoreTask):
    """Notes each attempt and scores nothing; kills its worker at some files, always or the first time, and refuses others."""

    always: tuple = ()
    once: tuple = ()
    refused: tuple = ()

    def score(self, shard, on_rows=None):
        name = shard.file.name
        attempts = Path(self.output) / "attempts" / name
        attempts.mkdir(parents=True, exist_ok=True)
        num_before = len(list(attempts.iterdir()))
        (attempts / str(time.time_ns())).write_text(ray.get_runtime_context().get_node_id())
        if name in self.always or (name in self.once and not num_before):
            os.kill(os.getpid(), signal.SIGKILL)
        if name in self.refused:
            raise MismatchError("what was given", "what is accepted", "what to do")
        time.sleep(0.5)
        on_rows(NUM_ROWS)
        return ShardReport(shard.name, name, DONE, Counts(num_rows=NUM_ROWS))

    def attempts_at(self, name):
        return len(list((Path(self.output) / "attempts" / name).iterdir()))


def nodes_of_attempts(task):
    return {path.read_text() for path in (Path(task.output) / "attempts").rglob("*") if path.is_file()}


def test_a_cluster_of_its_own_does_what_is_missing_gives_the_local_bytes_and_is_stopped(predictor_folder, source, tmp_path):
    score_corpus(predictor_folder, source, tmp_path / "local", workers=0)
    (tmp_path / "ray").mkdir()
    for kept in ("corpus.json", "scores", "reports"):  # as if killed after half of the files
        path = tmp_path / "local" / kept
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / "ray" / kept)
    for path in sorted((tmp_path / "ray" / "reports").iterdir())[:5]:
        path.unlink()
    variables = {name: os.environ.get(name) for name in OWN_CLUSTER}
    scored = score_corpus(predictor_folder, source, tmp_path / "ray", engine="ray", workers=1)
    assert score_bytes(tmp_path / "ray") == score_bytes(tmp_path / "local") and scored.manifest["clean"]
    assert scored.manifest["runs"][-1]["num_rows"] == 5 * NUM_ROWS
    assert not ray.is_initialized() and {name: os.environ.get(name) for name in OWN_CLUSTER} == variables


def test_dead_workers_a_lost_node_and_a_poisoned_file_are_survived(predictor_folder, source, tmp_path, two_nodes):
    """The cluster is the caller's and goes on."""
    cluster, second = two_nodes
    shards = [Shard(file) for file in list_inputs(source).files]
    task = DeadlyTask(str(predictor_folder), str(tmp_path), always=("03.jsonl",), once=("05.jsonl",))
    reports, rows = [], []
    for report in run(shards, task, on_rows=rows.append, max_attempts=2):
        reports.append(report)
        if second in cluster.worker_nodes and second.node_id in nodes_of_attempts(task):
            cluster.remove_node(second, allow_graceful=False)
    status = {report.input_name: report.status for report in reports}
    assert len(reports) == len(status) == NUM_FILES
    assert status.pop("03.jsonl") == "failed" and set(status.values()) == {DONE} and rows == [NUM_ROWS] * (NUM_FILES - 1)
    (poisoned,) = [report for report in reports if report.input_name == "03.jsonl"]
    assert "2 times" in poisoned.counts.errors[0] and task.attempts_at("03.jsonl") >= 2 <= task.attempts_at("05.jsonl")
    assert len(nodes_of_attempts(task)) == 2 and second not in cluster.worker_nodes and ray.is_initialized()
    with pytest.raises(MismatchError) as refused:  # a refusal in a worker reaches the caller in its parts
        list(run(shards[:1], dataclasses.replace(task, refused=("00.jsonl",))))
    assert refused.value.remedy == "what to do" and ray.is_initialized()
    with pytest.raises(InputError, match="has joined a Ray cluster already"):
        next(run(shards, task, address="auto"))


def test_options_that_cannot_be_used_are_refused_before_a_cluster_is_started(predictor_folder, tmp_path):
    task = ScoreTask(str(predictor_folder), str(tmp_path))
    for options in ({"workers": 0}, {"cpus_per_task": -1}, {"cpus_per_task": 1.5}, {"cpus_per_task": 0}, {"max_attempts": 0}):
        with pytest.raises(InputError):
            next(run([], task, **options))
    with pytest.raises(InputError, match="predictor object"):
        next(run([], dataclasses.replace(task, predictor=object())))
    assert not ray.is_initialized()
