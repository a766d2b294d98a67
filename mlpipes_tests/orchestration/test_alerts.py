"""Alerts: the message says what failed, why, and how to go on; the webhook gets it, and its address stays out of logs."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from mlpipes.orchestration.alerts import WEBHOOK_VARIABLE, failure_text
from mlpipes.orchestration.resources import StoreResource
from mlpipes.orchestration.sensors import failure_message
from mlpipes.store.files import write_record
from mlpipes_tests.training.harness import make_job, run_here

SCALE = "w1-b64-e1-g0"


class Webhook(HTTPServer):
    """Keeps what it is sent; answers with `status`."""

    status = 200

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(outer.status)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    server = Webhook()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv(WEBHOOK_VARIABLE, f"http://127.0.0.1:{server.server_port}/secret-token")
    yield server
    server.shutdown()
    server.server_close()


@dg.asset(key=["digits", "checkpoints"], partitions_def=dg.StaticPartitionsDefinition([SCALE]))
def failing() -> None:
    raise dg.Failure("the loss became nan at step 5 of 20. Lower the learning rate", allow_retries=False)


def fail(instance: dg.DagsterInstance, root: Path, **tags: str) -> Any:
    """Let a run fail, and the sensor look at it; returns what the sensor said."""
    job = dg.define_asset_job("chain", [failing])
    definitions = dg.Definitions(assets=[failing], jobs=[job])
    result = definitions.resolve_job_def("chain").execute_in_process(
        instance=instance, partition_key=SCALE, raise_on_error=False, tags=tags
    )
    context = dg.build_run_status_sensor_context(
        "failure_message",
        dagster_event=result.get_run_failure_event(),
        dagster_instance=instance,
        dagster_run=result.dagster_run,
        resources={"store": StoreResource(root=str(root))},
    ).for_run_failure()
    return failure_message(context)


def test_the_message_goes_to_the_webhook_and_says_what_to_do(tmp_path: Path, webhook: Webhook) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        fail(instance, tmp_path)
        (message,) = webhook.received
        text = message["text"]
        assert f"digits {SCALE} failed (Dagster run " in text
        assert "digits__checkpoints: the loss became nan at step 5 of 20" in text
        assert f"mlpipes backfill digits --scale {SCALE}" in text
        assert "Traceback" not in text


def test_what_will_be_retried_is_not_announced(tmp_path: Path, webhook: Webhook) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        said = fail(instance, tmp_path, **{"dagster/will_retry": "true"})
    assert isinstance(said, dg.SkipReason)
    assert webhook.received == []


def test_a_webhook_that_refuses_does_not_make_the_sensor_fail_nor_show_its_address(
    tmp_path: Path, webhook: Webhook, capfd: pytest.CaptureFixture[str]
) -> None:
    webhook.status = 500
    with dg.DagsterInstance.ephemeral() as instance:
        fail(instance, tmp_path)
    assert len(webhook.received) == 3
    captured = capfd.readouterr()
    assert "did not take the message (HTTPError)" in captured.err + captured.out
    assert "secret-token" not in captured.err + captured.out


def test_the_last_checkpoint_is_named(tmp_path: Path) -> None:
    job = make_job(tmp_path, SCALE)
    write_record(job.folder.recipe, job.recipe.model_dump(mode="json"))
    run_here(job)
    store = StoreResource(root=str(tmp_path)).store
    text = failure_text("digits", SCALE, "run-1", ["why"], store)
    assert "had finished; nothing of it is lost" in text
    job.folder.result.unlink()
    assert "Last checkpoint: step 19 of training" in failure_text("digits", SCALE, "run-1", ["why"], store)
