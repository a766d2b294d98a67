"""One Ray node of ours: its command line and environment, and its end, the same on a laptop and in a Slurm allocation.

Run as `python -m mlpipes.compute.ray_node …` it holds a node until it is asked to end, and leaves nothing behind.
"""

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from mlpipes.compute.processes import kill, running
from mlpipes.errors import PreflightError
from mlpipes.store.environment import for_children

MARK = "MLPIPES_RAY_HEAD"
"""Environment variable that every process of a node inherits, so that exactly these can be found and ended."""
LOOPBACK = "127.0.0.1"
_OBJECT_STORE_BYTES = 256 * 1024 * 1024  # data travel through the memory-mapped snapshot, not the object store
_HEAD_SECONDS, _ECHO_SECONDS = 180, 30
_STARTS, STARTED = 3, "Ray runtime started"
"""How often a node is started, and what Ray says once it has registered: it gives up on that after 30 s, which cannot be
set, and which a busy machine may need."""
_END_SECONDS, _LOOKS = 2.0, 5
_FOLDER_CHARACTERS, _RANDOM_CHARACTERS, _TEMPORARY_CHARACTERS = 36, 8, 60


def start_command(role: Sequence[str], cpus: int, *, head: bool) -> list[str]:
    """The command that holds a Ray node; `role` says whether it is a head or joins one. Ports come from the system."""
    names = [
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "runtime-env-agent-port",
        "metrics-export-port",
    ]
    ports = zip(names, free_ports(len(names)), strict=True)
    return [
        *(sys.executable, "-m", "mlpipes.compute.ray_start", "start", *role, "--block", "--disable-usage-stats"),
        *(f"--{name}={port}" for name, port in ports),
        *("--min-worker-port=0", "--max-worker-port=0"),
        *(f"--num-cpus={cpus}", f"--object-store-memory={_OBJECT_STORE_BYTES}"),
        *["--no-monitor"] * head,  # the autoscaler's, a process: there is nothing to scale
    ]


def start_environment(mark: str, ip: str) -> dict[str, str]:
    """What the processes of a node with an address need besides the clients' variables."""
    return binding(ip) | {
        MARK: mark,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Asks whether a cloud is about to take a node away; nobody takes ours by way of Ray, and it is a process a training.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }


def binding(ip: str) -> dict[str, str]:
    """What a node and its clients need to know about the node's address: on loopback, Ray is to stay there."""
    # Despite its name, 0 makes Ray bind every port to loopback on Linux too, as it does on a laptop elsewhere; without it
    # Ray replaces loopback by another address of this machine.
    return {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if ip == LOOPBACK else {}


def end_marked(mark: str, session: int | None = None, *, gently: bool = True) -> None:
    """End every process of this machine that carries a node's mark: first `gently`, then for good.

    More than once for good: what is just being started by what is just dying is seen at the next look only. Ray's agents
    overwrite their environment with their title, and their mark with it, and may outlive their raylet for half an hour; they
    are found as its children or, when it is dead, by the `session` that the node's processes have for themselves.
    """
    if gently:
        for process in (processes := _marked(mark, session)):
            with suppress(psutil.Error):
                process.terminate()
        psutil.wait_procs(processes, timeout=_END_SECONDS)
    for _ in range(_LOOKS):
        if not (processes := _marked(mark, session)):
            return
        kill(processes)


def _marked(mark: str, session: int | None) -> list[psutil.Process]:
    found: set[psutil.Process] = set()
    for process in running():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK) == mark:
                found |= {process, *process.children(recursive=True)}
            # Titles count too: long after a node's end, its session's number may be that of somebody else's.
            elif session is not None and os.getsid(process.pid) == session and process.cmdline()[0].startswith("ray"):
                found.add(process)
        except (psutil.Error, OSError, IndexError):
            continue
    return list(found)


def short_folder(prefix: str) -> Path:
    """A new folder that nobody else may look into, whose path leaves room for the Unix sockets that Ray puts into it.

    Their paths may have 107 characters, of which Ray takes some seventy; `$TMPDIR` may be longer than what is left. Raises
    PreflightError if there is no place for one.
    """
    for place in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):  # noqa: S108 - mkdtemp's are private
        if len(str(Path(place, prefix))) + _RANDOM_CHARACTERS > _FOLDER_CHARACTERS:
            continue
        with suppress(OSError):
            return Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    raise PreflightError(
        f"no temporary folder with a path of {_FOLDER_CHARACTERS} characters can be made, and Unix sockets need one. "
        "Make /tmp writable, or set TMPDIR to a short folder"
    )


