"""Slurm, the real one with two nodes on this machine: trained at one and two nodes, and every fault survived."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
import yaml

from mlpipes.compute.stacks import processes_of
from mlpipes.definitions import build_defs
from mlpipes.scales import scales_of
from mlpipes.scaling.report import make_report, prices_from_environment
from mlpipes.store.layout import Store, TrainingFolder
from mlpipes.store.messages import Allocated, Resumed, Started, Stopping, read_messages
from mlpipes.store.references import EvaluationReference
from mlpipes.training.checkpoints import Checkpoints
from mlpipes.workloads.catalog import CATALOG, Entry
from mlpipes_tests import evidence
from mlpipes_tests.barriers import Barriers
from mlpipes_tests.held import REFERENCE
from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.slurm_cluster import SlurmCluster, slurm_cluster
from mlpipes_tests.training.harness import make_job, run_here
from mlpipes_tests.waiting import LIMIT_SECONDS, until

pytestmark = pytest.mark.slurm
SCALE = "w1-b128-e12-g0"
EARLY, LATE = 0.4, 0.7
"""Where the trainings wait."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as made:
        yield made


@pytest.fixture(autouse=True)
def idle(cluster: SlurmCluster) -> Iterator[None]:
    """Nothing is left from one test to the next: no job, and no process of one."""
    yield
    cluster.ask("scancel", "--user=root")
    cluster.wait_until_idle()
    until(lambda: not cluster.processes(), "no process of a job is left")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of the same training, uninterrupted, in one process, without Ray and Slurm."""
    return run_here(make_job(tmp_path_factory.mktemp("reference"), SCALE, REFERENCE))


class Training:
    """A scale's training on Slurm, and the Dagster runs that ask for it."""

    def __init__(self, cluster: SlurmCluster, folder: Path, scale: str = SCALE) -> None:
        self.cluster, self.folder, self.scale, self.runs = cluster, folder, scale, 0
        self.store, self.barriers = Store(folder / "home" / "store"), Barriers(folder / "home")
        evidence.collect_from(folder)
        self.settings(poll_seconds=0.5, time="01:00:00", workers_per_node=1)

    def settings(self, **changes: Any) -> None:
        """Change the site's settings."""
        path = self.folder / "slurm.yaml"
        known = yaml.safe_load(path.read_text()) if path.exists() else {}
        path.write_text(yaml.safe_dump(known | changes))

    def run(self) -> "subprocess.Popen[bytes]":
        """Start a Dagster run in a process of its own."""
        self.runs += 1
        (self.folder / f"run{self.runs}.log").touch()
        environment = os.environ | self.cluster.environment
        environment |= {"MLPIPES_SLURM": str(self.folder / "slurm.yaml"), "MLPIPES_HOME": str(self.folder / "home")}
        with (self.folder / f"run{self.runs}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "mlpipes_tests.held_step", self.scale, str(self.folder / "instance")],
                cwd=CHECKOUT,
                env=environment,
                stdout=log,
                stderr=log,
            )

    def log(self) -> str:
        """What the latest run printed."""
        return (self.folder / f"run{self.runs}.log").read_text()

    def job(self) -> str:
        """The Slurm job that the latest run follows."""
        return re.findall(r"(?:Submitted|Attached to) Slurm job (\d+)", self.log())[-1]

    def training_folder(self) -> TrainingFolder | None:
        found = list(self.store.root.glob("trainings/*/"))
        return TrainingFolder(found[0]) if found else None

    def in_vain(self) -> str:
        """The end of the latest run's log, if it says that waiting for anything is in vain."""
        return self.log()[-3000:] if "Traceback" in self.log() and "Interrupted" not in self.log() else ""

    def until(self, condition: Any, what: str) -> None:
        """Wait for something to be so."""
        until(condition, what, vain=self.in_vain)

    def until_barrier(self, place: float) -> None:
        """Wait until the training waits at a barrier."""
        self.barriers.wait_for(place, vain=self.in_vain)

    def until_said(self, text: str) -> None:
        """Wait until the latest run's log says something."""
        self.until(lambda: text in self.log(), f"the run says {text!r}")

    def until_asked_to_stop(self) -> None:
        """Wait until some attempt is asked for a last checkpoint."""
        self.until(lambda: list(self.store.root.glob("trainings/*/jobs/a*.stop")), "a last checkpoint is asked for")

    def end(self, run: "subprocess.Popen[bytes]") -> int:
        """Wait for a run's end."""
        try:
            return run.wait(LIMIT_SECONDS)
        finally:
            run.kill()
            run.wait()

    def outcome(self) -> dict[str, Any]:
        folder = self.training_folder()
        assert folder is not None
        until(lambda: not processes_of(folder.fingerprint), "the training's processes have ended")
        return json.loads(folder.result.read_text())["content"]


