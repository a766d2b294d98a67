"""The real server process: formats, bits, limits, swaps under load, an absent registry, its end."""

import json
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from mlpipes.store.files import read_record
from mlpipes_tests.serving import server as servers
from mlpipes_tests.serving.models import IMAGES, NAME, champion, registered
from mlpipes_tests.serving.server import Serving
from mlpipes_tests.waiting import LIMIT_SECONDS, until

TOKEN = "0123456789abcdef-of-a-test"  # noqa: S105
registry = servers.registry


@pytest.fixture(scope="module")
def running(registry: Serving) -> Iterator[Serving]:
    champion(registry.tracker, "1")
    try:
        # It keeps no samples: in the same home, tests look for those of a server of their own.
        yield registry.start("--max-body", "2", "--sample", "0")
    finally:
        registry.stop()


@pytest.fixture
def server(running: Serving) -> Iterator[Serving]:
    """The one server of this module, which serves version 1."""
    yield running
    champion(running.tracker, "1")
    until(lambda: running.ask([0]).headers["x-model-version"] == "1", "version 1 is served", vain=running.ended)


@pytest.fixture
def another(registry: Serving, running: Serving) -> Iterator[Serving]:
    """One that a test starts by itself, in the same home, in which version 1 was served."""
    own = Serving(registry.home, registry.versions, registry.tracker, "another")
    try:
        yield own
    finally:
        own.stop()


def figures_of(server: Serving) -> dict[str, float]:
    """What it tells Prometheus; another test may have asked before."""
    lines = requests.get(f"{server.address}/metrics", timeout=LIMIT_SECONDS).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_formats_headers_and_the_bits_of_the_evaluation(server: Serving) -> None:
    wanted, before = server.versions["1"], figures_of(server)
    answer = server.ask([3, 1, 2])
    assert answer.status_code == 200
    assert np.array_equal(np.array(answer.json()["predictions"], dtype=np.float32), wanted[[3, 1, 2]])
    assert answer.headers["x-model-version"] == "1"
    assert answer.headers["x-model-weights"] == f"{1:064x}"
    assert answer.headers["x-model-exact"] == "true"

    metadata = requests.get(f"{server.address}/v2/models/{NAME}", timeout=LIMIT_SECONDS).json()
    assert metadata["inputs"] == [{"name": "input-0", "datatype": "UINT8", "shape": [-1, 1, 8, 8]}]
    parameters = metadata["parameters"]  # texts and numbers only, as the protocol has it
    assert json.loads(parameters["class_names"]) == [str(digit) for digit in range(10)]
    assert parameters["pixel_maximum"] == 16
    assert all(isinstance(value, (str, int, float)) for value in parameters.values())
    tensor = {"name": "input-0", "shape": [2, 1, 8, 8], "datatype": "UINT8", "data": IMAGES[:2].ravel().tolist()}
    reply = requests.post(
        f"{server.address}/v2/models/{NAME}/infer", json={"id": "7", "inputs": [tensor]}, timeout=60
    ).json()
    assert reply["id"] == "7"
    (output,) = reply["outputs"]
    assert output["shape"] == [2, 10]
    assert np.array_equal(np.array(output["data"], dtype=np.float32).reshape(2, 10), wanted[:2])
    for path, code in (
        ("/ping", 200),
        ("/v2/health/ready", 200),
        ("/v2", 200),
        ("/docs", 200),
        ("/openapi.json", 200),
        (f"/v2/models/{NAME}/versions/1/ready", 200),
        (f"/v2/models/{NAME}/versions/9", 404),
        ("/v2/models/other", 404),
        ("/nothing", 404),
    ):
        assert requests.get(f"{server.address}{path}", timeout=LIMIT_SECONDS).status_code == code, path
    assert requests.head(f"{server.address}/ping", timeout=LIMIT_SECONDS).status_code == 200
    figures = figures_of(server)
    grown = {name: value - before.get(name, 0) for name, value in figures.items() if value != before.get(name, 0)}
    assert grown['mlpipes_serve_requests_total{code="200",route="/invocations"}'] == 1
    assert figures[f'mlpipes_serve_version{{exact="true",model="{NAME}",scale="w1-b128-e1-g0"}}'] == 1
    counted = {found[1]: n for name, n in grown.items() if (found := re.search(r'answers_total\{label="(\d)"\}', name))}
    assert counted == {str(k): float(n) for k, n in enumerate(np.bincount(wanted[[3, 1, 2, 0, 1]].argmax(1))) if n}
    assert server.process is not None
    (listening,) = {
        c.laddr.ip for c in __import__("psutil").Process(server.process.pid).net_connections() if c.status == "LISTEN"
    }
    assert listening == "127.0.0.1"


