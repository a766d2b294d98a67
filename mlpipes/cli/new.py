"""The part of the command line that writes a package with a workload of one's own to start from."""

import importlib.util
import keyword
import shutil
import sys
import tempfile
from collections.abc import Iterator
from enum import StrEnum
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from mlpipes.cli.common import console, friendly
from mlpipes.errors import ConfigError
from mlpipes.workloads.catalog import configured, problems
from mlpipes.workloads.entry import check_name

app = typer.Typer()


class Kind(StrEnum):
    """What the workload of a new package does."""

    TABULAR = "tabular"
    IMAGE_FOLDER = "image-folder"


_MORE = {
    Kind.TABULAR: "",
    Kind.IMAGE_FOLDER: """
It trains on the folder that the environment variable `$variable` names, with one folder of images a class. Set it wherever
mlpipes runs:

```console
$$ export $variable=/path/to/images
```
""",
}


@app.command()
@friendly
def new(
    name: Annotated[str, typer.Argument(help="of workload and package, e.g. churn; becomes a folder here")],
    kind: Annotated[
        Kind, typer.Option(help="tabular: numbers from rows of numbers; image-folder: classes of images")
    ] = Kind.TABULAR,
) -> None:
    """Write an installable package with a small workload that works, to start from."""
    target = Path.cwd() / name
    _check(name, target)
    write_package(target, name, kind)
    console.print(f"{target} is written. Next, install it beside mlpipes and try it:", soft_wrap=True)
    steps = [f"{_program('python')} -m pip install -e {name}", f"{_program('mlpipes')} demo --workload {name}"]
    if kind == Kind.IMAGE_FOLDER:
        steps.insert(1, f"export {_variable(name)}=/path/to/images")
    for step in steps:
        console.print(f"  {step}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{name}/README.md says more.", highlight=False)


def _variable(name: str) -> str:
    """The environment variable that names a package's folder of images: never $HOME, $PATH or $LANG."""
    return f"{name.upper()}_IMAGES"


def _program(name: str) -> str:
    """How a program of this environment is called here, also where the environment is not activated."""
    path = Path(sys.executable).parent / name
    if shutil.which(name) == str(path):
        return name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _check(name: str, target: Path) -> None:
    """Raises ConfigError if a package or a workload cannot be called so, or something else is."""
    check_name(name)
    if keyword.iskeyword(name):
        raise ConfigError(f"{name!r} is a word of Python's own, which no package can be called; choose another name")
    if name in {entry.name for entry in configured()} | problems().keys():
        raise ConfigError(f"there is a workload {name!r} already; choose another name, or see `mlpipes scales`")
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} is there already, and nothing in it was changed; choose another name or folder")
    if found := importlib.util.find_spec(name):
        raise ConfigError(
            f"Python has a module {name!r} already ({found.origin}), which a package of that name would hide; choose "
            "another name"
        )


def write_package(target: Path, name: str, kind: Kind) -> None:
    """Write a package's files; `target`, which must not be there, has all of them or is not there.

    Raises ConfigError if it cannot be written.
    """
    words = {
        "name": name,
        "kind": kind.value,
        "variable": _variable(name),
    }
    words["more"] = Template(_MORE[kind]).substitute(words)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
            draft = Path(scratch) / name  # not the scratch folder itself, which nobody else may read
            for path, text in _templates(kind):
                file = draft / path.replace("NAME", name).removesuffix(".txt")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(Template(text).substitute(words), encoding="utf-8")
            draft.rename(target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from error


def _templates(kind: Kind) -> Iterator[tuple[str, str]]:
    """Path and text of the templates of a kind: of all kinds, then its own."""
    for folder in ("common", kind.value):
        yield from _below(files("mlpipes.cli") / "templates" / folder, "")


def _below(folder: Traversable, path: str) -> Iterator[tuple[str, str]]:
    for item in folder.iterdir():
        if item.is_dir():
            yield from _below(item, f"{path}{item.name}/")
        else:
            yield f"{path}{item.name}", item.read_text(encoding="utf-8")
