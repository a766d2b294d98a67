"""Code versions: digests of the code that a training's numbers, or a snapshot's bytes, depend on."""

from collections.abc import Iterable

from mlpipes.errors import ConfigError
from mlpipes.training.reached_code import reached_code
from mlpipes.workloads.packages import Offer

ENGINE_MODULES = (
    "mlpipes.data.ragged",
    "mlpipes.reporting.metric",  # which checkpoint is the best
    "mlpipes.training.determinism",
    "mlpipes.training.embedding",
    "mlpipes.training.prediction",
    "mlpipes.training.gradient",
    "mlpipes.training.loop",
    "mlpipes.training.parallel",
    "mlpipes.training.reduction",
    "mlpipes.training.running_statistics",
    "mlpipes.workloads.tensors",
)
"""Engine code that numbers depend on. The rest (checkpoints, messages, tracking) may change without retraining."""
PREPARING_MODULES = ("mlpipes.data.dataset", "mlpipes.data.ragged", "mlpipes.data.snapshot", "mlpipes.data.splits")
"""What makes a snapshot of any workload's data."""
EXPORTING_MODULES = tuple(
    f"mlpipes.workloads.{name}"
    for name in ("deployables", "served", "served_text_model", "temperature", "text_serving")
)
"""What makes what is served of a trained model."""
_PACKAGES = frozenset({"mlpipes", "mlpipes.data", "mlpipes.reporting", "mlpipes.training", "mlpipes.workloads"})
_NOT_RUN = frozenset(f"mlpipes.workloads.{name}" for name in ("catalog", "entry", "golden", "packages")) | frozenset(
    EXPORTING_MODULES
)
"""What lists workloads, and what calibrates and serves models: none of it trains."""
_NO_NUMBERS = frozenset({"dagster", "matplotlib", "mlflow", "pydantic", "ray", "rich", "tqdm", "typer"})
"""Libraries that workloads import and whose release changes neither data nor weights."""


def code_version(implementation: str) -> str:
    """Digest (16 hex digits) of the code that training `module:attribute` runs, without importing any of it.

    Covers the workload's module and what it imports: the user's own modules and those of `mlpipes.workloads` by their
    code, libraries by their version; and the engine's numeric modules. torch's version is one of them: another release
    gives other bits, and equal fingerprints stand for equal bits. What reads and prepares data does not count, for the
    snapshot's digest speaks for it; nor do reports. Comments, docstrings and formatting do not count, so tidying up never
    makes a finished model stale.

    Raises ConfigError if there is no such module, or a file is no Python.
    """
    return _version(implementation, ENGINE_MODULES, "mlpipes.workloads.")


def preparation_version(implementation: str) -> str:
    """Digest (16 hex digits) of the code that makes the snapshot of `module:attribute`: source, split, preparation.

    As `code_version`, with `mlpipes.data` in the engine's place. Bytes that come out equal make the same snapshot again.
    """
    return _version(implementation, PREPARING_MODULES, "mlpipes.workloads.", "mlpipes.data.")


def export_version(implementation: str) -> str:
    """Digest (16 hex digits) of the code that makes of a model of `module:attribute` what is served of it.

    As `code_version`, with calibration and deployables in the engine's place: other code exports the same weights anew.
    """
    return _version(implementation, EXPORTING_MODULES, "mlpipes.workloads.")


def unreadable(offers: Iterable[Offer]) -> dict[str, str]:
    """What is wrong with workloads of other packages whose code cannot be read, by workload: without versions, no assets."""
    found = {}
    for offer in offers:
        if offer.entry is not None:
            try:
                code_version(offer.entry.implementation)
                preparation_version(offer.entry.implementation)
            except ConfigError as error:
                found[offer.name] = (
                    f"workload {offer.name!r} of {offer.packages} has no assets until this is mended: {error}"
                )
    return found


def _version(implementation: str, engine: tuple[str, ...], *followed: str) -> str:
    def counts(name: str) -> bool:
        if name.partition(".")[0] != "mlpipes":
            return name not in _NO_NUMBERS
        return name in engine or name in _PACKAGES or (name.startswith(followed) and name not in _NOT_RUN)

    return reached_code([implementation.partition(":")[0], *engine], counts).digest[:16]
