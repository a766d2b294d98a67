"""Make a home with the code of an earlier commit, and pack it; imports only what is there in that commit and in this one.

    git worktree add /tmp/old COMMIT && cp -r mlpipes_tests/upgrade /tmp/old/mlpipes_tests/
    cd /tmp/old && PYTHONPATH=$PWD python -m mlpipes_tests.upgrade.make_home home-COMMIT.tar.xz

In it are two workloads of `made_up.py`, each with a champion, and a training that died after some checkpoints.
"""

import io
import os
import re
import socket
import sqlite3
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlpipes

HOME, CHECKOUT, HOST, TEMPORARY = "@HOME@", "@CHECKOUT@", "@HOST@", "@TEMPORARY@"
"""Stand for what is of one machine only; `home.py` fills them in."""
DUMP = "mlflow/mlflow.sql"
"""MLflow's SQLite file as text: smaller, and the same on every platform."""
ENTRIES = {
    "shapes": ("mlpipes_tests.upgrade.made_up:shapes", ["w1-b40-e8-g0", "w1-b40-e4-g0"]),
    "counts": ("mlpipes_tests.upgrade.made_up:counts", ["w1-b20-e12-g0"]),
}
HYPERPARAMETERS = {
    "shapes": {"width": 4},
    "counts": {"learning_rate": 2e-2, "pooling": "mean", "dropout": 0.0},
}
DYING = {"width": 4, "label_smoothing": 0.5}
NIGHT = "2026-11-01"


def make(home: Path) -> None:
    """Train both workloads to a champion, evaluate one again by night, and leave a training half done."""
    os.environ["MLPIPES_HOME"] = str(home)
    import dagster as dg

    from mlpipes.compute.local import LocalRay
    from mlpipes.definitions import build_defs
    from mlpipes.scales import scales_of
    from mlpipes.workloads.catalog import Entry

    entries = [Entry(name, "Made up", where, scales_of(keys, "test")) for name, (where, keys) in ENTRIES.items()]
    definitions = build_defs(catalog=entries)

    def launch(workload: str, job: str, scale: str, hp: Any = None, **options: Any) -> bool:
        config = {"ops": {f"{workload}__checkpoints": {"config": {"hyperparameters": hp}}}} if hp else None
        return (
            definitions.resolve_job_def(f"{workload}_{job}")
            .execute_in_process(instance=instance, partition_key=scale, run_config=config, **options)
            .success
        )

    try:
        with dg.DagsterInstance.ephemeral() as instance:
            for workload, hp in HYPERPARAMETERS.items():
                assert launch(workload, "chain", ENTRIES[workload][1][0], hp)
            assert launch("shapes", "evaluation", ENTRIES["shapes"][1][0], tags={"mlpipes/night": NIGHT})
            assert not launch("shapes", "chain", ENTRIES["shapes"][1][1], DYING, raise_on_error=False)
    finally:
        LocalRay().stop()


def pack(home: Path, archive: Path) -> None:
    """The store and what MLflow needs to serve its models, less what names this machine."""
    with tarfile.open(archive, "w:xz") as tar:
        for name, data in _packed(home):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))


def _packed(home: Path) -> Iterator[tuple[str, bytes]]:
    names = {
        str(home): HOME,
        str(Path(mlpipes.__file__).parents[1]): CHECKOUT,
        f'"{socket.gethostname()}"': f'"{HOST}"',
        tempfile.gettempdir(): TEMPORARY,
    }

    def anonymous(data: bytes) -> bytes:
        for name, placeholder in names.items():
            data = data.replace(name.encode(), placeholder.encode())
        return re.sub(rb'[^\s"\\]+/site-packages/', b"site-packages/", data)

    def cleaned(path: Path) -> bytes:
        if path.suffix in (".json", ".jsonl") or path.name == "MLmodel":
            return anonymous(path.read_bytes())
        if path.suffix != ".pt2":
            return path.read_bytes()
        # An exported program says of each of its operations where it stood.
        copy = io.BytesIO()
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
            for entry in old.infolist():
                new.writestr(entry, anonymous(old.read(entry)) if entry.filename.endswith(".json") else old.read(entry))
        return copy.getvalue()

    with sqlite3.connect(home / "mlflow" / "mlflow.db") as database:
        for table in ("metrics", "latest_metrics"):
            database.execute(f"DELETE FROM {table} WHERE key LIKE 'system/%'")  # noqa: S608
        for table, key in (("tags", "key"), ("logged_model_tags", "tag_key")):
            database.execute(f"DELETE FROM {table} WHERE {key} LIKE 'mlflow.source.%' OR {key} = 'mlflow.user'")  # noqa: S608
        database.execute("UPDATE runs SET user_id = '', source_name = ''")
        yield DUMP, anonymous("\n".join(database.iterdump()).encode())
    models = [path for path in (home / "mlflow" / "artifacts").rglob("*") if "models" in path.parts]
    for path in sorted([*(home / "store").rglob("*"), *models]):
        if path.is_file() and path.suffix not in (".lock", ".heartbeat") and path.parent.name != "ray":
            yield path.relative_to(home).as_posix(), cleaned(path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="mlpipes-old-") as folder:
        make(Path(folder))
        pack(Path(folder), Path(sys.argv[1]))
