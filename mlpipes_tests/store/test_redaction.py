"""Secrets: none is in what is shown, logged, posted or stored, whichever way it came in."""

import io
import json
import os
import stat
from pathlib import Path

import dagster as dg
import pytest
from rich.console import Console
from typer.testing import CliRunner

from mlpipes.cli.app import app
from mlpipes.compute.jobs import JobState
from mlpipes.errors import ConfigError
from mlpipes.orchestration.alerts import failure_text
from mlpipes.orchestration.dev_server import _Session
from mlpipes.orchestration.metadata import user_errors
from mlpipes.scales import RayScaleConfig
from mlpipes.store.files import read_record, write_record
from mlpipes.store.layout import Store
from mlpipes.store.messages import Failed, MessageWriter
from mlpipes.store.recipe import Recipe
from mlpipes.store.redaction import is_secret, redact
from mlpipes.store.training_job import Tracking, TrainingJob, forget_handovers
from mlpipes.tracking.runs import public_uri
from mlpipes_tests.compute.test_jobs import Notebook

PLANTED = "pl4nted-Passw0rd"
URI = f"http://somebody:{PLANTED}@mlflow.example:5000/path"
DATABASE = f"postgresql://somebody:{PLANTED}@db.example/mlflow"
FINGERPRINT = "f" * 64


def recipe() -> Recipe:
    return Recipe(
        workload="digits",
        implementation="m:a",
        snapshot="s",
        scale=RayScaleConfig.from_key("w1-b8-e1-g0"),
        hyperparameters={},
        seed=0,
        code="c",
    )


def job(store: Path, uri: str = URI) -> TrainingJob:
    return TrainingJob(recipe=recipe(), store=str(store), attempt=1, tracking=Tracking(uri=uri, run_id="r"))


