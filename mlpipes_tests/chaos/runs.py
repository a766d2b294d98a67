"""A workload's trainings in a Dagster: launched, cancelled and looked at over GraphQL, and in the store."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from mlpipes.store.layout import Store, TrainingFolder
from mlpipes.store.messages import Message, read_messages
from mlpipes_tests.sandbox import LOCATION
from mlpipes_tests.waiting import until

_LAUNCH = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
  ... on RunConfigValidationInvalid { errors { message } } } }"""
_RUNS = "{ runsOrError(limit: 30) { ... on Runs { results { runId rootRunId status tags { key value } } } } }"
_JOBS = """{ repositoriesOrError { ... on RepositoryConnection { nodes { jobs { name } } } } }"""
_TERMINATE = """mutation($run: String!) { terminateRun(runId: $run) { __typename } }"""
_EVENTS = """query($run: ID!) { logsForRun(runId: $run) { ... on EventConnection { events {
  __typename ... on MessageEvent { message timestamp }
  ... on ExecutionStepFailureEvent { error { message cause { message } } } } } } }"""


class Trainings(ABC):
    """The trainings of one scale of a workload; whoever has a Dagster says how to `ask` it."""

    workload: str
    scale: str
    store: Store
    expected: Mapping[str, Any]
    """The outcome of an uninterrupted training."""
    tracking_uri: str
    location = LOCATION

    @abstractmethod
    def ask(self, query: str, **variables: Any) -> Any:
        """Ask Dagster's webserver. Raises OSError, RuntimeError or ValueError where it does not answer."""

    def is_ready(self) -> bool:
        """Whether the webserver knows the jobs: what an earlier trial broke is mended."""
        try:
            return f"{self.workload}_chain" in str(self.ask(_JOBS))
        except (OSError, RuntimeError, ValueError):
            return False

    def launch(self, parent: str | None = None, tags: Mapping[str, str] | None = None, **settings: Any) -> str:
        """Launch the chain, up to a fresh training, or go on with that of a parent run; returns the run's id."""
        config = {"ops": {f"{self.workload}__checkpoints": {"config": {"fresh": True, **settings}}}}
        tags = {"dagster/partition": self.scale, **(tags or {})}
        metadata: dict[str, Any] = {"tags": [{"key": key, "value": value} for key, value in tags.items()]}
        if parent is not None:  # as the UI's button "re-execute" does
            metadata |= {"parentRunId": parent, "rootRunId": parent}
        selector = {"repositoryLocationName": self.location, "repositoryName": "__repository__"}
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
            answer = self.ask(_LAUNCH, params=parameters)["launchRun"]
            launched.extend([answer["run"]["runId"]] if "run" in answer else [])
            return bool(launched)

        self.until(try_to, "Dagster takes the run")
        return launched[0]

    def cancel(self, run_id: str) -> None:
        """Terminate a run as the UI does."""
        self.ask(_TERMINATE, run=run_id)

    def family(self, run_id: str) -> list[str]:
        """The statuses of a run and its retries; none while the webserver is away."""
        return [run["status"] for run in self._family(run_id)]

    def family_ids(self, run_id: str) -> list[str]:
        """The ids of a run and its retries."""
        return [run["runId"] for run in self._family(run_id)]

    def _family(self, run_id: str) -> list[dict[str, Any]]:
        try:
            runs = self.ask(_RUNS)["runsOrError"]["results"]
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
            return self.ask(_EVENTS, run=run_id)["logsForRun"]["events"]
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

    def attached(self, run_id: str, after: float) -> list[float]:
        """When runs began to follow the training, after a Unix time."""
        times = [
            int(event["timestamp"]) / 1000
            for run in self.family_ids(run_id)
            for event in self.events(run)
            if (event.get("message") or "").startswith(("Attached to Ray job", "Submitted Ray job", "Training "))
        ]
        return [at for at in times if at > after]

    # -- what came out --------------------------------------------------------------------------------------------------
    def differences(self, folder: TrainingFolder) -> list[str]:
        """What differs from the uninterrupted training, in the store and in MLflow."""
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
        return wrong

    def tracked_steps(self, folder: TrainingFolder) -> list[int]:
        """Steps of the loss curve of the training's run in MLflow."""
        client, run = self.tracked_run(folder)
        return [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]

    def tracked_run(self, folder: TrainingFolder) -> tuple[Any, Any]:
        """MLflow's client, and the one run of a training."""
        from mlpipes.tracking.runs import FINGERPRINT_TAG, Tracker

        client = Tracker(self.tracking_uri).client
        experiment = client.get_experiment_by_name(f"mlpipes/{self.workload}")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], f"tags.`{FINGERPRINT_TAG}` = '{folder.fingerprint}'")
        assert len(runs) == 1, "one MLflow run per training"
        return client, runs[0]

    # -- in the store ---------------------------------------------------------------------------------------------------
    def messages(self, folder: TrainingFolder) -> list[Message]:
        """All messages of a training, attempt by attempt."""
        return [m for path in sorted(folder.messages(0).parent.glob("a*.jsonl")) for m in read_messages(path)[0]]

    def last_step(self, folder: TrainingFolder) -> int:
        """The latest step that the training reported."""
        return max((getattr(m, "step", 0) for m in self.messages(folder)), default=0)

    def until(self, condition: Any, what: str) -> None:
        """Wait until a condition holds. Raises AssertionError saying what did not."""
        until(condition, what)
