"""An API server in trouble: answers that break off, logs of a node that is away, rights that it does not know yet."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from mlpipes.compute import kubernetes
from mlpipes.compute.jobs import JobHandle, JobState
from mlpipes.compute.kubernetes import KubernetesJobs
from mlpipes.compute.kubernetes_api import KubernetesApi, RefusedError
from mlpipes.compute.kubernetes_manifest import FOLDER_ANNOTATION
from mlpipes.scales import RayScaleConfig
from mlpipes_tests.compute.kubernetes_objects import job, settings

W2 = RayScaleConfig.from_key("w2-b128-e3-g0")
Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """What is told to be an API server: it answers each request as the next of its answers does."""

    def __init__(self) -> None:
        self.answers, self.asked = list[Answer](), list[str]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                outer.answers.pop(0)(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def kubeconfig(self) -> str:
        address = f"http://127.0.0.1:{self.server.server_port}"
        context = {"name": "x", "context": {"cluster": "x", "user": "x"}}
        users, clusters = [{"name": "x", "user": {}}], [{"name": "x", "cluster": {"server": address}}]
        return json.dumps({"users": users, "clusters": clusters, "contexts": [context], "current-context": "x"})


def says(code: int, body: str, missing: int = 0) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        request.send_header("content-type", "application/json")
        request.send_header("content-length", str(len(body) + missing))
        request.end_headers()
        request.wfile.write(body.encode())
        request.close_connection = True

    return answer


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    Thread(target=made.server.serve_forever, daemon=True).start()
    (tmp_path / "kubeconfig").write_text(made.kubeconfig())
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_an_answer_that_breaks_off_is_asked_for_again(server: Server) -> None:
    server.answers = [
        says(200, '{"items": [', missing=100),
        says(200, '{"items": ['),
        says(200, '{"items": [{"a": 1}]}'),
    ]
    assert KubernetesApi(settings(), patience_seconds=60).items("/api/v1/nodes") == [{"a": 1}]
    assert len(server.asked) == 3
    server.answers = [says(200, "{", missing=100)]
    with pytest.raises(ConnectionError, match="broke off within an answer"):
        KubernetesApi(settings(), patience_seconds=0).items("/api/v1/nodes")


def test_the_log_of_a_pod_whose_node_is_away_is_asked_for_once(server: Server) -> None:
    away = json.dumps({"kind": "Status", "message": "dial tcp 10.0.0.1:10250: i/o timeout"})
    server.answers = [says(500, away)]
    assert "10250: i/o timeout" in KubernetesApi(settings(), patience_seconds=60).log("head-x", 5)
    assert server.asked == ["/api/v1/namespaces/default/pods/head-x/log?tailLines=5"]


class Api:
    """An API server that forbids what it allowed before, for as long as a test wants it to."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found, self.refusal = found, 0
        self.replaced, self.forbidden = list[str](), 0

    def ray_jobs(self, name: str = "") -> str:
        return f"/rayjobs/{name}"

    def ray_clusters(self, name: str) -> str:
        return f"/rayclusters/{name}"

    def core(self, plural: str, *_: str) -> str:
        return f"/{plural}"

    def find(self, path: str) -> dict[str, Any]:
        if self.refusal == 403:
            self.forbidden += 1
            raise RefusedError(f"Kubernetes forbids GET {path}", 403)
        return self.found

    def items(self, path: str, **_: str) -> list[dict[str, Any]]:
        return []

    def stream(self, *_: Any) -> Iterator[bytes]:
        raise RefusedError("no watch", 403)

    def replace(self, path: str, field: str, value: Any) -> None:
        if self.refusal in (404, 409):
            raise RefusedError(f"{path} is another one now", self.refusal)
        self.replaced.append(f"{path} {value}")


def jobs_at(tmp_path: Path, **own: Any) -> tuple[KubernetesJobs, Api]:
    found = job("Running", "RUNNING", rayClusterName="c")
    found["metadata"]["annotations"] = {FOLDER_ANNOTATION: str(tmp_path)}
    made = KubernetesJobs(settings(poll_seconds=0.001, **own), W2)
    api = Api(found)
    made.api = api  # type: ignore[assignment]
    return made, api


def test_what_was_allowed_before_may_be_forbidden_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, api = jobs_at(tmp_path)
    handle = JobHandle("digits-a1", 1, attached=True)
    clock = [1000.0]
    monkeypatch.setattr(kubernetes.time, "monotonic", lambda: clock[0])
    state = jobs.status(handle).state
    assert state in (JobState.RUNNING, JobState.PENDING)
    api.refusal = 403
    for _ in range(10):
        clock[0] += 10
        assert jobs.status(handle).state == state
    assert api.forbidden == 10
    api.refusal, clock[0] = 0, clock[0] + 100
    assert jobs.status(handle).state == state, "it is known again"
    api.refusal, clock[0] = 403, clock[0] + 500
    assert jobs.status(handle).state == state, "and the time begins anew"
    clock[0] += 130
    with pytest.raises(RefusedError, match="forbids"):
        jobs.status(handle)
    never_seen, api = jobs_at(tmp_path)
    api.refusal = 403
    with pytest.raises(RefusedError, match="forbids"):
        never_seen.status(handle)


def test_a_ray_cluster_that_was_just_replaced_is_asked_for_more_workers_later(tmp_path: Path) -> None:
    jobs, api = jobs_at(tmp_path)
    for refusal in (404, 409):
        api.refusal = refusal
        jobs._grow(api.found)
    assert api.replaced == []
    api.refusal = 0
    for _ in range(2):
        jobs._grow(api.found)
    assert api.replaced == ["/rayclusters/c 2"]
