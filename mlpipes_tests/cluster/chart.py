"""The Helm chart on a test cluster: Helm itself, and values with which its pods run this host's programs."""

import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mlpipes_tests.cluster import build, software
from mlpipes_tests.cluster.cluster import Cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.cluster.images import THIN
from mlpipes_tests.sandbox import CHECKOUT, free_port

CHART = CHECKOUT / "deploy" / "helm" / "mlpipes"
RELEASE = "mlpipes"
USER = 1000
"""Of all pods, and of whoever looks at the store from outside."""
_FORWARD_SECONDS = 60.0
_POSTGRES = """\
set -e
PATH=$(ls -d /usr/lib/postgresql/*/bin | tail -1):$PATH
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  echo "$POSTGRES_PASSWORD" > /tmp/password
  initdb --username="$POSTGRES_USER" --auth=scram-sha-256 --pwfile=/tmp/password "$PGDATA"
  echo 'host all all all scram-sha-256' >> "$PGDATA/pg_hba.conf"
  pg_ctl -w start -o "-c listen_addresses=''"
  export PGPASSWORD="$POSTGRES_PASSWORD"
  psql -U "$POSTGRES_USER" -d postgres -c "CREATE DATABASE $POSTGRES_DB"
  psql -U "$POSTGRES_USER" -d postgres -f /docker-entrypoint-initdb.d/mlflow.sql
  pg_ctl -w stop
fi
exec postgres -c listen_addresses='*'
"""
"""What the entry point of the image `postgres` does, with the host's PostgreSQL."""


def database(name: str, user: str, databases: tuple[str, str], password: str) -> list[dict[str, Any]]:
    """A PostgreSQL server of the site's own, with Dagster's and MLflow's databases: a pod, its service and its Secret."""
    scripts = "/docker-entrypoint-initdb.d"
    variables = {"POSTGRES_USER": user, "POSTGRES_DB": databases[0], "POSTGRES_PASSWORD": password}
    variables |= {"PGDATA": f"{software.STORE}/{name}", **software.environment()}
    mounts = [{"name": "scripts", "mountPath": scripts}, {"name": "run", "mountPath": "/var/run/postgresql"}]
    env = [{"name": key, "value": value} for key, value in variables.items()]
    spec = software.pod_spec(["/bin/bash", "-c", _POSTGRES], env=env, volumeMounts=software.mounts() + mounts)
    spec["volumes"] += [{"name": "scripts", "configMap": {"name": name}}, {"name": "run", "emptyDir": {}}]
    metadata = {"name": name, "labels": {"app": name}}
    return [
        {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"postgresql-password": password}},
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": {"mlflow.sql": f"CREATE DATABASE {databases[1]};"},
        },
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"selector": {"app": name}, "ports": [{"port": 5432}]},
        },
    ]


def helm(*arguments: str, kubeconfig: Path | None = None, values: Any = None) -> "subprocess.CompletedProcess[str]":
    """Run Helm; its `--values` are read from standard input."""
    # One that is built from its module does not know which Kubernetes it is for.
    cluster = [f"--kubeconfig={kubeconfig}"] if kubeconfig else ["--kube-version=1.34.4"]
    command = [str(build.program("helm")), *arguments, *cluster]
    return subprocess.run(
        command + (["--values=-"] if values is not None else []),
        input=None if values is None else yaml.safe_dump(values),
        capture_output=True,
        text=True,
        timeout=600,
    )


class Desk:
    """The release in a namespace: what the chart brings up."""

    def __init__(self, cluster: Cluster, namespace: Namespace, **values: Any) -> None:
        self.cluster, self.namespace, self.kubectl = cluster, namespace, cluster.kubectl
        self.home = namespace.store / "mlpipes"
        database = namespace.store.parent / "postgres"
        database.mkdir()
        database.chmod(0o777)
        data = f"data-{RELEASE}-postgres-0"
        self.kubectl.apply(software.volume(namespace.name, data, database))
        volumes = [volume for volume in software.volumes() if volume["name"] != "store"]
        mounts = [mount for mount in software.mounts() if mount["name"] != "store"]
        environment = {**software.environment(), "PYTHONPATH": str(CHECKOUT)}
        own = {"volumes": volumes, "mounts": mounts, "environment": environment}
        self.values: dict[str, Any] = {
            "image": THIN,
            "user": USER,
            "store": {"claim": "store", "mountPath": str(namespace.store)},
            **own,
            "training": {
                **own,
                "python": sys.executable,
                "head_cpu": "100m",
                "head_memory": "2Gi",
                "cpu_per_worker": "300m",
                "memory_per_worker": "3Gi",
                "poll_seconds": 1,
                "node_lost_seconds": 5,
            },
            "postgres": {"image": THIN, "command": ["/bin/bash", "-c", _POSTGRES]},
            **values,
        }

    def helm(self, *arguments: str, values: Any = None) -> str:
        """Run Helm on the namespace. Raises AssertionError with its words."""
        done = helm(*arguments, f"--namespace={self.namespace.name}", kubeconfig=self.cluster.kubeconfig, values=values)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, **values: Any) -> str:
        """Install it with changed values; returns the notes."""
        self.values |= values
        return self.helm("install", RELEASE, str(CHART), values=self.values)

    def upgrade(self, **values: Any) -> None:
        """Upgrade it with changed values."""
        self.values |= values
        self.helm("upgrade", RELEASE, str(CHART), values=self.values)

    def pods(self, part: str) -> list[dict[str, Any]]:
        """The pods of a part that are not being deleted."""
        found = self.kubectl.objects("pods", self.namespace.name, selector=f"mlpipes.io/part={part}")
        return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]

    def until_up(self) -> None:
        """Wait until every part answers, each with the pod that its present settings ask for."""
        listed = self.kubectl.objects("deployments,statefulsets", self.namespace.name)
        for found in listed:
            kind, name = found["kind"].lower(), found["metadata"]["name"]
            self.kubectl.wait_for(kind, name, _is_up, "is up", namespace=self.namespace.name, vain=self.cluster.died)

    @contextmanager
    def forwarded(self, part: str, port: int) -> Iterator[str]:
        """The address of a service, as a user reaches it. Raises AssertionError while it has no pod."""
        here = free_port()
        command = [*self.kubectl.command, "port-forward", f"--namespace={self.namespace.name}"]
        process = subprocess.Popen(
            [*command, f"service/{RELEASE}-{part}", f"{here}:{port}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        try:
            # A pod of a node that hangs is asked in vain.
            listens, _, _ = select.select([process.stdout], [], [], _FORWARD_SECONDS)
            said = process.stdout.readline() if listens else f"nothing in {_FORWARD_SECONDS:.0f} s"
            assert "Forwarding" in said, f"{part} cannot be forwarded: {said}"
            yield f"http://127.0.0.1:{here}"
        finally:
            process.kill()
            process.wait()


def _is_up(found: dict[str, Any]) -> bool:
    status, wanted = found.get("status", {}), found["spec"]["replicas"]
    return (
        status.get("observedGeneration") == found["metadata"]["generation"]
        and status.get("updatedReplicas") == status.get("readyReplicas") == status.get("replicas") == wanted
    )