def test_in_any_company_an_answer_has_the_same_bits_and_no_swap_fails_a_request(server: Serving) -> None:
    generator = np.random.default_rng(1)
    asked = [generator.choice(len(IMAGES), generator.integers(1, 12)) for _ in range(1500)]
    done = threading.Event()

    def swapping() -> int:
        count = 0
        while not done.is_set():
            count += 1
            version = str(1 + count % 2)
            champion(server.tracker, version)
            said = f"version {version} ("
            until(lambda said=said: said in server.log.splitlines()[-1] or done.is_set(), "it is swapped")
        return count

    def ask(rows: np.ndarray, session: Any = threading.local()) -> tuple[str, bool]:  # noqa: B008 - one a thread
        session.http = getattr(session, "http", None) or requests.Session()
        body = {"inputs": IMAGES[rows].tolist()}
        answer = session.http.post(f"{server.address}/invocations", json=body, timeout=LIMIT_SECONDS)
        assert answer.status_code == 200, answer.text
        version = answer.headers["x-model-version"]
        found = np.array(answer.json()["predictions"], dtype=np.float32)
        return version, np.array_equal(found, server.versions[version][rows])

    with ThreadPoolExecutor(13) as pool:
        swaps = pool.submit(swapping)
        try:
            answers = list(pool.map(ask, asked))
        finally:
            done.set()
        assert swaps.result() >= 2
    assert all(same for _, same in answers)
    assert {version for version, _ in answers} == {"1", "2"}
    figures = requests.get(f"{server.address}/metrics", timeout=LIMIT_SECONDS).text
    together = re.search(r'batch_rows_bucket\{le="16.0"\} (\S+)', figures)
    assert together
    assert float(together[1]) < float(re.search(r"batch_rows_count (\S+)", figures)[1]), "some were answered together"  # type: ignore[index]


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        (b"{", "body", "JSON in UTF-8 is wanted"),
        (b"[" * 5000, "body", "nested too deeply"),
        (b"[" * 100_000, "body", "more lists are in it than 4,096 samples"),
        (b'{"inputs": NaN}', "body", "NaN is no number"),
        (b'{"\\ud800": 1}', "body", "exactly one of"),
        (b"[]", "body", "an object"),
        (b"{}", "body", "exactly one of"),
        (b'{"inputs": [], "instances": []}', "body", "exactly one of"),
        (b'{"inputs": [], "more": 1}', "body", "nothing else"),
        (b'{"inputs": 5}', "inputs", "a list of samples"),
        (b'{"inputs": []}', "inputs", "shape (n, 1, 8, 8)"),
        (b'{"inputs": [[[1, 2], [3]]]}', "inputs", "different lengths"),
        (b'{"inputs": [[1, 2]]}', "inputs", "shape (n, 1, 8, 8)"),
        ({"inputs": np.full((1, 1, 8, 8), 0.5).tolist()}, "inputs[0][0][0][0]", "0.5 is no whole number from 0 to 255"),
        ({"inputs": np.full((1, 1, 8, 8), 256).tolist()}, "inputs[0][0][0][0]", "256 is no whole number"),
        ({"inputs": np.full((1, 1, 8, 8), -1).tolist()}, "inputs[0][0][0][0]", "-1 is no whole number"),
        ({"inputs": np.full((1, 1, 8, 8), 10**30).astype(object).tolist()}, "inputs[0][0][0][0]", "too large"),
        ({"inputs": np.full((1, 1, 8, 8), "1").tolist()}, "inputs[0][0][0][0]", "not a text"),
        ({"inputs": np.full((1, 1, 8, 8), True).tolist()}, "inputs[0][0][0][0]", "not true or false"),
        ({"inputs": [[[[1] * 8] * 7 + [[1, True, 1, 1, 1, 1, 1, 1]]]]}, "inputs[0][0][7][1]", "a number is wanted"),
        ({"inputs": [[[[None] * 8] * 8]]}, "inputs[0][0][0][0]", "not null"),
        ({"inputs": np.zeros((5000, 1, 8, 8), int).tolist()}, "body", "more lists are in it than 4,096 samples"),
        ({"dataframe_records": [{"a": 1}]}, "dataframe_records", "takes an array"),
        ({"inputs": [[[[1] * 8] * 8]], "params": {"a": 1}}, "params", "takes none"),
    ],
)
def test_bad_input_is_told_by_field_and_rule(server: Serving, body: Any, field: str, says: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = {"content-type": "application/json"}
    answer = requests.post(f"{server.address}/invocations", data=data, headers=kind, timeout=LIMIT_SECONDS)
    assert answer.status_code == 400, answer.text
    assert answer.json()["field"] == field
    assert says in answer.json()["error"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"shape": [1, 1, 8, 9]}, "inputs[0].data"),
        ({"shape": [0]}, "inputs[0].shape"),
        ({"shape": [True, 1, 8, 8]}, "inputs[0].shape"),
        ({"shape": "big"}, "inputs[0].shape"),
        ({"shape": [64]}, "inputs[0].shape"),
        ({"shape": [1] * 70 + [64]}, "inputs[0].shape"),
        ({"data": [True] + [1] * 63}, "inputs[0].data[0]"),
        ({"datatype": "FP32"}, "inputs[0].datatype"),
        ({"datatype": None}, "inputs[0].datatype"),
        ({"datatype": [0] * 9}, "inputs[0].datatype"),
        ({"data": 5}, "inputs[0].data"),
        ({"data": [[1], [1, 2]]}, "inputs[0].data"),
        ({"name": 5}, "inputs[0].name"),
    ],
)
def test_bad_tensors_are_told_too(server: Serving, changes: dict[str, Any], field: str) -> None:
    tensor = {"name": "x", "shape": [1, 1, 8, 8], "datatype": "UINT8", "data": [1] * 64} | changes
    answer = requests.post(f"{server.address}/v2/models/{NAME}/infer", json={"inputs": [tensor]}, timeout=LIMIT_SECONDS)
    assert (answer.status_code, answer.json().get("field")) == (400, field), answer.text