def temporary_files(folder: Path) -> dict[str, str]:
    """The variable that has a node's processes put temporary files into its folder, which is removed when they are killed.

    Python's `multiprocessing` puts Unix sockets there, for which a long `$TMPDIR` is too long. A short one stays where the
    folder lies elsewhere than temporary files do: that may be a disk of another size, or memory.
    """
    usual = tempfile.gettempdir()
    return {"TMPDIR": str(folder)} if str(folder.parent) == usual or len(usual) > _TEMPORARY_CHARACTERS else {}


def free_ports(count: int) -> list[int]:
    """Different ports of this machine that nobody listens on; the system may give one twice that was let go."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]


def own_ip(towards: str) -> str:
    """The address of this machine on its way to another one. Raises OSError if there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # of a datagram socket: sends nothing, asks the routing table
        return probe.getsockname()[0]


def listens(host: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def main(arguments: Sequence[str]) -> int:
    """Hold a node of the cluster whose head is (or will be) at an address; returns the exit code."""
    parser = argparse.ArgumentParser(prog="mlpipes.compute.ray_node")
    parser.add_argument("head", help="ip:port of the cluster's head")
    parser.add_argument("temporary", help="folder for Ray's own files on each node; removed at the end")
    parser.add_argument("--cpus", type=int, required=True)
    parser.add_argument("--is-head", action="store_true")
    chosen = parser.parse_args(arguments)
    host, _, port = chosen.head.rpartition(":")
    if chosen.is_head:
        # No dashboard: nobody submits jobs to this cluster, and each of its processes costs a second or two of start-up.
        role = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={chosen.temporary}"]
        role.append(f"--node-ip-address={host}")
    else:
        deadline = time.monotonic() + _HEAD_SECONDS
        while not listens(host, int(port)):
            if time.monotonic() > deadline:
                print(f"no Ray head at {chosen.head} after {_HEAD_SECONDS} s; can this node reach that address?")
                return 1
            time.sleep(0.1)
        role = [f"--address={chosen.head}", f"--node-ip-address={own_ip(host)}"]
    # Said explicitly, because Ray counts the machine's devices, not those of this job.
    devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name not in ("", "NoDevFiles")]
    mark = secrets.token_hex(8)
    Path(chosen.temporary).mkdir(mode=0o700, exist_ok=True)  # the head's is there
    environment = for_children(unproxied=host) | start_environment(mark, host) | temporary_files(Path(chosen.temporary))
    command = [*start_command(role, chosen.cpus, head=chosen.is_head), f"--num-gpus={len(devices)}"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        return _hold(command, environment, mark, came_up_file(Path(chosen.temporary)))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # The session is the batch system's step on this node, so its agents are this node's: where Ray has ended before us,
        # as when the head went first, nothing else tells whose they are.
        end_marked(mark, session=os.getsid(0))
        shutil.rmtree(chosen.temporary, ignore_errors=True)


def came_up_file(temporary: Path) -> Path:
    """The file by which a node with this folder for Ray's files says that it has come up."""
    return temporary / "came-up"


def _hold(command: Sequence[str], environment: Mapping[str, str], mark: str, up: Path) -> int:
    """Run `ray start` to its end, again if it did not come up; returns its exit code."""
    for left in reversed(range(_STARTS)):
        came_up = threading.Event()
        node = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, text=True)
        # In a thread: what `ray start` leaves behind when it is killed would keep the pipe open.
        echo = threading.Thread(target=_echo, args=(node, came_up, up), daemon=True)
        echo.start()
        code = node.wait()
        echo.join(1)
        if not came_up.is_set():
            echo.join(_ECHO_SECONDS)  # a busy machine may be late to read what was said
        if came_up.is_set() or not left:
            return code
        print("Ray did not start on this node; trying again", flush=True)
        end_marked(mark, session=os.getsid(0))
    raise AssertionError("the last try returns")


def _echo(node: "subprocess.Popen[str]", came_up: threading.Event, up: Path) -> None:
    for line in node.stdout or ():
        print(line, end="", flush=True)
        if STARTED in line:
            came_up.set()
            up.touch()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
