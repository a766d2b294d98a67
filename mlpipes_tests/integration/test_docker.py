"""The images of deploy/docker/, built and run as containers: an endpoint, SageMaker's, and a whole desk of compose.yaml."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from typer.testing import CliRunner

from mlpipes.cli.app import app
from mlpipes_tests.docker_engine import NETWORK, POSTGRES, PROMETHEUS, Engine, engine
from mlpipes_tests.sandbox import CHECKOUT, free_port, wait_for
from mlpipes_tests.serving.models import IMAGES, NAME, champion, registered, tracker_in
from mlpipes_tests.waiting import LIMIT_SECONDS, until

pytestmark = pytest.mark.docker
TOKEN = "0123456789abcdef-of-a-test"  # noqa: S105
SCALE = "w1-b128-e30-g0"
PINNED = dict(line.split("==") for line in (CHECKOUT / "constraints.txt").read_text().lower().split())
LOCKED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")


@pytest.fixture(scope="module")
def docker() -> Iterator[Engine]:
    """A daemon with the base of the images; what it has goes with it, unless a folder is named in which it is kept."""
    kept = os.environ.get("DOCKER_KEPT")
    folder = kept or tempfile.mkdtemp(prefix="docker-")
    try:
        with engine(Path(folder)) as made:
            made.make_base()
            yield made
    finally:
        if not kept:
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def images(docker: Engine) -> dict[str, str]:
    """The names of the images by target."""
    return {target: docker.make_image(target) for target in ("desk", "serve", "batch", "sagemaker")}


@dataclass(frozen=True)
class Written:
    """A model in a folder, and what its evaluation would say of `IMAGES`."""

    folder: Path
    evaluated: np.ndarray

    def check(self, answer: requests.Response) -> None:
        """An answer to the first three has the evaluation's bits."""
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-model-exact"] == "true"
        assert np.array_equal(np.array(answer.json()["predictions"], dtype=np.float32), self.evaluated[:3])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    home = tmp_path_factory.mktemp("written")
    tracker = tracker_in(home)
    version, evaluated = registered(tracker, 1)
    champion(tracker, version)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLPIPES_HOME", str(home))
        done = CliRunner().invoke(app, ["export", "digits", "--output", str(home / "model")])
    assert done.exit_code == 0, done.output
    for path in (home, *home.parents[: len(home.parts) - len(Path(tempfile.gettempdir()).parts)]):
        path.chmod(0o755)  # for the containers' user
    return Written(home / "model", evaluated)


@contextmanager
def container(docker: Engine, port: int, *arguments: str) -> Iterator[tuple[str, str]]:
    """A container in the background, and the address at which its port is reached from this machine."""
    here = free_port()
    name = docker.docker("run", "--detach", f"--network={NETWORK}", f"--publish=127.0.0.1:{here}:{port}", *arguments)
    try:
        yield name, f"http://127.0.0.1:{here}"
    finally:
        docker.docker("rm", "--force", "--volumes", name)


def until_ready(docker: Engine, name: str, address: str) -> None:
    def ended() -> str:
        return "" if docker.inspect(name)["State"]["Running"] else docker.docker("logs", name)

    def ready() -> bool:
        try:
            return requests.get(f"{address}/ping", timeout=10).ok
        except requests.RequestException:
            return False

    until(ready, "the container answers", vain=ended)


def asked(address: str, **options: Any) -> requests.Response:
    return requests.post(
        f"{address}/invocations", json={"inputs": IMAGES[:3].tolist()}, timeout=LIMIT_SECONDS, **options
    )


