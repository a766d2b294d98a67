"""What pods run: an image without software, and this host's programs, mounted read-only through claims.

As on sites with a shared software tree: the restricted pod security of a namespace forbids a pod to mount folders of its
node, but not to claim a volume that an administrator made of one.
"""

import sys
from pathlib import Path
from typing import Any

from mlpipes_tests.cluster.images import THIN
from mlpipes_tests.cluster.kubectl import Manifest

PROJECT = Path(__file__).parents[2]
STORE = "/store"
"""Where pods find the volume that they share and may write."""
_USER = 1000
_SIZE = {"storage": "100Gi"}
_RESTRICTED = {
    "runAsNonRoot": True,
    "runAsUser": _USER,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def folders() -> dict[str, Path]:
    """The host's folders that hold programs, by the name of their claim."""
    found = {"usr": Path("/usr"), "project": PROJECT, "venv": Path(sys.prefix), "python": Path(sys.base_prefix)}
    kept: dict[str, Path] = {}
    for name, path in found.items():
        if not any(path.is_relative_to(other) for other in kept.values()):
            kept[name] = path.resolve()
    return kept


def namespace(name: str, store: Path) -> list[Manifest]:
    """A namespace under restricted pod security, with claims on the host's programs and on a store that it may write."""
    store.mkdir(parents=True, exist_ok=True)
    store.chmod(0o777)
    enforced = {"pod-security.kubernetes.io/enforce": "restricted"}
    manifests: list[Manifest] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": enforced}}
    ]
    for claim, path in folders().items():
        manifests += _volume(name, claim, path, "ReadOnlyMany")
    return manifests + _volume(name, "store", store, "ReadWriteMany")


def pod_spec(command: list[str], **container: Any) -> Manifest:
    """A pod that runs a command with the host's programs and the store, as a user without any rights."""
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 5,
        "containers": [
            {
                "name": "main",
                "image": THIN,
                "command": command,
                "env": [{"name": key, "value": value} for key, value in environment().items()],
                "securityContext": _RESTRICTED,
                "volumeMounts": mounts(),
            }
            | container
        ],
        "volumes": volumes(),
    }


def environment() -> dict[str, str]:
    """The variables with which a pod finds this interpreter and its libraries."""
    return {"PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}


def mounts() -> list[Manifest]:
    """A container's `volumeMounts`: programs at the paths that they have on the host, the store at `/store`."""
    programs = [{"name": name, "mountPath": str(path), "readOnly": True} for name, path in folders().items()]
    return [*programs, {"name": "store", "mountPath": STORE}]


def volumes() -> list[Manifest]:
    """A pod's `volumes` to those mounts."""
    read = [{"name": n, "persistentVolumeClaim": {"claimName": n, "readOnly": True}} for n in folders()]
    return [*read, {"name": "store", "persistentVolumeClaim": {"claimName": "store"}}]


def volume(where: str, claim: str, path: Path, mode: str = "ReadWriteOnce") -> Manifest:
    """A volume made of a folder, which only a claim of this name in this namespace gets."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"{where}-{claim}"},
        "spec": {
            "accessModes": [mode],
            "storageClassName": "",
            "capacity": _SIZE,
            "hostPath": {"path": str(path), "type": "Directory"},
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": {"namespace": where, "name": claim},
        },
    }


def _volume(where: str, claim: str, path: Path, mode: str) -> list[Manifest]:
    """Such a volume, and the claim."""
    made = volume(where, claim, path, mode)
    spec = {"accessModes": [mode], "storageClassName": "", "volumeName": made["metadata"]["name"]}
    claimed = {"name": claim, "namespace": where}
    return [
        made,
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": claimed,
            "spec": spec | {"resources": {"requests": _SIZE}},
        },
    ]
