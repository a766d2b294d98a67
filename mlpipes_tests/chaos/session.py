"""A session under chaos: a sandbox with `mlpipes dev`, Ray and MLflow in it, and what is asked of them."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from mlpipes.compute.processes import kill, with_variable
from mlpipes.compute.stacks import processes_of
from mlpipes.store.layout import Store, TrainingFolder
from mlpipes.store.messages import Message, read_messages
from mlpipes_tests.chaos.processes import command_of
from mlpipes_tests.held import REFERENCE as IMPLEMENTATION
from mlpipes_tests.prepared import mlflow_store
from mlpipes_tests.sandbox import Sandbox, descendants, end, free_port, graphql, wait_for
from mlpipes_tests.training.harness import make_job, run_here
from mlpipes_tests.waiting import LIMIT_SECONDS, until

DISK_BYTES = 1300 * 2**20
"""Size of the store's disk where it is to run full: what the preflight asks for, and some."""

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


class Session:
    """A sandbox with `mlpipes dev` in it and the outcome of an uninterrupted training to compare with.

    Without the scale of a `reference` there is nothing to compare with, and trainings wait for nobody.
    """

    def __init__(
        self,
        path: Path,
        *,
        workload: str = "digits",
        scale: str = SCALE,
        reference: str | None = REFERENCE,
        disk_can_be_full: bool = False,
    ) -> None:
        self.workload, self.scale = workload, scale
        self.sandbox = Sandbox(path, held=reference is not None)
        self.store = Store(self.sandbox.home / "store")
        self.own_disk = disk_can_be_full
        if disk_can_be_full:
            small_disk(self.store.root)
        (path / "scales.yaml").write_text(f"{workload}: [{scale}]\n")
        self.sandbox.environment["MLPIPES_SCALES"] = str(path / "scales.yaml")
        self.mlflow_port = free_port()
        self.sandbox.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{self.mlflow_port}"
        self.expected = run_here(make_job(path / "reference", reference, IMPLEMENTATION)) if reference else {}
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.dev = None
        self.temporary = set[Path]()
        """Folders of its `mlpipes dev`s, which one that is killed cannot remove."""

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
        kill(self.of_the_sandbox())
        for folder in self.temporary:
            shutil.rmtree(folder, ignore_errors=True)
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
            mlflow_store(folder / "mlflow.db"),
            "--artifacts-destination",
            str(folder / "files"),
        ]
        address = ["--host", "127.0.0.1", "--port", str(self.mlflow_port), "--workers", "1"]
        jobs = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight processes more
        server = self.sandbox.start(".venv/bin/mlflow", "server", *places, *address, log="mlflow.log", **jobs)
        wait_for(f"http://127.0.0.1:{self.mlflow_port}/health", server)

    def mlflow_processes(self) -> list[psutil.Process]:
        """The processes of the MLflow server."""
        found = [p for p in self.of_the_sandbox() if "--backend-store-uri" in command_of(p)]
        return [q for p in found for q in [p, *descendants(p.pid)]]

    def up(self) -> None:
        """Start `mlpipes dev`, as the user would after a crash; a half-dead one is ended first."""
        if self.dev is not None:
            end(self.dev)
        self.dev = self.sandbox.start(".venv/bin/mlpipes", "dev", "--port", str(self.port))
        wait_for(f"{self.address}/server_info", self.dev)
        words = [word for process in psutil.Process(self.dev.pid).children() for word in _words(process)]
        self.temporary |= {Path(word).parent for word in words if "/mlpipes-dev-" in word}

    def is_ready(self) -> bool:
        """Whether the webserver knows the jobs: what an earlier trial broke is mended."""
        try:
            return f"{self.workload}_chain" in str(graphql(self.address, _JOBS))
        except (OSError, RuntimeError, ValueError):
            return False

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
        _, left = psutil.wait_procs(self.training_processes(folder), timeout=LIMIT_SECONDS)
        if left:
            wrong.append(f"{len(left)} processes left behind")
        return f"differs in {', '.join(wrong)}" if wrong else ""

    def training_processes(self, folder: TrainingFolder) -> list[psutil.Process]:
        """Driver, controller and workers of a training.

        Ray keeps idle workers and cluster-wide actors of its own, which carry the variables of the job that came first.
        """
        ours = ("mlpipes.training.driver", "ray::TrainController", "ray::RayTrainWorker")
        return [p for p in processes_of(folder.fingerprint) if any(word in command_of(p) for word in ours)]

    def tracked_steps(self, folder: TrainingFolder) -> list[int]:
        """Steps of the loss curve of the training's run in MLflow."""
        client, run = self.tracked_run(folder)
        return [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]

    def tracked_run(self, folder: TrainingFolder) -> tuple[Any, Any]:
        """MLflow's client, and the one run of a training."""
        from mlpipes.tracking.runs import FINGERPRINT_TAG, Tracker

        client = Tracker(self.sandbox.environment["MLFLOW_TRACKING_URI"]).client
        experiment = client.get_experiment_by_name(f"mlpipes/{self.workload}")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], f"tags.`{FINGERPRINT_TAG}` = '{folder.fingerprint}'")
        assert len(runs) == 1, "one MLflow run per training"
        return client, runs[0]

    # -- Dagster ------------------------------------------------------------------------------------------------------
    def launch(self, parent: str | None = None, tags: Mapping[str, str] | None = None, **settings: Any) -> str:
        """Launch the chain, up to a fresh training, or go on with that of a parent run; returns the run's id."""
        config = {"ops": {f"{self.workload}__checkpoints": {"config": {"fresh": True, **settings}}}}
        tags = {"dagster/partition": self.scale, **(tags or {})}
        metadata: dict[str, Any] = {"tags": [{"key": key, "value": value} for key, value in tags.items()]}
        if parent is not None:  # as the UI's button "re-execute" does
            metadata |= {"parentRunId": parent, "rootRunId": parent}
        selector = {"repositoryLocationName": "mlpipes.definitions", "repositoryName": "__repository__"}
        # Up to the training, which all faults are aimed at; what follows it would only lengthen a trial.
        assets = [{"path": [self.workload, name]} for name in ("dataset", "snapshot", "checkpoints")]
        parameters = {
            "selector": {**selector, "jobName": f"{self.workload}_chain", "assetSelection": assets},
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
        return with_variable("MLPIPES_HOME", str(self.sandbox.home))

    # -- the training -------------------------------------------------------------------------------------------------
    def messages(self, folder: TrainingFolder) -> list[Message]:
        """All messages of a training, attempt by attempt."""
        return [m for path in sorted(folder.messages(0).parent.glob("a*.jsonl")) for m in read_messages(path)[0]]

    def last_step(self, folder: TrainingFolder) -> int:
        """The latest step that the training reported."""
        return max((getattr(m, "step", 0) for m in self.messages(folder)), default=0)

    def until(self, condition: Any, what: str) -> None:
        """Wait until a condition holds. Raises AssertionError saying what did not."""
        until(condition, what)


def small_disk(folder: Path) -> None:
    """Give a folder a small disk of its own. Raises RuntimeError where that cannot be had (it takes root)."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no small disk for the fault 'full disk': {done.stderr.strip()}")


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
