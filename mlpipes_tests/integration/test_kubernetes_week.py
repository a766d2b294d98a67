"""What any cluster has every week, all of it in one training: `make test-week`, the one test on a cluster that CI runs.

Each fault strikes while the training waits at a barrier; at random moments, again and again: `make chaos-cluster`.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mlpipes.store.layout import TrainingFolder
from mlpipes.store.messages import Started, read_messages
from mlpipes_tests.cluster import conftest, queues, trainings
from mlpipes_tests.cluster.cluster import Cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.cluster.faults import FAULTS
from mlpipes_tests.cluster.trainings import TWO, Training, assert_equal

pytestmark = pytest.mark.cluster
cluster, namespace, expected = conftest.cluster, conftest.namespace, trainings.expected
WEEK = {0.15: "worker pod", 0.3: "run", 0.45: "drain", 0.6: "head pod", 0.75: "preemption", 0.9: "node of a worker"}
"""The faults, by the place at which the training waits for each."""
ASKING = ("drain", "preemption")
"""Before these take a pod, they ask for a last checkpoint, which a training that waits could not make."""


@pytest.fixture
def training(cluster: Cluster, namespace: Namespace) -> Iterator[Training]:
    cluster.kubectl.apply(queues.queue(namespace.name, {"cpu": "700m", "memory": "16Gi"}))
    cluster.kubectl.apply(queues.priority("low", 10))
    yield Training(cluster, namespace, TWO, queue=queues.NAME, queue_priority="low", placement="spread")
    cluster.kubectl("delete", *queues.of_cluster(namespace.name), "--wait=false")


def attempts(folder: TrainingFolder) -> int:
    return len(list(folder.messages(0).parent.glob("a*.jsonl")))


def starts(folder: TrainingFolder) -> int:
    """How often workers have begun to train."""
    found = [read_messages(folder.messages(attempt))[0] for attempt in range(1, attempts(folder) + 1)]
    return sum(isinstance(message, Started) for messages in found for message in messages)


def open_when_asked(training: Training, attempt: int, place: float) -> None:
    """Let a training go on once it is asked for a last checkpoint."""
    training.until(training.folder().stop_request(attempt).exists, "a last checkpoint is asked for")
    training.barriers.open(place)


def strike(training: Training, fault: str, pool: ThreadPoolExecutor, place: float) -> None:
    """Let a fault happen to the training that waits at a place, until other workers train."""
    folder = training.folder()
    before = starts(folder)
    if fault in ASKING:
        pool.submit(open_when_asked, training, attempts(folder), place)
    with FAULTS[fault](training):
        training.until(lambda: starts(folder) > before, f"other workers train after the fault {fault!r}")


def test_after_a_week_of_faults_it_is_the_same_model(training: Training, expected: dict[str, Any]) -> None:
    training.barriers.close(*WEEK)
    run = training.run()
    with ThreadPoolExecutor(1) as pool:
        for place, fault in WEEK.items():
            training.until_barrier(place)
            if fault == "run":
                job = training.job()
                run.kill()
                run = training.run()
                training.until_said(f"Attached to RayJob {job}")
            else:
                strike(training, fault, pool, place)
            training.barriers.open(place)
    assert training.end(run) == 0, training.log()[-5000:]
    assert_equal(training.outcome(), expected)
    assert training.outcome()["attempt"] >= 3, (
        "of the head pod and the preemption, and more if workers were beside the head"
    )
    training.assert_nothing_is_left()