def fill(cluster: SlurmCluster) -> str:
    """Have a job take all nodes; returns its id."""
    return cluster.ask("sbatch", "--parsable", "-N2", "-c2", "-o", "/dev/null", "--wrap", "sleep 1000").strip()


def assert_equal(outcome: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("weights_digest", "order_digest", "loss_digest", "steps", "best"):
        assert outcome[name] == expected[name], name


def test_one_and_two_nodes_end_in_the_model_of_the_local_run(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(cluster, tmp_path)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLPIPES_SLURM", str(tmp_path / "slurm.yaml"))
    monkeypatch.setenv("MLPIPES_HOME", str(tmp_path / "home"))
    scales = ["w1-b128-e3-g0", "w2-b128-e3-g0"]
    entry = Entry("digits", "Digits", CATALOG[0].implementation, scales_of(scales, "test"))
    definitions = build_defs(catalog=[entry])
    checkpoints = definitions.resolve_assets_def(dg.AssetKey(["digits", "checkpoints"]))
    assert checkpoints.op.pool is None, "a job that waits in Slurm's queue holds no slot of Dagster"
    local = run_here(make_job(tmp_path / "reference", scales[0], CATALOG[0].implementation))
    with dg.DagsterInstance.ephemeral() as instance:
        for scale, nodes in zip(scales, ("1", "2"), strict=True):
            chain = definitions.resolve_job_def("digits_chain")
            result = chain.execute_in_process(instance=instance, partition_key=scale)
            assert result.success
            reference = training.store.read_reference(EvaluationReference, "digits", scale)
            assert reference is not None
            folder = training.store.training(reference.fingerprint)
            assert_equal(json.loads(folder.result.read_text())["content"], local)
            found = [m for path in folder.path.glob("messages/*") for m in read_messages(path)[0]]
            (job,) = {message.slurm_job for message in found if isinstance(message, Allocated)}
            shown = cluster.ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%D %T")
            assert shown.split() == [nodes, "COMPLETED"]
    text, _ = make_report(training.store, entry, prices_from_environment()).write(training.store, entry)
    assert all(scale in text for scale in scales)


def test_a_run_that_dies_attaches_again_while_its_job_waits_and_while_it_runs(
    cluster: SlurmCluster, tmp_path: Path, expected: dict[str, Any]
) -> None:
    training = Training(cluster, tmp_path)
    training.barriers.close(EARLY)
    full = fill(cluster)
    run = training.run()
    training.until_said("waits: Resources")
    first = training.job()
    run.kill()
    run = training.run()
    training.until_said(f"Attached to Slurm job {first}")  # while it waits
    cluster.ask("scancel", full)
    training.until_barrier(EARLY)
    run.kill()
    cluster.kill("slurmctld")
    run = training.run()
    until(lambda: "squeue" in names_below(run.pid), "Slurm is asked while nobody is there to answer")
    cluster.start_controller()
    training.until_said(f"Attached to Slurm job {first}")  # while it trains
    training.barriers.open()
    assert training.end(run) == 0, training.log()[-3000:]
    assert_equal(training.outcome(), expected)
    assert training.outcome()["attempt"] == 1
    assert len([job for job in cluster.jobs() if int(job) > int(full)]) == 1, "one job did it all"


def names_below(pid: int) -> set[str]:
    """The names of a process's descendants."""
    try:
        return {process.name() for process in psutil.Process(pid).children(recursive=True)}
    except psutil.Error:
        return set()


def test_cancelled_by_an_administrator_and_out_of_time(
    cluster: SlurmCluster, tmp_path: Path, expected: dict[str, Any]
) -> None:
    training = Training(cluster, tmp_path)
    training.barriers.close(EARLY, LATE)
    full = fill(cluster)
    run = training.run()
    training.until_said("waits: Resources")
    cluster.ask("scancel", training.job())
    assert training.end(run) == 1
    assert f"Slurm job {training.job()} was stopped; materialize again to resume it" in training.log()
    cluster.ask("scancel", full)

    training.settings(resubmit_cancelled=True)
    run = training.run()
    training.until_barrier(EARLY)
    # What Slurm does ahead of the time limit (`--signal=B:USR1@…`).
    cluster.ask("scancel", "--batch", "--signal=USR1", training.job())
    training.until_asked_to_stop()
    training.barriers.open(EARLY)
    training.until_said("is back in its queue")
    training.until_barrier(LATE)
    cancelled = training.job()
    cluster.ask("scancel", cancelled)
    training.until(lambda: training.job() != cancelled, "another job is submitted")
    training.barriers.open()
    assert training.end(run) == 0, training.log()[-3000:]
    assert "although its training is done" not in training.log(), "the last attempt ended by itself"
    outcome = training.outcome()
    assert_equal(outcome, expected)
    assert outcome["attempt"] == 4, "cancelled twice, requeued once"
    folder = training.training_folder()
    assert folder is not None
    before, after = read_messages(folder.messages(2))[0], read_messages(folder.messages(3))[0]
    (stopped,) = [message.step for message in before if isinstance(message, Stopping)]
    (resumed,) = [message.step for message in after if isinstance(message, Resumed)]
    assert resumed >= stopped, "the last checkpoint was made on demand, so not a step was lost"


def test_a_node_that_dies_is_replaced(cluster: SlurmCluster, tmp_path: Path, expected: dict[str, Any]) -> None:
    training = Training(cluster, tmp_path)
    training.barriers.close(EARLY)
    run = training.run()
    training.until_barrier(EARLY)
    node = cluster.ask("squeue", "-h", "-j", training.job(), "-o", "%N").strip()
    cluster.kill(f"slurmd-{node}")
    # As the controller does by itself when a node has not answered for SlurmdTimeout, which a busy machine must not reach.
    cluster.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=dead")
    try:
        # Slurm gives the node up and requeues the job. What still runs on the node waits at the barrier all the while, and
        # when it opens, is fenced off by the lease that the other attempt has taken.
        training.until_said("is back in its queue")
        folder = training.training_folder()
        assert folder is not None
        training.until(lambda: started(folder, 2), "the second attempt trains")
        training.barriers.open()
        assert training.end(run) == 0, training.log()[-3000:]
    finally:
        cluster.start_node(node)
    outcome = training.outcome()
    assert_equal(outcome, expected)
    assert outcome["attempt"] == 2


def started(folder: TrainingFolder, attempt: int) -> bool:
    """Whether an attempt's workers have begun to train."""
    return any(isinstance(message, Started) for message in read_messages(folder.messages(attempt))[0])


def test_a_cancelled_run_cancels_its_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    training = Training(cluster, tmp_path)
    training.barriers.close(EARLY)
    training.settings(command_prefix="bash -c")  # like ssh, it hands one word to a shell
    run = training.run()
    training.until_barrier(EARLY)
    open_ports = []
    for process in cluster.processes():
        with suppress(psutil.Error):  # one that is just ending
            open_ports += [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert open_ports, "Ray listens"
    assert {c.laddr.ip.removeprefix("::ffff:") for c in open_ports} == {"127.0.0.1"}, (
        "a job on one node listens on loopback only"
    )
    with dg.DagsterInstance.local_temp(str(tmp_path / "instance")) as instance:
        (record,) = instance.get_runs()
        instance.report_run_canceling(record)
        run.send_signal(signal.SIGINT)  # as Dagster's code server does
        training.until_asked_to_stop()
        training.barriers.open()
        training.until(lambda: cluster.jobs()[training.job()] == "CANCELLED", "the job is cancelled")
        training.until(lambda: not cluster.processes(), "nothing of it is left")
        training.end(run)
    folder = training.training_folder()
    assert folder is not None
    messages = read_messages(folder.messages(1))[0]
    (stopped,) = [message.step for message in messages if isinstance(message, Stopping)]
    # It trains on until it is ended; a later checkpoint may have taken the place of that one.
    assert max(Checkpoints(folder.checkpoints).steps()) >= stopped, "a last checkpoint"
    from mlpipes.tracking.runs import Tracker

    client = Tracker(f"sqlite:///{tmp_path}/home/mlflow/mlflow.db").client
    experiment = client.get_experiment_by_name("mlpipes/digits")
    assert experiment is not None
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "KILLED"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"workers_per_node": 1}, "PartitionConfig|PartitionNodeLimit"),  # the second from Slurm's next look on
        ({"partition": "physics"}, "account not known"),
        ({"partition": "nowhere"}, "invalid partition specified: nowhere"),
    ],
)
def test_a_job_that_can_never_start_fails_at_once_with_the_reason_of_slurm(
    cluster: SlurmCluster, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    training = Training(cluster, tmp_path, "w4-b128-e3-g0" if "workers_per_node" in settings else SCALE)
    training.settings(**settings)
    assert training.end(training.run()) == 1
    assert re.search(reason, training.log())
    assert "PENDING" not in cluster.jobs().values()


def test_devices_of_the_allocation_reach_the_workers(cluster: SlurmCluster, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import os, sys, time
from mlpipes.compute.allocation import ray_cluster

with ray_cluster() as cluster:
    os.environ.update(cluster.environment)
    import ray  # reads its environment when it is imported

    ray.init(address=cluster.address, log_to_driver=False)

    @ray.remote(num_gpus=1, scheduling_strategy="SPREAD")
    def devices(folder, number):
        from pathlib import Path
        import time
        (Path(folder) / str(number)).touch()
        while len(list(Path(folder).iterdir())) < 4:  # all hold their GPUs at the same time
            time.sleep(0.05)
        return os.environ["SLURMD_NODENAME"], os.environ["CUDA_VISIBLE_DEVICES"]

    while ray.cluster_resources().get("GPU", 0) < 4:
        time.sleep(0.1)
    print("DEVICES", sorted(ray.get([devices.remote(sys.argv[1], number) for number in range(4)])), flush=True)
    ray.shutdown()
"""
    )
    log, meeting = tmp_path / "job.log", tmp_path / "meeting"
    meeting.mkdir()
    environment = os.environ | cluster.environment | {"PYTHONPATH": str(CHECKOUT)}
    subprocess.run(
        ["sbatch", "--wait", "-N2", "--ntasks-per-node=1", "-c2", "--gres=gpu:2", f"--output={log}"],
        input=f"#!/bin/bash\nexec {sys.executable} {program} {meeting}\n",
        text=True,
        env=environment,
        timeout=LIMIT_SECONDS,
        check=True,
    )
    assert "DEVICES [('n1', '0'), ('n1', '1'), ('n2', '0'), ('n2', '1')]" in log.read_text()


def test_the_doctor_says_what_is_there_and_what_is_missing(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "scales.yaml").write_text("digits: [w1-b128-e3-g0, w9-b126-e3-g0]\n")
    settings = tmp_path / "slurm.yaml"
    settings.write_text("partition: main\nworkers_per_node: 1\n")
    environment = os.environ | cluster.environment | {"MLPIPES_HOME": str(tmp_path / "home"), "COLUMNS": "300"}
    environment |= {"MLPIPES_SLURM": str(settings), "MLPIPES_SCALES": str(tmp_path / "scales.yaml")}

    def doctor(*options: str) -> tuple[int, str]:
        command = [Path(sys.executable).parent / "mlpipes", "doctor", "slurm", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
        return done.returncode, done.stdout + done.stderr

    code, said = doctor("--probe")
    assert code == 1, "nine nodes are asked for, and two are there"
    assert re.search(r"missing +digits w9-b126-e3-g0: Slurm refuses: .*node configuration is not available", said)
    for good in ("settings", "commands", "partition", "digits w1-b128-e3-g0", "a node"):
        assert re.search(rf"good +{good}: ", said), said
    settings.write_text("partition: main\npartitoin: x\n")
    code, said = doctor()
    assert code == 1
    assert "partitoin: Extra inputs are not permitted" in said
    environment["PATH"] = "/nowhere"
    settings.write_text("")
    code, said = doctor()
    assert code == 1
    assert "sbatch is not on PATH. Install Slurm's commands here" in said
