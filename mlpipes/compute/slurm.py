"""Slurm: a training as one batch job, in whose allocation a Ray of its own runs; submitted, found again, cancelled.

Needs nothing but Slurm's own commands, here or behind a prefix such as `ssh login-node`, and a store that the nodes share.
"""

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from mlpipes.compute.allocation import PYTHON_VARIABLE
from mlpipes.compute.jobs import JobHandle, Jobs, JobState, JobStatus
from mlpipes.errors import ConfigError, PreflightError, ScaleError
from mlpipes.scales import RayScaleConfig
from mlpipes.settings import load_mapping, problems
from mlpipes.store.layout import JobFolder

SETTINGS_VARIABLE = "MLPIPES_SLURM"
_WAITS = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "SUSPENDED", "STOPPED"}
_RUNS = {"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT"}
_NEVER = ("InvalidAccount", "InvalidQOS", "NotAllowed", "BadConstraints", "can't use this partition")
_NEVER += ("PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit")  # the first turns into the second in seconds
_NEVER += ("PerJob", "PerNode", "MaxMemPerLimit", "QOSMin")  # limits of one job, not of what a user has running
"""In the reason of a waiting job: what does not pass by itself. What a node coming back would mend is not among it, and
`sbatch --test-only` is no help: it refuses for that as well, and does not tell the two apart."""
_PASSING = ("contact slurm controller", "connection", "timed out", "temporarily", "zero bytes", "endpoint", "try again")
"""Words, in lower case, by which Slurm's commands (or ssh) say that nobody answers just now."""
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.ASCII | re.IGNORECASE)
_COLUMNS = {"JobID": 20, "Name": 130, "State": 20, "RestartCnt": 10, "Reason": 200}


