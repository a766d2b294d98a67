"""Backfills from the command line: the scales that need it, launched in a Dagster that runs, and watched to the end."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import requests

from mlpipes.errors import ConfigError, CorruptionError
from mlpipes.orchestration.launchpad import is_trained, run_config
from mlpipes.orchestration.resources import STORE
from mlpipes.orchestration.training import DAGSTER_UI_VARIABLE, TrainingConfig
from mlpipes.scales import RayScaleConfig
from mlpipes.store.environment import value_of
from mlpipes.store.files import read_record
from mlpipes.store.identity import identity_of, is_empty
from mlpipes.store.layout import Store, home
from mlpipes.store.references import (
    CHAIN,
    REFERENCES,
    EvaluationReference,
    ModelReference,
    SnapshotReference,
    TrainingReference,
)
from mlpipes.workloads.catalog import Entry

DEV_NOTE = "dev.json"
"""The file in the home folder by which `mlpipes dev` says where it serves."""
DEFAULT_UI = "http://127.0.0.1:3000"
PATIENCE_SECONDS = 600.0
"""How long a Dagster that does not answer is asked again: it may be restarted while a backfill runs."""

START_SECONDS = 30.0
"""How long a `mlpipes dev` of this home folder is waited for, which may just have been started."""
_ELSEWHERE_SECONDS = 10.0
"""How long any other Dagster is waited for."""

_ASSET = "query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode { id } } }"
_FRESHNESS = """query($key: AssetKeyInput!, $scale: String!) { assetNodeOrError(assetKey: $key) { ... on AssetNode {
  staleStatus(partition: $scale) assetMaterializations(partitions: [$scale], limit: 1) {
  metadataEntries { label ... on TextMetadataEntry { text } } } } } }"""
_LAUNCH = """mutation($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) { __typename
  ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } ... on UnauthorizedError { message } } }"""
_STATUS = """query($id: String!) { partitionBackfillOrError(backfillId: $id) { __typename ... on PartitionBackfill {
  status runs { runId status tags { key value } } } } }"""
_RETRIES = """query($root: String!) { runsOrError(filter: {tags: [{key: "dagster/root_run_id", value: $root}]}) {
  ... on Runs { results { runId status tags { key value } } } } }"""
_EVENTS = """query($run: ID!, $cursor: String) { logsForRun(runId: $run, afterCursor: $cursor) { ... on EventConnection {
  cursor hasMore events { ... on ExecutionStepFailureEvent { stepKey failureMetadata { description } error { message } }
  ... on RunFailureEvent { message error { message } } } } } }"""
_RETRY_SECONDS = 300.0
"""How long the retry of a crashed run is waited for."""
_OVER = ("COMPLETED", "COMPLETED_SUCCESS", "COMPLETED_FAILED", "CANCELED", "FAILED")


def ui_of_dev() -> str | None:
    """The address of the UI that `mlpipes dev` serves for this home folder; None if none is served."""
    try:
        note = read_record(home() / DEV_NOTE)
    except (OSError, CorruptionError):
        return None
    return f"http://127.0.0.1:{note['port']}" if psutil.pid_exists(note["pid"]) else None  # it may have been killed


class DagsterUi:
    """A Dagster webserver, asked over GraphQL."""

    def __init__(self, address: str | None = None) -> None:
        self.of_dev = ui_of_dev()
        self.address = (address or value_of(DAGSTER_UI_VARIABLE) or self.of_dev or DEFAULT_UI).rstrip("/")
        if not self.address.startswith(("http://", "https://")):
            raise ConfigError(f"--ui {address}: write the address of the Dagster UI, such as {DEFAULT_UI}")

    def ask(self, query: str, **variables: Any) -> Any:
        """The answer's data. Raises ConfigError if nobody answers or the answer is an error."""
        try:
            answer = requests.post(f"{self.address}/graphql", json={"query": query, "variables": variables}, timeout=60)
            content = answer.json()
        except (requests.RequestException, ValueError) as error:
            raise ConfigError(
                f"no Dagster answers at {self.address} ({type(error).__name__}); start `mlpipes dev`, or name it with --ui"
            ) from error
        if content.get("errors"):
            raise ConfigError(f"Dagster at {self.address} says: {content['errors'][0].get('message')}")
        return content["data"]

    def ask_patiently(self, query: str, **variables: Any) -> Any:
        """The same, but waits for a Dagster that is being restarted."""
        return _patiently(lambda: self.ask(query, **variables), PATIENCE_SECONDS)

    def wait_for(self, workload: str, seconds: float | None = None) -> None:
        """Wait for a Dagster that has just been started. Raises ConfigError if it does not answer or lacks the workload."""

        def look() -> None:
            if not self.ask(_ASSET, key={"path": [workload, CHAIN[0]]})["assetNodeOrError"].get("id"):
                raise ConfigError(f"Dagster at {self.address} has no asset {workload}/{CHAIN[0]}")

        usual = START_SECONDS if self.of_dev == self.address else _ELSEWHERE_SECONDS
        _patiently(look, usual if seconds is None else seconds)

    def is_fresh(self, workload: str, scale: str, store: Store) -> bool:
        """Whether every asset of a scale's chain is up to date, by Dagster's word, and there, in the store.

        Raises ConfigError if Dagster's materializations lie in a store that cannot be seen from here.
        """
        for asset in CHAIN:
            node = self.ask(_FRESHNESS, key={"path": [workload, asset]}, scale=scale)["assetNodeOrError"]
            if node.get("staleStatus") != "FRESH":
                return False
            self._check_visible(f"{workload}/{asset} {scale}", node["assetMaterializations"], store)
            if not _is_there(store, workload, asset, scale):
                return False
        return True

    def _check_visible(self, what: str, materializations: Sequence[Mapping[str, Any]], store: Store) -> None:
        entries = [entry for event in materializations for entry in event["metadataEntries"]]
        # Materializations of before stores had ids do not say where they lie.
        written = next((entry["text"] for entry in entries if entry["label"] == STORE), None)
        here = identity_of(store)
        if not is_empty(store) if written is None else written == here:
            return
        found = "is empty" if is_empty(store) else "has no id" if here is None else f"is store {here}"
        raise ConfigError(
            f"Dagster at {self.address} says that {what} is materialized"
            f"{'' if written is None else f', in store {written}'}, but {store.root} {found}. If the store lies elsewhere, "
            "set MLPIPES_HOME to its home folder, or say this on a machine that sees it. If it is gone, `mlpipes store "
            "--adopt` where Dagster runs, and `mlpipes backfill --again` makes everything again."
        )

    def failure(self, run: str) -> str:
        """Why a run failed, as its first failed step has it, or, if none has, as Dagster has it; empty if it did not."""
        cursor, more = None, True
        while more:
            page = self.ask(_EVENTS, run=run, cursor=cursor)["logsForRun"]
            for event in filter(None, page.get("events", ())):
                raised = (event.get("error") or {}).get("message", "")
                if "stepKey" not in event:
                    return f"{event['message']} {raised}".strip()
                told = (event["failureMetadata"] or {}).get("description") or raised
                return f"{event['stepKey']}: {told.strip()}"
            cursor, more = page.get("cursor"), page.get("hasMore")
        return ""

    def launch(
        self, workload: str, scales: Sequence[str], priority: int, title: str, config: Mapping[str, Any] | None = None
    ) -> str:
        """Launch a backfill of the chain for some scales, with a run config; returns its id."""
        params = {
            "assetSelection": [{"path": [workload, asset]} for asset in CHAIN],
            "partitionNames": list(scales),
            "tags": [{"key": "dagster/priority", "value": str(priority)}],
            "title": title,
            **({"runConfigData": dict(config)} if config else {}),
        }
        answer = self.ask(_LAUNCH, params=params)["launchPartitionBackfill"]
        if "backfillId" not in answer:
            raise ConfigError(f"Dagster did not launch the backfill: {answer.get('message', answer['__typename'])}")
        return answer["backfillId"]


