"""What Kubernetes itself can lose under a training, one by one and all at once: the same bits come out each time.

A fault strikes while the training waits at a barrier, and stays until it has gone on as far as it can without what is gone.
At random moments, again and again: `python -m mlpipes_tests.chaos.kubernetes`.
"""

from contextlib import ExitStack
from typing import Any

import pytest

from mlpipes_tests.cluster import conftest, queues, trainings
from mlpipes_tests.cluster.cluster import Cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.cluster.faults import FAULTS, until_at_rest
from mlpipes_tests.cluster.trainings import EARLY, LATE, TWO, Training, assert_equal, started

pytestmark = pytest.mark.cluster
cluster, namespace, expected = conftest.cluster, conftest.namespace, trainings.expected
REPLACED = {
    "network of a node": 1,
    "frozen node": 1,
    "node of the head": 2,
    "kubelet": None,
    "API server": None,
    "etcd": None,
    "controllers": 1,
    "KubeRay": 1,
    "Kueue": None,
    "everything": 2,
}
"""The attempt whose workers start after each fault, before anything is mended; none where nobody notices."""


@pytest.mark.parametrize("fault", REPLACED)
def test_whatever_the_cluster_loses_the_same_model_comes_out(
    cluster: Cluster, namespace: Namespace, expected: dict[str, Any], fault: str
) -> None:
    queue, attempt = {"queue": queues.NAME} if fault == "Kueue" else {}, REPLACED[fault]
    with ExitStack() as afterwards:
        if queue:
            cluster.kubectl.apply(queues.queue(namespace.name, {"cpu": "2", "memory": "32Gi"}))
            afterwards.callback(cluster.kubectl, "delete", *queues.of_cluster(namespace.name), "--wait=false")
        training = Training(cluster, namespace, TWO, placement="spread", **queue)
        training.barriers.close(EARLY, LATE)
        run = training.run()
        training.until_barrier(EARLY)
        with FAULTS[fault](training):
            if attempt is not None:
                folder, times = training.folder(), 2 if attempt == 1 else 1
                training.until(lambda: started(folder, attempt, times), "other workers train")
            training.barriers.open(EARLY)
            training.until_barrier(LATE)
        training.barriers.open()
        assert training.end(run) == 0, training.log()[-5000:]
        assert_equal(training.outcome(), expected)
        training.assert_nothing_is_left()
    until_at_rest(cluster)
