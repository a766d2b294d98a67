"""An elastic training gains a node while it trains, then loses it: the same model must come out.

Run as `python -m mlpipes_tests.chaos.elastic`. The private Ray has this machine's 2 CPUs; a second Ray node with 2 more is
started beside it (on the same machine), and killed later. The scale asks for 4 workers, and is content with 2.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from mlpipes.files import read_record
from mlpipes.store import TrainingFolder
from mlpipes_tests.chaos.faults import environment_of
from mlpipes_tests.chaos.harness import Session
from mlpipes_tests.sandbox import free_port

EPOCHS = 500
SCALE, REFERENCE = f"w4-b128-e{EPOCHS}-g0", f"w1-b128-e{EPOCHS}-g0"
NODE_PORTS = (
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)


def join_node(session: Session, cpus: int) -> "subprocess.Popen[bytes]":
    """Start a node that joins the private Ray."""
    state = read_record(session.sandbox.home / "ray" / "head.json")
    head = psutil.Process(state["pid"])
    port = next(a.removeprefix("--port=") for a in head.cmdline() if a.startswith("--port="))
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", f"--address=127.0.0.1:{port}", "--block"),
        *("--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--object-store-memory=100000000"),
        *(f"--{name}={free_port()}" for name in NODE_PORTS),
        *("--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"),
    ]
    with (session.sandbox.path / "node.log").open("wb") as log:
        environment = environment_of(head) | {"MLPIPES_SECOND_NODE": "1"}
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def workers_over_time(session: Session, folder: TrainingFolder) -> list[int]:
    """How many workers trained, each time that training started or went on."""
    return [message["workers"] for message in session.messages(folder) if message["kind"] == "started"]


def main() -> int:
    """Run the trial; returns the exit code."""
    with (
        tempfile.TemporaryDirectory(prefix="elastic-", ignore_cleanup_errors=True) as folder,
        Session(Path(folder), scale=SCALE, reference=REFERENCE) as session,
    ):
        run_id = session.launch(min_workers=2, resize_seconds=5.0)
        training = session.folder_of(run_id)
        session.until(lambda: workers_over_time(session, training) == [2], "it trains with 2 workers")
        began = time.monotonic()
        join_node(session, 2)
        session.until(lambda: 4 in workers_over_time(session, training), "it trains with 4 workers", 180)
        grown = time.monotonic()
        step = session.last_step(training)
        session.until(lambda: session.last_step(training) > step + 200, "it gets on with 4 workers")
        lost = time.monotonic()
        for process in session.of_the_sandbox():
            if environment_of(process).get("MLPIPES_SECOND_NODE"):
                process.kill()
        session.until(lambda: workers_over_time(session, training)[-1] == 2, "it trains with 2 workers again", 240)
        shrunk = time.monotonic()
        session.until(lambda: "SUCCESS" in session.family(run_id), "it is done", 400)
        problem = session.compare(training)
        print(
            f"workers {workers_over_time(session, training)}; 2 → 4 after {grown - began:.0f} s, 4 → 2 after "
            f"{shrunk - lost:.0f} s; {problem or 'same model, order, losses and curve'} as with 1 worker, uninterrupted"
        )
        return int(bool(problem))


if __name__ == "__main__":
    sys.exit(main())
