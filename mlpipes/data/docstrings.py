"""Docstrings: paragraphs of the documentation of installed libraries, and which library each comes from."""

import ast
import gc
import hashlib
import importlib.util
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mlpipes.data.dataset import Dataset, Provenance
from mlpipes.data.ragged import Ragged
from mlpipes.errors import DataError

LIBRARIES = {
    "dagster": "dagster",
    "matplotlib": "matplotlib",
    "scipy": "scipy",
    "sqlalchemy": "SQLAlchemy",
    "torch": "torch",
}
"""Modules that mlpipes needs anyway, and their distributions."""
PARAGRAPHS = 2400
"""Of each library at most."""
_NAMES = re.compile(
    r"\b(dagster|matplotlib|pyplot|plt|mlflow|numpy|np|scipy|scikit-learn|sklearn|sqlalchemy|pytorch|torch\w*)\b",
    re.IGNORECASE,
)
_SHORTEST, _LONGEST = 100, 600
_BLOCKS = frozenset(["body", "handlers", "orelse", "finalbody", "cases"])
"""In what a statement has others; expressions, of which some have parts of the same names, are in none of them."""


@dataclass(frozen=True)
class DocstringSource:
    """Paragraphs of docstrings with the library they come from; embedded, because the libraries are installed anyway.

    Names of the libraries are masked, doctests and markup lines left out, and files are drawn in an order that their
    names determine until a library has its paragraphs. The column `file` lets a split keep files together.
    """

    def load(self) -> Dataset:
        """One split `train` with `text`, `label` and `file`. Raises DataError for a library that is not there."""
        texts, labels, files, number = [], [], [], 0
        with _garbage_left():
            for label, module in enumerate(LIBRARIES):
                taken = 0
                for path in _files(module):
                    paragraphs = list(_paragraphs(path))[: PARAGRAPHS - taken]
                    texts += paragraphs
                    labels += [label] * len(paragraphs)
                    files += [number] * len(paragraphs)
                    taken, number = taken + len(paragraphs), number + 1
                    if taken == PARAGRAPHS:
                        break
        versions = ", ".join(f"{distribution} {version(distribution)}" for distribution in LIBRARIES.values())
        return Dataset(
            splits={
                "train": {
                    "text": Ragged.of_texts(texts),
                    "label": np.array(labels, dtype=np.int64),
                    "file": np.array(files, dtype=np.int64),
                }
            },
            provenance=Provenance(
                name="Docstrings of installed libraries",
                licence="those of the libraries (Apache-2.0, BSD, MIT, matplotlib's)",
                origin=versions,
                fidelity=f"at most {PARAGRAPHS:,} paragraphs a library; other versions give other texts",
            ),
            facts={
                "class_names": list(LIBRARIES),
                "roles": {"text": "text", "label": "library", "task": "classification"},
            },
        )


@contextmanager
def _garbage_left() -> Iterator[None]:
    """Syntax trees are in no cycles; to look for garbage among their nodes takes as long as to parse them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _files(module: str) -> list[Path]:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the library {module} is not installed, but its docstrings are part of this data set")
    root = Path(next(iter(spec.submodule_search_locations)))
    names = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*.py")
        if "test" not in path.as_posix()[len(str(root)) :]
    }
    return [names[name] for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())]


def _paragraphs(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # templates and other things that only look like Python
        return
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for block in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                lines = [line.strip() for line in block.splitlines()]
                prose = " ".join(
                    line for line in lines if line and not line.startswith((">>>", "...", "..", ":", "---", "==="))
                )
                text = _NAMES.sub("[lib]", prose)[:_LONGEST]
                if len(text) >= _SHORTEST:
                    yield text


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that may hold a docstring, in the order of `ast.walk`, which goes through each expression, too."""
    left = deque[ast.AST]([tree])
    while left:
        node = left.popleft()
        yield node
        for name in node._fields:
            if name in _BLOCKS:
                left.extend(getattr(node, name))
