"""The chaos harness: launches a training in Dagster, kills a victim at a random moment, waits, and compares everything."""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mlpipes.compute.stacks import processes_of
from mlpipes.store import Store, TrainingFolder, read_messages
from mlpipes_tests.sandbox import Sandbox, answers, end, free_port, graphql, wait_for
from mlpipes_tests.training.harness import make_job, run_here

SCALE = "w2-b128-e60-g0"
REFERENCE_SCALE = "w1-b128-e60-g0"  # the same bits at any number of workers: one process is the cheapest reference
VICTIMS = (
    *("run worker", "dagster dev", "daemon", "code server", "webserver", "everything of Dagster"),
    *("Ray driver", "Train controller", "train worker", "raylet", "Ray head", "everything"),
)
_LAUNCH = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
  ... on RunConfigValidationInvalid { errors { message } } } }"""
_RUNS = "{ runsOrError(limit: 30) { ... on Runs { results { runId rootRunId status } } } }"
_TERMINATE = """mutation($run: String!) { terminateRun(runId: $run) { __typename } }"""
_EVENTS = """query($run: ID!) { logsForRun(runId: $run) { ... on EventConnection { events {
  __typename ... on MessageEvent { message } } } } }"""
DEADLINE_SECONDS = 240


@dataclass
class Trial:
    """What one trial found."""

    victim: str
    seed: int
    killed: int = 0
    problem: str = ""
    attempts: int = 0
    recovery_seconds: float = 0.0
    """From the kill until the training reported something again."""
    total_seconds: float = 0.0
    """From the kill until the run had succeeded."""
    steps_repeated: int = 0

    def __str__(self) -> str:
        figures = f"{self.recovery_seconds:5.1f} s to recovery, {self.total_seconds:5.1f} s to the end"
        jobs = f"{self.attempts} job(s), {self.steps_repeated} steps repeated"
        return f"{self.victim:22s} seed {self.seed:4d}: {self.problem or 'same model'}; {figures}, {jobs}"


class Session:
    """A sandbox with `mlpipes dev` in it and the outcome of an uninterrupted training to compare with."""

    def __init__(self, path: Path) -> None:
        self.sandbox = Sandbox(path)
        (path / "scales.yaml").write_text(f"digits: [{SCALE}]\n")
        self.sandbox.environment["MLPIPES_SCALES"] = str(path / "scales.yaml")
        self.store = Store(self.sandbox.home / "store")
        self.expected = run_here(make_job(path / "reference", REFERENCE_SCALE))
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.dev = None

    def __enter__(self) -> "Session":
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        if self.dev is not None:
            end(self.dev)
        self.sandbox.run(".venv/bin/mlpipes ray down")
        for process in self._of_the_sandbox():
            process.kill()

    def up(self) -> None:
        """Start `mlpipes dev`, as the user would after a crash; a half-dead one is ended first."""
        if self.dev is not None:
            end(self.dev, seconds=20)
        self.dev = self.sandbox.start(".venv/bin/mlpipes", "dev", "--port", str(self.port))
        wait_for(f"{self.address}/server_info")

    # -- one trial ----------------------------------------------------------------------------------------------------
    def trial(self, victim: str, seed: int) -> Trial:
        """Launch, kill, wait, compare."""
        trial, chance = Trial(victim, seed), random.Random(f"{victim}-{seed}")  # noqa: S311 - for moments, not secrets
        run_id = self.launch()
        folder = self.folder_of(run_id)
        self.until(lambda: folder.messages(1).is_file(), "the training's driver has started")
        self._random_moment(victim, run_id, folder, chance)
        killed_at, step = time.time(), self.last_step(folder)
        trial.killed = self.kill(victim, run_id)
        try:
            self._recover(run_id, folder, trial, killed_at)
            trial.problem = self.compare(folder)
        except TimeoutError as error:
            trial.problem = str(error)
        trial.total_seconds = time.time() - killed_at
        trial.attempts = len(list(folder.messages(0).parent.glob("a*.jsonl")))
        resumed = [m["step"] for m in self._messages(folder) if m["kind"] == "resumed" and m["time"] > killed_at]
        trial.steps_repeated = max(0, step - resumed[0]) if resumed else 0
        return trial

    def _random_moment(self, victim: str, run_id: str, folder: TrainingFolder, chance: random.Random) -> None:
        """Wait for a moment at which the victim is there: while things start, or at some step of the training."""
        self.until(lambda: bool(self.processes(victim, run_id)), f"{victim} is there")
        if victim != "train worker" and chance.random() < 0.3:
            time.sleep(chance.uniform(0, 8))
            return
        step = chance.uniform(0, 0.8) * self.expected["steps"]
        self.until(lambda: self.last_step(folder) >= step, f"the training is at step {step:.0f}")

    def _recover(self, run_id: str, folder: TrainingFolder, trial: Trial, killed_at: float) -> None:
        statuses: list[str] = []
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            if not trial.recovery_seconds:
                # What was under way while the kill went out does not count.
                heard = [m["time"] for m in self._messages(folder) if m["time"] > killed_at + 0.5]
                trial.recovery_seconds = min(heard) - killed_at if heard else 0.0
            if self.dev is None or self.dev.poll() is not None or not answers(f"{self.address}/server_info"):
                self.up()
            statuses = self.family(run_id)
            if "SUCCESS" in statuses:
                return
            time.sleep(1)
        raise TimeoutError(f"not done after {DEADLINE_SECONDS} s: runs {statuses}")

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
        if (tracked := self.tracked_steps(folder)) != list(range(1, outcome["steps"] + 1)):
            wrong.append(f"MLflow's curve ({len(tracked)} points for {outcome['steps']} steps)")
        deadline = time.monotonic() + 30
        while (left := self.training_processes(folder)) and time.monotonic() < deadline:
            time.sleep(0.5)
        if left:
            wrong.append(f"{len(left)} processes left behind")
        return f"differs in {', '.join(wrong)}" if wrong else ""

    def training_processes(self, folder: TrainingFolder) -> list[psutil.Process]:
        """Driver, controller and workers of a training.

        Ray keeps idle workers and cluster-wide actors of its own, which carry the variables of the job that came first.
        """
        ours = ("mlpipes.training.job", "ray::TrainController", "ray::RayTrainWorker")
        return [p for p in processes_of(folder.fingerprint) if any(word in _command(p) for word in ours)]

    def tracked_steps(self, folder: TrainingFolder) -> list[int]:
        """Steps of the loss curve of the training's run in MLflow."""
        client, run = self.tracked_run(folder)
        return [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]

    def tracked_run(self, folder: TrainingFolder) -> tuple[Any, Any]:
        """MLflow's client, and the one run of a training."""
        from mlpipes.tracking.runs import FINGERPRINT_TAG, Tracker

        client = Tracker(f"sqlite:///{self.sandbox.home / 'mlflow' / 'mlflow.db'}").client
        experiment = client.get_experiment_by_name("mlpipes/digits")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], f"tags.`{FINGERPRINT_TAG}` = '{folder.fingerprint}'")
        assert len(runs) == 1, "one MLflow run per training"
        return client, runs[0]

    # -- Dagster ------------------------------------------------------------------------------------------------------
    def launch(self, parent: str | None = None) -> str:
        """Launch the chain with a fresh training, or go on with that of a parent run; returns the run's id."""
        config = {"ops": {"digits__checkpoints": {"config": {"fresh": True}}}}
        metadata: dict[str, Any] = {"tags": [{"key": "dagster/partition", "value": SCALE}]}
        if parent is not None:  # as the UI's button "re-execute" does
            metadata |= {"parentRunId": parent, "rootRunId": parent}
        selector = {"repositoryLocationName": "mlpipes.definitions", "repositoryName": "__repository__"}
        parameters = {
            "selector": {**selector, "jobName": "digits_chain"},
            "runConfigData": json.dumps(config),
            "executionMetadata": metadata,
        }
        answer = graphql(self.address, _LAUNCH, params=parameters)["launchRun"]
        if "run" not in answer:
            raise RuntimeError(str(answer))
        return answer["run"]["runId"]

    def cancel(self, run_id: str) -> None:
        """Terminate a run as the UI does."""
        graphql(self.address, _TERMINATE, run=run_id)

    def family(self, run_id: str) -> list[str]:
        """The statuses of a run and its retries; none while the webserver is away."""
        try:
            runs = graphql(self.address, _RUNS)["runsOrError"]["results"]
        except (OSError, RuntimeError, ValueError):
            return []
        return [run["status"] for run in runs if run_id in (run["runId"], run["rootRunId"])]

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

    # -- victims ------------------------------------------------------------------------------------------------------
    def processes(self, victim: str, run_id: str) -> list[psutil.Process]:
        """The processes of a victim."""
        assert self.dev is not None
        try:
            dagster = psutil.Process(self.dev.pid).children(recursive=True)
        except psutil.Error:
            dagster = []
        ray = [p for p in self._of_the_sandbox() if _environment(p).get("MLPIPES_RAY_HEAD")]
        words = {
            "dagster dev": "dagster dev",
            "daemon": "dagster._daemon",
            "code server": "api grpc",
            "webserver": "dagster_webserver",
            "Ray driver": "mlpipes.training.job",
            "Train controller": "ray::TrainController",
            "train worker": "ray::RayTrainWorker",
            "raylet": "/raylet/raylet",
        }
        match victim:
            case "run worker":
                return [p for p in dagster if p.pid in self._run_worker_pids(run_id)]
            case "everything of Dagster":
                return dagster
            case "Ray head":
                return ray
            case "everything":
                return dagster + ray
            case _:
                found = [p for p in dagster + ray if words[victim] in _command(p)]
                return found[:1] if victim == "train worker" else found

    def kill(self, victim: str, run_id: str) -> int:
        """SIGKILL a victim's processes; returns how many there were."""
        processes = self.processes(victim, run_id)
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        return len(processes)

    def _run_worker_pids(self, run_id: str) -> set[int]:
        events = graphql(self.address, _EVENTS, run=run_id)["logsForRun"]["events"]
        messages = [event.get("message") or "" for event in events]
        return {int(m.split("pid: ")[1].split(")")[0]) for m in messages if "Started process for run (pid: " in m}

    def _of_the_sandbox(self) -> list[psutil.Process]:
        home = str(self.sandbox.home)
        return [p for p in psutil.process_iter() if _environment(p).get("MLPIPES_HOME") == home]

    # -- the training -------------------------------------------------------------------------------------------------
    def _messages(self, folder: TrainingFolder) -> list[dict[str, Any]]:
        return [m for path in sorted(folder.messages(0).parent.glob("a*.jsonl")) for m in read_messages(path)[0]]

    def last_step(self, folder: TrainingFolder) -> int:
        """The latest step that the training reported."""
        return max((m.get("step", 0) for m in self._messages(folder)), default=0)

    def until(self, condition: Any, what: str, seconds: float = 120) -> None:
        """Wait until a condition holds. Raises TimeoutError saying what did not."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {seconds:.0f} s it is not so that {what}")
            time.sleep(0.2)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
