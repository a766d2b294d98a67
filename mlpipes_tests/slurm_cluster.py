"""A real Slurm on this machine: munge, slurmctld and several slurmd, each a node with two pretended GPUs; no systemd."""

import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from mlpipes.compute.processes import kill, with_variable
from mlpipes.compute.ray_node import LOOPBACK, own_ip, short_folder
from mlpipes_tests import evidence
from mlpipes_tests.conftest import missing
from mlpipes_tests.sandbox import free_port
from mlpipes_tests.waiting import until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "srun")
_CONFIGURATION = """\
ClusterName=mlpipes
SlurmctldHost={host}({ip})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={socket}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=3
SlurmdParameters=config_overrides
SlurmdTimeout=600
ReturnToService=2
KillWait=10
MinJobAge=300
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=physics Nodes=ALL AllowAccounts=physics State=UP
"""


class SlurmCluster:
    """A running cluster; its nodes are n1, n2, …"""

    def __init__(self, folder: Path, nodes: int, cpus: int) -> None:
        self.folder, self.nodes, self.cpus = folder, [f"n{number}" for number in range(1, nodes + 1)], cpus
        self.configuration = folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.configuration)}
        self.socket = short_folder("munge-") / "socket"

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        (self.folder / "state").mkdir(parents=True)
        self.folder.chmod(0o755)
        self.socket.parent.chmod(0o755)  # munge refuses a socket that not everybody can reach
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        try:
            ip = own_ip("192.0.2.1")  # any address outside: Ray refuses to connect nodes over loopback
        except OSError:
            ip = LOOPBACK
        lines = "\n".join(
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr={ip} Port={free_port()} CPUs={self.cpus} "
            f"RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
            for node in self.nodes
        )
        self.configuration.write_text(
            _CONFIGURATION.format(
                host=socket.gethostname(),
                ip=ip,
                port=free_port(),
                folder=self.folder,
                socket=self.socket,
                nodes=lines,
            )
        )
        devices = [self.folder / f"gpu{number}" for number in range(2)]
        for device in devices:
            os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(
            f"NodeName={','.join(self.nodes)} Name=gpu File={self.folder}/gpu[0-1]\n"
        )
        files = [f"--{name}={self.folder}/munge{suffix}" for name, suffix in _MUNGE.items()]
        self._run("munged", "--force", "--num-threads=2", f"--socket={self.socket}", *files)
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        self.wait_until_idle()

    def start_controller(self) -> None:
        """Start slurmctld, with what it had saved."""
        self._run("slurmctld", "-f", str(self.configuration))

    def start_node(self, node: str) -> None:
        """Start one node's slurmd."""
        self._run("slurmd", "-f", str(self.configuration), "-N", node)

    def kill(self, daemon: str) -> None:
        """SIGKILL to `slurmctld` or `slurmd-nN`."""
        process = psutil.Process(self._pid(daemon))
        process.kill()
        process.wait(60)

    def wait_until_idle(self) -> None:
        """Wait until no node has anything to do or to clean up."""
        until(lambda: set(self.ask("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}, "all nodes are idle")

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints; nothing while the controller is away."""
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=300)
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """The state of each job, by its id; those that ended not long ago too."""
        listed = self.ask("squeue", "-h", "-t", "all", "-o", "%i %T").splitlines()
        return dict(line.split() for line in listed if line.strip())

    def stop(self) -> None:
        """Cancel all jobs and end all daemons, with what they may have left behind."""
        self.ask("scancel", "--user=root", "--full")
        psutil.wait_procs(self.processes(), timeout=10)
        for daemon in [f"slurmd-{node}" for node in self.nodes] + ["slurmctld", "munged"]:
            try:
                process = psutil.Process(self._pid(daemon))
            except (OSError, ValueError, psutil.NoSuchProcess):
                continue
            with suppress(psutil.NoSuchProcess):
                if process.name() != daemon.partition("-")[0]:
                    continue  # its number is another's by now
                process.terminate()
                try:
                    process.wait(10)
                except psutil.TimeoutExpired:
                    process.kill()
        kill(self.processes())
        shutil.rmtree(self.socket.parent, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """Processes that belong to this cluster or to its jobs, except its daemons."""
        found = []
        for process in with_variable("SLURM_CONF", str(self.configuration)):
            with suppress(psutil.Error, OSError):
                if "SLURM_JOB_ID" in process.environ() or process.name().startswith("slurmstepd"):
                    found.append(process)
        return found

    def _pid(self, daemon: str) -> int:
        return int((self.folder / f"{daemon}.pid").read_text())

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"


_MUNGE = {
    "key-file": ".key",
    "pid-file": "d.pid",
    "log-file": "d.log",
    "seed-file": "d.seed",
}


@contextmanager
def slurm_cluster(folder: Path, nodes: int = 2, cpus: int = 2) -> Iterator[SlurmCluster]:
    """A cluster that ends with the context; skips the test where Slurm or the right to pretend devices is missing."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # where Debian keeps daemons, which not every PATH has
    if lacking := [program for program in PROGRAMS if shutil.which(program) is None]:
        missing(f"no {', '.join(lacking)} on PATH: there is no Slurm to test with")
    if os.getuid():
        missing("a Slurm of one's own takes root")
    evidence.collect_from(folder)
    cluster = SlurmCluster(folder, nodes, cpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
