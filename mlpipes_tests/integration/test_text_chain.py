"""A text workload end to end: data set to registered model, with a real Ray, MLflow and Dagster, and new texts asked."""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from mlpipes.cli.app import app
from mlpipes.data.snapshot import open_snapshot
from mlpipes.definitions import build_defs
from mlpipes.evaluation.drift import Drift, DriftLimits
from mlpipes.evaluation.monitor import drift_of_champion
from mlpipes.scales import scales_of
from mlpipes.serving.sampled import folder_of
from mlpipes.store.layout import Store
from mlpipes.store.references import ModelReference
from mlpipes.tracking.models import SCALE, SNAPSHOT, WEIGHTS
from mlpipes.tracking.runs import Tracker, default_uri
from mlpipes.workloads.catalog import Entry
from mlpipes_tests.serving.fakes import keep_served
from mlpipes_tests.texts import FOLDER, WORDS

SCALES = ["w1-b16-e12-g0", "w2-b16-e12-g0"]


@pytest.fixture(scope="module")
def chain(ray_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ModelReference | None]]:
    """References to the models of two scales of a small workload on words."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [
        {"text": f"{' '.join([word] * (1 + n % 9))} item {n}", "label": label}
        for label, word in (("cat", "purr"), ("dog", "bark"))
        for n in range(120)
    ]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    patch = pytest.MonkeyPatch()
    patch.setenv("MLPIPES_HOME", str(ray_home))
    patch.setenv(FOLDER, str(folder))
    entry = Entry("words", "Words", WORDS, scales_of(SCALES, "test"))
    job = build_defs(catalog=[entry]).resolve_job_def("words_chain")
    config = {
        "ops": {"words__checkpoints": {"config": {"hyperparameters": {"learning_rate": 5e-3, "pooling": "mean"}}}}
    }
    try:
        with dg.DagsterInstance.ephemeral() as instance:
            for scale in SCALES:
                assert job.execute_in_process(instance=instance, partition_key=scale, run_config=config).success
        yield {scale: Store(ray_home / "store").read_reference(ModelReference, "words", scale) for scale in SCALES}
    finally:
        patch.undo()


@pytest.fixture(autouse=True)
def _in_home(ray_home: Path, chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPES_HOME", str(ray_home))


def test_both_scales_end_in_the_same_model(chain: dict[str, ModelReference], ray_home: Path) -> None:
    store = Store(ray_home / "store")
    folders = [store.training(chain[scale].fingerprint) for scale in SCALES]
    digests = {json.loads(folder.result.read_text())["content"]["weights_digest"] for folder in folders}
    assert len(digests) == 1


def test_the_registered_model_takes_texts_and_gives_labels_and_probabilities(chain: dict[str, ModelReference]) -> None:
    import mlflow

    mlflow.set_tracking_uri(default_uri())
    reference = chain[SCALES[0]]
    model = mlflow.pyfunc.load_model(f"models:/{reference.registered_model}/{reference.version}")
    answers: Any = model.predict(pd.DataFrame({"text": ["bark bark bark", "purr purr item"]}))
    assert answers["label"].tolist() == ["dog", "cat"]
    assert (answers[["p(cat)", "p(dog)"]].sum(axis=1) - 1).abs().max() < 1e-6


def test_predict_answers_new_texts(
    chain: dict[str, ModelReference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlpipes.cli import models

    monkeypatch.setattr(models, "scale_named", lambda workload, scale: scale)
    runner = CliRunner(env={"COLUMNS": "120"})
    result = runner.invoke(app, ["predict", "words", SCALES[0], "purr purr purr", "bark bark"])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "purr" in line or "bark" in line]
    assert "cat" in lines[0]
    assert "dog" in lines[1]
    piped = runner.invoke(app, ["predict", "words", SCALES[0]], input="bark bark\n\npurr\n")
    assert piped.output.count("dog") >= 1
    wrong = runner.invoke(app, ["predict", "words", SCALES[0], "x", "--pair", "y"])
    assert wrong.exit_code == 1
    assert not os.environ.get("MLPIPES_RAY_ADDRESS")


def test_served_texts_that_look_otherwise_than_the_test_split_are_noticed(
    chain: dict[str, ModelReference], ray_home: Path
) -> None:
    from mlpipes.serving.current import Registry, Wanted
    from mlpipes.serving.model import fetched, load

    store, tracker = Store(ray_home / "store"), Tracker(default_uri())
    champion = Registry(lambda: tracker, Wanted("mlpipes-words"), store).wanted_now()
    model = load(fetched(tracker, champion, store))
    split = open_snapshot(store.snapshots / champion.tags[SNAPSHOT]).columns("test")
    texts, generator = np.array(list(split["text"].texts()), dtype=object), np.random.default_rng(0)

    def found(served: np.ndarray) -> Drift:
        for path in folder_of(store, champion.name, champion.version, champion.tags[WEIGHTS]).glob("*"):
            path.unlink()
        keep_served(store, model, {"text": served})
        since = datetime.now(UTC) - timedelta(hours=24)
        drifted = drift_of_champion(store, tracker, "words", champion.tags[SCALE], since, DriftLimits(least_samples=40))
        assert drifted
        return drifted[1]

    some = generator.choice(texts, 200)
    usual = found(some)
    assert (usual.evaluated, usual.served) == (len(texts), 200)
    assert {"input text: words", "answer label", "answer confidence"} <= {each.name for each in usual.figures}
    assert not usual.moved, str(usual)
    for name, served in {
        "input text: words": np.array([f"{text} and so on and on" for text in some], dtype=object),
        "input text: beyond ASCII": np.array([f"«{text}»" for text in some], dtype=object),
        "answer label": generator.choice(texts[[text.startswith("bark") for text in texts]], 200),
    }.items():
        moved = found(served)
        assert name in {each.name for each in moved.moved}, str(moved)