@pytest.mark.parametrize(
    "text",
    [
        f"no answer from {URI}: refused",
        f"({DATABASE})",
        f"mysql+pymysql://u:{PLANTED}@h:3306/db?ssl=1",
        f"http://{PLANTED}@host/",
        f"http://user:{PLANTED}/x@host",  # the / is not quoted; known from the environment
        f"sqlite:///x.db?password={PLANTED}&timeout=5",
        f"https://bucket.example/k?X-Amz-Signature={PLANTED}&X-Amz-Expires=60",
        f"Authorization: Bearer {PLANTED}",
        f"{{'Authorization': 'Basic {PLANTED}='}}",
        f'{{"password": "{PLANTED}"}}',
        f"password={PLANTED} host=h",
        f"AWS_SECRET_ACCESS_KEY={PLANTED}",
        f"https://hooks.slack.com/services/T0/B0/{PLANTED}",
        f"https://chat.example/hook/{PLANTED}/x",  # the webhook, known from the environment
        f"said {PLANTED} by itself",  # known from the environment
    ],
)
def test_a_secret_is_taken_out_and_the_rest_stays(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPES_WEBHOOK", f"https://chat.example/hook/{PLANTED}/x")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PLANTED)
    clean = redact(text)
    assert PLANTED not in clean
    assert "***" in clean
    if "host" in text:
        assert "host" in clean


@pytest.mark.parametrize(
    "text",
    [
        "digits/w1-b128-e30-g0@3f2a is fresh; see http://127.0.0.1:3000/runs/1 and docs@home",
        "30 % unknown tokens: 12, pad token [PAD], key: w1-b8-e1-g0; RAY_AUTH_TOKEN_PATH=/home/me/token",
        "https://huggingface.co/org/x@v1 is not there",
        "learning_rate=0.1, sigma=2, design=x",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_keys_of_services_are_known_by_their_shape() -> None:
    aws, hub, git = "AKIA" + "ABCDEFGH12345678", "hf_" + "a1" * 12, "ghp_" + "b2" * 18
    assert redact(f"{aws} {hub} {git}") == "*** *** ***"


def test_names_tell_what_is_secret() -> None:
    assert all(
        map(is_secret, ("MY_PASSWORD", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "MLPIPES_WEBHOOK"))
    )
    assert not any(map(is_secret, ("PWD", "HOME", "RAY_AUTH_TOKEN_PATH", "TOKENIZERS_PARALLELISM", "MAX_TOKENS")))


def test_an_unquoted_password_in_an_address_is_known_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:a/b%40c#d@host/db")
    assert redact("driver: a/b%40c#d and a/b@c#d") == "driver: *** and ***"
    assert public_uri("https://me:x@host:5000/path?token=abc") == "https://host:5000/path?token=***"


def test_a_specification_has_no_password_and_the_driver_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{PLANTED}-aws")
    path = job(tmp_path).write()
    assert PLANTED not in path.read_text()
    handover = job(tmp_path).folder.handover(1)
    assert stat.S_IMODE(handover.stat().st_mode) == 0o600
    read = TrainingJob.read(path)
    assert read == job(tmp_path)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    read.take_over()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == f"{PLANTED}-aws"
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_handovers(read.folder)
    assert not handover.exists()
    tracking = TrainingJob.read(path).tracking
    assert tracking is not None
    assert tracking.uri == "http://***@mlflow.example:5000/path"


def test_an_old_specification_and_one_without_secrets_are_read(tmp_path: Path) -> None:
    path = job(tmp_path).folder.specification(1)
    write_record(path, job(tmp_path).model_dump(mode="json"))  # as versions before wrote it
    assert TrainingJob.read(path) == job(tmp_path)
    plain = job(tmp_path, "sqlite:////x.db")
    assert TrainingJob.read(plain.write()) == plain
    assert not plain.folder.handover(1).exists()


def test_the_next_attempt_removes_what_the_last_one_was_told(tmp_path: Path) -> None:
    place = Notebook()
    place.attach_or_submit(job(tmp_path))
    place.state = JobState.FAILED
    place.attach_or_submit(job(tmp_path))
    assert [path.name for path in job(tmp_path).folder.path.glob("jobs/*.handover")] == ["a2.handover"]
    assert PLANTED not in json.dumps(dict(place.environment))


class SecretiveError(Exception):
    """Of a library, with everything in its text."""


@pytest.fixture
def everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URI)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{PLANTED}/aws")
    monkeypatch.setenv("MLPIPES_WEBHOOK", f"http://127.0.0.1:9/hook/{PLANTED}")
    (tmp_path / "dagster").mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster"))
    return tmp_path


def test_a_planted_password_is_in_nothing_that_was_written(
    everything: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    store, said = Store(everything / "home" / "store"), ""

    @dg.asset
    def user() -> None:
        with user_errors():
            raise ConfigError(f"cannot use {DATABASE}")

    @dg.asset
    def library() -> None:
        with user_errors():
            try:
                raise SecretiveError(f"refused: {URI}")
            except SecretiveError as error:
                raise ValueError("the run is not there") from error

    @dg.asset
    def chained() -> None:
        with user_errors():
            try:
                raise SecretiveError(f"refused: {PLANTED}/aws")
            except SecretiveError as error:
                raise ConfigError("not there") from error

    with dg.DagsterInstance.from_config(str(everything / "dagster")) as instance:
        for asset in (user, library, chained):
            result = dg.materialize([asset], instance=instance, raise_on_error=False)
            assert not result.success
            events = instance.all_logs(result.run_id)
            said += str(events)
            causes = [str(event.message) for event in events]
            said += failure_text("digits", None, result.run_id, [*causes, f"{URI} {DATABASE}"], store)
    place = Notebook()
    place.attach_or_submit(job(store.root))
    MessageWriter(job(store.root).folder.messages(1))(Failed(error=f"{DATABASE} refused", fatal=True))
    said += job(store.root).folder.messages(1).read_text()
    runner = CliRunner()
    for command in (
        ["demo", "--workload", f"http://me:{PLANTED}@x"],
        ["promote", "digits", "w1-b128-e30-g0", "--reason", "x"],
    ):
        result = runner.invoke(app, command)
        assert result.exit_code == 1
        said += result.stdout + result.stderr
    session, console = object.__new__(_Session), io.StringIO()
    session.console = Console(file=console, width=500)
    session.say(f"MLflow: {URI}")
    said += console.getvalue() + capfd.readouterr().err
    assert "***" in said
    assert PLANTED not in said
    hits = [p for p in everything.rglob("*") if p.is_file() and PLANTED.encode() in p.read_bytes()]
    assert hits == [job(store.root).folder.handover(1)]
    assert stat.S_IMODE(hits[0].stat().st_mode) == 0o600
    assert read_record(hits[0])["uri"] == URI


def test_of_a_secret_that_begins_like_another_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", PLANTED)
    monkeypatch.setenv("B_TOKEN", f"{PLANTED}/and-more")
    assert redact(f"say {PLANTED}/and-more, {PLANTED}") == "say ***, ***"