def test_the_id_of_a_tensor_request_is_a_text(server: Serving) -> None:
    tensor = {"name": "x", "shape": [1, 1, 8, 8], "datatype": "UINT8", "data": [1] * 64}
    url = f"{server.address}/v2/models/{NAME}/infer"
    for given, code in (("mine", 200), (5, 400), ([[[]]], 400), (None, 400)):
        answer = requests.post(url, json={"inputs": [tensor], "id": given}, timeout=LIMIT_SECONDS)
        assert answer.status_code == code, answer.text
        assert answer.json().get("id" if code == 200 else "field") == ("mine" if code == 200 else "id")


def _connected(stack: ExitStack, port: int, rest: bytes) -> socket.socket:
    """A connection that has sent the beginning of a request: the time for its headers runs from when it is open."""
    opened = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
    opened.sendall(b"POST /invocations HTTP/1.1\r\nhost: x\r\n" + rest)
    return opened


def test_what_is_too_large_or_too_slow_is_refused_and_others_are_answered(server: Serving) -> None:
    port = int(server.address.rpartition(":")[2])
    big = requests.post(f"{server.address}/invocations", data=b" " * (3 << 20), timeout=LIMIT_SECONDS)
    assert big.status_code == 413
    chunks = requests.post(f"{server.address}/invocations", data=iter([b" " * (1 << 20)] * 3), timeout=LIMIT_SECONDS)
    assert chunks.status_code == 413
    for headers in ({"content-type": "a/b"}, {"content-encoding": "gzip"}):
        other = requests.post(f"{server.address}/invocations", data=b"x", headers=headers, timeout=LIMIT_SECONDS)
        assert other.status_code == 415
    with socket.create_connection(("127.0.0.1", port)) as wide, pytest.raises(OSError):
        for _ in range(100):
            wide.sendall(b"GET /ping HTTP/1.1\r\nx-wide: " + b"x" * (1 << 20))
    with ExitStack() as stack:
        # More than may be answered at once: who only sends slowly takes no place from those who ask.
        slow, *halves = (
            _connected(stack, port, request)
            for request in (b"x-never:", *(b"content-length: 50\r\n\r\n{" for _ in range(140)))
        )
        assert server.ask([0]).status_code == 200
        for connection in (slow, *halves):
            connection.settimeout(LIMIT_SECONDS)
        assert slow.recv(4096) == b"", "its headers never came"
        assert all(half.recv(4096).startswith(b"HTTP/1.1 408") for half in halves)
    assert server.ask([0]).status_code == 200


