"""Evidence: when a test fails, the logs that tell why (of workers, Ray, Dagster, Slurm) become part of its report."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

_LINES = 60
_FILES = 25
_PATTERNS = ("**/*.log", "**/messages/a*.jsonl", "**/*.stacks.txt", "**/logs/**/*.err")
_RAY_PATTERNS = ("job-driver-*.log", "worker-*.err", "worker-*.out", "raylet.err", "gcs_server.err", "dashboard.log")
_folders: list[Path] = []
_begun = [0.0]


def collect_from(folder: Path) -> None:
    """Look into a folder when a test fails from now on."""
    _folders.append(folder)


def begin() -> None:
    """A module of tests begins: what its tests share may have said before a test what makes it fail."""
    _begun[0] = time.time()


def sections() -> list[tuple[str, str]]:
    """Name and end of each log that was written to since the module began, the latest last; for a test's report."""
    found = {path for folder in _folders for path in _logs(folder)}
    fresh = sorted((p for p in found if _written(p) >= _begun[0]), key=_written)
    return [(f"log {path}", _tail(path)) for path in fresh[-_FILES:]]


def _logs(folder: Path) -> Iterator[Path]:
    for pattern in _PATTERNS:
        yield from (path for path in _matching(folder, pattern) if path.is_file())
    for head in _matching(folder, "**/ray/head.json"):
        try:
            temporary = Path(json.loads(head.read_text())["content"]["temporary"])
        except (OSError, ValueError, KeyError):
            continue
        for pattern in _RAY_PATTERNS:
            yield from _matching(temporary, f"r/session_*/logs/{pattern}")


def _matching(folder: Path, pattern: str) -> list[Path]:
    """The files that match; once more where a folder vanished meanwhile, for a report must not be lost by that."""
    for _ in range(5):
        try:
            return list(folder.glob(pattern))
        except OSError:
            continue
    return []


def _written(path: Path) -> float:
    """When a file was written to; of an empty one, never."""
    try:
        found = path.stat()
    except OSError:
        return -1.0
    return found.st_mtime if found.st_size else -1.0


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return str(error)
    return "\n".join(line[:500] for line in lines[-_LINES:])
