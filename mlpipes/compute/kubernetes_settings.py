"""Settings of Kubernetes: what a cluster wants to know of a training's pods, read from a YAML file and validated."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from mlpipes.errors import ConfigError, ScaleError
from mlpipes.scales import RayScaleConfig
from mlpipes.settings import load_mapping, problems

SETTINGS_VARIABLE = "MLPIPES_KUBERNETES"
TEMPORARY, SHARED_MEMORY, STORE = "tmp", "shared-memory", "store"
"""Volumes that every pod has; a site's own have other names."""


def _of(pattern: str, rule: str) -> Callable[[str], str]:
    """A validator: a text of that form, or else ValueError with the rule."""
    form = re.compile(pattern, re.ASCII)

    def check(value: str) -> str:
        if not form.fullmatch(value):
            raise ValueError(rule)
        return value

    return check


def _path(value: str) -> str:
    path = PurePosixPath(value)
    if not path.is_absolute() or ".." in path.parts or ":" in value or str(path) == "/":
        raise ValueError("write an absolute path below /, without `..` and colons")
    return str(path)


_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_QUALIFIED = r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
Namespace = Annotated[
    str, AfterValidator(_of(_LABEL, "write lower-case letters, digits and dashes, 63 characters at most"))
]
Name = Annotated[
    str,
    AfterValidator(
        _of(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*", "write a name of lower-case letters, digits, dashes and dots")
    ),
]
Key = Annotated[str, AfterValidator(_of(_QUALIFIED, "write a key such as pool or example.com/pool"))]
LabelValue = Annotated[
    str,
    AfterValidator(
        _of(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?", "write letters, digits, dashes, dots; 63 at most")
    ),
]
Quantity = Annotated[
    str,
    AfterValidator(
        _of(r"(?=.*[1-9])\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?", "write a quantity as Kubernetes does: 500m, 2, 4Gi")
    ),
]
VariableName = Annotated[str, AfterValidator(_of(r"[A-Za-z_][A-Za-z0-9_]*", "write a name such as NCCL_SOCKET_IFNAME"))]
MountPath = Annotated[str, AfterValidator(_path)]
Image = Annotated[
    str,
    AfterValidator(
        _of(
            r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?(:\d+)?(/[a-z0-9]([a-z0-9._-]*[a-z0-9])?)*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?",
            "write an image such as registry.example.com/team/mlpipes:1.0",
        )
    ),
]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoreClaim(_Strict):
    """The volume that the home folder lies on, here and in every pod under the same path."""

    claim: Name
    mount_path: MountPath
    sub_path: str | None = None


class SecretKey(_Strict):
    """A value that lies in a Secret."""

    secret: Name
    key: Annotated[str, AfterValidator(_of(r"[A-Za-z0-9._-]{1,253}", "write a key of a Secret"))]


class Toleration(_Strict):
    """A taint that pods may be placed in spite of; as Kubernetes writes it."""

    key: Key | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("with `operator: Exists` there is no value")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("name the key, or write `operator: Exists` for every taint")
        return self


class SpotPool(_Strict):
    """Nodes that may be taken away: workers go there, heads do not."""

    node_selector: dict[Key, LabelValue] = Field(default_factory=dict)
    tolerations: list[Toleration] = Field(default_factory=list)


class KubernetesSettings(_Strict):
    """What a cluster wants to know of a training's pods; all of it but namespace and context can differ by scale."""

    image: Image
    store: StoreClaim
    namespace: Namespace = "default"
    context: str | None = Field(default=None, description="of the kubeconfig; default: its current one")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    image_pull_secrets: list[Name] = Field(default_factory=list)
    python: str = Field(default="python", min_length=1, description="starts Python in the image")
    ray_version: str | None = Field(default=None, description="of the image; default: this machine's")
    ray_token: bool = Field(default=True, description="whether Ray asks for a token, which the operator makes")
    owner: Name | None = Field(default=None, description="ConfigMap with which trainings are deleted")
    service_account: Name | None = None
    run_as_user: int | None = Field(default=None, ge=1, description="default: the image's user, which must not be root")
    fs_group: int | None = Field(default=None, ge=1)
    queue: Name | None = Field(default=None, description="LocalQueue of Kueue")
    queue_priority: Name | None = Field(default=None, description="WorkloadPriorityClass of Kueue")
    priority_class: Name | None = Field(default=None, description="PriorityClass of the pods")
    volumes: list[dict[str, Any]] = Field(default_factory=list, description="more volumes, as Kubernetes writes them")
    mounts: list[dict[str, Any]] = Field(default_factory=list, description="where those volumes are mounted")
    environment: dict[VariableName, str | SecretKey] = Field(default_factory=dict)
    environment_from: list[Name] = Field(default_factory=list, description="Secrets all of whose keys are variables")
    node_selector: dict[Key, LabelValue] = Field(default_factory=dict)
    tolerations: list[Toleration] = Field(default_factory=list)
    spot: SpotPool | None = None
    gpu_resource: Key = "nvidia.com/gpu"
    workers_per_pod: int | None = Field(default=None, ge=1, description="default: what makes CPUs and GPUs whole")
    placement: Literal["spread", "pack", "any"] = Field(default="any", description="worker pods over nodes")
    cpu_per_worker: Quantity | None = Field(default=None, description="requested; default: the scale's")
    memory_per_worker: Quantity = "4Gi"
    head_cpu: Quantity = "1"
    head_memory: Quantity = "4Gi"
    shared_memory: Quantity = Field(default="1Gi", description="size of /dev/shm, part of a pod's memory")
    save_seconds: int = Field(default=40, ge=5, le=3600, description="what a last checkpoint may take")
    node_lost_seconds: int = Field(default=20, ge=0, le=3600, description="after which pods of a silent node go")
    poll_seconds: float = Field(
        default=5.0, gt=0, le=600, description="how often the API server is asked where something is waited for"
    )
    resubmit_deleted: bool = Field(default=False, description="submit again what somebody has deleted")
    head_pod: dict[str, Any] = Field(default_factory=dict, description="merged into the head's pod template")
    worker_pod: dict[str, Any] = Field(default_factory=dict, description="merged into the workers' pod template")
    autoscaled: bool = Field(
        default=False, description="nodes are made for pods that wait: none is refused for its size"
    )
    scales: dict[str, dict[str, Any]] = Field(default_factory=dict, description="settings that differ, by scale key")

    @model_validator(mode="after")
    def _volumes_are_mounted(self) -> Self:
        names = [volume.get("name") for volume in self.volumes]
        for name in names:
            _of(_LABEL, f"volumes: each needs a `name` of lower-case letters, digits and dashes, not {name!r}")(
                str(name)
            )
        if double := [name for name in names if names.count(name) > 1 or name in (TEMPORARY, SHARED_MEMORY, STORE)]:
            raise ValueError(f"volumes: {double[0]!r} is there already; choose another name")
        for mount in self.mounts:
            if mount.get("name") not in names:
                raise ValueError(f"mounts: there is no volume {mount.get('name')!r}; volumes has {names or 'none'}")
            _path(str(mount.get("mountPath", "")))
        paths = [str(mount["mountPath"]) for mount in self.mounts] + [self.store.mount_path, "/tmp", "/dev/shm"]  # noqa: S108
        if double := [path for path in paths if paths.count(path) > 1]:
            raise ValueError(f"mounts: {double[0]} is mounted twice")
        if self.queue_priority and not self.queue:
            raise ValueError("queue_priority is one of a queue; name the `queue`")
        return self

    def of_scale(self, key: str) -> "KubernetesSettings":
        """The settings of one scale. Raises ConfigError naming the setting that is unknown or unusable."""
        changes = self.scales.get(key, {})
        for common in ("scales", "namespace", "context"):  # what is tidied up lies in one place
            if common in changes:
                raise ConfigError(
                    f"Kubernetes settings, scale {key}: `{common}` inside a scale is none of its settings"
                )
        return _validated({**self.model_dump(), **changes}, f"scale {key}")

    @classmethod
    def load(cls, path: Path) -> "KubernetesSettings":
        """Settings from a YAML file. Raises ConfigError or ScaleError saying what is wrong with it."""
        settings = _validated(load_mapping(path, "Kubernetes settings", SETTINGS_VARIABLE), str(path))
        for key in settings.scales:
            try:
                RayScaleConfig.from_key(key)
            except ScaleError as error:
                raise ScaleError(f"Kubernetes settings, {path}, scales: {error}") from error
            try:
                settings.of_scale(key)
            except ConfigError as error:
                raise ConfigError(
                    str(error).replace("Kubernetes settings", f"Kubernetes settings, {path}", 1)
                ) from error
        return settings

    def check_store(self, root: Path) -> None:
        """Raises ConfigError if a store does not lie on the volume that the pods mount."""
        if not root.is_relative_to(self.store.mount_path):
            raise ConfigError(
                f"the store {root} is not below {self.store.mount_path}, where pods mount the claim "
                f"{self.store.claim}: set MLPIPES_HOME to a folder below it, or `store.mount_path` to where that volume "
                "is mounted here"
            )

    def check_visible(self, file: Path) -> None:
        """Raises ConfigError if a file, or what a link leads to, lies on nothing that pods mount."""
        shared = [self.store.mount_path, *(str(mount["mountPath"]) for mount in self.mounts)]
        by_name = any(file.absolute().is_relative_to(path) for path in shared)
        if not (by_name and any(file.resolve().is_relative_to(Path(path).resolve()) for path in shared)):
            raise ConfigError(
                f"pods do not see {file}: they mount {', '.join(shared)}. Copy it to a folder below one of these"
            )


def _validated(content: Mapping[str, Any], where: str) -> KubernetesSettings:
    try:
        return KubernetesSettings.model_validate(dict(content))
    except ValidationError as error:
        said = problems(error, KubernetesSettings.model_fields, "settings")
        raise ConfigError(f"Kubernetes settings, {where}: {said}") from error