class SlurmSettings(BaseModel):
    """What a site wants to know of a job; all of it can differ by scale."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = Field(default="04:00:00", description="limit of one job; a longer training resumes in the next one")
    signal_seconds: int = Field(default=120, ge=60, description="how long before the limit the training is told")
    workers_per_node: int | None = Field(default=None, ge=1, description="default: all of a scale on one node")
    memory: str | None = Field(default=None, description="of a node, such as 64G; default: the site's")
    gpu_type: str | None = Field(default=None, description="such as a100, where a site tells them apart")
    options: list[str] = Field(default_factory=list, description="more options of sbatch, such as --exclusive")
    setup: list[str] = Field(default_factory=list, description="shell lines on the node, such as `module load cuda`")
    python: str = Field(
        default=shlex.quote(sys.executable), description="starts Python on a node, e.g. apptainer exec x.sif python"
    )
    command_prefix: str = Field(default="", description="before each Slurm command, such as `ssh login-node`")
    poll_seconds: float = Field(default=5.0, gt=0, description="how often the controller is asked")
    resubmit_cancelled: bool = Field(default=False, description="submit again what an administrator has cancelled")
    scales: dict[str, dict[str, Any]] = Field(default_factory=dict, description="settings that differ, by scale key")

    @field_validator("python", "command_prefix")
    @classmethod
    def _words(cls, value: str) -> str:
        shlex.split(value)  # of a quotation mark that is not closed: ValueError
        return value

    @field_validator("time")
    @classmethod
    def _limit(cls, value: str) -> str:
        if not _TIME.fullmatch(value):
            raise ValueError("write a time limit as Slurm does: hours:minutes:seconds, or days-hours")
        return value

    def of_scale(self, key: str) -> "SlurmSettings":
        """The settings of one scale. Raises ConfigError naming the setting that is unknown or unusable."""
        return _validated({**self.model_dump(), **self.scales.get(key, {})}, f"scale {key}")

    @classmethod
    def load(cls, path: Path) -> "SlurmSettings":
        """Settings from a YAML file. Raises ConfigError saying what is wrong with it."""
        settings = _validated(load_mapping(path, "Slurm settings", SETTINGS_VARIABLE), str(path))
        for key in settings.scales:
            try:
                RayScaleConfig.from_key(key)
            except ScaleError as error:
                raise ScaleError(f"Slurm settings, {path}, scales: {error}") from error
            settings.of_scale(key)
        return settings


def _validated(content: Mapping[str, Any], where: str) -> SlurmSettings:
    try:
        return SlurmSettings.model_validate(dict(content))
    except ValidationError as error:
        raise ConfigError(f"Slurm settings, {where}: {problems(error, SlurmSettings.model_fields)}") from error


def shape(scale: RayScaleConfig, settings: SlurmSettings) -> list[str]:
    """The options of sbatch that give a scale the allocation it needs: nodes, CPUs and GPUs of each."""
    per_node = min(settings.workers_per_node or scale.workers, scale.workers)
    options = [f"--nodes={math.ceil(scale.workers / per_node)}", "--ntasks-per-node=1"]
    options.append(f"--cpus-per-task={math.ceil(per_node * scale.cpus_per_worker)}")
    if gpus := math.ceil(per_node * scale.gpus_per_worker):
        options.append(f"--gres=gpu:{f'{settings.gpu_type}:' if settings.gpu_type else ''}{gpus}")
    for name in ("partition", "account", "qos", "time"):
        if value := getattr(settings, name):
            options.append(f"--{name}={value}")
    return options + [f"--mem={settings.memory}"] * bool(settings.memory) + settings.options


class SlurmJobs(Jobs):
    """The batch jobs of one scale. A job's name carries the fingerprint, by which it is found again."""

    name = "Slurm job"
    module = "mlpipes.compute.allocation"
    doctor = "mlpipes doctor slurm"

    def __init__(self, settings: SlurmSettings, scale: RayScaleConfig, patience_seconds: float = 180) -> None:
        self.settings, self.scale = settings.of_scale(scale.key), scale
        self.python, self.patience_seconds = self.settings.python, patience_seconds
        self.poll_seconds = self.settings.poll_seconds
        # Another Python, in a container say, has its own packages, and ours could break it.
        self.shares_machine = shlex.split(self.python) == [sys.executable]
        self._hurried: set[JobHandle] = set()

    def latest(self, name: str) -> tuple[JobHandle, JobStatus] | None:
        """The latest job of a name that Slurm remembers, which it does for some minutes after a job has ended."""
        jobs = [job for job in self._jobs() if job.name.rpartition("-a")[0] == name]
        latest = max(jobs, key=lambda job: job.attempt, default=None)
        return latest and (JobHandle(latest.id, latest.attempt, attached=True), latest.status)

    def submit(
        self, name: str, specification: Path, attempt: int, environment: Mapping[str, str], about: str
    ) -> JobHandle:
        """Submit an attempt. Raises PreflightError with Slurm's own reason if it is refused."""
        options = [f"--job-name={name}-a{attempt}", f"--signal=B:USR1@{self.settings.signal_seconds}", "--requeue"]
        options += [f"--output={specification.with_suffix('.log')}", "--open-mode=append", f"--comment={about}"]
        options += ["--parsable", *shape(self.scale, self.settings)]
        made = self._command(["sbatch", *options], self._script(specification, environment))
        return JobHandle(made.strip().split(";")[0], attempt, attached=False)

    def _script(self, specification: Path, environment: Mapping[str, str]) -> str:
        exported = {**environment, PYTHON_VARIABLE: self.python}
        lines = [f"export {name}={shlex.quote(value)}" for name, value in exported.items()]
        # exec: Slurm's signals go to the process of the batch script.
        run = f"exec {self.python} -m {self.module} {shlex.quote(str(specification))}"
        return "\n".join(["#!/bin/bash", *lines, *self.settings.setup, run, ""])

    def status(self, handle: JobHandle) -> JobStatus:
        """How the job stands; REQUEUED if it has begun, or waits to begin, another attempt than the handle's."""
        found = [job for job in self._jobs() if job.id == handle.id]
        if not found:
            return JobStatus(JobState.LOST)
        if found[0].attempt != handle.attempt:
            return JobStatus(JobState.REQUEUED, found[0].status.reason, found[0].attempt)
        if found[0].status.reason == "BeginTime" and found[0].restarts and handle not in self._hurried:
            # Slurm keeps a requeued job waiting for two minutes, lest a broken node takes it again; ours ended in order.
            # Not at once: within the same second, the node believes that it is still to kill the job of that number.
            self._hurried.add(handle)
            self._command(["scontrol", "update", f"JobId={handle.id}", "StartTime=now+3"])
        return found[0].status

    def ask_to_stop(self, handle: JobHandle) -> None:
        """Cancel a job."""
        self._command(["scancel", handle.id])

    def logs(self, handle: JobHandle, folder: JobFolder) -> str:
        """What the training's latest job printed; for people."""
        logs = sorted(folder.specification(0).parent.glob("a*.log"), key=lambda path: path.stat().st_mtime)
        return logs[-1].read_text(encoding="utf-8", errors="replace") if logs else ""

    # -- Slurm's commands -----------------------------------------------------------------------------------------------
    def _jobs(self) -> list["_Listed"]:
        """The user's jobs; ended ones too, for as long as Slurm remembers them."""
        columns = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
        listed = self._command(["squeue", "--me", "--noheader", "--states=all", f"--Format={columns}"])
        return [_Listed.parse(line, self.settings) for line in listed.splitlines()]

    def _command(self, command: Sequence[str], stdin: str = "") -> str:
        """What a Slurm command prints. Tries again while nobody answers; raises ConnectionError when patience is out."""
        return Retrying(
            retry=retry_if_exception_type(ConnectionError),
            stop=stop_after_delay(self.patience_seconds),
            wait=wait_exponential(multiplier=0.5, max=10),
            reraise=True,
        )(run_slurm, self.settings.command_prefix, command, stdin)


