"""Calibration of finished models: what is evaluated, exported and registered is divided by one temperature."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax

from mlpipes.data.snapshot import Snapshot, open_snapshot
from mlpipes.evaluation import gates
from mlpipes.evaluation.records import Subject, publish_evaluation
from mlpipes.store.calibration import Calibration
from mlpipes.store.layout import TrainingFolder
from mlpipes.store.outcome import Outcome
from mlpipes.tracking.models import EXPORTED, FINGERPRINT, register
from mlpipes.tracking.runs import Tracker, default_uri
from mlpipes.training.code_version import code_version, export_version
from mlpipes.training.model import TrainedModel, calibrated_model, deployable, evaluate, export_best, load_model
from mlpipes.training.parallel import SingleWorker
from mlpipes.training.prediction import predictions_of
from mlpipes.workloads.tensors import on_device
from mlpipes_tests import texts
from mlpipes_tests.training.harness import make_job, run_here

SCALE = "w1-b64-e6-g0"
Trained = Callable[[str], tuple[TrainingFolder, Snapshot]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The folder of a finished training of blobs, exported but not calibrated yet, and its snapshot; by workload, once."""
    made: dict[str, tuple[TrainingFolder, Snapshot]] = {}

    def train(name: str) -> tuple[TrainingFolder, Snapshot]:
        if name not in made:
            job = make_job(tmp_path_factory.mktemp(name), SCALE, f"mlpipes_tests.training.blobs:{name}")
            run_here(job)
            export_best(job.folder, job.recipe, Outcome.read(job.folder.result))
            made[name] = job.folder, open_snapshot(job.snapshot)
        return made[name]

    return train


def logits_of(model: TrainedModel, snapshot: Snapshot, split: str = "test") -> np.ndarray:
    columns = on_device(snapshot.columns(split), torch.device("cpu"))
    network = model.network.cpu()
    return predictions_of(model.workload, network, columns, model.hp, SingleWorker(), "fp32")["logits"]


def temperature(model: TrainedModel) -> float:
    assert model.calibration is not None
    return model.calibration.parameters["temperature"]


def subject(model: TrainedModel, snapshot: Snapshot) -> Subject:
    return Subject(
        workload="blobs", scale=SCALE, seed=0, fingerprint="f", snapshot=snapshot.digest, weights="w", split="test",
        n=snapshot.counts["test"], data="synthetic", night=None, dagster_run_id="r" * 8,
    )  # fmt: skip


def test_what_is_too_unsure_is_put_right_and_passes_its_gate(trained: Trained) -> None:
    folder, snapshot = trained("blobs")
    plain, model = load_model(folder.model, snapshot), calibrated_model(folder.model, snapshot)
    assert plain.calibration is None, "nothing was recorded"
    assert temperature(model) < 0.7
    before, _ = evaluate(plain, snapshot, "test")
    after, scores = evaluate(model, snapshot, "test")
    assert after.estimates["accuracy"] == before.estimates["accuracy"]
    found = after.quantities
    for name in ("expected_calibration_error", "negative_log_likelihood"):
        assert found[f"{name}_as_trained"] == pytest.approx(before.quantities[name], rel=1e-5)
        assert found[name] < before.quantities[name]
    assert found["temperature"] == temperature(model)
    (table,) = [table for table in after.tables if table.title == "Calibration"]
    assert [row[0] for row in table.rows] == ["as trained", f"calibrated, T = {temperature(model):g}"]
    assert any("fitted to validation, n=" in note for note in after.notes)
    assert len(after.figures["calibration"]) > len(before.figures["calibration"]), "both diagrams, side by side"
    for report, passes in ((before, False), (after, True)):
        evaluation = publish_evaluation(folder, report, scores, "title", subject(model, snapshot))
        assert gates.calibration(evaluation, gates.Limits()).passed is passes


@pytest.mark.parametrize("name", ["blobs", "probable"])
def test_what_is_served_is_divided_by_the_temperature(
    trained: Trained, name: str, isolated_home: Path, tmp_path: Path
) -> None:
    """Also where an author deploys something of the model that mlpipes knows nothing of."""
    import mlflow

    folder, snapshot = trained(name)
    raw = logits_of(load_model(folder.model, snapshot), snapshot)
    model = calibrated_model(folder.model, snapshot)
    tracker = Tracker(default_uri())
    run = tracker.run_of("blobs", "f", "run", {}, {})
    mlflow.set_tracking_uri(tracker.uri)
    mlflow.set_experiment("of somebody's own code")
    version = register(
        tracker, run, "mlpipes-blobs", deployable(model, snapshot), {FINGERPRINT: "f", EXPORTED: "e"}, [],
        {"temperature": temperature(model)},
    )  # fmt: skip
    served: Any = mlflow.pyfunc.load_model(f"models:/mlpipes-blobs/{version}")
    found = np.asarray(served.predict(np.array(snapshot.columns("test")["point"])))
    expected = softmax(raw.astype(np.float64) / temperature(model), axis=1)
    np.testing.assert_allclose(found if name == "probable" else softmax(found, axis=1), expected, atol=1e-5)
    assert (found.argmax(axis=1) == raw.argmax(axis=1)).all()
    logged = tracker.client.get_logged_model(served.metadata.model_id)
    assert logged.params["temperature"] == f"{temperature(model):g}"


