"""How many come before a job in a queue of Kueue: as Kueue says, or counted where the queue is short."""

from typing import Any

import pytest

from mlpipes.compute.kubernetes_api import KubernetesApi, RefusedError
from mlpipes.compute.kubernetes_queue import ahead, ahead_of, workload_of
from mlpipes_tests.compute.kubernetes_objects import settings, workload

QUEUED = [workload(1), workload(2), workload(3, priority=5), workload(4, queueName="other"), workload(5), workload(9)]
VISIBLE = "/apis/visibility.kueue.x-k8s.io"
WORKLOADS = "/apis/kueue.x-k8s.io/v1beta2/namespaces/default/workloads"


class Answers:
    """An API server that has some things, forbids some, and is not there for others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, things: dict[str, Any]) -> None:
        self.things, self.asked = things, list[tuple[str, dict[str, str]]]()
        monkeypatch.setattr(KubernetesApi, "_request", self.request)
        self.api = KubernetesApi(settings(), patience_seconds=0)

    def request(self, method: str, path: str, query: dict[str, str], *_: Any) -> Any:
        self.asked.append((path, query))
        found = self.things.get(path, RefusedError(f"{path} is not there", 404))
        if isinstance(found, Exception):
            raise found
        return found


def listed(items: list[Any], more: str = "") -> dict[str, Any]:
    return {"metadata": {"continue": more}, "items": items}


def pending(*names: str) -> dict[str, Any]:
    return listed([{"metadata": {"name": name}, "positionInLocalQueue": at} for at, name in enumerate(names)])


KUEUE = {"/apis/kueue.x-k8s.io": {"preferredVersion": {"version": "v1beta2"}}}
TELLS = {VISIBLE: {"preferredVersion": {"version": "v1beta2"}}}
TOLD = f"{VISIBLE}/v1beta2/namespaces/default/localqueues/training/pendingworkloads"


@pytest.mark.parametrize(
    ("things", "expected"),
    [
        (TELLS | {TOLD: pending("w1", "w5", "w9")}, 1),
        (TELLS | {TOLD: pending("w1"), WORKLOADS: listed(QUEUED)}, 3),  # not told of yet
        (TELLS | {TOLD: RefusedError("forbidden", 403), WORKLOADS: listed(QUEUED)}, 3),
        (TELLS | {TOLD: ConnectionError("503"), WORKLOADS: listed(QUEUED)}, 3),
        ({WORKLOADS: listed(QUEUED)}, 3),
        ({WORKLOADS: listed(QUEUED, "more")}, None),
        ({WORKLOADS: RefusedError("forbidden", 403)}, None),
    ],
)
def test_how_many_come_before(monkeypatch: pytest.MonkeyPatch, things: dict[str, Any], expected: int | None) -> None:
    assert ahead(Answers(monkeypatch, KUEUE | things).api, workload(5)) == expected


def test_who_is_of_higher_priority_or_older_comes_before() -> None:
    assert ahead_of(workload(5), QUEUED) == 3
    assert ahead_of(workload(3, priority=5), QUEUED) == 0


def test_only_the_jobs_own_workload_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(monkeypatch, KUEUE | {WORKLOADS: listed([workload(5)])})
    assert workload_of(answers.api, {"metadata": {"uid": "u5"}}) == workload(5)
    assert answers.asked[-1] == (WORKLOADS, {"labelSelector": "kueue.x-k8s.io/job-uid=u5"})
    assert workload_of(Answers(monkeypatch, {}).api, {"metadata": {"uid": "u5"}}) is None
