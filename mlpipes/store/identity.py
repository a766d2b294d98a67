"""The store's identity: an id of its own, so that whoever remembers one store never takes another one for it."""

import hashlib
import secrets
import time
from pathlib import Path

from filelock import FileLock

from mlpipes.store.files import read_record, write_record
from mlpipes.store.layout import Store


def identity_of(store: Store) -> str | None:
    """The store's id; None if it has none (yet). Raises CorruptionError."""
    try:
        return read_record(_path(store))["id"]
    except FileNotFoundError:
        return None


def identify(store: Store) -> str:
    """The store's id, given to it now if it has none; of several processes that ask at once, all get the same."""
    if (known := identity_of(store)) is not None:
        return known
    store.root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{_path(store)}.lock"):
        if (known := identity_of(store)) is None:
            known = secrets.token_hex(8)
            write_record(_path(store), {"id": known, "since": time.time()})
        return known


def mark_of(store: str) -> str:
    """Eight hexadecimal digits in the names of a store's jobs, by which no other store's are taken for them.

    They go by its id, which is given to it now if it has none: where two programs run, both may have theirs at one path.
    """
    return hashlib.sha256(identify(Store(Path(store))).encode()).hexdigest()[:8]


def is_empty(store: Store) -> bool:
    """Whether no asset was ever materialized into the store, or nothing of that is left."""
    return not any((store.root / "assets").glob("*/*/*.json"))


def _path(store: Store) -> Path:
    return store.root / "store.json"
