"""Build what a cluster is made of, once: `python -m mlpipes_tests.cluster.build`.

Our modules in `go/` are mains for what is only to be had as a library; operators are built as their authors release them.
Everything lands in a cache whose names hold the versions, so another version is another file.
"""

import functools
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

_SOURCES = Path(__file__).parent / "go"
OURS = ("kube", "etcd", "dns", "pause")
RELEASED = {
    "ray-operator": "github.com/ray-project/kuberay/ray-operator@v1.6.0",
    "kueue": "sigs.k8s.io/kueue/cmd/kueue@v0.17.0",
    "metrics-server": "sigs.k8s.io/metrics-server/cmd/metrics-server@v0.9.0",
    "kube-router": "github.com/cloudnativelabs/kube-router/v2/cmd/kube-router@v2.1.0",
    "helm": "helm.sh/helm/v3/cmd/helm@v3.22.0",
    "kwok": "sigs.k8s.io/kwok/cmd/kwok@v0.8.0",
}
_CONFIGURATIONS = {
    "ray-operator": (RELEASED["ray-operator"], "config/default"),
    "kueue": ("sigs.k8s.io/kueue@v0.17.0", "config/default"),
    "metrics-server": ("sigs.k8s.io/metrics-server@v0.9.0", "manifests/base"),
    "kwok": ("sigs.k8s.io/kwok@v0.8.0", "kustomize/stage"),
}
"""The modules of operators, and the folder in each that installs it, or has its settings."""
_STATIC = {"CGO_ENABLED": "0"}
_FLAGS = ["-trimpath", "-ldflags"]


def cache() -> Path:
    """The folder that keeps what was built."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlpipes-cluster"


@functools.cache
def program(name: str) -> Path:
    """Where a program lies, built first if it is missing. Raises CalledProcessError with Go's own words above it."""
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        return _ours(name) if name in OURS else _released(name)


def configuration(operator: str) -> Path:
    """The folder that installs an operator's release, as Go's module cache keeps it."""
    module, place = _CONFIGURATIONS[operator]
    return Path(json.loads(_go("mod", "download", "-json", module, folder=Path("/")))["Dir"]) / place


def _ours(name: str) -> Path:
    source = _SOURCES / name
    flags = "-s -w"
    if name == "kube":  # Kueue refuses an API server that does not know its version
        found = re.search(r"k8s\.io/kubernetes (v1\.(\d+)\.\d+)", (source / "go.mod").read_text())
        assert found, "go/kube/go.mod names no version of k8s.io/kubernetes"
        package = "k8s.io/component-base/version"
        flags += f" -X {package}.gitVersion={found[1]} -X {package}.gitMajor=1 -X {package}.gitMinor={found[2]}"
        flags += f" -X k8s.io/client-go/pkg/version.gitVersion={found[1]}"
    content = b"".join((source / file).read_bytes() for file in ("go.mod", "go.sum", "main.go"))
    target = _target(name, content + flags.encode())
    if not target.exists():
        _say(name)
        _go("build", *_FLAGS, flags, "-o", f"{target}.new", ".", folder=source)
        Path(f"{target}.new").rename(target)
    return target


def _released(name: str) -> Path:
    module = RELEASED[name]
    target = _target(name, module.encode())
    if not target.exists():
        _say(name)
        place = target.with_suffix(".new")
        _go("install", *_FLAGS, "-s -w", module, folder=Path("/"), GOBIN=str(place))
        (built,) = place.iterdir()
        built.rename(target)
        shutil.rmtree(place)
    return target


def _target(name: str, content: bytes) -> Path:
    go = _go("version", folder=Path("/"))
    return cache() / f"{name}-{hashlib.sha256(content + go.encode()).hexdigest()[:12]}"


def _go(*command: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        ["go", *command],
        cwd=folder,
        env=os.environ | _STATIC | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def _say(name: str) -> None:
    print(f"building {name} (once; minutes) …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    for name in (*OURS, *RELEASED):
        if name != "kwok":  # a benchmark alone wants it
            print(program(name))
    for operator in _CONFIGURATIONS:
        configuration(operator)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{used.ru_utime + used.ru_stime:.0f} CPU-seconds", file=sys.stderr)
