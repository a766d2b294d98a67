"""A packed home of an earlier commit (`make_home.py`), opened as it lies on a user's disk."""

import json
import sqlite3
import tarfile
from pathlib import Path

from mlpipes.store.files import write_record
from mlpipes_tests.upgrade.make_home import CHECKOUT, DUMP, HOME, HOST, TEMPORARY

HOMES = {path.name.removesuffix(".tar.xz"): path for path in Path(__file__).parent.glob("home-*.tar.xz")}
"""By the name of the commit that wrote it."""


def unpack(name: str, home: Path) -> None:
    """Put a home where it could have been written, with MLflow's file and records that are as they should be."""
    with tarfile.open(HOMES[name]) as tar:
        tar.extractall(home, filter="data")
    places = {HOME: str(home), CHECKOUT: str(home / "checkout"), HOST: "elsewhere", TEMPORARY: str(home / "tmp")}
    for path in [p for p in home.rglob("*") if p.suffix in (".json", ".jsonl", ".sql") or p.name == "MLmodel"]:
        data = before = path.read_bytes()
        for placeholder, meaning in places.items():
            data = data.replace(placeholder.encode(), meaning.encode())
        if data == before:
            continue
        if path.suffix == ".json" and "sha256" in (record := json.loads(data)):
            write_record(path, record["content"])
        else:
            path.write_bytes(data)
    with sqlite3.connect(home / "mlflow" / "mlflow.db") as database:
        database.executescript((home / DUMP).read_text(encoding="utf-8"))
    (home / DUMP).unlink()
