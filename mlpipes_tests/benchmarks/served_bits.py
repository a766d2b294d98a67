"""Whether what is served are the evaluation's bits: requests in random company, aliases that move, a batch that is killed.

Run as `python -m mlpipes_tests.benchmarks.served_bits [PART…]`: `company`, `swaps`, `batch`; all by default. Every answer is
compared with what the evaluation says of the row. It takes some ten CPU-minutes, and ends with exit code 1 if a bit differs.
"""

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch

from mlpipes.data.snapshot import open_snapshot
from mlpipes.serving.model import Registered, write_out
from mlpipes.tracking.models import EXPORTED, FINGERPRINT, SCALE, WEIGHTS, register
from mlpipes.tracking.runs import Tracker
from mlpipes.workloads.base import DataInfo
from mlpipes.workloads.image_classification import BuiltInHyperparameters, ImageClassification
from mlpipes.workloads.served import one_thread, served_predictions, served_rows
from mlpipes.workloads.super_resolution import _made, video_sr
from mlpipes.workloads.tensors import autocast, on_device
from mlpipes_tests.sandbox import CHECKOUT, end, free_port
from mlpipes_tests.serving.models import IMAGES, champion, registered, run_in, tracker_in
from mlpipes_tests.texts import FOLDER, HYPER, WORDS, words, write_tables
from mlpipes_tests.training.harness import make_job
from mlpipes_tests.waiting import until

CLIENTS, MOST_TOGETHER = 13, 9
REQUESTS = 1250
"""Of each kind of model: more than 10,000 in all."""
SWAPS, SWAPPED_REQUESTS = 20, 20_000
ROWS, KILLS = 100_000, 10
PRECISIONS = ("fp32", "bf16")
CPU = torch.device("cpu")
MLPIPES = f"{CHECKOUT}/.venv/bin/mlpipes"


@dataclass
class Kind:
    """A model, what may be asked of it, and what the evaluation says of that."""

    name: str
    folder: Path
    rows: int
    body: Callable[[np.ndarray], Any]
    is_right: Callable[[Any, np.ndarray], bool]


