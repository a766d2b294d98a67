"""The models that upscale frames: bicubic, one of MLflow's registry (its bytes kept in the store), or Python code.

An upscaler takes uint8 RGB frames [N, H, W, 3], or [N, T, H, W, 3] if it looks at T neighbouring frames and upscales the
middle one, and answers with uint8 RGB frames [N, scale·H, scale·W, 3].
"""

import importlib
import inspect
import os
import re
import tempfile
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from mlpipes.errors import ConfigError
from mlpipes.store.files import digest_of, open_published, publishing, sha256_file
from mlpipes.store.layout import Store
from mlpipes.video.job import SCALES, ModelPin
from mlpipes.workloads.golden import BF16_PROGRAM

BICUBIC = "bicubic"
PRECISIONS = ("fp32", "bf16")
FACTS = "super_resolution"
"""In the metadata of a registered model: its scale, its frames and its reach."""
_KIND, _VERSION, _FILE = "upscaler", 1, "model.pt2"


class Upscaler(Protocol):
    """What upscales frames; `scale`, and where they are there `frames` and `reach`, as in `ModelPin`."""

    scale: int

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """The frames, upscaled."""
        ...


class Bicubic:
    """Cubic convolution (Keys, a = -0.5), as Pillow computes it: the baseline that needs no training and no torch."""

    def __init__(self, scale: int) -> None:
        self.scale = scale

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """The frames, upscaled."""
        from PIL import Image

        size = (frames.shape[2] * self.scale, frames.shape[1] * self.scale)
        return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in frames])


def pin(
    spec: str,
    scale: int | None,
    store: Store,
    precision: str = "fp32",
    tracker: Any = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> ModelPin:
    """A model as it is now: `bicubic`, `models:/name@alias`, `models:/name/version`, or `module:attribute`.

    One of the registry is copied into the store, under its digest: workers need neither MLflow nor its credentials, and
    another champion does not change a video that was begun. `tracker`: MLflow; default as configured. Raises ConfigError
    for a model that is not there, is none for frames, or has another scale than the one that is asked for.
    """
    if scale is not None and scale not in SCALES:
        raise ConfigError(f"a scale of {scale} is none of {', '.join(map(str, SCALES))}")
    if precision not in PRECISIONS:
        raise ConfigError(f"a precision of {precision!r} is none of {', '.join(PRECISIONS)}")
    if spec == BICUBIC:
        if device != "cpu":
            raise ConfigError(f"{BICUBIC} is computed by CPUs: leave the GPUs out, or name a network with --model")
        return ModelPin(name=BICUBIC, kind="built-in", digest="bicubic-1", scale=scale or 2)
    found = _registered(spec, store, tracker, precision) if spec.startswith("models:/") else _of_python(spec)
    if scale is not None and scale != found.scale:
        raise ConfigError(f"{found.name} upscales ×{found.scale}, and ×{scale} was asked for")
    return found.model_copy(update={"device": device})


def load(pinned: ModelPin, store: Store) -> Upscaler:
    """The upscaler itself. Raises CorruptionError if its bytes are not those that were pinned."""
    if pinned.kind == "built-in":
        return Bicubic(pinned.scale)
    if pinned.kind == "python":
        if _of_python(pinned.name).digest != pinned.digest:
            raise ConfigError(f"{pinned.name} has changed since the video was begun; start it again")
        return _attribute(pinned.name)
    from mlpipes.video.program import Program

    published = open_published(_place(store, pinned.digest), kind=_KIND)
    return Program(published.path / _FILE, pinned)


def _place(store: Store, digest: str) -> Path:
    return store.root / "upscalers" / digest


# -- of Python ---------------------------------------------------------------------------------------------------------
def _attribute(spec: str) -> Any:
    module, _, name = spec.partition(":")
    if not re.fullmatch(r"[\w.]+", module) or not name.isidentifier():
        raise ConfigError(f"{spec!r} is no model: write {BICUBIC}, models:/name@champion, or package.module:attribute")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the model {spec!r} cannot be imported: {error}") from error


def _of_python(spec: str) -> ModelPin:
    found: Any = _attribute(spec)
    module, scale = importlib.import_module(spec.partition(":")[0]), getattr(found, "scale", None)
    if not callable(found) or scale not in SCALES:
        raise ConfigError(f"{spec} is no upscaler: it must be callable, and have a `scale` of 2, 3 or 4")
    digest = digest_of(inspect.getsource(module))
    frames, reach = getattr(found, "frames", 1), getattr(found, "reach", 0)
    return ModelPin(name=spec, kind="python", digest=digest, scale=scale, frames=frames, reach=reach)


# -- of MLflow's registry ------------------------------------------------------------------------------------------------
def _registered(spec: str, store: Store, tracker: Any, precision: str) -> ModelPin:
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.exceptions import MlflowException

    from mlpipes.tracking.runs import Tracker, answering_uri

    tracker = tracker or Tracker(answering_uri())
    name, version = _version(spec, tracker)
    pinned = f"models:/{name}/{version}"
    try:
        mlflow.set_tracking_uri(tracker.uri)
        mlflow.set_registry_uri(tracker.uri)
        info = mlflow.models.get_model_info(pinned)
        facts = (info.metadata or {}).get(FACTS)
        if not facts:
            raise ConfigError(f"{pinned} is no model that upscales frames: its metadata say nothing of {FACTS}")
        with tempfile.TemporaryDirectory(prefix="mlpipes-model-") as scratch:
            local = Path(mlflow.artifacts.download_artifacts(artifact_uri=pinned, dst_path=scratch))
            programs = sorted(path for path in local.rglob("*.pt2") if path.name != BF16_PROGRAM)
            if len(programs) != 1:
                raise ConfigError(f"{pinned} holds {len(programs)} torch programs, expected one")
            digest = sha256_file(programs[0])
            if not _place(store, digest).is_dir():
                with publishing(_place(store, digest), kind=_KIND, version=_VERSION) as draft:
                    (draft.path / _FILE).write_bytes(programs[0].read_bytes())
                    draft.meta |= {"model": pinned, **facts}
    except MlflowException as error:
        raise ConfigError(f"{pinned} cannot be loaded from MLflow: {error}") from error
    return ModelPin(
        name=pinned,
        kind="program",
        digest=digest,
        scale=int(facts["scale"]),
        frames=int(facts.get("frames", 1)),
        reach=int(facts.get("reach", 0)),
        precision=precision,
    )


def _version(spec: str, tracker: Any) -> tuple[str, str]:
    """Name and version of a model of the registry."""
    from mlflow.exceptions import MlflowException

    rest = spec.removeprefix("models:/").strip("/")
    name, at, alias = rest.partition("@")
    try:
        if at:
            return name, str(tracker.client.get_model_version_by_alias(name, alias).version)
        name, _, version = rest.partition("/")
        if not version.isdigit():
            raise ConfigError(f"{spec}: write models:/name@champion or models:/name/3")
        return name, str(tracker.client.get_model_version(name, version).version)
    except MlflowException as error:
        raise ConfigError(
            f"{spec} is not registered in MLflow ({tracker.uri}): {error}. Train one first (`mlpipes demo --workload "
            "video_sr`), or use --model bicubic"
        ) from error
