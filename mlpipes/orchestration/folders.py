"""Folders that sensors watch: which files have stopped growing."""

from collections.abc import Collection, Mapping
from pathlib import Path


def settled(
    folder: Path, suffixes: Collection[str], before: Mapping[str, list[int]]
) -> tuple[dict[str, list[int]], list[str]]:
    """The files in a folder with size and time of change, and those of them that are as they were `before`."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file():
            stat = path.stat()
            found[path.name] = [stat.st_size, stat.st_mtime_ns]
    return found, [name for name, state in found.items() if before.get(name) == state and state[0]]
