"""A registered version as it is served: written out once, verified, loaded, asked its golden request."""

import errno
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from mlpipes.errors import ConfigError, CorruptionError, FormatError
from mlpipes.serving.signature import Signature
from mlpipes.store.files import MANIFEST, Published, digest_of, open_published, publishing
from mlpipes.store.layout import Store
from mlpipes.tracking.models import FINGERPRINT, SCALE, WEIGHTS
from mlpipes.tracking.runs import Tracker, public_uri
from mlpipes.workloads.golden import BF16_PROGRAM, GOLDEN, GoldenRequest, Values

_KIND, _VERSION = "served model", 1
_KEPT, _IDLE_SECONDS = 4, 24 * 3600.0
"""Versions of a model that are kept in the store, and how long one more is that nobody loads."""
_COMPUTING = threading.Lock()
"""One model computes at a time in a process: torch's choice of attention kernels belongs to all of its threads."""


class RefusedError(ConfigError):
    """A version that cannot be served, whenever it is tried."""


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
        with _COMPUTING:
            return self.run(values)


@dataclass(frozen=True)
class Registered:
    """A version as MLflow's registry has it."""

    name: str
    version: str
    source: str
    """What was logged: another one where a registry was made anew, whose versions have the same numbers."""
    tags: Mapping[str, str]

    def folder(self, store: Store) -> Path:
        """Where it is kept."""
        return store.root / "served" / self.name / f"{self.version}-{digest_of(self.source)[:12]}"


def fetched(tracker: Tracker, registered: Registered, store: Store) -> Path:
    """The folder of a registered version in the store, downloaded where it is not there yet.

    Raises ConfigError if MLflow does not give it.
    """
    place = registered.folder(store)
    if not place.is_dir():
        write_out(tracker, registered, place)
        _tidy(place.parent)
    return place


