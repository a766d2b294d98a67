"""The faults: what can be killed, stopped, filled or flipped, how, and what the outside world does about it afterwards."""

import random
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from mlpipes.store.layout import TrainingFolder
from mlpipes_tests.chaos.processes import command_of, environment_of

if TYPE_CHECKING:
    from mlpipes_tests.chaos.session import Session

KILLED = (
    *("run worker", "mlpipes dev", "daemon", "code server", "code server and its parent", "webserver"),
    *("everything of Dagster", "Ray driver", "Train controller", "train worker", "raylet", "Ray head"),
    *("MLflow server", "everything"),
)
"""These get SIGKILL."""
HUNG = ("train worker, hung", "Ray driver, hung")
"""These get SIGSTOP: they are there, and do nothing."""
DISK = "full disk"
BYTE = "flipped byte"
SNAPSHOT_BYTE = "flipped byte, snapshot"
VICTIMS = (*KILLED, *HUNG, DISK, BYTE, SNAPSHOT_BYTE)
AWAY_SECONDS = {"MLflow server": 10.0, "everything": 0.0, DISK: 15.0}
"""How long what the outside world has to mend stays broken."""
_WORDS = {
    "daemon": "dagster-daemon",
    "code server": "api grpc",
    "code server and its parent": "code-server start",
    "webserver": "dagster-webserver",
    "Ray driver": "mlpipes.training.driver",
    "Train controller": "ray::TrainController",
    "train worker": "ray::RayTrainWorker",
    "raylet": "/raylet/raylet",
}


def processes(session: "Session", victim: str, run_id: str) -> list[psutil.Process]:
    """The processes of a victim; of a fault that needs none, those that make the training read its files again."""
    assert session.dev is not None
    try:
        dagster = psutil.Process(session.dev.pid).children(recursive=True)
    except psutil.Error:
        dagster = []
    ray = [p for p in session.of_the_sandbox() if environment_of(p).get("MLPIPES_RAY_HEAD")]
    mlflow = session.mlflow_processes()
    match victim:
        case "run worker":
            return [p for p in dagster if p.pid in session.run_worker_pids(run_id)]
        case "mlpipes dev":
            return [psutil.Process(session.dev.pid)]
        case "everything of Dagster":
            return [*dagster, psutil.Process(session.dev.pid)]
        case "Ray head":
            return ray
        case "MLflow server":
            return mlflow
        case "everything":
            return [*dagster, psutil.Process(session.dev.pid), *ray, *mlflow]
        case "full disk":
            return []
        case "flipped byte" | "flipped byte, snapshot":
            words = ("mlpipes.training.driver", "ray::RayTrainWorker")
            return [p for p in ray if any(word in command_of(p) for word in words)]
        case "code server and its parent":
            return [p for p in dagster if any(_WORDS[name] in command_of(p) for name in ("code server", victim))]
        case _:
            word = _WORDS[victim.removesuffix(", hung")]
            found = [p for p in dagster + ray if word in command_of(p)]
            return found[:1] if "train worker" in victim else found


def strike(session: "Session", victim: str, run_id: str, folder: TrainingFolder, chance: random.Random) -> str:
    """Let the fault happen; returns what was done."""
    if victim == DISK:
        return _fill(session.store.root)
    struck = processes(session, victim, run_id)
    for process in struck:
        try:
            process.send_signal(signal.SIGSTOP if victim in HUNG else signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    if victim not in HUNG:
        psutil.wait_procs(struck, timeout=20)  # what is dying still looks alive to whoever starts it again
    if victim == BYTE:
        return _flip(folder.path, chance)
    if victim == SNAPSHOT_BYTE:
        return _flip(session.store.snapshots, chance)
    assert struck, f"there is no {victim}"
    return f"{len(struck)} processes"


def mend(session: "Session", victim: str) -> None:
    """What a user or a supervisor outside does: make room, start servers again."""
    if victim == DISK:
        (session.store.root / "ballast").unlink(missing_ok=True)
    if victim in ("MLflow server", "everything"):
        session.start_mlflow()


def _fill(folder: Path) -> str:
    written = 0
    try:
        with (folder / "ballast").open("wb", buffering=0) as stream:
            while True:
                written += stream.write(bytes(1 << 16))
    except OSError as error:
        return f"{written / 2**20:.0f} MiB until {error.strerror}"


def _flip(folder: Path, chance: random.Random) -> str:
    """Flip one bit of one file, chosen by kind first, so that many files of a kind do not crowd out the others."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        temporary = any(part.startswith(".tmp") or ".corrupt" in part for part in path.parts)
        if path.is_file() and path.stat().st_size and not temporary and "ray" not in path.relative_to(folder).parts:
            kinds.setdefault(re.sub(r"[0-9a-f]{64}|\d+", "N", str(path.relative_to(folder))), []).append(path)
    path = chance.choice(kinds[chance.choice(sorted(kinds))])
    data = bytearray(path.read_bytes())
    position = chance.randrange(len(data))
    data[position] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return f"byte {position} of {path.relative_to(folder)}"
