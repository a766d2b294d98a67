"""A session under chaos: a sandbox with `mlpipes dev`, Ray and MLflow in it, and what is asked of them."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil

from mlpipes.compute.processes import kill, with_variable
from mlpipes.compute.stacks import processes_of
from mlpipes.store.layout import Store, TrainingFolder
from mlpipes_tests.chaos.processes import command_of
from mlpipes_tests.chaos.runs import Trainings
from mlpipes_tests.held import REFERENCE as IMPLEMENTATION
from mlpipes_tests.prepared import mlflow_store
from mlpipes_tests.sandbox import Sandbox, descendants, end, free_port, graphql, wait_for
from mlpipes_tests.training.harness import make_job, run_here
from mlpipes_tests.waiting import LIMIT_SECONDS

DISK_BYTES = 1300 * 2**20
"""Size of the store's disk where it is to run full: what the preflight asks for, and some."""

SCALE = "w2-b128-e40-g0"
REFERENCE = "w1-b128-e40-g0"  # the same bits at any number of workers: one process is the cheapest reference


class Session(Trainings):
    """A sandbox with `mlpipes dev` in it and the outcome of an uninterrupted training to compare with.

    Without the scale of a `reference` there is nothing to compare with, and trainings wait for nobody.
    """

    def __init__(
        self,
        path: Path,
        *,
        workload: str = "digits",
        scale: str = SCALE,
        reference: str | None = REFERENCE,
        definitions: str | None = None,
        disk_can_be_full: bool = False,
    ) -> None:
        self.workload, self.scale = workload, scale
        self.sandbox = Sandbox(path, held=reference is not None, definitions=definitions)
        self.store = Store(self.sandbox.home / "store")
        self.own_disk = disk_can_be_full
        if disk_can_be_full:
            small_disk(self.store.root)
        (path / "scales.yaml").write_text(f"{workload}: [{scale}]\n")
        self.sandbox.environment["MLPIPES_SCALES"] = str(path / "scales.yaml")
        self.mlflow_port = free_port()
        self.tracking_uri = f"http://127.0.0.1:{self.mlflow_port}"
        self.sandbox.environment["MLFLOW_TRACKING_URI"] = self.tracking_uri
        self.expected = run_here(make_job(path / "reference", reference, IMPLEMENTATION)) if reference else {}
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.dev = None
        self.temporary = set[Path]()
        """Folders of its `mlpipes dev`s, which one that is killed cannot remove."""

    def __enter__(self) -> "Session":
        try:
            self.start_mlflow()
            self.up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.dev is not None:
            end(self.dev)
        self.sandbox.run(".venv/bin/mlpipes ray down")
        kill(self.of_the_sandbox())
        for folder in self.temporary:
            shutil.rmtree(folder, ignore_errors=True)
        if self.own_disk:
            subprocess.run(["umount", "--lazy", str(self.store.root)], check=False)

    def start_mlflow(self) -> None:
        """Start the MLflow server, if it does not run."""
        if self.mlflow_processes():
            return
        folder = self.sandbox.home / "mlflow"
        folder.mkdir(parents=True, exist_ok=True)
        places = [
            "--backend-store-uri",
            mlflow_store(folder / "mlflow.db"),
            "--artifacts-destination",
            str(folder / "files"),
        ]
        address = ["--host", "127.0.0.1", "--port", str(self.mlflow_port), "--workers", "1"]
        jobs = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight processes more
        server = self.sandbox.start(".venv/bin/mlflow", "server", *places, *address, log="mlflow.log", **jobs)
        wait_for(f"http://127.0.0.1:{self.mlflow_port}/health", server)

    def mlflow_processes(self) -> list[psutil.Process]:
        """The processes of the MLflow server."""
        found = [p for p in self.of_the_sandbox() if "--backend-store-uri" in command_of(p)]
        return [q for p in found for q in [p, *descendants(p.pid)]]

    def up(self) -> None:
        """Start `mlpipes dev`, as the user would after a crash; a half-dead one is ended first."""
        if self.dev is not None:
            end(self.dev)
        self.dev = self.sandbox.start(".venv/bin/mlpipes", "dev", "--port", str(self.port))
        wait_for(f"{self.address}/server_info", self.dev)
        words = [word for process in psutil.Process(self.dev.pid).children() for word in _words(process)]
        self.temporary |= {Path(word).parent for word in words if "/mlpipes-dev-" in word}

    def ask(self, query: str, **variables: Any) -> Any:
        return graphql(self.address, query, **variables)

    def compare(self, folder: TrainingFolder) -> str:
        """What differs from the uninterrupted training; empty if nothing does."""
        _, left = psutil.wait_procs(self.training_processes(folder), timeout=LIMIT_SECONDS)
        wrong = [*self.differences(folder), *([f"{len(left)} processes left behind"] if left else [])]
        return f"differs in {', '.join(wrong)}" if wrong else ""

    def training_processes(self, folder: TrainingFolder) -> list[psutil.Process]:
        """Driver, controller and workers of a training.

        Ray keeps idle workers and cluster-wide actors of its own, which carry the variables of the job that came first.
        """
        ours = ("mlpipes.training.driver", "ray::TrainController", "ray::RayTrainWorker")
        return [p for p in processes_of(folder.fingerprint) if any(word in command_of(p) for word in ours)]

    # -- processes -------------------------------------------------------------------------------------------------------
    def run_worker_pids(self, run_id: str) -> set[int]:
        """Pids of the process that executes a run."""
        messages = [event.get("message") or "" for event in self.events(run_id)]
        return {int(m.split("pid: ")[1].split(")")[0]) for m in messages if "Started process for run (pid: " in m}

    def of_the_sandbox(self) -> list[psutil.Process]:
        """All processes that work on the sandbox's state."""
        return with_variable("MLPIPES_HOME", str(self.sandbox.home))


def small_disk(folder: Path) -> None:
    """Give a folder a small disk of its own. Raises RuntimeError where that cannot be had (it takes root)."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no small disk for the fault 'full disk': {done.stderr.strip()}")


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
