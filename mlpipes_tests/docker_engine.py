"""A Docker daemon of one's own, and images for it: no registry is asked, for their base is made of Debian's packages."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlpipes_tests import evidence
from mlpipes_tests.conftest import missing
from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.waiting import LIMIT_SECONDS, until

PROGRAMS = ("dockerd", "docker", "docker-compose", "debootstrap")
BASE, POSTGRES, PROMETHEUS = "debian-python:test", "debian-postgres:test", "debian-prometheus:test"
NETWORK = "tests"
"""The one of containers whose ports this machine reaches."""
_AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
_ENTRY_OF_POSTGRES = """\
#!/bin/bash
set -e
PATH=$(ls -d /usr/lib/postgresql/*/bin):$PATH
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  initdb --username="$POSTGRES_USER" --auth=scram-sha-256 --pwfile=<(echo "$POSTGRES_PASSWORD") "$PGDATA"
  echo 'host all all all scram-sha-256' >> "$PGDATA/pg_hba.conf"
  pg_ctl -w start -o "-c listen_addresses=''"
  export PGPASSWORD="$POSTGRES_PASSWORD"
  psql -U "$POSTGRES_USER" -d postgres -c "CREATE DATABASE $POSTGRES_DB"
  for file in /docker-entrypoint-initdb.d/*.sql; do psql -U "$POSTGRES_USER" -d "$POSTGRES_DB" -f "$file"; done
  pg_ctl -w stop
fi
exec postgres -c listen_addresses='*'
"""
"""What the official image does, in short, with Debian's PostgreSQL."""


class Engine:
    """A running daemon."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.socket = folder, folder / "d.sock"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLPIPES_", "COMPOSE_"))}
        self.environment |= {"DOCKER_HOST": f"unix://{self.socket}", "DOCKER_BUILDKIT": "0"}

    def run(self, *command: str, code: int = 0, **environment: str) -> str:
        """Run a program that asks the daemon, in the checkout; returns all that it says."""
        done = subprocess.run(
            command,
            cwd=CHECKOUT,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=3 * LIMIT_SECONDS,
        )
        assert done.returncode == code, f"{' '.join(command)}: {done.stdout[-4000:]}"
        return done.stdout.strip()

    def docker(self, *arguments: str, code: int = 0) -> str:
        """Run `docker`."""
        return self.run("docker", *arguments, code=code)

    def inspect(self, what: str) -> dict[str, Any]:
        """What is known of a container or an image."""
        return json.loads(self.docker("inspect", what))[0]

    def make_base(self) -> None:
        """An image like python:slim, which trusts whom this machine trusts."""
        if self.docker("images", "--quiet", BASE):
            return
        root = self.folder / "root"
        sources = "".join(path.read_text() for path in Path("/etc/apt").glob("sources.list*/**/*") if path.is_file())
        found = re.search(r"^(?:URIs:|deb(?: \[.*\])?) +(http\S+/debian)/?\s", sources, re.MULTILINE)
        packages = "python3,python3-venv,ca-certificates"
        mirror = found[1] if found else "http://deb.debian.org/debian"
        # It leaves /proc mounted there, which goes with a mount namespace of its own.
        apart = ("unshare", "--mount", "debootstrap", "--variant=minbase")
        self.run(*apart, f"--include={packages}", "bookworm", str(root), mirror)
        shutil.copyfile(_AUTHORITIES, f"{root}{_AUTHORITIES}")
        self.run("bash", "-c", f"tar -C {root} -c . | docker import - {BASE}")
        shutil.rmtree(root)

    def make_postgres(self) -> None:
        """An image that takes what the official one of PostgreSQL takes."""
        self._make_service(
            POSTGRES,
            "postgresql",
            "RUN ln -s /usr/lib/postgresql/*/bin/pg_isready /usr/local/bin/ || true\n"
            "RUN install -d -o postgres /var/lib/postgresql/data\n"
            'COPY entry /\nUSER postgres\nENTRYPOINT ["/entry"]\n',
            _ENTRY_OF_POSTGRES,
        )

    def make_prometheus(self) -> None:
        """An image that takes what the official one of Prometheus takes."""
        self._make_service(PROMETHEUS, "prometheus", "RUN install -d -o prometheus /prometheus\nUSER prometheus\n")

    def _make_service(self, name: str, package: str, more: str, entry: str = "") -> None:
        context = self.folder / package
        context.mkdir()
        (context / "entry").write_text(entry)
        (context / "entry").chmod(0o755)
        install = f"RUN apt-get update && apt-get install -y --no-install-recommends {package}\n"
        (context / "Dockerfile").write_text(f"FROM {BASE}\n{install}{more}")
        self.docker("build", "--network=host", "--tag", name, str(context))

    def make_image(self, target: str) -> str:
        """What `make images` builds; returns its name."""
        options = f"--cert {_AUTHORITIES} {os.environ.get('PIP_OPTIONS', '')}"
        build = f"--network=host --build-arg BASE={BASE} --build-arg 'PIP_OPTIONS={options}'"
        self.run("make", "images", f"TARGET={target}", f"IMAGE=mlpipes-{target}:test", f"BUILD={build}")
        return f"mlpipes-{target}:test"


@contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    """A daemon whose state is in a folder, which may hold that of an earlier one; it has ended when this returns."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if lacks := [name for name in PROGRAMS if shutil.which(name) is None]:
        missing(f"Docker is not there to be tested with: {', '.join(lacks)}")
    if os.geteuid() != 0:
        missing("a Docker daemon needs root")
    made, log = Engine(folder), folder / "logs" / "dockerd.log"
    log.parent.mkdir(exist_ok=True)
    evidence.collect_from(log.parent)
    # Without rules of the firewall, which belong to the machine: ports are handed on by processes.
    command = ["dockerd", "--storage-driver=overlay2", "--iptables=false", "--ip6tables=false", "--bridge=none"]
    places = [f"--host=unix://{made.socket}", f"--pidfile={folder / 'd.pid'}"]
    places += [f"--data-root={folder / 'data'}", f"--exec-root={folder / 'exec'}"]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, *places], stdout=out, stderr=out, start_new_session=True)
    try:
        until(
            lambda: subprocess.run(["docker", "info"], env=made.environment, capture_output=True).returncode == 0,
            "the Docker daemon answers",
            vain=lambda: log.read_text()[-1000:] if process.poll() is not None else "",
        )
        if NETWORK not in made.docker("network", "ls", "--format={{.Name}}").split():
            made.docker("network", "create", NETWORK)
        yield made
    finally:
        with_containers = ["bash", "-c", "docker ps -aq | xargs --no-run-if-empty docker rm --force --volumes"]
        subprocess.run(with_containers, env=made.environment, capture_output=True)
        process.terminate()
        process.wait(LIMIT_SECONDS)
        _unmount(folder)


def _unmount(folder: Path) -> None:
    """What a daemon leaves mounted below a folder, such as the network of containers that had the machine's."""
    for line in reversed(Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()):
        place = Path(line.split()[1])
        if place.is_relative_to(folder):
            subprocess.run(["umount", "--lazy", str(place)], check=True)
