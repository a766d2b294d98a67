"""Slurm without a Slurm: settings, the shape of an allocation, and what a line of squeue means."""

from pathlib import Path

import pytest

from mlpipes.compute.jobs import JobHandle, JobState
from mlpipes.compute.places import jobs_for
from mlpipes.compute.slurm import SlurmJobs, SlurmSettings, run_slurm, shape
from mlpipes.errors import ConfigError, ScaleError
from mlpipes.scales import RayScaleConfig
from mlpipes_tests.sandbox import CHECKOUT

W8 = RayScaleConfig.from_key("w8-b1024-e90-g1")


def written(folder: Path, text: str) -> Path:
    (folder / "slurm.yaml").write_text(text)
    return folder / "slurm.yaml"


@pytest.mark.parametrize(
    ("key", "settings", "expected"),
    [
        ("w8-b64-e1-g0", {}, ["--nodes=1", "--cpus-per-task=8"]),
        ("w8-b64-e1-g1", {"workers_per_node": 4}, ["--nodes=2", "--cpus-per-task=4", "--gres=gpu:4"]),
        ("w3-b63-e1-g2", {"workers_per_node": 2, "gpu_type": "a100"}, ["--nodes=2", "--gres=gpu:a100:4"]),
        ("w4-b64-e1-g0.5-c0.5", {}, ["--nodes=1", "--cpus-per-task=2", "--gres=gpu:2"]),
        ("w2-b64-e1-g0", {"workers_per_node": 9, "memory": "8G", "qos": "night"}, ["--mem=8G", "--qos=night"]),
        ("w1-b64-e1-g0", {"options": ["--exclusive"]}, ["--exclusive", "--time=04:00:00"]),
    ],
)
def test_an_allocation_has_the_shape_of_its_scale(key: str, settings: dict[str, object], expected: list[str]) -> None:
    made = shape(RayScaleConfig.from_key(key), SlurmSettings.model_validate(settings))
    assert set(expected) <= set(made)
    assert "--ntasks-per-node=1" in made
    assert any(option.startswith("--gres") for option in made) == ("-g0-" not in f"{key}-")


def test_settings_can_differ_by_scale(tmp_path: Path) -> None:
    settings = SlurmSettings.load(
        written(tmp_path, 'partition: gpu\nscales:\n  w8-b1024-e90-g1: {time: "12:00:00", options: [--exclusive]}\n')
    )
    mine = settings.of_scale(W8.key)
    assert (mine.partition, mine.time, mine.options) == ("gpu", "12:00:00", ["--exclusive"])
    assert settings.of_scale("w1-b1-e1-g0").time == "04:00:00"


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("partitoin: x", ConfigError, "partitoin: Extra inputs are not permitted .* Known: partition, account"),
        ("signal_seconds: 5", ConfigError, "signal_seconds: .* greater than or equal to 60"),
        ("scales: {w2-b3-e1-g0: {}}", ScaleError, "not divisible"),
        ("scales: {w1-b1-e1-g0: {tmie: 1}}", ConfigError, "scale w1-b1-e1-g0: tmie"),
        ("- a", ConfigError, "name: value"),
        ("partition: x\npartition: y", ConfigError, "'partition' occurs twice"),
        ("a: [", ConfigError, "not valid YAML"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, text: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        SlurmSettings.load(written(tmp_path, text))


def test_missing_settings_and_two_places_at_once_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        jobs_for(W8, slurm=str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="exclude each other"):
        jobs_for(W8, address="http://head:8265", slurm=str(written(tmp_path, "")))


@pytest.mark.parametrize("name", ["slurm.yaml", "container.yaml"])
def test_the_settings_that_we_ship_are_valid(name: str) -> None:
    assert SlurmSettings.load(CHECKOUT / "deploy" / "slurm" / name).partition == "gpu"


def test_the_example_in_the_shipped_settings_is_used() -> None:
    settings = SlurmSettings.load(CHECKOUT / "deploy" / "slurm" / "slurm.yaml")
    assert {"--nodes=2", "--gres=gpu:4", "--exclusive", "--time=12:00:00"} <= set(shape(W8, settings.of_scale(W8.key)))


def line(state: str, reason: str = "None", restarts: int = 0, name: str = "f-0-a2", number: str = "7") -> str:
    return f"{number:20}{name:130}{state:20}{restarts:<10}{reason:200}"


@pytest.mark.parametrize(
    ("listed", "state", "attempt"),
    [
        (line("PENDING", "Resources"), "PENDING", 0),
        (line("CONFIGURING"), "PENDING", 0),
        (line("SUSPENDED"), "PENDING", 0),
        (line("RUNNING"), "RUNNING", 0),
        (line("COMPLETING"), "RUNNING", 0),
        (line("COMPLETED"), "SUCCEEDED", 0),
        (line("TIMEOUT", "TimeLimit"), "FAILED", 0),
        (line("NODE_FAIL", "NodeDown"), "FAILED", 0),
        (line("CANCELLED"), "STOPPED", 0),
        (line("PENDING", "PartitionConfig"), JobState.REFUSED, 0),
        (line("PENDING", "PartitionNodeLimit"), JobState.REFUSED, 0),
        (line("PENDING", "QOSMaxGRESPerJob"), JobState.REFUSED, 0),
        (line("PENDING", "QOSMaxGRESPerUser"), JobState.PENDING, 0),
        (line("PENDING", "Job's account not known, so it can't use this partition (x)"), JobState.REFUSED, 0),
        (line("PENDING", "BeginTime", restarts=1), JobState.REQUEUED, 3),
        (line("RUNNING", restarts=2), JobState.REQUEUED, 4),
        (line("RUNNING", number="8"), JobState.LOST, 0),
    ],
)
def test_what_slurm_says_of_a_job(monkeypatch: pytest.MonkeyPatch, listed: str, state: str, attempt: int) -> None:
    jobs = SlurmJobs(SlurmSettings(), W8)
    monkeypatch.setattr("mlpipes.compute.slurm.run_slurm", lambda *_: listed + "\n")
    found = jobs.status(JobHandle("7", 2, attached=False))
    assert (found.state, found.attempt) == (state, attempt)
    if state == "STOPPED":
        again = SlurmJobs(SlurmSettings(resubmit_cancelled=True), W8)
        assert again.status(JobHandle("7", 2, attached=False)).state == "FAILED"


def test_only_the_jobs_of_a_name_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = SlurmJobs(SlurmSettings(), W8)
    listed = [line("FAILED"), line("PENDING", name="f-0-a3", number="9"), line("RUNNING", name="f-1-a9", number="10")]
    monkeypatch.setattr("mlpipes.compute.slurm.run_slurm", lambda *_: "\n".join([*listed, line("RUNNING", name="x")]))
    latest = jobs.latest("f-0")
    assert latest is not None
    assert (latest[0].id, latest[0].attempt, latest[1].state) == ("9", 3, "PENDING")
    assert jobs.latest("g") is None


def test_a_controller_that_is_away_is_asked_again_and_a_refusal_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    away = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1 #"
    with pytest.raises(ConnectionError, match="Unable to contact"):
        run_slurm(f'bash -c "{away}"', ["squeue"])
    calls: list[int] = []

    def failing(*_: object) -> str:
        calls.append(1)
        raise ConnectionError("away")

    monkeypatch.setattr("mlpipes.compute.slurm.run_slurm", failing)
    with pytest.raises(ConnectionError):
        SlurmJobs(SlurmSettings(), W8, patience_seconds=1.5).latest("f")
    assert len(calls) > 1
