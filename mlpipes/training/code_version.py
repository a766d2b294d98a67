"""The code version: a digest of the code that a training's numbers depend on, taken without importing it."""

import ast
import importlib.util
from functools import cache
from pathlib import Path

from mlpipes.store.files import digest_of

ENGINE_MODULES = (
    "mlpipes.training.determinism",
    "mlpipes.training.embedding",
    "mlpipes.training.prediction",
    "mlpipes.training.gradient",
    "mlpipes.training.loop",
    "mlpipes.training.parallel",
    "mlpipes.training.reduction",
    "mlpipes.training.running_statistics",
    "mlpipes.workloads.tensors",
)
"""Engine code that numbers depend on. The rest (checkpoints, messages, tracking) may change without retraining."""


@cache
def code_version(implementation: str) -> str:
    """Digest (16 hex digits) of the code that training `module:attribute` runs, without importing any of it.

    Covers the workload's module, the modules of its own package that it imports, and the engine's numeric modules.
    Comments, docstrings and formatting do not count, so tidying up never makes a finished model stale.
    """
    module = implementation.partition(":")[0]
    package = module.rpartition(".")[0]
    modules = _reachable(module, package) | set(ENGINE_MODULES)
    return digest_of({name: _normalised(name) for name in sorted(modules)})[:16]


def _source(module: str) -> Path | None:
    """A module's file. Only its top-level package is looked up: asking for more would import what lies above it."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for location in (spec.submodule_search_locations if spec else None) or []:
        path = Path(location, *rest)
        if (file := path.with_suffix(".py")).is_file() or (file := path / "__init__.py").is_file():
            return file
    return Path(spec.origin) if spec and spec.origin and not rest else None


def _reachable(module: str, package: str) -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if name in found or path is None:
            continue
        found.add(name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            waiting += [n for n in names if package and n.startswith(package + ".")]
    return found


def _normalised(module: str) -> str:
    path = _source(module)
    if path is None:
        return ""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            del body[0]  # a docstring; that the tree may now be no valid program does not matter to its dump
    return ast.dump(tree)