def write_out(tracker: Tracker, registered: Registered, place: Path) -> None:
    """Write what MLflow has of a registered version to a folder, which appears as a whole, with the digests of its files.

    Raises ConfigError if MLflow does not give it.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.exceptions import MlflowException

    what = f"{registered.name} version {registered.version}"
    uri = f"models:/{registered.name}/{registered.version}"
    mlflow.set_tracking_uri(tracker.uri)
    mlflow.set_registry_uri(tracker.uri)
    with (
        tempfile.TemporaryDirectory(prefix="mlpipes-model-") as scratch,
        publishing(place, kind=_KIND, version=_VERSION) as draft,
    ):
        files = Path(scratch) / "model"
        files.mkdir()  # readable for whom the user's umask says, such as a container's user; a temporary folder is not
        try:
            got = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(files)))
        except (MlflowException, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(f"{what} cannot be fetched from MLflow ({public_uri(tracker.uri)}): {error}") from error
        if not (got / "MLmodel").is_file():  # of a folder that is gone, MLflow gives an empty one
            raise ConfigError(f"the files of {what} are not in MLflow's artifacts; materialize `model` again")
        shutil.move(got, draft.path / "model")
        draft.meta |= {"name": registered.name, "version": registered.version, "tags": dict(registered.tags)}


class _Meta(BaseModel):
    """What a folder says of itself."""

    name: str = Field(pattern=r"^[\w.-]+$")
    version: str = Field(pattern=r"^[0-9]+$")
    tags: dict[str, str]


def opened(folder: Path, *, verify: bool = True) -> tuple[Published, Registered]:
    """A folder of `write_out`, each byte of which is as it was written, and the version that it has.

    `verify=False` looks at the manifest and at which files there are, and not into them.
    Raises FileNotFoundError, FormatError for one of another version of mlpipes, and CorruptionError for whatever else is not
    as it was written; also for a file too many, which the model might load.
    """
    try:
        published = open_published(folder, kind=_KIND, verify=verify)
        meta = _Meta.model_validate(published.meta)
        known = {folder / name for name in published.files} | {folder / MANIFEST}
    except (ValidationError, AttributeError, TypeError, KeyError) as error:
        # Its checksum is right, so nothing of ours has written it.
        raise CorruptionError(f"{folder / MANIFEST} says not what it should of a {_KIND}") from error
    if published.version != _VERSION:
        raise FormatError(f"{folder} was written by another version of mlpipes; write it again, by this one")
    for path in folder.rglob("*"):
        # Python's own, of a model's code that was loaded from here before.
        if path not in known and not path.is_dir() and path.parent.name != "__pycache__":
            raise CorruptionError(f"{path} does not belong to it: {MANIFEST} does not name it")
    return published, Registered(meta.name, meta.version, digest_of(published.files), meta.tags)


def _tidy(folder: Path) -> None:
    """Remove those of a model's versions that nobody has loaded for long: each has all of its weights."""
    loaded = {path: path.stat().st_mtime for path in folder.iterdir() if path.is_dir()}
    for path in sorted(loaded, key=loaded.__getitem__, reverse=True)[_KEPT:]:
        if time.time() - loaded[path] > _IDLE_SECONDS:
            gone = path.with_name(f".gone-{path.name}")  # whole, or not there
            with suppress(OSError):  # another process removes it, too
                path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def load(folder: Path) -> ServedModel:
    """The version in a folder of `write_out`, which has answered its golden request.

    Raises what `opened` raises, and RefusedError if its answer is wrong, or it cannot be served.
    """
    _, registered = opened(folder)
    with suppress(OSError):  # where nothing can be written, nothing is tidied
        os.utime(folder)  # see `_tidy`
    from mlflow.models import Model

    name, version, tags = registered.name, registered.version, registered.tags
    path, what = folder / "model", f"{name} version {version}"
    try:
        description = Model.load(str(path))
        signature = Signature.of(description.signature)
        golden = GoldenRequest.from_json((path / GOLDEN).read_bytes()) if (path / GOLDEN).is_file() else None
        precision = _precision(golden)
        # Code chooses its precision by itself, by the same rule.
        programs = {each.name: each for each in path.rglob("*.pt2")}
        of_bf16 = programs.pop(BF16_PROGRAM, None)
        program = of_bf16 if precision == "bf16" and of_bf16 else next(iter(programs.values()), None)
        about = description.metadata or {}
        run = _program(program, golden.rows if golden else 1, about) if program else _code(path)
        caveat, wrong = "it was registered before golden requests were; materialize `model` again", ""
        if golden is not None:
            with _COMPUTING:
                wrong = golden.difference(run(golden.given), precision)
            caveat = golden.caveat(precision)
    except Exception as error:  # of MLflow, of torch, of somebody's code
        raise RefusedError(f"{what} cannot be served: {type(error).__name__}: {error}") from error
    if wrong:
        raise RefusedError(f"{what} answers its golden request otherwise than where it was registered: {wrong}")
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
        about=about,
        run=run,
    )


def _precision(golden: GoldenRequest | None) -> str:
    """What is computed at here: where a CPU lacks bf16, fp32 is many times faster, and equal but for rounding."""
    import torch

    from mlpipes.workloads.tensors import has_native_bf16

    bf16 = golden is not None and golden.precision == "bf16" and has_native_bf16(torch.device("cpu"))
    return "bf16" if bf16 else "fp32"


def _program(path: Path, rows: int, about: Mapping[str, Any]) -> Callable[[Values], Values]:
    import torch

    from mlpipes.workloads.served import answers_in_batches
    from mlpipes.workloads.tiles import in_tiles

    module: Any = torch.export.load(path).module()
    torch.set_num_threads(1)
    if upscales := about.get("super_resolution"):
        program = partial(in_tiles, module, scale=upscales["scale"], reach=upscales["reach"])
    else:
        program = module

    def run(values: Values) -> Values:
        assert isinstance(values, np.ndarray)  # noqa: S101 - the signature has checked them
        return answers_in_batches(program, values, rows)

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