def _is_there(store: Store, workload: str, asset: str, scale: str) -> bool:
    """Whether the store has an asset's reference, and the place that it points to."""
    match reference := store.read_reference(REFERENCES[asset], workload, scale):
        case EvaluationReference():
            return store.training(reference.fingerprint).evaluation(reference.evaluation).is_dir()
        case ModelReference():
            return store.training(reference.fingerprint).model.is_dir()
        case TrainingReference():
            return store.training(reference.fingerprint).result.is_file()
        case SnapshotReference():
            return (store.snapshots / reference.digest).is_dir()
        case _:
            return reference is not None


def _patiently(call: Callable[[], Any], seconds: float) -> Any:
    from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

    return Retrying(
        retry=retry_if_exception_type(ConfigError), stop=stop_after_delay(seconds), wait=wait_fixed(1), reraise=True
    )(call)


@dataclass
class Backfill:
    """Launched backfills, and the last known status of each scale's run."""

    ui: DagsterUi
    ids: list[str]
    scales: Mapping[str, str]
    """Status by scale: REQUESTED until it has a run, then the run's."""
    runs: dict[str, str] = field(default_factory=dict)
    """The id of each scale's latest run."""

    def watch(self, pause: float = 2.0) -> Iterator[Mapping[str, str]]:
        """The status of each scale whenever it was looked at, until all backfills and the retries of their runs are over.

        Dagster calls a backfill failed while the retry of a run that crashed is still on its way, and a retry that it
        makes after that does not belong to the backfill any more; it is found by the run that it repeats.
        """
        statuses, crashed = dict(self.scales), dict[str, float]()
        while True:
            over = True
            for number in self.ids:
                found = self.ui.ask_patiently(_STATUS, id=number)["partitionBackfillOrError"]
                over &= found.get("status") in _OVER
                # The latest run of a scale comes last: a retry counts, not what it repeats.
                latest: dict[str, Mapping[str, str]] = {}
                for run in self._with_retries(found.get("runs", [])):
                    tags = _tags(run)
                    if (scale := tags.get("dagster/partition")) in statuses:
                        statuses[scale], latest[scale] = run["status"], tags
                        self.runs[scale] = run["runId"]
                for scale, tags in latest.items():
                    over &= statuses[scale] in ("SUCCESS", "FAILURE", "CANCELED")
                    if statuses[scale] == "FAILURE" and tags.get("dagster/failure_reason") != "STEP_FAILURE":
                        attempt = f"{scale} {tags.get('dagster/retry_number')}"
                        over &= time.monotonic() - crashed.setdefault(attempt, time.monotonic()) > _RETRY_SECONDS
            self.scales = statuses
            yield statuses
            if over:
                return
            time.sleep(pause)

    def _with_retries(self, runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Runs and the retries of those that failed, the first attempts first."""
        found = {run["runId"]: run for run in runs}
        for run in runs:
            if run["status"] == "FAILURE" and "dagster/root_run_id" not in _tags(run):
                answer = self.ui.ask_patiently(_RETRIES, root=run["runId"])["runsOrError"]
                found |= {retry["runId"]: retry for retry in answer.get("results", [])}
        return sorted(found.values(), key=lambda run: int(_tags(run).get("dagster/retry_number", 0)))


def _tags(run: Mapping[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in run["tags"]}


def work(scale: RayScaleConfig) -> float:
    """What a scale costs, roughly: passes over the data times the devices that are held meanwhile."""
    return scale.epochs * scale.workers * (scale.gpus_per_worker or scale.cpus_per_worker)


def launch(
    ui: DagsterUi,
    entry: Entry,
    scales: Sequence[RayScaleConfig],
    store: Store,
    *,
    smallest_first: bool,
    again: bool,
    config: TrainingConfig | None = None,
) -> tuple[Backfill | None, list[str]]:
    """Launch what is not fresh (or all, with `again`); returns it, and the keys of the scales that are fresh.

    With settings (`config`), fresh is what was trained with them, by its fingerprint.
    Raises ConfigError if Dagster's materializations lie in a store that cannot be seen from here.

    What is half done is resumed: a training is found by its fingerprint. With `smallest_first` each scale is a backfill of
    its own, with a priority.
    """

    def is_fresh(key: str) -> bool:
        if config is None:
            return ui.is_fresh(entry.name, key, store)
        there = all(_is_there(store, entry.name, asset, key) for asset in CHAIN)
        return there and is_trained(entry, key, config, store)

    fresh = [] if again else [scale.key for scale in scales if is_fresh(scale.key)]
    settings = run_config(entry, config)
    wanted = [scale for scale in scales if scale.key not in fresh]
    if not wanted:
        return None, fresh
    if smallest_first:
        ordered = sorted(wanted, key=work)
        ids = [
            ui.launch(entry.name, [scale.key], len(ordered) - rank, f"{entry.name} {scale.key}", settings)
            for rank, scale in enumerate(ordered)
        ]
    else:
        title = f"{entry.name}: {len(wanted)} scales"
        ids = [ui.launch(entry.name, [scale.key for scale in wanted], 0, title, settings)]
    return Backfill(ui, ids, {scale.key: "REQUESTED" for scale in wanted}), fresh
