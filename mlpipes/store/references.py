"""References: what each asset of a scale's chain hands on, and the store keeps; what they name is verified when opened."""

from typing import ClassVar

from mlpipes.store.estimate import Estimate
from mlpipes.store.record import Record


class Reference(Record):
    """What a partition of an asset points to."""

    asset: ClassVar[str]
    """The name of the asset whose partitions point so."""


class DatasetReference(Reference):
    """A source as it was loaded and verified."""

    asset = "dataset"
    digest: str
    provenance: dict[str, str]
    counts: dict[str, int]


class SnapshotReference(Reference):
    """A snapshot in the store."""

    asset = "snapshot"
    digest: str


class TrainingReference(Reference):
    """A finished training in the store, and its run in MLflow."""

    asset = "checkpoints"
    fingerprint: str
    mlflow_run_id: str
    snapshot: str
    """Digest."""


class ModelReference(TrainingReference):
    """The model of a training, and the version that it has in MLflow's registry."""

    asset = "model"
    registered_model: str
    version: str


class EvaluationReference(ModelReference):
    """The latest evaluation of a model."""

    asset = "eval_report"
    evaluation: str
    """Its name in the training's folder."""
    estimates: dict[str, Estimate]


class ChampionReference(EvaluationReference):
    """The evaluation by which it was decided who is champion, and who is."""

    asset = "champion"
    champion: str
    """A version in MLflow's registry."""


REFERENCES: dict[str, type[Reference]] = {
    kind.asset: kind
    for kind in (
        DatasetReference,
        SnapshotReference,
        TrainingReference,
        ModelReference,
        EvaluationReference,
        ChampionReference,
    )
}
"""By asset, in the order of the chain."""
CHAIN = tuple(REFERENCES)
"""The assets of a workload's scale, in order."""
