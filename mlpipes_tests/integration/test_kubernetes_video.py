"""Videos on a real Kubernetes: pods go, the head goes, the command is interrupted; the bytes of the local run come out."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlpipes.store.files import sha256_file
from mlpipes_tests.cluster import conftest
from mlpipes_tests.cluster.cluster import Cluster
from mlpipes_tests.cluster.conftest import Namespace
from mlpipes_tests.cluster.kubectl import has_condition
from mlpipes_tests.cluster.trainings import Training, as_user
from mlpipes_tests.sandbox import CHECKOUT
from mlpipes_tests.video.made import QUICK, upscale_here, write_video
from mlpipes_tests.video.upscalers import wait_at
from mlpipes_tests.waiting import until

pytestmark = pytest.mark.cluster
cluster, namespace = conftest.cluster, conftest.namespace
GATED = "mlpipes_tests.video.upscalers:gated"


class Upscaling(Training):
    """`mlpipes upscale` on Kubernetes, as the user that the pods are."""

    def start(self, source: Path, result: Path) -> "subprocess.Popen[bytes]":
        """Start the command."""
        self.runs += 1
        command = [sys.executable, "-m", "mlpipes_tests.video.command", "upscale", str(source), str(result)]
        command += ["--model", GATED, "--chunk", "4", "--workers", "2"]
        command += ["--crf", str(QUICK.crf), "--preset", QUICK.preset]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*as_user(), *command], cwd=CHECKOUT, env=self.environment, stdout=log, stderr=log
            )
        return self.process

    def in_vain(self) -> str:
        """Why waiting for anything is in vain; empty if it is not."""
        return self.cluster.died() or ("" if self.process.poll() is None else f"the command has ended: {self.log()}")

    def delete(self, role: str) -> set[str]:
        """Have all pods of a role gone at once; returns their names."""
        names = {pod["metadata"]["name"] for pod in self.pods(role)}
        self.kubectl("delete", "pod", *names, f"--namespace={self.namespace.name}", "--grace-period=0", "--force")
        return names


def test_whatever_is_killed_it_ends_in_the_bytes_of_the_local_run(
    cluster: Cluster, namespace: Namespace, tmp_path: Path
) -> None:
    made = Upscaling(cluster, namespace, "w2-b2-e1-g0")
    source, result = write_video(namespace.store / "x.mp4", 22, audio=[{}]), made.home / "out.mp4"
    source.chmod(0o644)
    wanted = sha256_file(upscale_here(source, tmp_path / "here", encoding=QUICK))
    reached = wait_at(made.home, 9)
    reached.parent.chmod(0o777)
    run = made.start(source, result)
    made.until(reached.exists, "a worker is at the gate")

    def others_are_ready() -> bool:
        return len({p["metadata"]["name"] for p in made.pods("worker") if has_condition("Ready")(p)} - gone) == 2

    # A worker tells again and again that it is at the gate; the file is removed when those that are gone can no longer.
    gone = made.delete("worker")
    made.until(others_are_ready, "others are ready")
    reached.unlink(missing_ok=True)
    made.until(reached.exists, "another worker is at the gate")

    made.delete("head")
    made.until(lambda: list(made.store.root.glob("videos/*/jobs/a2.claim")), "the entry point runs again")
    reached.unlink(missing_ok=True)
    made.until(reached.exists, "a worker of the second attempt is at the gate")

    run.send_signal(signal.SIGINT)
    assert made.end(run) == 130, made.log()[-5000:]
    until(lambda: made.things() <= made.before, f"nothing is left but {made.before}")
    assert not result.exists()
    (made.home / "gate" / "9").unlink()
    assert made.end(made.start(source, result)) == 0, made.log()[-5000:]
    assert sha256_file(result) == wanted
    until(lambda: made.things() <= made.before, f"nothing is left but {made.before}")
    print(f"sha256 {wanted}")
