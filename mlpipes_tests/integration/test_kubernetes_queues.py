"""Queues of Kueue on a real Kubernetes: who is more urgent goes first, a team lends and takes back, a gang waits whole."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpipes_tests.cluster import conftest, queues, trainings
from mlpipes_tests.cluster.cluster import Cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.cluster.trainings import EARLY, LATE, ONE, TWO, Training, assert_equal, cancel, started

pytestmark = pytest.mark.cluster
cluster, namespace, expected = conftest.cluster, conftest.namespace, trainings.expected
OURS, THEIRS = "ours", "theirs"
"""Two teams' queues."""


@pytest.fixture
def queue(cluster: Cluster, namespace: Namespace) -> Iterator[str]:
    """A queue in the namespace that has room for one training, and two priorities."""
    cluster.kubectl.apply(queues.queue(namespace.name, {"cpu": "700m", "memory": "16Gi"}))
    cluster.kubectl.apply([queues.priority("urgent", 1000), queues.priority("low", 10)])
    yield queues.NAME
    cluster.kubectl("delete", *queues.of_cluster(namespace.name), "--wait=false")


def test_preempted_in_a_queue_it_waits_and_goes_on(
    cluster: Cluster,
    namespace: Namespace,
    queue: str,
    expected: dict[str, Any],
) -> None:
    training = Training(cluster, namespace, TWO, queue=queue, queue_priority="low")
    training.barriers.close(EARLY)
    run = training.run()
    training.until_barrier(EARLY)
    cluster.kubectl.apply(queues.urgent_job(namespace.name))
    training.until(training.folder().stop_request(1).exists, "a last checkpoint is asked for")
    training.barriers.open(EARLY)
    training.barriers.close(LATE)
    training.until_said("reempted")
    training.until_said("and waits for quota in queue training: 0 ahead")
    (namespace.store / "urgent").touch()
    training.until_barrier(LATE)
    assert started(training.folder(), 2), "another attempt of the same RayJob"
    cluster.kubectl("delete", "job", "urgent", f"--namespace={namespace.name}")
    training.barriers.open()
    assert training.end(run) == 0, training.log()[-5000:]
    assert_equal(training.outcome(), expected)
    assert training.outcome()["attempt"] == 2
    assert training.job().endswith("-a1")
    training.assert_nothing_is_left()


def test_the_more_urgent_of_two_that_wait_goes_first(
    cluster: Cluster,
    namespace: Namespace,
    queue: str,
    expected: dict[str, Any],
) -> None:
    training = Training(cluster, namespace, TWO, queue=queue, queue_priority="low")
    training.barriers.close(EARLY)
    cluster.kubectl.apply(queues.urgent_job(namespace.name))
    training.before |= {"job.batch/urgent"}
    low = training.run()
    training.until_said("waits for quota in queue training: 0 ahead")
    training.change(queue_priority="urgent")
    training.scale = ONE
    urgent = training.run()
    training.until_said("waits for quota in queue training: 0 ahead")
    training.until(
        lambda: "waits for quota in queue training: 1 ahead" in training.log(1), "the other one waits longer"
    )
    (namespace.store / "urgent").touch()
    training.until_barrier(EARLY)
    assert started(training.folder(ONE), 1)
    assert not started(training.folder(TWO), 1), "what is less urgent has not begun"
    cluster.kubectl("delete", "job", "urgent", f"--namespace={namespace.name}")
    training.barriers.open()
    assert training.end(urgent) == 0, training.log()[-5000:]
    assert training.end(low) == 0, training.log(1)[-5000:]
    for scale in (ONE, TWO):
        training.scale = scale
        assert_equal(training.outcome(), expected)
    training.assert_nothing_is_left()


@pytest.fixture
def teams(cluster: Cluster, namespace: Namespace) -> Iterator[None]:
    """Two teams, neither of which could train with two workers alone."""
    quota = {"cpu": "400m", "memory": "16Gi"}
    cluster.kubectl.apply(queues.teams(namespace.name, {OURS: quota, THEIRS: quota}))
    cluster.kubectl.apply(queues.priority("urgent", 1000))
    yield
    names = [f"clusterqueue/{namespace.name}-{team}" for team in (OURS, THEIRS)]
    cluster.kubectl("delete", *names, f"resourceflavor/{namespace.name}", "--wait=false")


def test_what_a_team_has_borrowed_it_gives_back_and_a_gang_waits_whole(
    cluster: Cluster,
    namespace: Namespace,
    teams: None,
    expected: dict[str, Any],
) -> None:
    training = Training(cluster, namespace, TWO, queue=OURS)
    training.barriers.close(EARLY)
    run = training.run()
    training.until_barrier(EARLY)
    cluster.kubectl.apply(queues.urgent_job(namespace.name, THEIRS, "400m"))
    training.until(training.folder().stop_request(1).exists, "a last checkpoint is asked for")
    training.barriers.open(EARLY)
    training.barriers.close(LATE)
    training.until_said(f"and waits for quota in queue {OURS}: 0 ahead")
    of_it = f"mlpipes.io/job={training.job()}"
    training.until(lambda: not cluster.kubectl.objects("pods", namespace.name, selector=of_it), "its pods are gone")
    cluster.kubectl.wait_for(
        "job", "urgent", lambda job: job["status"].get("ready"), "runs", namespace=namespace.name, vain=training.in_vain
    )
    # 400m are free, which is enough for the head and one worker: none of them is there.
    assert not cluster.kubectl.objects("pods", namespace.name, selector=of_it)
    (namespace.store / "urgent").touch()
    training.until_barrier(LATE)
    cluster.kubectl("delete", "job", "urgent", f"--namespace={namespace.name}")
    training.barriers.open()
    assert training.end(run) == 0, training.log()[-5000:]
    assert_equal(training.outcome(), expected)
    assert training.outcome()["attempt"] == 2
    training.assert_nothing_is_left()


def test_cancelled_while_it_waits_in_a_queue_it_leaves_nothing(
    cluster: Cluster,
    namespace: Namespace,
    queue: str,
) -> None:
    training = Training(cluster, namespace, ONE, queue=queue, queue_priority="low")
    cluster.kubectl.apply(queues.urgent_job(namespace.name))
    training.before = training.things() | {"job.batch/urgent"}
    cluster.kubectl.wait_for(
        "job", "urgent", lambda job: job.get("status", {}).get("active"), "is admitted", namespace=namespace.name
    )
    training.before |= training.things()
    run = training.run()
    training.until_said("waits for quota in queue training: 0 ahead")
    (status,) = statuses(training)
    assert "waits for quota in queue training" in status
    cancel(training, run)
    training.end(run)
    training.assert_nothing_is_left()
    assert not list(training.folder().claim(0).parent.glob("*.claim")), "it never ran"


def statuses(training: Training) -> list[str]:
    """The remarks below the table of `mlpipes status`."""
    command = [Path(sys.executable).parent / "mlpipes", "status"]
    environment = training.environment | {"COLUMNS": "300"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if " waits: " in line]