def test_the_endpoint_runs_without_rights_and_ends_in_peace(
    docker: Engine, images: dict[str, str], written: Written
) -> None:
    options = (*LOCKED, f"--volume={written.folder}:/model:ro", f"--env=MLPIPES_SERVE_TOKEN={TOKEN}")
    with container(docker, 8100, *options, images["serve"], "--model=/model", "--behind-proxy") as (name, address):
        until_ready(docker, name, address)
        assert asked(address).status_code == 401
        written.check(asked(address, headers={"authorization": f"Bearer {TOKEN}"}))
        assert docker.docker("exec", name, "id", "-u") == "1000"
        until(lambda: docker.inspect(name)["State"]["Health"]["Status"] == "healthy", "its health check passes")
        docker.docker("stop", "--time=1200", name)
        assert docker.inspect(name)["State"]["ExitCode"] == 0, docker.docker("logs", name)
        assert TOKEN not in docker.docker("logs", name)
    assert "set MLPIPES_SERVE_TOKEN" in docker.docker("run", "--rm", images["serve"], "digits", code=1)
    environment = f"--env=MLPIPES_SERVE_TOKEN={TOKEN}"
    assert "--tls-cert" in docker.docker("run", "--rm", environment, images["serve"], "digits", code=1)


def test_an_endpoint_with_its_own_certificate_is_healthy(
    docker: Engine, images: dict[str, str], written: Written, tmp_path: Path
) -> None:
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    files = {"--tls-key": tmp_path / "key.pem", "--tls-cert": tmp_path / "cert.pem"}
    docker.run("openssl", *made, "-keyout", str(files["--tls-key"]), "-out", str(files["--tls-cert"]))
    mounts = [f"--volume={path}:/{path.name}:ro" for path in files.values()]
    mounts.append(f"--volume={written.folder}:/model:ro")
    for path in files.values():
        path.chmod(0o644)
    tls = [word for option, path in files.items() for word in (option, f"/{path.name}")]
    options = (*LOCKED, *mounts, f"--env=MLPIPES_SERVE_TOKEN={TOKEN}", images["serve"], "--model=/model", *tls)
    with container(docker, 8100, *options) as (name, _):
        until(
            lambda: docker.inspect(name)["State"]["Health"]["Status"] == "healthy",
            "its health check passes",
            vain=lambda: "" if docker.inspect(name)["State"]["Running"] else docker.docker("logs", name),
        )


