"""Crash-safe files: atomic writes, checksummed records, and directories published as a whole with a manifest.

The rule everywhere: write under a temporary name, fsync, rename. A reader trusts nothing that it has not verified.
"""

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpipes.errors import ConfigError, CorruptionError, FormatError

MANIFEST = "MANIFEST.json"
_CHUNK = 1 << 20


def canonical_json(value: Any) -> bytes:
    """The one byte string that stands for a JSON value: sorted keys, no spaces, UTF-8; NaN raises ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON value's canonical form."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in chunks."""
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            sha.update(chunk)
    return sha.hexdigest()


def fsync(path: Path) -> None:
    """Force a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Raises ConfigError if no file can be made in a folder that is there: to be asked before hours of work for it."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written to ({error.strerror}); name another place, or give yourself the right to"
        ) from error


def _temporary_beside(path: Path) -> Path:
    return path.parent / f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}"


def write_atomic(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a whole file so that a crash at any moment leaves the old bytes or the new ones, never a mixture.

    `mode`: who may do what with it, less what the process's umask forbids; from its first byte on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:  # noqa: PTH123
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def write_record(path: Path, content: Mapping[str, Any], mode: int = 0o666) -> None:
    """Write a JSON object together with its own checksum, atomically; `mode` as of `write_atomic`."""
    envelope = {"sha256": digest_of(content), "content": content}
    write_atomic(path, json.dumps(envelope, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n", mode)


def read_record(path: Path) -> dict[str, Any]:
    """Read what `write_record` wrote. Raises FileNotFoundError, or CorruptionError if a byte is not as written."""
    try:
        envelope = json.loads(path.read_bytes())
        content, expected = envelope["content"], envelope["sha256"]
        found = digest_of(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptionError(
            f"{path} is not a readable record ({error}). Move it away to have it made again."
        ) from error
    if found != expected:
        raise CorruptionError(f"{path} does not match its checksum. Move it away to have it made again.")
    return content


@dataclass
class Draft:
    """A directory being written: put files under `path` and facts into `meta`; both are sealed when it is published."""

    path: Path
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A directory whose every file matched its manifest when it was opened."""

    path: Path
    kind: str
    version: int
    meta: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def size(self) -> int:
        """Bytes of all files together, the manifest apart."""
        return sum(entry["bytes"] for entry in self.files.values())


@contextmanager
def publishing(target: Path, *, kind: str, version: int) -> Iterator[Draft]:
    """Write a directory that appears under its final name complete and checksummed, or not at all.

    Two writers of the same target are safe: the first rename wins, and the loser's copy is dropped after the winner's
    has been verified. A target that is there but corrupt is quarantined, never overwritten.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(target)
    temporary.mkdir()
    try:
        draft = Draft(temporary)
        yield draft
        _seal(draft, kind, version)
        _rename_or_concede(temporary, target, kind)
    finally:
        # Also on BaseException: an interrupted step must leave no half-written directory behind.
        shutil.rmtree(temporary, ignore_errors=True)


def _seal(draft: Draft, kind: str, version: int) -> None:
    files = {}
    for path in sorted(p for p in draft.path.rglob("*") if p.is_file()):
        fsync(path)
        files[path.relative_to(draft.path).as_posix()] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    content = {"kind": kind, "version": version, "files": files, "meta": draft.meta}
    write_record(draft.path / MANIFEST, content)
    for directory in [draft.path, *(p for p in draft.path.rglob("*") if p.is_dir())]:
        fsync(directory)


def _rename_or_concede(temporary: Path, target: Path, kind: str) -> None:
    for _ in range(2):
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            try:
                open_published(target, kind=kind)
            except CorruptionError:
                quarantine(target)
                continue
            return
        fsync(target.parent)
        return
    raise CorruptionError(f"{target} was replaced by a corrupt directory twice while it was being written")


def open_published(path: Path, *, kind: str, versions: frozenset[int] | None = None, verify: bool = True) -> Published:
    """Open a published directory and verify every byte of it.

    `verify=False` checks the manifest itself and the presence and size of each file, but not the files' checksums.
    Raises FileNotFoundError if the directory is not there, FormatError if its format is not among `versions` (what is only
    older or newer is not corrupt, and never quarantined), and CorruptionError naming the first bad file otherwise.
    """
    if not path.is_dir():
        raise FileNotFoundError(path)
    try:
        content = read_record(path / MANIFEST)
    except FileNotFoundError as error:
        raise CorruptionError(f"{path} has no {MANIFEST}: it is incomplete") from error
    try:
        published = Published(path, content["kind"], content["version"], content["meta"], content["files"])
    except KeyError as error:
        raise CorruptionError(f"{path / MANIFEST} lacks the field {error}") from error
    if published.kind != kind:
        raise CorruptionError(f"{path} holds a {published.kind!r}, expected a {kind!r}")
    if versions is not None and published.version not in versions:
        readable = ", ".join(map(str, sorted(versions)))
        raise FormatError(
            f"{path} was written by another version of mlpipes: a {kind} of format {published.version}, and this version "
            f"reads {readable}. It was left as it is. Use that version, or materialize the whole chain again, with "
            "the config `fresh: true` for `checkpoints`."
        )
    for name, entry in published.files.items():
        file = path / name
        if not file.is_file():
            raise CorruptionError(f"{file} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise CorruptionError(f"{file} has {file.stat().st_size} bytes, its manifest says {entry['bytes']}")
        if verify and sha256_file(file) != entry["sha256"]:
            raise CorruptionError(f"{file} does not match its checksum: its bytes changed after it was written")
    return published


def quarantine(path: Path) -> Path:
    """Rename a corrupt file or directory so that it is out of the way but kept as evidence; returns its new path."""
    for number in range(1, 1000):
        target = path.with_name(f"{path.name}.corrupt-{number}")
        if not target.exists():
            with suppress(FileNotFoundError):  # another process may have moved it first
                path.rename(target)
            return target
    raise CorruptionError(f"{path} was quarantined 999 times already; look at what keeps destroying it")