# -- models without a training ---------------------------------------------------------------------------------------
def lively(model: Any) -> Any:
    """With random weights: what an untrained network answers is much the same for all."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval()


def written(tracker: Tracker, name: str, deployable: Any, home: Path) -> Path:
    """The folder of a model, as `mlpipes export` writes it."""
    tags = {FINGERPRINT: "f", EXPORTED: "e", SCALE: "w1-b1-e1-g0", WEIGHTS: "w"}
    version = register(tracker, run_in(tracker, name, "f"), f"mlpipes-{name}", deployable, tags, [])
    found = tracker.client.get_model_version(f"mlpipes-{name}", version)
    write_out(tracker, Registered(found.name, version, str(found.source), dict(found.tags)), home / name)
    return home / name


def pictures(network: str, shape: tuple[int, ...], precision: str, tracker: Tracker, home: Path) -> Kind:
    """A classifier of pictures at full width."""
    task: Any = ImageClassification(None, None)  # type: ignore[arg-type]
    hp = BuiltInHyperparameters(network=network, flip=network == "airbench")  # type: ignore[arg-type]
    images = np.random.default_rng(0).integers(0, 256, (61, *shape), dtype=np.uint8)
    columns = {"image": images, "label": np.zeros(61, dtype=np.int64)}
    info = DataInfo({"class_names": list("abcdefghij")}, task.statistics(columns), precision=precision)  # type: ignore[arg-type]
    model = lively(task.build_model(hp, info))
    wanted = served_predictions(task, model, on_device(columns, CPU), hp, precision)["logits"]
    deployable = replace(task.deployable(model, hp, info, columns), rows=served_rows(task, hp), precision=precision)
    folder = written(tracker, f"{network}-{precision}", deployable, home)
    return Kind(
        folder.name,
        folder,
        len(images),
        lambda rows: {"inputs": images[rows].tolist()},
        lambda given, rows: np.array_equal(np.array(given, dtype=np.float32), wanted[rows]),
    )


def texts(precision: str, tracker: Tracker, home: Path) -> Kind:
    """A small encoder on texts of several lengths."""
    os.environ[FOLDER] = str(home / "tables")
    (home / "tables").mkdir(exist_ok=True)
    snapshot = open_snapshot(make_job(write_tables(home / "tables"), "w1-b32-e1-g0", WORDS).snapshot)
    info = DataInfo(snapshot.facts, snapshot.meta["statistics"], snapshot.files, precision=precision)  # type: ignore[arg-type]
    hp, columns = HYPER(), snapshot.columns("train")
    model = lively(words.build_model(hp, info))
    answers = words.answers(served_predictions(words, model, on_device(columns, CPU), hp, precision), info)
    wanted = {name: np.asarray(values).tolist() for name, values in answers.items()}
    asked = list(columns["text"].texts())
    deployable: Any = words.deployable(model, hp, info, columns)
    deployable = replace(deployable, rows=served_rows(words, hp), precision=precision)
    folder = written(tracker, f"texts-{precision}", deployable, home)

    def is_right(given: Any, rows: np.ndarray) -> bool:
        return all(
            [record[name] for record in given] == [values[row] for row in rows] for name, values in wanted.items()
        )

    return Kind(
        folder.name, folder, len(asked), lambda rows: {"inputs": {"text": [asked[row] for row in rows]}}, is_right
    )


def frames(precision: str, tracker: Tracker, home: Path) -> Kind:
    """An upscaler; what the evaluation judges is what its network gives, on whole levels."""
    hp, info = video_sr.hyperparameters(), DataInfo({}, {}, precision=precision)  # type: ignore[arg-type]
    low = np.random.default_rng(0).integers(0, 256, (31, 24, 32, 3), dtype=np.uint8)
    model = lively(video_sr.build_model(hp, info))
    with torch.no_grad(), one_thread(), autocast(CPU, precision):
        made = [_made(model, torch.from_numpy(each)[None, None].permute(0, 1, 4, 2, 3)) for each in low]
    wanted = torch.cat(made).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    deployable: Any = video_sr.deployable(model, hp, info, {"image": np.zeros((2, 3, 48, 64), dtype=np.uint8)})
    deployable = replace(deployable, rows=video_sr.served_rows, precision=precision)
    folder = written(tracker, f"frames-{precision}", deployable, home)
    return Kind(
        folder.name,
        folder,
        len(low),
        lambda rows: {"inputs": low[rows].tolist()},
        lambda given, rows: np.array_equal(np.array(given), wanted[rows]),
    )


# -- servers and clients -----------------------------------------------------------------------------------------------
@contextmanager
def server(home: Path, *what: str) -> Iterator[str]:
    """`mlpipes serve`, once it answers: its address."""
    port, log = free_port(), home / "served_bits.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLPIPES_", "MLFLOW_"))}
    with log.open("wb") as out:
        command = [MLPIPES, "serve", *what, "--port", str(port), "--poll", "0.2"]
        process = subprocess.Popen(
            command, env=environment | {"MLPIPES_HOME": str(home)}, stdout=out, stderr=out, start_new_session=True
        )

    def ended() -> str:
        return log.read_text() if process.poll() is not None else ""

    try:
        until(lambda: "is served, after" in log.read_text(), "the server answers", vain=ended)
        yield f"http://127.0.0.1:{port}"
    finally:
        end(process)


def ask_all(address: str, number: int, ask: Callable[[requests.Session, random.Random], str]) -> Counter[str]:
    """So many requests by some clients at once; counts what `ask` says of each."""
    places = count()

    def client(seed: int) -> Counter[str]:
        said, generator = Counter[str](), random.Random(seed)  # noqa: S311 - no secret
        with requests.Session() as session:
            while next(places) < number:
                said[ask(session, generator)] += 1
        return said

    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(client, range(CLIENTS)), Counter[str]())


def company(home: Path) -> bool:
    """Each kind of model, asked by many at once for random rows."""
    tracker, right = tracker_in(home), True
    shapes = {"digits": (1, 8, 8), "airbench": (3, 32, 32), "resnet18": (3, 32, 32)}
    kinds = [pictures(name, shape, p, tracker, home) for name, shape in shapes.items() for p in PRECISIONS]
    kinds += [make(precision, tracker, home) for make in (texts, frames) for precision in PRECISIONS]
    for kind in kinds:
        with server(home, "--model", str(kind.folder)) as address:

            def ask(session: requests.Session, generator: random.Random, kind: Kind = kind, to: str = address) -> str:
                rows = np.array([generator.randrange(kind.rows) for _ in range(generator.randint(1, MOST_TOGETHER))])
                reply = session.post(f"{to}/invocations", json=kind.body(rows))
                exact = reply.headers.get("x-model-exact") == "true"
                if reply.status_code != 200:
                    return f"status {reply.status_code}"
                return "equal" if kind.is_right(reply.json()["predictions"], rows) else "OTHER" if exact else "inexact"

            said = ask_all(address, REQUESTS, ask)
        print(f"{kind.name:20} {dict(said)}", flush=True)
        right &= set(said) <= {"equal"}
    return right


def swaps(home: Path) -> bool:
    """The champion moves again and again while many ask; each answer has the bits of the version that its header names."""
    tracker = tracker_in(home)
    versions = dict(registered(tracker, seed) for seed in (1, 2))
    champion(tracker, "1")
    with server(home, "digits") as address:

        def ask(session: requests.Session, generator: random.Random) -> str:
            rows = [generator.randrange(len(IMAGES)) for _ in range(generator.randint(1, MOST_TOGETHER))]
            reply = session.post(f"{address}/invocations", json={"inputs": IMAGES[rows].tolist()})
            if reply.status_code != 200:
                return f"status {reply.status_code}"
            wanted = versions[version := reply.headers["x-model-version"]][rows]
            same = np.array_equal(np.array(reply.json()["predictions"], dtype=np.float32), wanted)
            return f"equal to version {version}" if same else "OTHER"

        def serves(version: str) -> bool:
            return requests.get(f"{address}/ping", timeout=60).headers.get("x-model-version") == version

        moved = 0

        def move() -> None:
            nonlocal moved
            for number in range(SWAPS):
                version = "21"[number % 2]
                champion(tracker, version)
                until(lambda v=version: f'version="{v}"' in requests.get(f"{address}/metrics", timeout=60).text, "it")
                moved += 1

        mover = threading.Thread(target=move)
        mover.start()
        said = Counter[str]()
        while sum(said.values()) < SWAPPED_REQUESTS or mover.is_alive():
            said += ask_all(address, 1000, ask)
        mover.join()
    print(f"{moved} moves of the alias: {dict(said)}", flush=True)
    return moved == SWAPS and all(key.startswith("equal") for key in said)


def batch(home: Path) -> bool:
    """A file whose answering is killed at random moments; the result is that of one which was not, byte for byte."""
    tracker = tracker_in(home)
    version, evaluated = registered(tracker, 1)
    champion(tracker, version)
    rows = np.random.default_rng(0).integers(0, len(IMAGES), ROWS)
    np.save(home / "many.npy", IMAGES[rows])
    environment = os.environ | {"MLPIPES_HOME": str(home)}
    generator, kills = random.Random(7), 0  # noqa: S311 - no secret

    def start(output: str) -> "subprocess.Popen[bytes]":
        words = ("predict", "digits", "--input", str(home / "many.npy"), "--output", str(home / output))
        return subprocess.Popen([MLPIPES, *words], env=environment, stdout=subprocess.DEVNULL)

    def published() -> int:
        return len(list((home / "store" / "predictions").glob("*/0*")))

    while kills < KILLS:
        before, process = published(), start("killed.parquet")
        wanted = before + generator.randint(1, ROWS // 1000 // (KILLS + 3))
        until(
            lambda n=wanted: published() >= n,
            "chunks are there",
            vain=lambda p=process: str(p.poll() or ""),
            every=0.01,
        )
        time.sleep(generator.random() * 0.3)
        process.kill()
        process.wait()
        kills += 1
    left = published()
    if start("killed.parquet").wait():
        return False
    import pyarrow.parquet as pq

    found = pq.read_table(home / "killed.parquet")
    same = np.array_equal(np.stack(found["prediction"].to_numpy(zero_copy_only=False)), evaluated[rows])
    once = found["row"].to_pylist() == list(range(ROWS))
    print(
        f"{ROWS:,} rows, {kills} kills, {left} of {ROWS // 1000} chunks by then: once {once}, equal bits {same}",
        flush=True,
    )
    return same and once


def main() -> int:
    """Run the parts."""
    parts = {"company": company, "swaps": swaps, "batch": batch}
    right = True
    for name in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory() as folder:
            right &= parts[name](Path(folder))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