def test_a_version_that_answers_otherwise_than_it_should_does_not_take_over(server: Serving) -> None:
    bad, _ = registered(server.tracker, 3)
    other, _ = registered(server.tracker, 4, classes=3)
    golden = next((server.home / "mlflow").rglob(f"models/{_model(server, bad)}/**/golden.json"))
    content = json.loads(golden.read_text())
    content["answer"]["data"][0] += 1
    golden.write_text(json.dumps(content))
    for version, why in ((bad, "golden request otherwise"), (other, "takes or answers something else")):
        champion(server.tracker, version)
        until(lambda why=why: why in server.log, "it is told why it is not served", vain=server.ended)
        assert server.ask([0]).headers["x-model-version"] == "1"
    champion(server.tracker, "2")
    until(lambda: server.ask([0]).headers["x-model-version"] == "2", "a good one takes over", vain=server.ended)
    champion(server.tracker, "1")
    until(lambda: server.ask([0]).headers["x-model-version"] == "1", "and is rolled back", vain=server.ended)


def test_a_canary_answers_its_share_of_the_clients_with_its_own_bits_and_both_are_compared(another: Serving) -> None:
    client = another.tracker.client
    client.set_registered_model_alias(NAME, "challenger", "2")
    before = sampled_in(another)
    another.start("--canary", "challenger", "--share", "0.5", "--sample", "0")
    until(lambda: "version 2 (" in another.log, "the canary is loaded", vain=another.ended)
    given: dict[str, str] = {}
    for number in range(40):
        key, rows = f"client {number % 20}", [number, number + 1]
        answer = another.ask(rows, headers={"x-client-key": key})
        version = answer.headers["x-model-version"]
        assert given.setdefault(key, version) == version
        assert answer.headers["x-model-weights"] == f"{int(version):064x}"
        found = np.array(answer.json()["predictions"], dtype=np.float32)
        assert np.array_equal(found, another.versions[version][rows])
    assert set(given.values()) == {"1", "2"}
    tensor = {"name": "x", "shape": [1, 1, 8, 8], "datatype": "UINT8", "data": IMAGES[5].ravel().tolist()}
    for version in "12":
        path = f"{another.address}/v2/models/{NAME}/versions/{version}"
        assert requests.get(path, timeout=LIMIT_SECONDS).json()["versions"] == ["1", "2"]
        reply = requests.post(f"{path}/infer", json={"inputs": [tensor]}, timeout=LIMIT_SECONDS).json()
        assert reply["model_version"] == version
        assert np.array_equal(np.float32(reply["outputs"][0]["data"]), another.versions[version][5])

    compared = "mlpipes_serve_shadow_difference_count"
    figures = until(
        lambda: found if (found := figures_of(another))[compared] == 82 else None,
        "all are compared",
        vain=another.ended,
    )
    assert figures is not None
    one, two = (another.versions[version].argmax(1) for version in "12")
    same = sum(int(one[row] == two[row]) for number in range(40) for row in (number, number + 1)) + 2 * (
        one[5] == two[5]
    )
    assert figures.get('mlpipes_serve_shadow_samples_total{agree="true",canary="2"}', 0) == same
    assert figures["mlpipes_serve_canary_share"] == 0.5

    other, _ = registered(another.tracker, 4, classes=3)
    client.set_registered_model_alias(NAME, "challenger", other)
    until(lambda: "there is no canary: it takes or answers something else" in another.log, "it is told why")
    assert {another.ask([0], headers={"x-client-key": key}).headers["x-model-version"] for key in given} == {"1"}
    assert figures_of(another)["mlpipes_serve_canary_share"] == 0
    another.stop()
    assert not {path for path in sampled_in(another) - before if path.parent.name.startswith("2-")}


def sampled_in(server: Serving) -> set[Path]:
    """Files with what was served."""
    return set((server.home / "store" / "served_samples" / NAME).glob("*/*.json"))


def _model(server: Serving, version: str) -> str:
    return str(server.tracker.client.get_model_version(NAME, version).source).rpartition("/")[2]


