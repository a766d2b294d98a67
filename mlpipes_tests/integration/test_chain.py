"""End to end with a real Ray, a real MLflow store and a real Dagster instance."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import psutil
import pytest

from mlpipes.compute import ray_service, ray_setup_worker
from mlpipes.compute.address import RayAddress
from mlpipes.compute.local import LocalRay
from mlpipes.compute.processes import with_variable
from mlpipes.definitions import build_defs
from mlpipes.evaluation.records import open_evaluation
from mlpipes.scales import scales_of
from mlpipes.store.files import read_record
from mlpipes.store.layout import Store
from mlpipes.store.references import EvaluationReference, ModelReference, TrainingReference
from mlpipes.tracking.runs import Tracker, default_uri
from mlpipes.workloads.catalog import CATALOG, Entry
from mlpipes_tests.waiting import LIMIT_SECONDS

SCALES = ["w1-b128-e3-g0", "w2-b128-e3-g0"]


def digits(scales: list[str]) -> Entry:
    return Entry("digits", CATALOG[0].summary, CATALOG[0].implementation, scales_of(scales, "test"))


class Pipeline:
    """A Dagster instance, a home and the definitions of digits at some scales."""

    def __init__(self, home: Path, scales: list[str]) -> None:
        self.entry = digits(scales)
        self.definitions = build_defs(catalog=[self.entry])
        self.store = Store(home / "store")
        (home / "dagster").mkdir(exist_ok=True)
        self.instance = dg.DagsterInstance.local_temp(str(home / "dagster"))

    def run(self, selection: dg.AssetSelection, partition: str | None = None, config: Any = None) -> Any:
        job = dg.define_asset_job("selected", selection)
        resolved = dg.Definitions.merge(self.definitions, dg.Definitions(jobs=[job])).resolve_job_def("selected")
        os.environ["DAGSTER_HOME"] = str(self.instance.root_directory)
        return resolved.execute_in_process(
            instance=self.instance, partition_key=partition, run_config=config, raise_on_error=False
        )

    def chain(self, partition: str, config: Any = None) -> Any:
        return self.run(dg.AssetSelection.assets(["digits", "champion"]).upstream(), partition, config)

    def metadata(self, asset: str, partition: str | None = None) -> dict[str, Any]:
        event = (
            self.instance.get_latest_materialization_event(dg.AssetKey(["digits", asset]))
            if partition is None
            else None
        )
        if partition is not None:
            records = self.instance.fetch_materializations(
                dg.AssetRecordsFilter(dg.AssetKey(["digits", asset]), asset_partitions=[partition]), limit=1
            ).records
            event = records[0].event_log_entry
        assert event is not None
        assert event.asset_materialization is not None
        return {name: value.value for name, value in event.asset_materialization.metadata.items()}


def failure(result: Any) -> str:
    return " ".join(
        str(event.event_specific_data.error_display_string) for event in result.all_node_events if event.is_step_failure
    )


@pytest.fixture(scope="module")
def home(ray_home: Path) -> Iterator[Path]:
    """The home whose private Ray runs; set for the whole module, so that its tests can build on one chain."""
    before = os.environ.get("MLPIPES_HOME")
    os.environ["MLPIPES_HOME"] = str(ray_home)
    yield ray_home
    os.environ.pop("MLPIPES_HOME")
    if before:
        os.environ["MLPIPES_HOME"] = before


@pytest.fixture(scope="module")
def pipeline(home: Path) -> Pipeline:
    """Two scales trained and judged, and the report over them."""
    made = Pipeline(home, [*SCALES, "w1-b64-e9-g0"])
    for partition in SCALES:
        result = made.chain(partition)
        assert result.success, failure(result)
    assert made.run(dg.AssetSelection.assets(["digits", "scaling_report"])).success
    return made


@pytest.fixture(autouse=True)
def _in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPES_HOME", str(home))


def test_the_chain_shows_what_people_want_to_see(pipeline: Pipeline) -> None:
    for partition in SCALES:
        training = pipeline.metadata("checkpoints", partition)
        assert "data:image/png;base64," in training["curves"]
        assert training["precision"] == "fp32"
        report = pipeline.metadata("eval_report", partition)
        assert report["accuracy"] > 0.8
        assert "n=359" in report["accuracy_95"]
        assert "data:image/png;base64," in report["confusion_plot"]
        assert "snapshot" in report["measured_on"]
        model = pipeline.metadata("model", partition)
        assert "Limits" in model["card"]
        assert "temperature" in model["calibration"]
        assert "validation, n=180" in model["calibration"]
        assert model["calibration"] in model["card"]
        assert report["expected_calibration_error"] < report["expected_calibration_error_as_trained"]
    digests = {pipeline.metadata("checkpoints", partition)["weights_digest"] for partition in SCALES}
    assert len(digests) == 1, "1 and 2 workers on real Ray must end in the same bits"


def test_the_scaling_report_names_what_is_missing(pipeline: Pipeline) -> None:
    found = pipeline.metadata("scaling_report")
    assert found["missing"] == "w1-b64-e9-g0 (never trained)"
    assert found["stale"] == "none"
    assert found["distinct_models"] == 1
    text = (pipeline.store.report("digits") / "scaling_report.md").read_text()
    assert all(scale in text for scale in SCALES)
    assert "Not evaluated: w1-b64-e9-g0 (never trained)" in text
    assert "is the best by validation, and the cheapest" in text
    # Both scales ended in the same model: the cheaper one is recommended, and the first to pass is champion.
    report = read_record(pipeline.store.report("digits") / "scaling_report.json")
    # One whose result was lost, and came back from its last checkpoint, has done no step by then: 0.
    assert all(row["peak_memory_bytes"] > 50 * 2**20 and 0 <= row["cpu_utilisation"] < 8 for row in report["rows"])
    client = Tracker(default_uri()).client
    champion = client.get_model_version_by_alias("mlpipes-digits", "champion")
    assert champion.tags["mlpipes.scale"] == SCALES[0]
    assert "first to pass the gates" in champion.tags["mlpipes.promotion"]
    assert "not better, the champion stays" in pipeline.metadata("champion", SCALES[1])["reason"]


def test_one_mlflow_run_per_fingerprint_with_a_whole_curve(pipeline: Pipeline) -> None:
    from mlpipes.tracking.runs import FINGERPRINT_TAG, Tracker, default_uri

    client = Tracker(default_uri()).client
    experiment = client.get_experiment_by_name("mlpipes/digits")
    assert experiment is not None
    for partition in SCALES:
        reference = pipeline.store.read_reference(EvaluationReference, "digits", partition)
        assert reference is not None
        runs = client.search_runs([experiment.experiment_id], f"tags.`{FINGERPRINT_TAG}` = '{reference.fingerprint}'")
        assert len(runs) == 1
        run = runs[0]
        assert run.info.status == "FINISHED"
        assert run.data.params["learning_rate"] == "0.02"
        assert run.data.metrics["test/accuracy"] > 0.8
        assert run.data.tags["dagster.partition"] == partition
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
        assert steps == list(range(1, 28)), "one point a step, none missing, none double"
        artifacts = {a.path for a in client.list_artifacts(run.info.run_id, f"evaluation/{reference.evaluation}")}
        assert any(path.endswith("confusion.png") for path in artifacts)


def test_the_registered_model_answers_like_the_trained_one(pipeline: Pipeline) -> None:
    import mlflow

    from mlpipes.data.snapshot import open_snapshot
    from mlpipes.tracking.runs import default_uri

    reference = pipeline.store.read_reference(ModelReference, "digits", SCALES[0])
    assert reference is not None
    mlflow.set_tracking_uri(default_uri())
    model = mlflow.pyfunc.load_model(f"models:/{reference.registered_model}/{reference.version}")
    test = open_snapshot(pipeline.store.snapshots / reference.snapshot).columns("test")
    assert model.metadata.model_id is not None
    logged = Tracker(default_uri()).client.get_logged_model(model.metadata.model_id)
    calibration = read_record(pipeline.store.training(reference.fingerprint).calibration)
    assert float(logged.params["temperature"]) == calibration["parameters"]["temperature"]
    answers = np.asarray(model.predict(np.array(test["image"][:77])))  # another batch size than the example's
    accuracy = float((answers.argmax(axis=1) == test["label"][:77]).mean())
    assert accuracy > 0.8


def test_a_finished_training_is_found_again_and_not_repeated(pipeline: Pipeline) -> None:
    reference = pipeline.store.read_reference(TrainingReference, "digits", SCALES[0])
    assert reference is not None
    folder = pipeline.store.training(reference.fingerprint)
    before = folder.result.stat().st_mtime_ns
    assert pipeline.chain(SCALES[0]).success
    assert folder.result.stat().st_mtime_ns == before
    assert sorted(path.name for path in folder.messages(1).parent.iterdir()) == ["a1.jsonl"]
    assert pipeline.metadata("model", SCALES[0])["registered_model"] == "models:/mlpipes-digits/1"


def test_a_lost_result_comes_back_the_same_from_the_last_checkpoint(pipeline: Pipeline) -> None:
    reference = pipeline.store.read_reference(TrainingReference, "digits", SCALES[1])
    assert reference is not None
    folder = pipeline.store.training(reference.fingerprint)
    digest = json.loads(folder.result.read_text())["content"]["weights_digest"]
    folder.result.unlink()
    result = pipeline.run(dg.AssetSelection.assets(["digits", "checkpoints"]), SCALES[1])
    assert result.success, failure(result)
    outcome = json.loads(folder.result.read_text())["content"]
    assert outcome["weights_digest"] == digest
    assert outcome["resumed_from_step"] == outcome["steps"]
    assert outcome["attempt"] == 2


def test_the_replay_check_trains_again_elsewhere_and_says_nothing_unless_asked(pipeline: Pipeline) -> None:
    scale, before = SCALES[1], sorted(pipeline.store.root.rglob("*"))
    job = pipeline.definitions.resolve_job_def("digits_replay")
    quiet = {"ops": {"digits__checkpoints__replay": {"config": {"enabled": False}}}}
    result = job.execute_in_process(instance=pipeline.instance, partition_key=scale, run_config=quiet)
    assert result.success
    assert [check.check_name for check in result.get_asset_check_evaluations()] == ["loss_finite"]
    result = job.execute_in_process(instance=pipeline.instance, partition_key=scale)
    (check,) = [check for check in result.get_asset_check_evaluations() if check.check_name == "replay"]
    assert check.passed
    assert "equal**, bit for bit" in str(check.metadata["comparison"].value)
    assert sorted(pipeline.store.root.rglob("*")) == before, "a replay leaves the store as it is"


def test_a_failing_training_says_why_and_leaves_no_job(home: Path) -> None:
    from mlpipes.compute.jobs import ALIVE
    from mlpipes.compute.local import LocalRay
    from mlpipes.compute.ray_jobs import RayJobs

    pipeline = Pipeline(home, ["w1-b64-e8-g0"])
    config = {
        "ops": {"digits__checkpoints": {"config": {"hyperparameters": {"optimizer": "sgd", "learning_rate": 1e30}}}}
    }
    result = pipeline.chain("w1-b64-e8-g0", config)
    assert not result.success
    assert "the loss became" in failure(result)
    jobs = RayJobs(LocalRay().ensure())
    statuses = [str(job.status.value) for job in jobs._patiently(lambda client: client.list_jobs())]
    assert statuses
    assert not set(statuses) & set(ALIVE)
    from mlpipes.tracking.runs import Tracker, default_uri

    runs = Tracker(default_uri()).client.search_runs(
        [Tracker(default_uri()).experiment("mlpipes/digits")], "tags.`mlpipes.scale` = 'w1-b64-e8-g0'"
    )
    assert [run.info.status for run in runs] == ["FAILED"]


def test_a_scale_that_does_not_fit_fails_before_anything_starts(home: Path) -> None:
    pipeline = Pipeline(home, ["w4-b128-e3-g1", "w8-b128-e3-g0-c0.1"])
    result = pipeline.chain("w4-b128-e3-g1")
    assert "needs 4 workers with 1 CPUs, 1 GPUs" in failure(result)
    assert "127.0.0.1" in failure(result)
    assert "`logical_shards` to at least 8" in failure(pipeline.chain("w8-b128-e3-g0-c0.1"))


def test_a_missing_data_set_says_how_to_get_it(home: Path) -> None:
    entry = Entry("cifar10", "CIFAR-10", CATALOG[1].implementation, scales_of(["w1-b8-e1-g0"], "test"))
    job = build_defs(catalog=[entry]).resolve_job_def("cifar10_chain")
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance, partition_key="w1-b8-e1-g0", raise_on_error=False)
    assert "mlpipes fetch cifar10" in failure(result)


def test_the_private_ray_listens_on_loopback_only_and_wants_its_token(home: Path) -> None:
    import requests

    ray = LocalRay()
    state = ray.status()
    assert state is not None
    mark = state["mark"]
    listening = []
    for process in with_variable("MLPIPES_RAY_HEAD", mark):
        with suppress(psutil.Error):
            listening += [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert len(listening) > 3
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    assert requests.get(f"{state['dashboard']}/api/jobs/", timeout=LIMIT_SECONDS).status_code in (401, 403)
    assert (ray.folder / "token").stat().st_mode & 0o077 == 0
    assert isinstance(ray.ensure(), RayAddress)
    assert ray.ensure().dashboard == state["dashboard"]


def test_a_training_starts_no_process_that_it_has_no_use_for(pipeline: Pipeline) -> None:
    import requests

    ray = LocalRay()
    state = ray.status()
    assert state is not None
    (command,) = (process.cmdline() for process in [psutil.Process(state["raylet"][0])])
    assert "--num_prestart_python_workers=0" in command
    assert "--maximum_startup_concurrency=4" in command or (os.cpu_count() or 1) > 4
    assert any(ray_setup_worker.__file__ in word for word in command)
    assert any(ray_service.__file__ in word for word in command)
    others = list[str]()
    for process in psutil.Process(state["pid"]).children():
        with suppress(psutil.Error):  # some come and go
            others.append(" ".join(process.cmdline()))
    assert [ray_service.__file__ in line for line in others if "dashboard/dashboard.py" in line] == [True]
    assert not any("ray.util.client" in line for line in others), "which listens for drivers that are no jobs"
    found = requests.get(
        f"{state['dashboard']}/api/v0/actors", headers=ray.ensure().headers(), timeout=LIMIT_SECONDS
    ).json()["data"]["result"]["result"]
    classes = {actor["class_name"] for actor in found}
    assert {"JobSupervisor", "TrainController", "RayTrainWorker"} <= classes
    assert classes <= {"JobSupervisor", "TrainController", "RayTrainWorker", "SynchronizationActor"}


@pytest.mark.long
def test_cifar10_on_real_data_at_one_and_two_workers(
    home: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLPIPES_CIFAR10", str(real_data / "cifar10"))
    scales = ["w1-b256-e2-g0", "w2-b256-e2-g0"]
    entry = Entry("cifar10", "CIFAR-10", CATALOG[1].implementation, scales_of(scales, "test"))
    job = build_defs(catalog=[entry]).resolve_job_def("cifar10_chain")
    digests = set()
    with dg.DagsterInstance.ephemeral() as instance:
        for scale in scales:
            result = job.execute_in_process(instance=instance, partition_key=scale, raise_on_error=False)
            assert result.success, failure(result)
            reference = Store(home / "store").read_reference(EvaluationReference, "cifar10", scale)
            assert reference is not None
            assert reference.estimates["accuracy"].value > 0.4
            assert reference.estimates["accuracy"].n == 1017
            verdict = open_evaluation(Store(home / "store"), reference).verdict
            assert verdict is not None
            assert verdict["gates"]["calibration"]["passed"], verdict
            folder = Store(home / "store").training(reference.fingerprint)
            digests.add(json.loads(folder.result.read_text())["content"]["weights_digest"])
    assert len(digests) == 1
