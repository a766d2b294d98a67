"""`make chaos-cluster N=10`: trainings at a desk on a real Kubernetes, struck by everything at random moments, into a table.

Run as root as `python -m mlpipes_tests.chaos.kubernetes ROUNDS [ROUNDS OF THE RARE ONES] [SEED] [FAULT …]`.

The chart's webserver launches a training of two workers, which waits in a queue. In each round each of the frequent faults
strikes it once, in a random order, some seconds after it has got on again; then the rare ones do. A training that is nearly
done is let come to its end, compared with an uninterrupted one in this process, and followed by another. Exits with 1 if
anything differed, or got no further.
"""

import random
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlpipes.store.layout import Store, TrainingFolder
from mlpipes.store.messages import EpochEnded, Progressed, Started
from mlpipes_tests.chaos.runs import Trainings
from mlpipes_tests.cluster import faults, queues
from mlpipes_tests.cluster.chart import Desk
from mlpipes_tests.cluster.cluster import Cluster, kubernetes_cluster
from mlpipes_tests.cluster.conftest import Namespace, make_namespace
from mlpipes_tests.cluster.faults import FAULTS, Fault, Target, delete
from mlpipes_tests.cluster.kubectl import Manifest
from mlpipes_tests.cluster.nodes import CONTROL
from mlpipes_tests.sandbox import graphql
from mlpipes_tests.training.harness import make_job, run_here
from mlpipes_tests.waiting import until

EPOCHS = 600
SCALE, REFERENCE = f"w2-b128-e{EPOCHS}-g0", f"w1-b128-e{EPOCHS}-g0"
FREQUENT = ("worker pod", "head pod", "node of a worker", "run pod", "preemption", "drain")
"""What any cluster has every week."""
PARTS = ("webserver", "daemon", "code", "postgres", "mlflow")
"""The chart's pods."""
AWAY = "postgres away"
"""The database for a minute, which is longer than Dagster's client tries."""
_UNNOTICED = {"API server", "etcd", "Kueue", "kubelet", "run pod", *PARTS, AWAY}
"""What workers train on through."""
_NEARLY_DONE = 0.85
_LOOK_SECONDS = 20.0
"""How often it is asked whether a run has failed for good."""
_REPEATED_SECONDS = 180.0
"""How long after a run has failed another one may come that goes on."""
_MANY = {"dagster/max_retries": "1000"}
_RUN_PODS = "app.kubernetes.io/component=run_worker"


@dataclass
class Row:
    """What one fault did."""

    fault: str
    problem: str = ""
    noticed: float = 0.0
    """Seconds from the fault until it was there, or known: the node counted as lost, the drain was over."""
    seconds: float = 0.0
    """Seconds from the fault to the next step that no worker had done before; from the other job's end at a preemption."""
    repeated: int = 0
    """Steps that were done again."""

    def __str__(self) -> str:
        figures = (
            f"next new step after {self.seconds:.0f} s (noticed after {self.noticed:.0f} s), {self.repeated} repeated"
        )
        return f"{self.fault:18s} {self.problem or figures}"


class Campaign(Trainings):
    """Trainings at a chart's desk, of which one is under way."""

    workload, scale = "digits", SCALE

    def __init__(self, cluster: Cluster, namespace: Namespace, expected: dict[str, Any]) -> None:
        self.cluster, self.namespace, self.expected = cluster, namespace, expected
        self.desk = Desk(cluster, namespace)
        self.store = Store(self.desk.home / "store")
        self.strikes = 0
        """Of the training that is under way."""
        self.run_id = ""
        self.folder: TrainingFolder | None = None
        self._asked, self._goes_on = 0.0, time.monotonic()

    def install(self) -> None:
        """Install the desk, and the queue that its trainings wait in."""
        file = self.namespace.store / "scales.yaml"
        file.write_text(yaml.safe_dump({self.workload: [self.scale]}))
        values = self.desk.values
        values["environment"] = values["environment"] | {"MLPIPES_SCALES": str(file)}
        values["dagster"] = {"runs": {"resources": {"requests": {"cpu": "200m", "memory": "1Gi"}}}}
        # The database is on a node that stays, as docs/kubernetes.md advises; everything else may be on one that is struck.
        control = {"key": "node-role.kubernetes.io/control-plane", "operator": "Exists", "effect": "NoSchedule"}
        values["postgres"] |= {"nodeSelector": {"kubernetes.io/hostname": CONTROL}, "tolerations": [control]}
        values["training"] |= {"queue": queues.NAME, "queue_priority": "low", "placement": "spread", "save_seconds": 60}
        self.cluster.kubectl.apply(queues.queue(self.namespace.name, {"cpu": "700m", "memory": "16Gi"}))
        self.cluster.kubectl.apply(queues.priority("low", 10))
        self.desk.install()
        self.desk.until_up()

    def ask(self, query: str, **variables: Any) -> Any:
        try:
            with self.desk.forwarded("webserver", 3000) as address:
                return graphql(address, query, **variables)
        except AssertionError as error:  # there is no pod to forward to
            raise OSError(str(error)) from error

    def differences(self, folder: TrainingFolder) -> list[str]:
        with self.desk.forwarded("mlflow", 5000) as self.tracking_uri:
            return super().differences(folder)

    def pods(self, role: str) -> list[Manifest]:
        """The training's pods of a role that are not being deleted."""
        return self._standing(f"ray.io/node-type={role}")

    def _standing(self, selector: str) -> list[Manifest]:
        found = self.cluster.kubectl.objects("pods", self.namespace.name, selector=selector)
        return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]

    def followers(self) -> list[str]:
        """The names of the pods of runs that work."""
        found = self._standing(_RUN_PODS)
        return [pod["metadata"]["name"] for pod in found if pod["status"].get("phase") == "Running"]

    # -- a training --------------------------------------------------------------------------------------------------------
    def begin(self) -> TrainingFolder:
        """Launch a training, and wait until it trains."""
        self.until(self.is_ready, "Dagster can launch runs")
        self.run_id, self.strikes = self.launch(tags=_MANY), 0
        self.folder = folder = self.folder_of(self.run_id)
        self.until_step(folder, lambda: bool(self.new_steps(folder, 0.0, 0)), "it trains")
        return folder

    def nearly_done(self) -> bool:
        """Whether a training is under way that should come to its end."""
        return self.folder is not None and self.last_step(self.folder) > _NEARLY_DONE * self.expected["steps"]

    def finish(self) -> str:
        """Let the training come to its end, and compare; returns what is wrong."""
        assert self.folder is not None
        folder, self.folder = self.folder, None
        self.until_step(folder, folder.result.is_file, "the training has its result")
        self.until_step(folder, lambda: "SUCCESS" in self.family(self.run_id), "its run has succeeded")
        wrong = self.differences(folder)
        until(lambda: not self.cluster.kubectl.objects("rayjobs", self.namespace.name), "its RayJob is gone", every=1)
        attempts = len(list(folder.messages(0).parent.glob("a*.jsonl")))
        print(
            f"training {folder.fingerprint[:8]}, struck {self.strikes} times, attempt {attempts}, "
            f"{len(self.family_ids(self.run_id))} run(s): {f'differs in {wrong}' if wrong else 'same model'}",
            flush=True,
        )
        return f"differs in {', '.join(wrong)}" if wrong else ""

    def new_steps(self, folder: TrainingFolder, after: float, above: int) -> list[float]:
        """When steps above one were reported, after a time."""
        found = [m for m in self.messages(folder) if isinstance(m, Progressed | EpochEnded)]
        return [m.time for m in found if m.time > after and m.step > above]

    def until_step(self, folder: TrainingFolder, condition: Callable[[], Any], what: str) -> None:
        """Wait for the training; in vain if its run has failed for good."""

        def failed() -> str:
            if time.monotonic() < self._asked + _LOOK_SECONDS:
                return ""
            self._asked = time.monotonic()
            statuses = self.family(self.run_id)
            if not statuses or set(statuses) - {"FAILURE", "CANCELED"} or not self.final_failure(self.run_id):
                self._goes_on = time.monotonic()
            # What a sensor repeats comes some seconds later.
            is_over = time.monotonic() > self._goes_on + _REPEATED_SECONDS
            return self.failure(self.run_id)[:1000] if is_over else ""

        self._goes_on = time.monotonic()
        until(condition, what, vain=failed, every=1)

    # -- faults ------------------------------------------------------------------------------------------------------------
    def strike(self, name: str, fault: Fault, chance: random.Random) -> Row:
        """Let a fault happen some seconds after the training has got on, and wait until it gets on again."""
        folder = self.begin() if self.folder is None else self.folder
        faults.until_at_rest(self.cluster)
        self.desk.until_up()
        self.until_step(folder, self.followers, "somebody follows the training")
        settled, last = time.time(), self.last_step(folder)
        self.until_step(folder, lambda: self.new_steps(folder, settled, last), "it gets on")
        time.sleep(chance.uniform(0.5, 6.0))
        self.strikes += 1
        row, began = Row(name), time.time()
        print(f"{time.strftime('%H:%M:%S')} {name} …", flush=True)
        with fault(self) as noticed:
            row.noticed = noticed - began
            back: list[float] = []

            def goes_on() -> bool:
                if name in _UNNOTICED:
                    back[:] = self.new_steps(folder, noticed, self._before(folder, noticed))
                else:
                    started = [m for m in self.messages(folder) if isinstance(m, Started) and m.time > began]
                    row.repeated = max([self._before(folder, m.time) - m.step for m in started], default=0)
                    new = [self.new_steps(folder, m.time, self._before(folder, m.time)) for m in started]
                    back[:] = [at for each in new for at in each]
                return bool(back) or folder.result.is_file()

            self.until_step(folder, goes_on, f"it goes on after the fault {name!r}")
            if back:
                row.seconds = min(back) - (noticed if name == "preemption" else began)
        return row

    def _before(self, folder: TrainingFolder, at: float) -> int:
        """The latest step that was reported up to a time."""
        return max((getattr(m, "step", 0) for m in self.messages(folder) if m.time <= at), default=0)


def _run_pod(campaign: Campaign) -> Fault:
    @contextmanager
    def lost(target: Target) -> Iterator[float]:
        before = campaign.followers()
        delete(target, campaign._standing(_RUN_PODS), "--grace-period=0", "--force")
        yield time.time()
        until(lambda: set(campaign.followers()) - set(before), "another run follows the training", every=1)

    return lost


def _part(campaign: Campaign, part: str) -> Fault:
    @contextmanager
    def lost(target: Target) -> Iterator[float]:
        delete(target, campaign.desk.pods(part), "--grace-period=0", "--force")
        yield time.time()
        campaign.desk.until_up()

    return lost


def _database_away(campaign: Campaign) -> Fault:
    @contextmanager
    def away(target: Target) -> Iterator[float]:
        scale = ("scale", "statefulset/mlpipes-postgres", f"--namespace={campaign.namespace.name}")
        struck = time.time()
        campaign.cluster.kubectl(*scale, "--replicas=0")
        try:
            yield struck
        finally:
            time.sleep(max(0.0, struck + faults.AWAY_SECONDS - time.time()))
            campaign.cluster.kubectl(*scale, "--replicas=1")
        campaign.desk.until_up()

    return away


def rows_of(campaign: Campaign, rounds: int, rare: int, seed: int, only: Sequence[str]) -> Iterator[Row]:
    """Strike, round after round, with all faults or `only` some; yields what each did, and what came out of trainings."""
    chance = random.Random(seed)  # noqa: S311 - for moments, not secrets
    own = {"run pod": _run_pod(campaign)} | {part: _part(campaign, part) for part in PARTS}
    own[AWAY] = _database_away(campaign)
    seldom = [name for name in FAULTS | own if name not in FREQUENT]
    for names in [list(FREQUENT)] * rounds + [seldom] * rare:
        chosen = [name for name in names if name in (only or names)]
        for name in chance.sample(chosen, len(chosen)):
            try:
                if campaign.nearly_done():
                    yield Row("outcome", campaign.finish())
                yield campaign.strike(name, (FAULTS | own)[name], chance)
            except Exception as error:
                traceback.print_exc()
                campaign.folder = None  # another one is begun
                yield Row(name, f"{type(error).__name__}: {str(error)[:300]}")
    if campaign.folder is not None:
        yield Row("outcome", campaign.finish())


def main(rounds: int, rare: int, seed: int, only: Sequence[str]) -> int:
    """Strike, and print what came of it; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # also in the background of a shell, where SIGINT is ignored
        signal.signal(number, signal.default_int_handler)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="chaos-k8s-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)
        expected = run_here(make_job(folder / "reference", REFERENCE, "mlpipes.workloads.image_classification:digits"))
        with kubernetes_cluster(folder / "cluster") as cluster:
            campaign = Campaign(cluster, make_namespace(cluster, "chaos", folder / "store"), expected)
            campaign.install()
            try:
                for row in rows_of(campaign, rounds, rare, seed, only):
                    rows.append(row)
                    print(row, flush=True)
            finally:
                print(f"\n{table(rows)}", flush=True)
    return int(any(row.problem for row in rows))


def table(rows: Sequence[Row]) -> str:
    """The faults, as Markdown."""
    lines = [
        "| fault | went on | s until it was there or known | s to the next new step | steps repeated, max |",
        "| --- | --- | --- | --- | --- |",
    ]
    outcomes = [row for row in rows if row.fault == "outcome"]
    for name in dict.fromkeys(row.fault for row in rows if row.fault != "outcome"):
        mine = [row for row in rows if row.fault == name]
        good = [row for row in mine if not row.problem]
        lines.append(
            f"| {name} | {len(good)}/{len(mine)} | {_spread([row.noticed for row in good])} "
            f"| {_spread([row.seconds for row in good])} | {max([row.repeated for row in good], default=0)} |"
        )
    same = sum(not row.problem for row in outcomes)
    return "\n".join([*lines, f"\n{same} of {len(outcomes)} trainings ended in the same model."])


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.0f} (max {max(seconds):.0f})" if seconds else "–"


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdecimal()]
    faults_given = [word for word in sys.argv[1:] if not word.isdecimal()]
    rounds, rare, seed = (numbers + [1, 1, 0][len(numbers) :])[:3]
    sys.exit(main(rounds, rare, seed, faults_given))