def test_a_file_is_answered_by_a_container_without_rights(
    docker: Engine, images: dict[str, str], written: Written, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    np.save(tmp_path / "images.npy", IMAGES)
    os.chown(tmp_path, 1000, 1000)
    options = (*LOCKED, f"--volume={written.folder}:/model:ro", f"--volume={tmp_path}:/shared")
    asked = ("--model=/model", "--input=images.npy", "--output=answers.parquet")
    assert "answers are in" in docker.docker("run", "--rm", *options, images["batch"], *asked)
    found = pq.read_table(tmp_path / "answers.parquet")["prediction"].to_numpy(zero_copy_only=False)
    assert np.array_equal(np.stack(found), written.evaluated)
    assert "were answered before" in docker.docker("run", "--rm", *options, images["batch"], *asked)


def test_sagemaker_has_its_way(docker: Engine, images: dict[str, str], written: Written) -> None:
    model = f"--volume={written.folder}:/opt/ml/model:ro"
    with container(docker, 8080, model, images["sagemaker"], "serve") as (name, address):
        until_ready(docker, name, address)
        written.check(asked(address))
        assert docker.docker("exec", name, "id", "-u") == "0"
        docker.docker("stop", "--time=1200", name)
        assert docker.inspect(name)["State"]["ExitCode"] == 0, docker.docker("logs", name)
    assert "is no folder with a model" in docker.docker("run", "--rm", images["sagemaker"], "serve", code=1)
    assert "No such command 'train'" in docker.docker("run", "--rm", images["sagemaker"], "train", code=2)


def test_images_say_what_they_are_and_have_what_they_need(docker: Engine, images: dict[str, str]) -> None:
    users = {"desk": "1000", "serve": "1000", "batch": "1000", "sagemaker": "0"}
    for target, name in images.items():
        found = docker.inspect(name)
        assert found["Config"]["User"] == users[target]
        labels = found["Config"]["Labels"]
        assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
        assert labels["org.opencontainers.image.base.name"] == "debian-python:test"
        assert len(labels["org.opencontainers.image.revision"]) == 40
        listed = json.loads(docker.docker("run", "--rm", "--entrypoint=cat", name, "/opt/mlpipes/sbom.cdx.json"))
        parts = {part["name"].lower(): part["version"] for part in listed["components"]}
        assert listed["bomFormat"] == "CycloneDX"
        assert parts["torch"] == PINNED["torch"]
        assert ("ray" in parts) == (target == "desk")
        assert {part: PINNED[part] for part in parts if part in PINNED and parts[part] != PINNED[part]} == {}
    size = {target: docker.inspect(name)["Size"] for target, name in images.items()}
    assert size["serve"] < 0.7 * size["desk"], size
    program = "import importlib.util as u; print([n for n in ('ray', 'dagster', 'torch', 'mlpipes') if u.find_spec(n)])"
    for target, there in (("desk", "['ray', 'dagster', 'torch', 'mlpipes']"), ("serve", "['torch', 'mlpipes']")):
        assert docker.docker("run", "--rm", "--entrypoint=python", images[target], "-c", program) == there


@dataclass(frozen=True)
class Desk:
    """What compose.yaml brings up."""

    docker: Engine
    settings: dict[str, str]

    def compose(self, *arguments: str, code: int = 0) -> str:
        """Run docker-compose."""
        where = ("--project-name=desk", f"--file={CHECKOUT / 'deploy' / 'docker' / 'compose.yaml'}")
        return self.docker.run("docker-compose", *where, *arguments, code=code, **self.settings)

    def address(self, part: str) -> str:
        """Where a part is reached."""
        return f"http://127.0.0.1:{self.settings[f'{part}_PORT']}"

    def measured(self, query: str) -> float | None:
        """What Prometheus has last found, or None."""
        answer = requests.get(
            f"{self.address('PROMETHEUS')}/api/v1/query", params={"query": query}, timeout=LIMIT_SECONDS
        )
        found = answer.json()["data"]["result"]
        return float(found[0]["value"][1]) if found else None


@pytest.fixture
def desk(docker: Engine, images: dict[str, str]) -> Iterator[Desk]:
    docker.make_postgres()
    docker.make_prometheus()
    settings = {"POSTGRES_PASSWORD": "of-a-test", "MLPIPES_SERVE_TOKEN": TOKEN, "POSTGRES_IMAGE": POSTGRES}
    settings |= {
        "MLPIPES_IMAGE": images["desk"],
        "MLPIPES_SERVE_IMAGE": images["serve"],
        "PROMETHEUS_IMAGE": PROMETHEUS,
    }
    settings |= {f"{part}_PORT": str(free_port()) for part in ("WEBSERVER", "MLFLOW", "SERVE", "PROMETHEUS")}
    made = Desk(docker, settings)
    try:
        yield made
    finally:
        made.compose("--profile=metrics", "down", "--volumes")


def test_a_desk_trains_and_its_endpoint_answers(desk: Desk) -> None:
    desk.compose("--profile=metrics", "up", "--detach")
    wait_for(f"{desk.address('WEBSERVER')}/server_info")
    said = desk.compose(
        "exec", "-T", "code", "mlpipes", "backfill", "digits", "--scale", SCALE, "--ui", "http://webserver:3000"
    )
    assert f"{SCALE}: SUCCESS" in said
    wait_for(f"{desk.address('SERVE')}/ping")
    answer = asked(desk.address("SERVE"), headers={"authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 200, answer.text
    assert np.array(answer.json()["predictions"]).shape == (3, 10)
    assert answer.headers["x-model-exact"] == "true"
    assert requests.get(f"{desk.address('MLFLOW')}/health", timeout=LIMIT_SECONDS).ok
    until(lambda: desk.measured('mlpipes_serve_requests_total{route="/invocations",code="200"}') == 1, "it is counted")
    names = desk.compose("--profile=metrics", "ps", "--quiet").split()
    assert len(names) == 7
    for name in names:
        found = desk.docker.inspect(name)
        bound = [place["HostIp"] for places in found["NetworkSettings"]["Ports"].values() for place in places or ()]
        assert set(bound) <= {"127.0.0.1"}, json.dumps(found["NetworkSettings"]["Ports"])


def test_a_desk_without_a_password_is_refused_in_a_line(docker: Engine) -> None:
    said = Desk(docker, {}).compose("config", "--quiet", code=1)
    assert "POSTGRES_PASSWORD" in said
    assert "write it to .env" in said
    assert NAME not in said
