"""Videos on a real Slurm: two nodes share one, the job is requeued, out of time and cancelled; the same bytes come out."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mlpipes.store.files import sha256_file
from mlpipes_tests.slurm_cluster import SlurmCluster, slurm_cluster
from mlpipes_tests.video.command import Command
from mlpipes_tests.video.made import QUICK, upscale_here, write_video
from mlpipes_tests.video.upscalers import wait_at
from mlpipes_tests.waiting import until

pytestmark = pytest.mark.slurm
GATED = "mlpipes_tests.video.upscalers:gated"


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as made:
        yield made
        made.ask("scancel", "--user=root")
        made.wait_until_idle()
        until(lambda: not made.processes(), "no process of a job is left")


def test_requeued_out_of_time_and_cancelled_it_ends_in_the_same_bytes(cluster: SlurmCluster, tmp_path: Path) -> None:
    path, out, log = write_video(tmp_path / "x.mp4", 22, audio=[{}]), tmp_path / "out.mp4", tmp_path / "log"
    wanted = sha256_file(upscale_here(path, tmp_path / "store", encoding=QUICK))
    command = Command(tmp_path / "home")
    settings = {"poll_seconds": 0.5, "time": "01:00:00", "workers_per_node": 1}
    (tmp_path / "slurm.yaml").write_text(yaml.safe_dump(settings))
    command.environment |= cluster.environment | {"MLPIPES_SLURM": str(tmp_path / "slurm.yaml")}
    arguments = (path, out, "--model", GATED, "--chunk", "4", "--workers", "2")
    reached = wait_at(command.home, 9)
    first = command.start(*arguments, log=log)

    def another_than(worker: str) -> str:
        """Wait until another worker is at the gate; returns which."""
        return until(
            lambda: (found := reached.read_text() if reached.is_file() else "") * (found != worker),
            "another worker is at the gate",
            vain=lambda: "" if first.poll() is None else f"the command has ended: {log.read_text()}",
        )

    worker = another_than("")
    (job,) = cluster.ask("squeue", "-h", "-o", "%i").split()
    assert cluster.ask("squeue", "-h", "-j", job, "-o", "%D %T").split() == ["2", "RUNNING"]
    cluster.ask("scontrol", "requeue", job)
    worker = another_than(worker)
    cluster.ask("scancel", "--batch", "--signal=USR1", job)  # what Slurm does ahead of the time limit
    worker = another_than(worker)
    assert cluster.ask("squeue", "-h", "-o", "%i").split() == [job], "the same job, requeued"
    first.send_signal(signal.SIGINT)
    until(lambda: first.poll() is not None, "the interrupted command ends")
    assert first.returncode == 130, log.read_text()
    cluster.wait_until_idle()
    (command.home / "gate" / "9").unlink()
    assert command.run(*arguments, log=log) == 0, log.read_text()
    assert sha256_file(out) == wanted
    assert not (command.home / "ray").exists(), "no private Ray was started"
    attempts = sorted(path.name for path in (command.home / "store").glob("videos/*/messages/*"))
    assert attempts == ["a1.jsonl", "a2.jsonl", "a3.jsonl", "a4.jsonl"]
