"""A registered version as it is served: fetched once into the store, verified, loaded, asked its golden request."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlpipes.errors import ConfigError
from mlpipes.serving.signature import Signature
from mlpipes.store.files import digest_of, open_published, publishing
from mlpipes.store.layout import Store
from mlpipes.tracking.models import FINGERPRINT, SCALE, WEIGHTS
from mlpipes.tracking.runs import Tracker
from mlpipes.workloads.golden import BF16_PROGRAM, GOLDEN, GoldenRequest, Values

_KIND, _VERSION = "served model", 1


@dataclass(frozen=True)
class ServedModel:
    """One version, ready to answer. A call takes samples that the signature has checked."""

    name: str
    version: str
    scale: str
    weights: str
    """Digest of what training has learnt."""
    fingerprint: str
    """Of its training."""
    signature: Signature
    exact: bool
    """Whether its answers have the bits of the model that was evaluated, as far as can be known here."""
    caveat: str
    """Why not; empty where they have."""
    shares: bool
    """Whether samples of several requests may go through it together: no answer depends on the others."""
    about: Mapping[str, Any]
    """What its workload says of it, such as `class_names`."""
    run: Callable[[Values], Values]

    def __call__(self, values: Values) -> Values:
        """The answers to checked samples."""
        return self.run(values)


def fetched(tracker: Tracker, name: str, version: str, store: Store) -> Path:
    """The folder of a registered version in the store, downloaded where it is not there yet.

    Raises ConfigError if MLflow does not know it, or does not give it.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        tags = dict(tracker.client.get_model_version(name, version).tags)
        place = folder_of(store, name, version, tags)
        if not place.is_dir():
            mlflow.set_tracking_uri(tracker.uri)
            mlflow.set_registry_uri(tracker.uri)
            with (
                tempfile.TemporaryDirectory(prefix="mlpipes-model-") as scratch,
                publishing(place, kind=_KIND, version=_VERSION) as draft,
            ):
                got = Path(
                    mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{name}/{version}", dst_path=scratch)
                )
                shutil.move(got, draft.path / "model")
                draft.meta |= {"name": name, "version": version, "tags": tags}
    except (MlflowException, OSError) as error:
        raise ConfigError(f"{name} version {version} cannot be fetched from MLflow ({tracker.uri}): {error}") from error
    return place


def folder_of(store: Store, name: str, version: str, tags: Mapping[str, str]) -> Path:
    """Where a version is kept: numbers begin anew in another registry, digests do not."""
    return store.root / "served" / name / f"{version}-{digest_of(dict(tags))[:12]}"


def load(folder: Path) -> ServedModel:
    """The version in a folder of `fetched`, which has answered its golden request.

    Raises CorruptionError if a byte has changed, and ConfigError if its answer is wrong, or it cannot be served.
    """
    published = open_published(folder, kind=_KIND)
    from mlflow.models import Model

    name, version, tags = (published.meta[key] for key in ("name", "version", "tags"))
    path, what = folder / "model", f"{name} version {version}"
    try:
        description = Model.load(str(path))
        signature = Signature.of(description.signature)
    except Exception as error:  # of MLflow, of a file that it cannot read
        raise ConfigError(f"{what} cannot be served: {error}") from error
    golden = GoldenRequest.from_json((path / GOLDEN).read_bytes()) if (path / GOLDEN).is_file() else None
    precision = _precision(golden)
    # Code chooses its precision by itself, by the same rule.
    programs = {each.name: each for each in path.rglob("*.pt2")}
    of_bf16 = programs.pop(BF16_PROGRAM, None)
    program = of_bf16 if precision == "bf16" and of_bf16 else next(iter(programs.values()), None)
    run = _program(program, golden.rows if golden else 1) if program else _code(path)
    caveat = "it was registered before golden requests were; materialize `model` again"
    if golden is not None:
        if wrong := golden.difference(run(golden.given), precision):
            raise ConfigError(f"{what} answers its golden request otherwise than where it was registered: {wrong}")
        caveat = golden.caveat(precision)
    return ServedModel(
        name=name,
        version=version,
        scale=tags.get(SCALE, ""),
        weights=tags.get(WEIGHTS, ""),
        fingerprint=tags.get(FINGERPRINT, ""),
        signature=signature,
        exact=not caveat,
        caveat=caveat,
        shares=golden is not None and (program is not None or golden.rows > 1),
        about=description.metadata or {},
        run=run,
    )


def _precision(golden: GoldenRequest | None) -> str:
    """What is computed at here: where a CPU lacks bf16, fp32 is many times faster, and equal but for rounding."""
    import torch

    from mlpipes.workloads.tensors import has_native_bf16

    bf16 = golden is not None and golden.precision == "bf16" and has_native_bf16(torch.device("cpu"))
    return "bf16" if bf16 else "fp32"


def _program(path: Path, rows: int) -> Callable[[Values], Values]:
    import torch

    from mlpipes.workloads.served import answers_in_batches

    module: Any = torch.export.load(path).module()
    torch.set_num_threads(1)

    def run(values: Values) -> Values:
        assert isinstance(values, np.ndarray)  # noqa: S101 - the signature has checked them
        return answers_in_batches(module, values, rows)

    return run


def _code(path: Path) -> Callable[[Values], Values]:
    import mlflow
    import pandas as pd

    model = mlflow.pyfunc.load_model(str(path))

    def run(values: Values) -> Values:
        given: Any = values if isinstance(values, np.ndarray) else pd.DataFrame(dict(values))
        answer: Any = model.predict(given)
        if isinstance(answer, pd.DataFrame):
            return {str(name): answer[name].to_numpy() for name in answer}
        return np.asarray(answer)

    return run
