"""MLflow runs: one per training fingerprint, found again after a crash, fed from the training's message file.

Nothing in here may stop a training. The message file and the checkpoints hold every metric, so what could not be sent
while a server was away is sent later; a row sent twice is identical, and the SQL stores keep it once.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock
from tenacity import retry, stop_after_attempt, wait_random_exponential

from mlpipes.errors import ConfigError
from mlpipes.store.environment import tracking_uri, value_of
from mlpipes.store.layout import home
from mlpipes.store.messages import MetricsLogged, Notify, Warned, read_messages
from mlpipes.store.redaction import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

FINGERPRINT_TAG = "mlpipes.fingerprint"
URI_VARIABLE = "MLFLOW_TRACKING_URI"
UI_VARIABLE = "MLPIPES_MLFLOW_UI"
_ANSWER_SECONDS = 5
_LOG = logging.getLogger(__name__)
_BATCH = 1000  # MLflow's limit of metrics per request


def default_uri() -> str:
    """`$MLFLOW_TRACKING_URI`, else an SQLite file in the home folder.

    Raises ConfigError for what MLflow cannot use, and for a home folder whose path the address of a database cannot hold.
    """
    if given := value_of(URI_VARIABLE):
        return tracking_uri(given)
    path = home() / "mlflow" / "mlflow.db"
    if "?" in str(path):
        raise ConfigError(
            f"the home folder {home()} has a question mark in its path, which the addresses of MLflow's and Dagster's "
            f"databases cannot hold; set MLPIPES_HOME to another folder"
        )
    return f"sqlite:///{path}"


def answering_uri() -> str:
    """The same, once it has answered: a command tells at once what would be tried again for minutes in a training.

    Raises ConfigError if it does not.
    """
    uri = default_uri()
    try:
        if uri.startswith("http"):
            import requests

            requests.get(f"{uri.rstrip('/')}/health", timeout=_ANSWER_SECONDS)  # any answer is one
        elif not uri.startswith("sqlite"):
            _connect(uri)
    except Exception as error:  # of any driver of a database
        if type(error).__name__ in ("ModuleNotFoundError", "NoSuchModuleError"):
            raise ConfigError(
                f"{URI_VARIABLE}={redact(uri)}: the driver of this database is not installed. Install it, correct the "
                "address, or use sqlite:///…"
            ) from None
        raise ConfigError(
            f"{URI_VARIABLE}={redact(uri)}: nobody answers there ({type(error).__name__}). Start the server, correct the "
            "address, or unset the variable"
        ) from None
    return uri


def existing_uri() -> str:
    """The same, for what only looks at what was tracked before: raises ConfigError where nothing was, and makes nothing."""
    uri = answering_uri()
    if (path := _sqlite_file(uri)) is not None and not path.is_file():
        raise ConfigError(
            f"no model is registered yet: there is no {path}. Materialize `model` first (`mlpipes demo` does), or set "
            f"{URI_VARIABLE}"
        )
    return uri


def _connect(uri: str) -> None:
    import sqlalchemy

    known = sqlalchemy.make_url(uri).get_dialect().driver in ("psycopg2", "psycopg", "pymysql", "mysqldb")
    engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": _ANSWER_SECONDS} if known else {})
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def public_uri(uri: str) -> str:
    """An address without user name, password and other secrets, for whatever is shown or logged."""
    parts = urlsplit(uri)
    shown = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri
    return redact(shown)


def _sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite address; None of another."""
    scheme, _, rest = uri.partition("://")
    return Path(rest.partition("?")[0].removeprefix("/")) if scheme.startswith("sqlite") else None


