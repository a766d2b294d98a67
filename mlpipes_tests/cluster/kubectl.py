"""Talk to a cluster as a user does: apply, look, wait, exec, logs."""

import json
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from mlpipes_tests.cluster.machines import run
from mlpipes_tests.waiting import LIMIT_SECONDS, until

Manifest = dict[str, Any]


class Kubectl:
    """kubectl with a kubeconfig. Every method raises AssertionError with kubectl's words when it fails."""

    def __init__(self, program: Path, kubeconfig: Path) -> None:
        self.command = [str(program), "kubectl", f"--kubeconfig={kubeconfig}"]

    def __call__(self, *arguments: str, text: str | None = None) -> str:
        """Run it; returns its output."""
        return run(*self.command, *arguments, text=text)

    def tried(self, *arguments: str, text: str | None = None) -> "subprocess.CompletedProcess[str]":
        """Run it, and let it fail."""
        return subprocess.run([*self.command, *arguments], input=text, capture_output=True, text=True, timeout=900)

    def apply(self, manifests: Manifest | Iterable[Manifest]) -> None:
        """Create or change objects, by server-side apply."""
        documents = [manifests] if isinstance(manifests, dict) else manifests
        self("apply", "--server-side", "--force-conflicts", "-f", "-", text=yaml.safe_dump_all(documents))

    def find(self, kind: str, name: str, namespace: str = "default") -> Manifest | None:
        """An object, or None where there is none."""
        found = self("get", kind, name, f"--namespace={namespace}", "--ignore-not-found", "--output=json")
        return json.loads(found) if found.strip() else None

    def objects(self, kinds: str, namespace: str | None = None, selector: str = "") -> list[Manifest]:
        """All objects of these kinds (`pods,jobs`) in one namespace, or in all."""
        where = [f"--namespace={namespace}"] if namespace else ["--all-namespaces"]
        chosen = [f"--selector={selector}"] if selector else []
        return json.loads(self("get", kinds, *where, *chosen, "--output=json"))["items"]

    def everything(self, namespace: str) -> list[str]:
        """`kind/name` of whatever lies in a namespace, of every kind that can be listed, without events."""
        listed = self("api-resources", "--namespaced", "--verbs=list", "--output=name").split()
        kinds = ",".join(sorted(kind for kind in listed if not kind.startswith("events")))
        return self("get", kinds, f"--namespace={namespace}", "--ignore-not-found", "--output=name").split()

    def wait_for(
        self,
        kind: str,
        name: str,
        condition: Callable[[Manifest], Any],
        what: str,
        *,
        namespace: str = "default",
        seconds: float = LIMIT_SECONDS,
        vain: Callable[[], str] = lambda: "",
    ) -> Manifest:
        """Wait until a condition holds for an object; returns it then."""

        def holds() -> Manifest | None:
            found = self.find(kind, name, namespace)
            return found if found is not None and condition(found) else None

        def words() -> str:
            return self.tried("describe", kind, name, f"--namespace={namespace}").stdout[-2500:]

        try:
            found = until(holds, f"{kind} {name} {what}", seconds=seconds, vain=vain, every=1)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{words()}") from None
        assert found is not None
        return found

    def execute(self, pod: str, *command: str, namespace: str = "default") -> str:
        """Run a command in a pod's first container."""
        return self("exec", pod, f"--namespace={namespace}", "--", *command)

    def logs(self, pod: str, *options: str, namespace: str = "default") -> str:
        """What a pod has said."""
        return self("logs", pod, f"--namespace={namespace}", *options)


def has_condition(kind: str, status: str = "True") -> Callable[[Manifest], bool]:
    """Whether an object's status has a condition of a type with this status."""

    def holds(found: Manifest) -> bool:
        conditions = found.get("status", {}).get("conditions", [])
        return any(c["type"] == kind and c["status"] == status for c in conditions)

    return holds


def in_phase(*phases: str) -> Callable[[Manifest], bool]:
    """Whether an object is in one of these phases."""
    return lambda found: found.get("status", {}).get("phase") in phases
