"""The chaos harness: launches a training in Dagster, kills a victim at a random moment, waits, and compares everything."""

import json
import random
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mlpipes.compute.stacks import processes_of
from mlpipes.store import Store, TrainingFolder, read_messages
from mlpipes_tests.chaos.faults import (
    AWAY_SECONDS,
    DISK,
    HUNG,
    KILLED,
    SNAPSHOT_BYTE,
    command_of,
    environment_of,
    mend,
    processes,
    small_disk,
    strike,
)
from mlpipes_tests.sandbox import Sandbox, end, free_port, graphql, wait_for
from mlpipes_tests.training.harness import make_job, run_here
from mlpipes_tests.waiting import LIMIT_SECONDS, until

SCALE = "w2-b128-e40-g0"
REFERENCE = "w1-b128-e40-g0"  # the same bits at any number of workers: one process is the cheapest reference
_LAUNCH = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
  ... on RunConfigValidationInvalid { errors { message } } } }"""
_RUNS = "{ runsOrError(limit: 30) { ... on Runs { results { runId rootRunId status tags { key value } } } } }"
_JOBS = """{ repositoriesOrError { ... on RepositoryConnection { nodes { jobs { name } } } } }"""
_TERMINATE = """mutation($run: String!) { terminateRun(runId: $run) { __typename } }"""
_EVENTS = """query($run: ID!) { logsForRun(runId: $run) { ... on EventConnection { events {
  __typename ... on MessageEvent { message timestamp }
  ... on ExecutionStepFailureEvent { error { message cause { message } } } } } } }"""
DEADLINE_SECONDS = LIMIT_SECONDS
STALL_SECONDS = 60
"""More than the start of a training is silent for on a busy machine of two cores."""


class UnexpectedEndError(Exception):
    """A run ended in a way that it should not."""


@dataclass
class Trial:
    """What one trial found."""

    victim: str
    seed: int
    done: str = ""
    """What the fault was in particular."""
    problem: str = ""
    attempts: int = 0
    attached_seconds: float | None = None
    """From the fault until a run followed the training (again), where the fault ended the one that did."""
    training_seconds: float | None = None
    """From the fault until the training went on, start-up included; none if it ended in the meantime."""
    total_seconds: float = 0.0
    """From the fault until the run had succeeded."""
    steps_repeated: int = 0

    def __str__(self) -> str:
        figures = [
            f"{self.total_seconds:.0f} s to the end",
            f"{self.attempts} job(s), {self.steps_repeated} steps repeated",
        ]
        if self.attached_seconds is not None:
            figures.insert(0, f"{self.attached_seconds:.1f} s to re-attach")
        if self.training_seconds is not None:
            figures.insert(0, f"{self.training_seconds:.1f} s to training")
        return f"{self.victim:22s} seed {self.seed}: {self.problem or 'same model'} ({self.done}); {', '.join(figures)}"


class Session:
    """A sandbox with `mlpipes dev` in it and the outcome of an uninterrupted training to compare with."""

    def __init__(
        self, path: Path, *, scale: str = SCALE, reference: str = REFERENCE, disk_can_be_full: bool = False
    ) -> None:
        self.scale = scale
        self.sandbox = Sandbox(path, held=True)
        self.store = Store(self.sandbox.home / "store")
        self.own_disk = disk_can_be_full
        if disk_can_be_full:
            small_disk(self.store.root)
        (path / "scales.yaml").write_text(f"digits: [{scale}]\n")
        self.sandbox.environment["MLPIPES_SCALES"] = str(path / "scales.yaml")
        self.mlflow_port = free_port()
        self.sandbox.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{self.mlflow_port}"
        self.expected = run_here(make_job(path / "reference", reference))
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.dev = None

    def __enter__(self) -> "Session":
        try:
            self.start_mlflow()
            self.up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.dev is not None:
            end(self.dev)
        self.sandbox.run(".venv/bin/mlpipes ray down")
        for process in self.of_the_sandbox():
            process.kill()
        for folder in Path(tempfile.gettempdir()).glob("mlpipes-dev-*"):  # of sessions that were killed
            shutil.rmtree(folder)
        if self.own_disk:
            subprocess.run(["umount", "--lazy", str(self.store.root)], check=False)

    def start_mlflow(self) -> None:
        """Start the MLflow server, if it does not run."""
        if self.mlflow_processes():
            return
        folder = self.sandbox.home / "mlflow"
        folder.mkdir(parents=True, exist_ok=True)
        places = [
            "--backend-store-uri",
            f"sqlite:///{folder / 'mlflow.db'}",
            "--artifacts-destination",
            str(folder / "files"),
        ]
        address = ["--host", "127.0.0.1", "--port", str(self.mlflow_port), "--workers", "1"]
        server = self.sandbox.start(".venv/bin/mlflow", "server", *places, *address, log="mlflow.log")
        wait_for(f"http://127.0.0.1:{self.mlflow_port}/health", server)

    def mlflow_processes(self) -> list[psutil.Process]:
        """The processes of the MLflow server."""
        found = [p for p in self.of_the_sandbox() if "--backend-store-uri" in command_of(p)]
        return [q for p in found for q in [p, *p.children(recursive=True)]]

    def up(self) -> None:
        """Start `mlpipes dev`, as the user would after a crash; a half-dead one is ended first."""
        if self.dev is not None:
            end(self.dev)
        self.dev = self.sandbox.start(".venv/bin/mlpipes", "dev", "--port", str(self.port))
        wait_for(f"{self.address}/server_info", self.dev)

    # -- one trial ----------------------------------------------------------------------------------------------------
    def trial(self, victim: str, seed: int, place: float | None = None) -> Trial:
        """Launch, let the fault happen, wait, compare.

        It happens at a random moment or, given a place (a fraction of the steps), while the training waits there; it goes
        on when a run follows it again.
        """
        trial, chance = Trial(victim, seed), random.Random(f"{victim}-{seed}")  # noqa: S311 - for moments, not secrets
        self.until(self.is_ready, "Dagster can launch runs")
        if place is not None:
            self.sandbox.barriers.close(place)
        run_id = self.launch(stall_seconds=STALL_SECONDS if victim in HUNG else 900)
        folder = self.folder_of(run_id)
        self.until(lambda: folder.messages(1).is_file(), "the training's driver has started")
        if place is None:
            self._random_moment(victim, run_id, folder, chance)
        else:
            self.sandbox.barriers.wait_for(place)
        struck_at, step = time.time(), self.last_step(folder)
        trial.done = strike(self, victim, run_id, folder, chance)
        try:
            self._recover(run_id, victim, struck_at)
            trial.problem = self.compare(folder)
        except (AssertionError, UnexpectedEndError) as error:
            trial.problem = str(error)
            for status_run in self.family(run_id):
                if status_run not in ("SUCCESS", "FAILURE", "CANCELED"):
                    self.cancel(run_id)
        trial.total_seconds = time.time() - struck_at
        self._measure(trial, run_id, folder, struck_at, step)
        return trial

    def is_ready(self) -> bool:
        """Whether the webserver knows the jobs: what an earlier trial broke is mended."""
        try:
            return "digits_chain" in str(graphql(self.address, _JOBS))
        except (OSError, RuntimeError, ValueError):
            return False

    def _random_moment(self, victim: str, run_id: str, folder: TrainingFolder, chance: random.Random) -> None:
        """Wait for a moment at which the victim is there: while things start, or at some step of the training."""
        self.until(lambda: victim == DISK or bool(processes(self, victim, run_id)), f"{victim} is there")
        if victim in KILLED and victim != "train worker" and chance.random() < 0.3:
            time.sleep(chance.uniform(0, 8))
            return
        step = chance.uniform(0.02, 0.8) * self.expected["steps"]
        self.until(lambda: self.last_step(folder) >= step, f"the training is at step {step:.0f}")

    def _recover(self, run_id: str, victim: str, struck_at: float) -> None:
        statuses: list[str] = []
        mended = asked_again = False
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            if not mended and time.time() - struck_at > AWAY_SECONDS.get(victim, 0):
                mend(self, victim)
                mended = True
            if self.dev is None or self.dev.poll() is not None:
                self.up()  # the one thing that a user has to do
            if self._attached(run_id, struck_at):
                self.sandbox.barriers.open()
            statuses = self.family(run_id)
            if "SUCCESS" in statuses:
                return
            if statuses and set(statuses) == {"FAILURE"} and self.final_failure(run_id):
                message = self.failure(run_id)
                if victim != SNAPSHOT_BYTE or "Materialize `snapshot`" not in message or asked_again:
                    raise UnexpectedEndError(f"failed: {message[:500]}")
                asked_again = True  # what the message says: the user materializes the chain again
                self.launch(parent=run_id)
            time.sleep(1)
        raise UnexpectedEndError(f"not done after {DEADLINE_SECONDS} s: runs {statuses}")

    def _measure(self, trial: Trial, run_id: str, folder: TrainingFolder, struck_at: float, step: int) -> None:
        trial.attempts = len(list(folder.messages(0).parent.glob("a*.jsonl")))
        later = [m for m in self.messages(folder) if m["time"] > struck_at]
        begun = [m for m in later if m["kind"] in ("resumed", "started")]
        progress = [m["time"] for m in later if m["kind"] in ("progress", "epoch") and m["time"] > struck_at + 0.5]
        if begun:
            progress = [at for at in progress if at > begun[-1]["time"]]
            trial.steps_repeated = max(0, step - begun[-1]["step"])
        if progress:
            trial.training_seconds = min(progress) - struck_at
        attached = self._attached(run_id, struck_at)
        trial.attached_seconds = min(attached) - struck_at if attached else None

    def _attached(self, run_id: str, after: float) -> list[float]:
        """When runs began to follow the training, after a Unix time."""
        attached = [
            int(event["timestamp"]) / 1000
            for run in self.family_ids(run_id)
            for event in self.events(run)
            if (event.get("message") or "").startswith(("Attached to Ray job", "Submitted Ray job", "Training "))
        ]
        return [at for at in attached if at > after]

    def compare(self, folder: TrainingFolder) -> str:
        """What differs from the uninterrupted training; empty if nothing does."""
        outcome = json.loads(folder.result.read_text())["content"]
        wrong = [
            key
            for key in ("weights_digest", "order_digest", "loss_digest", "steps", "best")
            if outcome[key] != self.expected[key]
        ]
        if [row[:3] for row in outcome["history"]] != [row[:3] for row in self.expected["history"]]:
            wrong.append("curve")
        logged = [row[2] for row in outcome["history"] if row[0] == "train/loss"]  # of a long training, not every step
        if (tracked := self.tracked_steps(folder)) != logged:
            wrong.append(f"MLflow's curve ({len(tracked)} points instead of {len(logged)})")
        _, left = psutil.wait_procs(self.training_processes(folder), timeout=60)
        if left:
            wrong.append(f"{len(left)} processes left behind")
        return f"differs in {', '.join(wrong)}" if wrong else ""

    def training_processes(self, folder: TrainingFolder) -> list[psutil.Process]:
        """Driver, controller and workers of a training.

        Ray keeps idle workers and cluster-wide actors of its own, which carry the variables of the job that came first.
        """
        ours = ("mlpipes.training.job", "ray::TrainController", "ray::RayTrainWorker")
        return [p for p in processes_of(folder.fingerprint) if any(word in command_of(p) for word in ours)]

    def tracked_steps(self, folder: TrainingFolder) -> list[int]:
        """Steps of the loss curve of the training's run in MLflow."""
        client, run = self.tracked_run(folder)
        return [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]

    def tracked_run(self, folder: TrainingFolder) -> tuple[Any, Any]:
        """MLflow's client, and the one run of a training."""
        from mlpipes.tracking.runs import FINGERPRINT_TAG, Tracker

        client = Tracker(self.sandbox.environment["MLFLOW_TRACKING_URI"]).client
        experiment = client.get_experiment_by_name("mlpipes/digits")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], f"tags.`{FINGERPRINT_TAG}` = '{folder.fingerprint}'")
        assert len(runs) == 1, "one MLflow run per training"
        return client, runs[0]

    # -- Dagster ------------------------------------------------------------------------------------------------------
    def launch(self, parent: str | None = None, **settings: Any) -> str:
        """Launch the chain, up to a fresh training, or go on with that of a parent run; returns the run's id."""
        config = {"ops": {"digits__checkpoints": {"config": {"fresh": True, **settings}}}}
        metadata: dict[str, Any] = {"tags": [{"key": "dagster/partition", "value": self.scale}]}
        if parent is not None:  # as the UI's button "re-execute" does
            metadata |= {"parentRunId": parent, "rootRunId": parent}
        selector = {"repositoryLocationName": "mlpipes.definitions", "repositoryName": "__repository__"}
        # Up to the training, which all faults are aimed at; what follows it would only lengthen a trial.
        assets = [{"path": ["digits", name]} for name in ("dataset", "snapshot", "checkpoints")]
        parameters = {
            "selector": {**selector, "jobName": "digits_chain", "assetSelection": assets},
            "runConfigData": json.dumps(config),
            "executionMetadata": metadata,
        }
        launched: list[str] = []

        def try_to() -> bool:
            # Refused for as long as the webserver has not found the code server that was started after a dead one.
            answer = graphql(self.address, _LAUNCH, params=parameters)["launchRun"]
            launched.extend([answer["run"]["runId"]] if "run" in answer else [])
            return bool(launched)

        self.until(try_to, "Dagster takes the run")
        return launched[0]

    def cancel(self, run_id: str) -> None:
        """Terminate a run as the UI does."""
        graphql(self.address, _TERMINATE, run=run_id)

    def family(self, run_id: str) -> list[str]:
        """The statuses of a run and its retries; none while the webserver is away."""
        return [run["status"] for run in self._family(run_id)]

    def family_ids(self, run_id: str) -> list[str]:
        """The ids of a run and its retries."""
        return [run["runId"] for run in self._family(run_id)]

    def _family(self, run_id: str) -> list[dict[str, Any]]:
        try:
            runs = graphql(self.address, _RUNS)["runsOrError"]["results"]
        except (OSError, RuntimeError, ValueError):
            return []
        # A retry that Dagster lost is launched by a sensor, and such runs know their root by a tag only.
        root = {"key": "dagster/root_run_id", "value": run_id}
        return [run for run in runs if run_id in (run["runId"], run["rootRunId"]) or root in run["tags"]]

    def final_failure(self, run_id: str) -> bool:
        """Whether a run's failure is one of its step, which nobody repeats; a crash is repeated by Dagster."""
        return any(event["__typename"] == "ExecutionStepFailureEvent" for event in self.events(run_id))

    def failure(self, run_id: str) -> str:
        """What the failed steps of a run and its retries said."""
        events = [event for run in self.family_ids(run_id) for event in self.events(run)]
        errors = [event["error"] for event in events if event["__typename"] == "ExecutionStepFailureEvent"]
        return " ".join(error["message"] + ((error["cause"] or {}).get("message") or "") for error in errors if error)

    def events(self, run_id: str) -> list[dict[str, Any]]:
        """A run's events; none while the webserver is away."""
        try:
            return graphql(self.address, _EVENTS, run=run_id)["logsForRun"]["events"]
        except (OSError, RuntimeError, ValueError, KeyError):
            return []

    def folder_of(self, run_id: str) -> TrainingFolder:
        """The folder of the training that a run starts."""
        found: list[TrainingFolder] = []

        def look() -> bool:
            for path in self.store.root.glob("trainings/*/recipe.json"):
                if json.loads(path.read_text())["content"]["generation"] == run_id:
                    found.append(TrainingFolder(path.parent))
            return bool(found)

        self.until(look, "the training has a folder")
        return found[0]

    # -- processes -------------------------------------------------------------------------------------------------------
    def run_worker_pids(self, run_id: str) -> set[int]:
        """Pids of the process that executes a run."""
        messages = [event.get("message") or "" for event in self.events(run_id)]
        return {int(m.split("pid: ")[1].split(")")[0]) for m in messages if "Started process for run (pid: " in m}

    def of_the_sandbox(self) -> list[psutil.Process]:
        """All processes that work on the sandbox's state."""
        home = str(self.sandbox.home)
        return [p for p in psutil.process_iter() if environment_of(p).get("MLPIPES_HOME") == home]

    # -- the training -------------------------------------------------------------------------------------------------
    def messages(self, folder: TrainingFolder) -> list[dict[str, Any]]:
        """All messages of a training, attempt by attempt."""
        return [m for path in sorted(folder.messages(0).parent.glob("a*.jsonl")) for m in read_messages(path)[0]]

    def last_step(self, folder: TrainingFolder) -> int:
        """The latest step that the training reported."""
        return max((m.get("step", 0) for m in self.messages(folder)), default=0)

    def until(self, condition: Any, what: str) -> None:
        """Wait until a condition holds. Raises AssertionError saying what did not."""
        until(condition, what)
