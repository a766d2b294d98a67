"""Ray scales: how many workers, which global batch, how long, on what; and their partition keys.

A partition key such as `w2-b256-e3-g0` (2 workers, global batch 256, 3 epochs, 0 GPUs per worker) is readable and
canonical: every scale has exactly one key. CPUs per worker are part of the key only where they are not 1 (`-c0.5`).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mlpipes.errors import ScaleError
from mlpipes.settings import load_mapping, problems, shown

SCALES_VARIABLE = "MLPIPES_SCALES"
_NUMBER, _COUNT = r"(?:0|[1-9]\d{0,8})(?:\.\d{1,4})?", r"([1-9]\d{0,8})"
_KEY = re.compile(rf"w{_COUNT}-b{_COUNT}-e{_COUNT}-g({_NUMBER})(?:-c({_NUMBER}))?", re.ASCII)


def _short(number: float) -> str:
    return f"{number:.4f}".rstrip("0").rstrip(".")


class RayScaleConfig(BaseModel):
    """One point on the scale axis; immutable and validated, so that whoever holds one can rely on it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    workers: int = Field(ge=1, le=10_000, description="Ray Train workers, one process each")
    batch_size: int = Field(ge=1, description="global batch size: samples per optimizer step over all workers")
    epochs: int = Field(ge=1, description="passes over the training split")
    gpus_per_worker: float = Field(
        default=0, ge=0, le=1024, description="GPUs of each worker; below 1, workers share a GPU"
    )
    cpus_per_worker: float = Field(default=1, gt=0, le=1024, description="CPUs of each worker; its threads, at least 1")

    @field_validator("gpus_per_worker", "cpus_per_worker")
    @classmethod
    def _four_decimals(cls, value: float) -> float:
        if round(value, 4) != value:
            raise ValueError("Ray resolves fractions of a device to 0.0001, no finer")
        return value

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("above 1, GPUs per worker must be a whole number")
        return value

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.batch_size % self.workers:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by workers {self.workers}")
        return self

    @property
    def key(self) -> str:
        """The canonical partition key."""
        cpus = "" if self.cpus_per_worker == 1 else f"-c{_short(self.cpus_per_worker)}"
        return f"w{self.workers}-b{self.batch_size}-e{self.epochs}-g{_short(self.gpus_per_worker)}{cpus}"

    @property
    def threads(self) -> int:
        """Compute threads of each worker: whole CPUs, at least one. Bits depend on it, so it follows from the scale."""
        return max(1, int(self.cpus_per_worker))

    @property
    def trains_in_driver(self) -> bool:
        """Whether the job's own process is the worker: a single one starts sooner without a process of its own."""
        return self.workers == 1

    @classmethod
    def from_key(cls, key: str) -> "RayScaleConfig":
        """The scale that a key names. Raises ScaleError if the key is malformed, invalid or not canonical."""
        match = _KEY.fullmatch(key)
        if match is None:
            raise ScaleError(
                f"{shown(key)} is not a scale key. Write w<workers>-b<global batch>-e<epochs>-g<GPUs per worker>, "
                "for example w2-b256-e3-g0: small letters, numbers from 1 (GPUs from 0) without zeros in front; append "
                "-c<CPUs per worker> where that is not 1."
            )
        workers, batch_size, epochs, gpus, cpus = match.groups()
        scale = _validated(
            {
                "workers": int(workers),
                "batch_size": int(batch_size),
                "epochs": int(epochs),
                "gpus_per_worker": float(gpus),
                "cpus_per_worker": float(cpus) if cpus else 1.0,
            },
            where=f"scale key {key!r}",
        )
        if scale.key != key:
            raise ScaleError(f"{key!r} is not canonical; write {scale.key!r}")
        return scale


def _validated(fields: Mapping[str, Any], where: str) -> RayScaleConfig:
    try:
        return RayScaleConfig.model_validate(dict(fields))
    except ValidationError as error:
        raise ScaleError(f"{where}: {problems(error, whole='scale')}") from error


def workers_of(workers: int, gpus_per_worker: float, where: str) -> RayScaleConfig:
    """So many workers that train nothing, as a scale. Raises ScaleError."""
    fields = {"workers": workers, "batch_size": workers, "epochs": 1, "gpus_per_worker": gpus_per_worker}
    return _validated(fields, where)


def scales_of(entries: Iterable[str | Mapping[str, Any]], where: str) -> tuple[RayScaleConfig, ...]:
    """Scales from keys or mappings of fields, in order. Raises ScaleError naming the entry for invalid or double ones."""
    scales: dict[str, RayScaleConfig] = {}
    for number, entry in enumerate(entries, start=1):
        place = f"{where}, entry {number}"
        if isinstance(entry, str):
            try:
                scale = RayScaleConfig.from_key(entry)
            except ScaleError as error:
                raise ScaleError(f"{place}: {error}") from error
        elif isinstance(entry, Mapping):
            scale = _validated(entry, place)
        else:
            raise ScaleError(
                f"{place}: expected a key such as w2-b256-e3-g0 or a mapping of fields, got {shown(entry)}"
            )
        if scale.key in scales:
            raise ScaleError(f"{place}: {scale.key} is declared twice")
        scales[scale.key] = scale
    if not scales:
        raise ScaleError(f"{where}: no scale is declared; at least one is needed")
    return tuple(scales.values())


def load_scale_file(path: Path, workloads: Iterable[str]) -> dict[str, tuple[RayScaleConfig, ...]]:
    """Scales by workload from a YAML file; workloads that it does not name keep their declared scales.

    Raises ScaleError naming the file, the entry and the rule: unreadable, unknown workload, duplicate, invalid value.
    """
    content = load_mapping(path, "scale file", SCALES_VARIABLE, ScaleError)
    known = set(workloads)
    scales = {}
    for workload, entries in content.items():
        if workload not in known:
            raise ScaleError(
                f"scale file {path}: unknown workload {shown(workload)}; known are {', '.join(sorted(known))}"
            )
        if not isinstance(entries, list):
            raise ScaleError(f"scale file {path}, workload {workload}: expected a list of scales, got {shown(entries)}")
        scales[workload] = scales_of(entries, f"scale file {path}, workload {workload}")
    return scales
