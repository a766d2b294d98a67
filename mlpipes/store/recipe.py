"""The recipe: everything that a trained model depends on, and the fingerprint that names it."""

from typing import Any

from pydantic import ConfigDict

from mlpipes.scales import RayScaleConfig
from mlpipes.store.files import digest_of
from mlpipes.store.record import Record


class Recipe(Record):
    """The inputs of a training's fingerprint. Two trainings with equal recipes end in the same model, bit for bit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workload: str
    implementation: str
    """`module:attribute` of the workload instance."""
    snapshot: str
    """Digest of the snapshot."""
    scale: RayScaleConfig
    hyperparameters: dict[str, Any]
    """All of them, defaults included, so that a changed default is a different training."""
    seed: int
    code: str
    """Digest of the code that the numbers depend on; see `code_version`."""
    generation: str = ""
    """Empty, or the name of a deliberate fresh start."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all fields: the name of the training's folder, Ray job and MLflow run."""
        return digest_of(self.model_dump(mode="json"))
