"""Where everything lies: the layout of the store and of the local home folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mlpipes.store.environment import path_in
from mlpipes.store.references import Reference

HOME_VARIABLE = "MLPIPES_HOME"
R = TypeVar("R", bound=Reference)


def home() -> Path:
    """The folder that holds all state of this installation: `$MLPIPES_HOME`, else `.mlpipes` in the checkout.

    An installed package without a checkout uses `.mlpipes` in the current folder, as `dagster dev` does for its files.
    Raises ConfigError for a variable that holds no folder.
    """
    if configured := path_in(HOME_VARIABLE):
        return configured
    checkout = Path(__file__).resolve().parents[2]
    base = checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()
    return base / ".mlpipes"


@dataclass(frozen=True)
class JobFolder:
    """The folder of what jobs make, one attempt after the other, named by its fingerprint."""

    path: Path

    @property
    def fingerprint(self) -> str:
        """The identity (SHA-256, hex) of what is made."""
        return self.path.name

    @property
    def result(self) -> Path:
        """What became of it; there only when it is finished."""
        return self.path / "result.json"

    def messages(self, attempt: int) -> Path:
        """The append-only progress file of one attempt: for display, never the truth."""
        return self.path / "messages" / f"a{attempt}.jsonl"

    def specification(self, attempt: int) -> Path:
        """What one attempt's driver is told."""
        return self.path / "jobs" / f"a{attempt}.json"

    def heartbeat(self, attempt: int) -> Path:
        """A file that one attempt's driver touches while it lives."""
        return self.path / "jobs" / f"a{attempt}.heartbeat"

    def claim(self, attempt: int) -> Path:
        """Which job an attempt is of, where the job's entry point is run again by others."""
        return self.path / "jobs" / f"a{attempt}.claim"

    def log(self, attempt: int) -> Path:
        """What one attempt's driver printed, where nobody else keeps it."""
        return self.path / "jobs" / f"a{attempt}.log"


@dataclass(frozen=True)
class TrainingFolder(JobFolder):
    """Everything about one training, named by its fingerprint."""

    @property
    def recipe(self) -> Path:
        """What was asked for: the inputs of the fingerprint."""
        return self.path / "recipe.json"

    @property
    def checkpoints(self) -> Path:
        """One published directory per kept checkpoint."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The exported best model."""
        return self.path / "model"

    @property
    def calibration(self) -> Path:
        """How the exported model's outputs are corrected; not there for a model of before that was done."""
        return self.path / "calibration.json"

    def handover(self, attempt: int) -> Path:
        """What one attempt's driver is told that nobody else may read; of mode 600, and gone when the training is done."""
        return self.path / "jobs" / f"a{attempt}.handover"

    def stop_request(self, attempt: int) -> Path:
        """A file whose presence asks one attempt for a last checkpoint, because it is about to be stopped."""
        return self.path / "jobs" / f"a{attempt}.stop"

    def evaluation(self, name: str) -> Path:
        """The report of one evaluation."""
        return self.path / "evaluations" / name


@dataclass(frozen=True)
class Store:
    """The folder of results; on a cluster it lies on storage that all nodes share."""

    root: Path

    @property
    def snapshots(self) -> Path:
        """Content-addressed snapshots, shared by all scales that need the same data."""
        return self.root / "snapshots"

    def training(self, fingerprint: str) -> TrainingFolder:
        """The folder of one training."""
        return TrainingFolder(self.root / "trainings" / fingerprint)

    def dry_run(self, digest: str) -> Path:
        """What says that a dry run was passed; `digest` is of all that it depends on, which scales of a workload share."""
        return self.root / "dry_runs" / f"{digest}.json"

    def report(self, workload: str) -> Path:
        """The folder of a workload's scaling report."""
        return self.root / "reports" / workload

    def _reference(self, kind: type[Reference], workload: str, scale: str) -> Path:
        return self.root / "assets" / workload / kind.asset / f"{scale}.json"

    def write_reference(self, reference: Reference, workload: str, scale: str) -> None:
        """Record what the partition of its asset now points to."""
        reference.write_to(self._reference(type(reference), workload, scale))

    def read_reference(self, kind: type[R], workload: str, scale: str) -> R | None:
        """What the partition of an asset points to, or None if it was never materialized.

        Raises CorruptionError, or FormatError if another version of mlpipes has written it.
        """
        try:
            return kind.read(self._reference(kind, workload, scale))
        except FileNotFoundError:
            return None


def default_store() -> Store:
    """The store of this installation."""
    return Store(home() / "store")
