"""Messages: lines of JSON that a training appends to a file for whoever watches; for display, never the truth."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mlpipes.store.outcome import Best
from mlpipes.store.redaction import redact


class _Message(BaseModel):
    # What another version of mlpipes says besides is passed over; a loss may be NaN.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")

    time: float = Field(default_factory=time.time)
    """Unix time."""


class Allocated(_Message):
    """A batch system has given the job its nodes."""

    kind: Literal["allocated"] = "allocated"
    slurm_job: str
    nodes: str
    restarts: int


class ClusterUp(_Message):
    """The Ray of an allocation answers."""

    kind: Literal["cluster"] = "cluster"
    address: str


class DriverStarted(_Message):
    """The attempt's driver runs, and will start workers."""

    kind: Literal["driver"] = "driver"
    attempt: int
    workload: str
    scale: str


class Waits(_Message):
    """Why the attempt does not train, by whoever follows it; empty when it does not wait any more."""

    kind: Literal["waits"] = "waits"
    reason: str


class Resumed(_Message):
    """The state of a checkpoint was restored."""

    kind: Literal["resumed"] = "resumed"
    step: int
    total_steps: int


class Started(_Message):
    """The workers train, from this step on."""

    kind: Literal["started"] = "started"
    step: int
    total_steps: int
    precision: str
    workers: int


class Progressed(_Message):
    """Some steps further."""

    kind: Literal["progress"] = "progress"
    step: int
    total_steps: int
    epoch: float
    loss: float
    samples_per_second: float
    eta_seconds: float


class EpochEnded(_Message):
    """An epoch is over, and validated."""

    kind: Literal["epoch"] = "epoch"
    epoch: int
    epochs: int
    step: int
    metrics: dict[str, float]


class CheckpointSaved(_Message):
    """A checkpoint is published."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str


class MetricsLogged(_Message):
    """Rows of the curve (key, value, step, Unix time in ms) that a checkpoint carries now."""

    kind: Literal["metrics"] = "metrics"
    rows: list[tuple[str, float, int, int]]


class Warned(_Message):
    """Something that a person should know."""

    kind: Literal["warning"] = "warning"
    text: str


class Stopping(_Message):
    """The last checkpoint that was asked for is there."""

    kind: Literal["stopping"] = "stopping"
    step: int


class Failed(_Message):
    """The attempt ends by an error; a fatal one is not worth another attempt."""

    kind: Literal["failed"] = "failed"
    error: str
    fatal: bool
    rank: int | None = None


class Finished(_Message):
    """The result is in the store."""

    kind: Literal["finished"] = "finished"
    step: int
    total_steps: int
    best: Best


Message = Annotated[
    Allocated
    | ClusterUp
    | DriverStarted
    | Waits
    | Resumed
    | Started
    | Progressed
    | EpochEnded
    | CheckpointSaved
    | MetricsLogged
    | Warned
    | Stopping
    | Failed
    | Finished,
    Field(discriminator="kind"),
]
Notify = Callable[[Message], None]
_MESSAGE: TypeAdapter[Message] = TypeAdapter(Message)


class MessageWriter:
    """Appends messages to a file. Each is one `write` call, so several processes may append to the same file."""

    def __init__(self, path: Path) -> None:
        self.path, self._torn, self._turn = path, False, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, message: Message) -> None:
        """Append one message, from any thread; an unwritable disk is not the training's problem."""
        texts = {name: redact(value) for name, value in message if isinstance(value, str) and name != "kind"}
        line = message.model_copy(update=texts).model_dump_json() + "\n"
        with self._turn:
            self._append(line.encode())

    def _append(self, line: bytes) -> None:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError:
            return
        try:
            # On a full disk only a part may be written; the next message must then not be glued to it.
            data = b"\n" * self._torn + line
            self._torn = True
            self._torn = os.write(descriptor, data) < len(data)
        except OSError:
            pass
        finally:
            os.close(descriptor)


def read_messages(path: Path, offset: int = 0) -> tuple[list[Message], int]:
    """Whole messages of a file from a byte offset on, and the offset behind them.

    A torn last line is left for the next call; a line that is no message, or one of a kind that this version does not know,
    is passed over, for messages are display only.
    """
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            data = stream.read()
    except FileNotFoundError:
        return [], offset
    end = data.rfind(b"\n") + 1
    messages = []
    for line in data[:end].splitlines():
        try:
            messages.append(_MESSAGE.validate_json(line))
        except ValidationError:
            continue
    return messages, offset + end