def _client(uri: str) -> "MlflowClient":
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    if path := _sqlite_file(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
        # The first client creates the schema, and two at once would trip over each other.
        with FileLock(str(path) + ".lock", timeout=120):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
        return client
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@dataclass
class Tracker:
    """MLflow at one address."""

    uri: str

    def __post_init__(self) -> None:
        try:
            self.uri = tracking_uri(self.uri)
        except ValueError as error:
            raise ConfigError(f"MLflow's address {redact(self.uri)}: {error}") from error
        self.client = _client(self.uri)

    def experiment(self, name: str) -> str:
        """The id of an experiment, made if it is not there; with an SQLite store, its artifacts lie beside the file."""
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                _LOG.warning(
                    "the MLflow experiment %s was deleted; it is restored, for its runs belong to trainings", name
                )
                self.client.restore_experiment(found.experiment_id)
            return found.experiment_id
        location = None
        if path := _sqlite_file(self.uri):
            location = (path.parent / "artifacts" / name).as_uri()
        try:
            return self.client.create_experiment(name, artifact_location=location)
        except Exception:  # another process was faster
            found = self.client.get_experiment_by_name(name)
            if found is None:
                raise
            return found.experiment_id

    def run_of(
        self, experiment: str, fingerprint: str, name: str, parameters: Mapping[str, Any], tags: Mapping[str, str]
    ) -> str:
        """The id of the one run of a fingerprint: the one that is there, set to RUNNING, or a new one."""
        experiment_id = self.experiment(experiment)
        with FileLock(str(home() / "mlflow-runs.lock"), timeout=120):
            from mlflow.entities import ViewType

            found = self.client.search_runs(
                [experiment_id],
                f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'",
                run_view_type=ViewType.ALL,
                order_by=["attributes.start_time ASC"],
            )
            if found:
                run_id = found[0].info.run_id
                if found[0].info.lifecycle_stage == "deleted":
                    _LOG.warning("the MLflow run %s was deleted; it is restored, for a training belongs to it", run_id)
                    self.client.restore_run(run_id)
                self.set_tags(run_id, tags)
                return run_id
            run = self.client.create_run(experiment_id, run_name=name, tags={FINGERPRINT_TAG: fingerprint, **tags})
            from mlflow.entities import Param

            params = [Param(key, str(value)[:6000]) for key, value in parameters.items()]
            self.client.log_batch(run.info.run_id, params=params)
            return run.info.run_id

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Add or change tags."""
        for key, value in tags.items():
            self.client.set_tag(run_id, key, value)

    def set_status(self, run_id: str, status: str) -> None:
        """RUNNING, FINISHED, FAILED or KILLED."""
        if status == "RUNNING":
            self.client.update_run(run_id, status)
        else:
            self.client.set_terminated(run_id, status)

    def log_history(self, run_id: str, rows: Sequence[Sequence[Any]]) -> None:
        """Log rows of (key, value, step, Unix time in ms); rows that are there already stay single."""
        from mlflow.entities import Metric

        metrics = [Metric(key, float(value), int(at), int(step)) for key, value, step, at in rows]
        for start in range(0, len(metrics), _BATCH):
            self._log_batch(run_id, metrics[start : start + _BATCH])

    @retry(stop=stop_after_attempt(5), wait=wait_random_exponential(multiplier=0.2, max=3), reraise=True)
    def _log_batch(self, run_id: str, metrics: list[Any]) -> None:
        # MLflow leaves out rows that are there already, but fails if another process adds them at the same moment, as the
        # driver and the step may do at a training's end. A second attempt finds them.
        self.client.log_batch(run_id, metrics=metrics)

    def log_values(self, run_id: str, values: Mapping[str, float], step: int = 0) -> None:
        """Log figures of now."""
        self.log_history(run_id, [[key, value, step, int(time.time() * 1000)] for key, value in values.items()])

    def log_files(self, run_id: str, folder: str, files: Iterable[Path]) -> None:
        """Attach files to the run under an artifact folder."""
        for path in files:
            self.client.log_artifact(run_id, str(path), folder)

    @property
    def public_uri(self) -> str:
        """The address without user name and password, for whatever is shown or logged."""
        return public_uri(self.uri)

    def command(self, run_id: str) -> str:
        """The command that would show a run, for where no UI is known."""
        return f"mlflow ui --backend-store-uri {self.public_uri}  # run {run_id}"

    def link(self, run_id: str) -> str | None:
        """The address of a run in the MLflow UI, where one is known: a server's own, or `$MLPIPES_MLFLOW_UI`."""
        base = self.public_uri if self.uri.startswith("http") else os.environ.get(UI_VARIABLE)
        if not base:
            return None
        experiment = self.client.get_run(run_id).info.experiment_id
        return f"{base.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


class MetricFollower:
    """Sends a training's metrics from its message file to MLflow, in a thread of the driver."""

    def __init__(self, uri: str, run_id: str, messages: Path, notify: Notify) -> None:
        self.uri, self.run_id, self.messages, self.notify = uri, run_id, messages, notify
        self._thread: threading.Thread | None = None

    def start(self, stop: threading.Event) -> None:
        """Begin; when `stop` is set, what is left is sent and the thread ends."""
        self._thread = threading.Thread(target=self._run, args=(stop,), daemon=True, name="metrics")
        self._thread.start()

    def join(self, timeout: float = 60) -> None:
        """Wait until all is sent, or for `timeout` seconds: the `model` asset sends what is missing then."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self, stop: threading.Event) -> None:
        offset, pending, tracker, monitor, warned = 0, [], None, None, False
        while True:
            last = stop.is_set()
            messages, offset = read_messages(self.messages, offset)
            pending += [row for message in messages if isinstance(message, MetricsLogged) for row in message.rows]
            try:
                if tracker is None:
                    tracker = Tracker(self.uri)
                    tracker.set_status(self.run_id, "RUNNING")
                    monitor = _system_metrics(self.uri, self.run_id)
                if pending:
                    tracker.log_history(self.run_id, pending)
                    pending = []
                warned = False
            except Exception as error:
                if not warned:
                    self.notify(Warned(text=f"MLflow does not take metrics ({type(error).__name__}); trying again"))
                warned = True
            if last:
                if monitor is not None:
                    monitor.finish()
                return
            stop.wait(1.0)


def _system_metrics(uri: str, run_id: str) -> Any:
    """MLflow's own monitor of CPU, memory, disk, network and GPU of the node that the driver is on."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, sampling_interval=5, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor
