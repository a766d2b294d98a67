"""An elastic training gains a node while it trains, then loses it: the same model must come out.

Run as `python -m mlpipes_tests.chaos.elastic`. Two Ray nodes with 2 CPUs each run on this machine, as if they were two; the
second one joins while it trains, and is killed later. The scale asks for 4 workers, and is content with 2.
"""

import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mlpipes.compute.address import RayAddress
from mlpipes.compute.preflight import nodes_of
from mlpipes.compute.ray_node import end_marked, own_ip, start_command, start_environment
from mlpipes.errors import PreflightError
from mlpipes.store.layout import TrainingFolder
from mlpipes.store.messages import Started
from mlpipes_tests.chaos.session import Session
from mlpipes_tests.sandbox import CHECKOUT, free_port

EPOCHS = 500
SCALE, REFERENCE = f"w4-b128-e{EPOCHS}-g0", f"w1-b128-e{EPOCHS}-g0"


class TwoNodes:
    """A Ray whose second node comes and goes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.marks = folder, [secrets.token_hex(8), secrets.token_hex(8)]
        self.ip, self.port, self.dashboard = own_ip("192.0.2.1"), free_port(), free_port()
        self.client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        # Its jobs run `python`, which is to be this one.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = os.environ | self.client | {"PATH": path, "PYTHONPATH": str(CHECKOUT)}

    def start(self, node: int) -> None:
        """Start the head (0) or the node that joins it (1)."""
        role = [f"--address={self.ip}:{self.port}", f"--node-ip-address={self.ip}"]
        if node == 0:
            role = ["--head", f"--port={self.port}", f"--node-ip-address={self.ip}", "--dashboard-host=127.0.0.1"]
            role += [f"--dashboard-port={self.dashboard}", f"--temp-dir={tempfile.mkdtemp(prefix='elastic-ray-')}"]
        with (self.folder / f"node{node}.log").open("wb") as log:
            subprocess.Popen(
                start_command(role, 2, head=node == 0),
                env=self.environment | start_environment(self.marks[node], self.ip),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 90
        while node == 0 and not self._answers():
            assert time.monotonic() < deadline, (self.folder / "node0.log").read_text()[-2000:]
            time.sleep(0.3)

    def _answers(self) -> bool:
        try:
            return bool(nodes_of(RayAddress(f"http://127.0.0.1:{self.dashboard}", self.client)))
        except PreflightError:
            return False

    def end(self, node: int) -> None:
        """End a node and what runs on it."""
        end_marked(self.marks[node])


def workers_over_time(session: Session, folder: TrainingFolder) -> list[int]:
    """How many workers trained, each time that training started or went on."""
    return [message.workers for message in session.messages(folder) if isinstance(message, Started)]


def main() -> int:
    """Run the trial; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="elastic-", ignore_cleanup_errors=True) as folder:
        session, ray = Session(Path(folder), scale=SCALE, reference=REFERENCE), TwoNodes(Path(folder))
        session.sandbox.environment |= {"MLPIPES_RAY_ADDRESS": f"http://127.0.0.1:{ray.dashboard}", **ray.client}
        try:
            ray.start(0)
            with session:
                return trial(session, ray)
        finally:
            ray.end(1)
            ray.end(0)


def trial(session: Session, ray: TwoNodes) -> int:
    """One training, with a node more, and a node less; returns the exit code."""
    session.until(session.is_ready, "Dagster can launch runs")
    run_id = session.launch(min_workers=2, resize_seconds=5.0)
    training = session.folder_of(run_id)
    session.until(lambda: workers_over_time(session, training) == [2], "it trains with 2 workers")
    began = time.monotonic()
    ray.start(1)
    session.until(lambda: 4 in workers_over_time(session, training), "it trains with 4 workers")
    grown = time.monotonic()
    step = session.last_step(training)
    session.until(lambda: session.last_step(training) > step + 200, "it gets on with 4 workers")
    lost = time.monotonic()
    ray.end(1)
    session.until(lambda: workers_over_time(session, training)[-1] == 2, "it trains with 2 workers again")
    shrunk = time.monotonic()
    session.until(lambda: "SUCCESS" in session.family(run_id), "it is done")
    problem = session.compare(training)
    print(
        f"workers {workers_over_time(session, training)}; 2 → 4 after {grown - began:.0f} s, 4 → 2 after "
        f"{shrunk - lost:.0f} s; {problem or 'same model, order, losses and curve'} as with 1 worker, uninterrupted"
    )
    return int(bool(problem))


if __name__ == "__main__":
    sys.exit(main())
