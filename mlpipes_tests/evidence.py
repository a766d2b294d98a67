"""Evidence: when a test fails, the logs that tell why (of workers, Ray, Dagster, Slurm) become part of its report."""

import json
from collections.abc import Iterator
from pathlib import Path

_LINES = 60
_FILES = 25
_PATTERNS = ("**/*.log", "**/messages/a*.jsonl", "**/*.stacks.txt", "**/logs/**/*.err")
_RAY_PATTERNS = ("job-driver-*.log", "worker-*.err", "worker-*.out", "raylet.err", "gcs_server.err", "dashboard.log")
_folders: list[Path] = []


def collect_from(folder: Path) -> None:
    """Look into a folder when a test fails from now on."""
    _folders.append(folder)


def sections(since: float) -> list[tuple[str, str]]:
    """Name and end of each log that was written to since a Unix time, the latest last; for a test's report."""
    found = {path for folder in _folders for path in _logs(folder)}
    fresh = sorted((p for p in found if _modified(p) >= since and p.stat().st_size), key=_modified)
    return [(f"log {path}", _tail(path)) for path in fresh[-_FILES:]]


def _logs(folder: Path) -> Iterator[Path]:
    for pattern in _PATTERNS:
        yield from (path for path in folder.glob(pattern) if path.is_file())
    for head in folder.glob("**/ray/head.json"):
        try:
            temporary = Path(json.loads(head.read_text())["content"]["temporary"])
        except (OSError, ValueError, KeyError):
            continue
        for pattern in _RAY_PATTERNS:
            yield from temporary.glob(f"session_*/logs/{pattern}")


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return str(error)
    return "\n".join(line[:500] for line in lines[-_LINES:])