def test_another_export_of_a_known_training_is_another_version(trained: Trained, isolated_home: Path) -> None:
    folder, snapshot = trained("blobs")
    tracker = Tracker(default_uri())
    run = tracker.run_of("blobs", "f", "run", {}, {})
    fits = [None, {"temperature": 0.5}, {"temperature": 0.25}, {"temperature": 0.5}]
    versions, digests = [], []
    # One of before exports had digests of their own.
    tracker.client.create_registered_model("mlpipes-blobs")
    tracker.client.create_model_version("mlpipes-blobs", "file:///nowhere", tags={FINGERPRINT: "f"})
    for parameters in fits:
        if parameters:
            Calibration(parameters=parameters, n=9).write_to(folder.calibration)
        model = load_model(folder.model, snapshot)
        digests.append(model.exported_digest)
        tags = {FINGERPRINT: "f", EXPORTED: model.exported_digest}
        versions.append(register(tracker, run, "mlpipes-blobs", deployable(model, snapshot), tags, []))
    folder.calibration.unlink()
    assert versions == ["2", "3", "4", "3"]
    assert len(set(digests)) == 3


def test_the_export_has_a_code_version_of_its_own(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpipes.training import code_version as rules

    folder, snapshot = trained("blobs")
    where, model = "mlpipes_tests.training.blobs:blobs", load_model(folder.model, snapshot)
    training, digest = code_version(where), model.exported_digest
    found = {}
    for name in ("code_version", "export_version"):
        from mlpipes.training import reached_code as search

        with monkeypatch.context() as patch:
            patch.setattr(
                rules, "reached_code", lambda *given, name=name: found.setdefault(name, search.reached_code(*given))
            )
            getattr(rules, name)(where)
    exporting = {f"mlpipes.workloads.{name}" for name in ("deployables", "served_text_model", "temperature")}
    assert exporting <= set(found["export_version"].modules)
    assert not exporting & set(found["code_version"].modules), "the fit may change without training anew"
    assert export_version(where) != training
    monkeypatch.setattr("mlpipes.training.model.export_version", lambda _: "other code")
    assert model.exported_digest != digest


@pytest.mark.parametrize("name", ["aside", "twice"])
def test_predictions_that_do_not_follow_the_model_are_left_as_trained_and_it_is_said(
    trained: Trained, name: str
) -> None:
    folder, snapshot = trained(name)
    model = calibrated_model(folder.model, snapshot)
    assert model.calibration is not None
    assert model.calibration.parameters == {}
    assert "override `calibrated`" in model.calibration.note
    np.testing.assert_array_equal(logits_of(model, snapshot), logits_of(load_model(folder.model, snapshot), snapshot))
    report, _ = evaluate(model, snapshot, "test")
    assert "temperature" not in report.quantities
    assert any("override `calibrated`" in note for note in report.notes)


def test_texts_are_served_and_predicted_with_the_temperature(
    tmp_path: Path, isolated_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import pandas as pd

    from mlpipes.training.model import predict_texts

    monkeypatch.setenv(texts.FOLDER, str(texts.write_tables(tmp_path)))
    job = make_job(tmp_path, "w1-b32-e2-g0", texts.WORDS)
    run_here(job)
    snapshot = open_snapshot(job.snapshot)
    folder = export_best(job.folder, job.recipe, Outcome.read(job.folder.result))
    asked = ["purr mouse", "bark bone the leash"]

    def answers(model: TrainedModel) -> np.ndarray:
        found = predict_texts(model, snapshot, asked, None)
        return np.array([found[name] for name in found if name != "label"]).T

    plain = answers(load_model(folder, snapshot))
    Calibration(parameters={"temperature": 0.25}, n=9).write_to(job.folder.calibration)
    model = load_model(folder, snapshot)
    sharper = plain**4 / (plain**4).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(answers(model), sharper, atol=1e-5)
    mlflow.set_tracking_uri(default_uri())
    with mlflow.start_run(run_id=Tracker(default_uri()).run_of("words", "f", "run", {}, {})):
        logged = deployable(model, snapshot).log([])
    served: Any = mlflow.pyfunc.load_model(logged.model_uri).predict(pd.DataFrame({"text": asked}))
    np.testing.assert_allclose(served.drop(columns="label").to_numpy(), sharper, atol=1e-4)
    assert calibrated_model(folder, snapshot).calibration is not None


def test_a_regression_is_not_touched(tmp_path: Path) -> None:
    job = make_job(tmp_path, "w1-b12-e2-g0", "mlpipes_tests.training.odd:plain")
    run_here(job)
    snapshot = open_snapshot(job.snapshot)
    model = calibrated_model(export_best(job.folder, job.recipe, Outcome.read(job.folder.result)), snapshot)
    assert model.calibration is None
    assert not evaluate(model, snapshot, "test")[0].quantities.keys() & {"temperature", "expected_calibration_error"}