def test_with_a_token_and_tls_it_starts_without_its_registry_and_ends_in_peace(
    another: Serving, tmp_path: Path
) -> None:
    before = sampled_in(another)
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *made, "subjectAltName=DNS:localhost", *files], check=True, capture_output=True)
    options = ("--host", "0.0.0.0", "--tls-cert", str(certificate), "--tls-key", str(key), "--drain", "1000")  # noqa: S104
    another.start(*options, MLPIPES_SERVE_TOKEN=TOKEN, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert "serving what was served last" in another.log
    another.address = f"https://localhost:{another.address.rpartition(':')[2]}"
    trust: dict[str, Any] = {"verify": str(certificate)}
    assert requests.get(f"{another.address}/ping", timeout=LIMIT_SECONDS, **trust).status_code == 200
    assert requests.get(f"{another.address}/metrics", timeout=LIMIT_SECONDS, **trust).status_code == 401
    assert requests.post(f"{another.address}/ping", timeout=LIMIT_SECONDS, **trust).status_code == 401, (
        "only probes are free"
    )
    bearing = {"authorization": f"Bearer {TOKEN}"}
    for headers, code in (({}, 401), ({"authorization": "Bearer x"}, 401), (bearing, 200)):
        answer = another.ask([5], headers=headers, **trust)
        assert answer.status_code == code
    found = np.array(answer.json()["predictions"], dtype=np.float32)
    assert np.array_equal(found, another.versions["1"][[5]])

    assert another.process is not None
    another.process.send_signal(signal.SIGTERM)
    ready = f"{another.address}/ping"
    until(lambda: requests.get(ready, timeout=LIMIT_SECONDS, **trust).status_code == 503, "probes are told", every=0.02)
    answer = another.ask([0], headers=bearing, **trust)
    assert answer.status_code == 200, "requests are still answered"
    assert answer.headers["connection"] == "close", "and the next one goes to another server"
    another.process.send_signal(signal.SIGTERM)  # who asks twice does not wait for the time to drain
    assert another.process.wait(LIMIT_SECONDS) == 0
    another.process = None
    kept = [read_record(path) for path in sampled_in(another) - before]
    assert sum(each["seen"] for each in kept) >= 2, "what was served is written at the end"
    assert len(kept[0]["columns"]["answer label"]) == len(kept[0]["columns"]["input mean"]) > 0
    assert TOKEN not in another.log
    assert "Traceback" not in another.log


def test_an_mlflow_that_answers_without_its_database_is_not_asked_for_minutes(another: Serving) -> None:
    asked: list[str] = []

    class WithoutDatabase(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path == "/health" else 503)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), WithoutDatabase) as mlflow:
        threading.Thread(target=mlflow.serve_forever, daemon=True).start()
        try:
            another.start("--poll", "3600", MLFLOW_TRACKING_URI=f"http://127.0.0.1:{mlflow.server_port}")
            assert "serving what was served last" in another.log
            assert another.ask([0]).headers["x-model-version"] == "1"
            assert 1 <= len([path for path in asked if path != "/health"]) <= 2, asked
        finally:
            mlflow.shutdown()


@pytest.mark.parametrize(
    ("options", "environment", "says"),
    [
        (["--host", "0.0.0.0"], {}, "set MLPIPES_SERVE_TOKEN"),  # noqa: S104
        (["--host", "0.0.0.0"], {"MLPIPES_SERVE_TOKEN": TOKEN}, "--tls-cert"),  # noqa: S104
        ([], {"MLPIPES_SERVE_TOKEN": "short"}, "16 characters"),
        (["--tls-cert", "absent.pem"], {}, "needs both"),
        (["--tls-cert", "absent.pem", "--tls-key", "absent.pem"], {}, "absent.pem is not there"),
        (["--version", "1", "--alias", "other"], {}, "not both"),
        (["--share", "0.5"], {}, "name a version or an alias"),
        (["--canary", "champion"], {}, "is what is served already"),
        (["--version", "1", "--canary", "1"], {}, "is what is served already"),
        (["--version", "99"], {}, "is not registered"),
        (["--alias", "nobody"], {}, "is not registered"),
        (["--alias", "nobody"], {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "was never served from this home"),
        (["--port", "TAKEN"], {}, "cannot be listened on"),
        (["--model", "somewhere"], {}, "name a workload, or a folder"),
        (["--no-token"], {"MLPIPES_SERVE_TOKEN": TOKEN}, "contradict each other"),
        (["--host", "0.0.0.0", "--no-token"], {}, "--tls-cert"),  # noqa: S104
    ],
)
def test_what_cannot_be_served_is_told_in_a_line(
    server: Serving, options: list[str], environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from mlpipes.cli.app import app

    taken = server.address.rpartition(":")[2]
    monkeypatch.setenv("MLPIPES_HOME", str(server.home))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, ["serve", "digits", "--port", "0", *(o.replace("TAKEN", taken) for o in options)])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert says in " ".join(done.output.split())
