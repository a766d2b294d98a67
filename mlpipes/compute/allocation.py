"""Inside a Slurm allocation: a Ray over its nodes, a driver run in it, the time limit heeded, all torn down.

Run by the batch script as `python -m mlpipes.compute.allocation <specification>`. Exits with 0 only if the result is there.
"""

import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlpipes.compute.jobs import ask_for_last_checkpoint
from mlpipes.compute.ray_node import LOOPBACK, binding, came_up_file, free_ports, listens, own_ip, short_folder
from mlpipes.store.environment import for_children
from mlpipes.store.messages import Allocated, ClusterUp, MessageWriter, Notify, Warned
from mlpipes.store.training_job import TrainingJob

PYTHON_VARIABLE = "MLPIPES_SLURM_PYTHON"
"""The command that starts Python on a node; in a container, more than a path."""
FAREWELL_SECONDS = 40.0
"""What a training gets for its last checkpoint when its time is up; the signal comes earlier than that."""
GO_ON = 75
"""Exit code of a job whose time was up and that Slurm would not requeue (EX_TEMPFAIL)."""
_HEAD_SECONDS = 300
_END_SECONDS = 15


def main(path: Path) -> int:
    """Run one attempt of a training in this allocation; returns the exit code."""
    job, restarts = TrainingJob.read(path), restarts_so_far()
    if restarts:
        # An attempt of its own: on a node that Slurm gave up, the old one may still live, and write its messages.
        job.take_over()
        job = job.model_copy(update={"attempt": job.attempt + restarts})
        path = job.write()
    job.folder.stop_request(job.attempt).unlink(missing_ok=True)
    return drive(
        "mlpipes.training.driver",
        path,
        MessageWriter(job.folder.messages(job.attempt)),
        save=lambda: ask_for_last_checkpoint(job.folder, job.attempt, FAREWELL_SECONDS),
        is_done=job.folder.result.is_file,
    )


def restarts_so_far() -> int:
    """How often Slurm has put this job back into its queue; each time is an attempt of its own."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def drive(module: str, path: Path, notify: Notify, *, save: Callable[[], object], is_done: Callable[[], bool]) -> int:
    """Run a driver with its specification in a Ray over this allocation; returns the exit code.

    When the job's time is nearly up, `save` is called, the driver ended, and the job requeued unless it `is_done`.
    """
    time_is_up = False

    def note(*_: object) -> None:
        nonlocal time_is_up
        time_is_up = True

    signal.signal(signal.SIGUSR1, note)  # ahead of the time limit, or of preemption where the site sends it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the job is being ended: tear down
    slurm_job, nodes = os.environ["SLURM_JOB_ID"], os.environ["SLURM_JOB_NODELIST"]
    notify(Allocated(slurm_job=slurm_job, nodes=nodes, restarts=restarts_so_far()))
    with ray_cluster() as cluster:
        notify(ClusterUp(address=cluster.address))
        driver = subprocess.Popen([sys.executable, "-m", module, str(path)], env=for_children() | cluster.environment)
        try:
            while driver.poll() is None and not time_is_up:
                if lost := cluster.lost():
                    notify(Warned(text=f"Ray ended on {lost}; this job ends, and another one resumes what it did"))
                    return 1
                time.sleep(0.2)
            if driver.poll() is not None:
                return driver.returncode
            notify(Warned(text="the job's time is nearly up: it saves what it has, then it is requeued"))
            save()
        finally:
            _end(driver)
    if is_done():  # before it was asked
        return 0
    # Slurm kills this process when it requeues the job; what comes after is for sites that do not allow it.
    done = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True)
    if done.returncode == 0:
        time.sleep(60)
    notify(Warned(text=f"Slurm did not requeue the job: {done.stderr.strip()}"))
    return GO_ON


class Cluster:
    """A Ray whose nodes are those of this allocation."""

    def __init__(self, address: str, environment: dict[str, str], nodes: dict[str, "subprocess.Popen[bytes]"]) -> None:
        self.address, self.environment, self.nodes = address, environment, nodes

    def lost(self) -> str:
        """The nodes whose Ray has ended; empty if all live."""
        return ", ".join(name for name, process in self.nodes.items() if process.poll() is not None)


@contextmanager
def ray_cluster() -> Iterator[Cluster]:
    """A Ray over all nodes of this allocation, with ports, token and folder of its own, ended with the context.

    Raises RuntimeError if its head does not start.
    """
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], check=True, capture_output=True, text=True
    )
    _, *others = listed.stdout.split()
    ip, (port,) = _head_ip(others), free_ports(1)
    environment = {
        "RAY_ADDRESS": f"{ip}:{port}",
        "RAY_AUTH_MODE": "token",  # said explicitly: a stray ~/.ray/auth_token would switch tokens on for one side only
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        **binding(ip),
    }
    inherited = for_children(unproxied=ip)
    cpus = os.environ.get("SLURM_CPUS_PER_TASK", "1")
    temporary = short_folder("mlpipes-ray-")  # on the node's own disk
    node = ["-m", "mlpipes.compute.ray_node", f"{ip}:{port}", str(temporary), f"--cpus={cpus}"]
    nodes = {"the head": subprocess.Popen([sys.executable, *node, "--is-head"], env=inherited | environment)}
    try:
        if others:
            step = ["srun", "--overlap", f"--nodes={len(others)}", f"--ntasks={len(others)}", "--ntasks-per-node=1"]
            step += [f"--nodelist={','.join(others)}", f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1"]
            python = shlex.split(os.environ.get(PYTHON_VARIABLE) or shlex.quote(sys.executable))
            nodes[", ".join(others)] = subprocess.Popen([*step, *python, *node], env=inherited | environment)
        cluster, deadline = Cluster(f"{ip}:{port}", environment, nodes), time.monotonic() + _HEAD_SECONDS
        # Its port listens earlier, but until it has come up, it may be started again.
        while not (came_up_file(temporary).exists() and listens(ip, port)):
            if cluster.lost() or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start on {cluster.lost() or 'the head'}; see the job's log")
            time.sleep(0.1)
        yield cluster
    finally:
        for process in reversed(nodes.values()):
            _end(process)


def _head_ip(others: list[str]) -> str:
    """Loopback if this node is the only one; otherwise its address on the way to the others."""
    if not others:
        return LOOPBACK
    shown = subprocess.run(["scontrol", "show", "node", "--oneliner", others[0]], capture_output=True, text=True)
    address = re.search(r"\bNodeAddr=(\S+)", shown.stdout)
    return own_ip(address[1] if address else others[0])


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