def run_slurm(prefix: str, command: Sequence[str], stdin: str = "", timeout_seconds: float = 300) -> str:
    """Run one of Slurm's commands, behind a prefix if there is one; returns what it prints.

    Raises ConfigError if the command is not there, ConnectionError if nobody answers, and PreflightError otherwise.
    """
    # A prefix such as ssh hands what follows to a shell, so it gets one word.
    words = [*shlex.split(prefix), shlex.join(command)] if prefix else list(command)
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=timeout_seconds)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{words[0]} is not on PATH. Install Slurm's commands here, set `command_prefix` to a host that has them, or "
            f"unset {SETTINGS_VARIABLE}; `mlpipes doctor slurm` says more."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConnectionError(f"{command[0]} did not answer within {error.timeout:.0f} s") from error
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
    if any(word in said.lower() for word in _PASSING):
        raise ConnectionError(f"{command[0]}: {said}")
    raise PreflightError(f"Slurm refuses: {said} ({shlex.join(command)})")


class _Listed:
    """A line of squeue."""

    def __init__(self, id: str, name: str, state: str, restarts: int, reason: str, settings: SlurmSettings) -> None:
        self.id, self.name, self.restarts = id, name, restarts
        number = name.rpartition("-a")[2]
        self.attempt = (int(number) if number.isdigit() else 0) + restarts
        if state in _WAITS:
            self.status = JobStatus(
                JobState.REFUSED if any(word in reason for word in _NEVER) else JobState.PENDING, reason
            )
        elif state in _RUNS:
            self.status = JobStatus(JobState.RUNNING, reason)
        elif state == "CANCELLED" and not settings.resubmit_cancelled:
            self.status = JobStatus(JobState.STOPPED, "cancelled in Slurm")
        else:
            self.status = JobStatus(
                JobState.SUCCEEDED if state == "COMPLETED" else JobState.FAILED, f"{state} {reason}"
            )

    @classmethod
    def parse(cls, line: str, settings: SlurmSettings) -> "_Listed":
        cells, start = [], 0
        for width in _COLUMNS.values():
            cells.append(line[start : start + width].strip())
            start += width
        id, name, state, restarts, reason = cells
        return cls(id, name, state, int(restarts or 0), reason, settings)
