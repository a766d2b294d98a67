"""What all commands share: the console, errors without a traceback, workloads and scales by name, tables that fit."""

import atexit
import errno
import gc
import io
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from mlpipes.errors import ConfigError, UserError
from mlpipes.store.environment import apply, check_all, misspelt
from mlpipes.store.layout import HOME_VARIABLE, default_store, home
from mlpipes.store.redaction import redact
from mlpipes.workloads.catalog import entry_named, offered, problems

console = Console()
_OF_THE_MACHINE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.ENAMETOOLONG}
)
"""What a disk may say that is no defect of the program."""
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="a hyperparameter, or a setting of the launchpad"),
]
Seed = Annotated[int | None, typer.Option(help="of initialization, data order and augmentation")]
Fresh = Annotated[bool, typer.Option("--fresh", help="train again from the beginning, beside what is there")]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE.yaml", help="file with the launchpad's settings of `checkpoints`"),
]
_BUFFERED = frozenset({io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom, io.BufferedRWPair})
_UNBOUNDED = 10_000
"""Columns of a terminal that cuts nothing."""


@contextmanager
def ended_alike() -> Iterator[None]:
    """Have SIGTERM end a block as Ctrl-C does: what it has started is taken down with it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Have this process be one of ours; show a user's error, or what a disk says, as its message, and exit with 1."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        sys.excepthook = _without_secrets
        atexit.register(_end_soon)
        try:
            for told in misspelt():
                Console(stderr=True).print(told, style="yellow", markup=False, highlight=False, soft_wrap=True)
            check_all()
            apply()
            command(*args, **kwargs)
        except UserError as error:
            raise _shown(error, str(error)) from None
        except OSError as error:
            if (told := _without_home(error)) is not None:
                raise _shown(told, str(told)) from None
            if error.errno not in _OF_THE_MACHINE:
                raise
            raise _shown(error, f"{error.strerror}{f': {error.filename}' if error.filename else ''}") from None

    return wrapped


def _end_soon() -> None:
    """Keep Python from looking for garbage at its end, several times, among all that was imported: two seconds with torch.

    It would close files by that which only garbage holds, or a module that is gone; what is in them is written here.
    """
    for file in [each for each in gc.get_objects() if type(each) in _BUFFERED]:
        with suppress(OSError, ValueError):  # closed, or not open for writing
            file.flush()
    gc.freeze()


def _shown(error: Exception, text: str) -> typer.Exit:
    """Show an error by its kind and a text; returns what ends the command."""
    text = f"[bold red]{type(error).__name__}:[/] {escape(redact(text))}"
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    return typer.Exit(1)


def _without_home(error: OSError) -> ConfigError | None:
    """What is wrong where an error is that the home folder cannot be made; None for any other error.

    Whether it can is only known when it is tried: in a file system of the kernel's, or below a link to nothing, it cannot,
    whatever the permissions say.
    """
    folder = home()
    if folder.is_dir() or not isinstance(error.filename, str) or Path(error.filename) not in (folder, *folder.parents):
        return None
    return ConfigError(
        f"{HOME_VARIABLE}={folder}: the folder cannot be made ({error.strerror}: {error.filename}); name one that you may "
        "write to"
    )


def _without_secrets(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own report of an error that nobody expected, less the secrets in its text."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def scale_named(workload: str, scale: str) -> str:
    """The key of a scale that the catalog has or the store knows: what was trained once stays reachable.

    Raises ConfigError for an unknown workload, ScaleError for an unknown scale.
    """
    from mlpipes.store.status import trained_scales

    return entry_named(workload).scale(scale, trained_scales(default_store(), workload)).key


def tell_problems() -> None:
    """Say what is wrong with workloads of other packages, where something is; in commands that are about all workloads."""
    from mlpipes.training.code_version import unreadable

    for problem in (*problems().values(), *unreadable(offered()).values()):
        console.print(problem, style="yellow", markup=False, highlight=False, soft_wrap=True)


def fitting(rows: Sequence[Mapping[str, str]], *expendable: str) -> Table:
    """A table of rows with equal keys, less the columns that a narrow terminal has no room for, the first named first."""
    names, left_over = list(rows[0]), list(expendable)
    while True:
        table = Table(*names, box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*(row[name] for name in names))
        width = Measurement.get(console, console.options.update(width=_UNBOUNDED), table).maximum
        if width <= console.width or not left_over:
            return table
        names.remove(left_over.pop(0))
