"""The sensor for lost retries, against a real instance."""

import time

import dagster as dg
import pytest
from dagster._core.test_utils import create_run_for_test

from mlpipes.compute.kubernetes_tidy import Wanted
from mlpipes.orchestration import sensors
from mlpipes.orchestration.sensors import lost_retries, retry_of


@dg.asset(key=["mine", "fails"], group_name="mine", partitions_def=dg.StaticPartitionsDefinition(["a", "b"]))
def fails() -> None:
    raise ValueError("on purpose")


DEFINITIONS = dg.Definitions([fails], jobs=[dg.define_asset_job("named", [fails])], sensors=[lost_retries])


@dg.asset(key=["other", "works"])
def works() -> None:
    """An asset of another code location."""


OTHERS = dg.Definitions([works], sensors=[lost_retries])


def failed_run(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, **tags: str) -> str:
    job = DEFINITIONS.resolve_job_def("named")
    result = job.execute_in_process(instance=instance, partition_key="b", raise_on_error=False, tags=tags)
    assert not result.success
    return result.run_id


def requests(instance: dg.DagsterInstance, definitions: dg.Definitions = DEFINITIONS) -> list[dg.RunRequest]:
    """What the daemon is told."""
    context = dg.build_sensor_context(instance=instance, definitions=definitions)
    return list(lost_retries.evaluate_tick(context).run_requests or [])


def test_a_retry_that_was_promised_and_never_made_is_requested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "_SETTLED_SECONDS", 1200.0)  # however long this machine takes until it looks
    with dg.DagsterInstance.ephemeral() as instance:
        lost = failed_run(instance, monkeypatch, **{"dagster/will_retry": "true", "team": "mine"})
        failed_run(instance, monkeypatch)  # nobody promised anything
        assert requests(instance) == [], "it may still be on its way"
        real = time.time
        monkeypatch.setattr(sensors.time, "time", lambda: real() + 1260)
        (request,) = requests(instance)
        assert request.job_name == "__ASSET_JOB"
        assert requests(instance, OTHERS) == [], "another code location leaves it alone"
        assert request.run_key == f"retry-{lost}"
        assert request.partition_key == "b"
        assert request.asset_selection == [dg.AssetKey(["mine", "fails"])]
        assert request.tags["team"] == "mine"
        assert request.tags["dagster/root_run_id"] == lost
        assert request.tags["dagster/retry_number"] == "1"
        failed_run(instance, monkeypatch, **{"dagster/parent_run_id": lost})
        assert requests(instance) == [], "it has a child now"


def test_a_retry_that_could_not_be_launched_is_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        given_up = failed_run(instance, monkeypatch, **{"dagster/will_retry": "false"})
        failed_run(instance, monkeypatch, **{"dagster/will_retry": "false"})  # out of retries, or failed in its step
        run = instance.get_run_by_id(given_up)
        instance.report_engine_event("Failed to retry run", run)  # what Dagster writes while the code server is away
        real = time.time
        for later in (0, 60):  # at once: nothing more is on its way
            monkeypatch.setattr(sensors.time, "time", lambda later=later: real() + later)
            (request,) = requests(instance)
            assert request.run_key == f"retry-{given_up}"
        monkeypatch.setattr(sensors.time, "time", lambda: real() + 7200)
        assert requests(instance) == [], "long ago"


def test_the_retry_of_a_run_that_was_executed_again_by_hand_belongs_to_the_first_one() -> None:
    """Such a run names its root in no tag. By its root a fresh training is known: else the retry would begin another."""
    again = dg.DagsterRun(job_name="chain", run_id="again", root_run_id="first", parent_run_id="first")
    request = retry_of(again, [dg.AssetKey("x")])
    assert request.tags["dagster/root_run_id"] == "first"
    assert request.tags["dagster/parent_run_id"] == "again"


def test_what_a_run_asked_for_is_wanted_while_any_run_of_its_partition_is_not_over() -> None:
    with dg.DagsterInstance.ephemeral() as instance:

        def run(status: dg.DagsterRunStatus, partition: str) -> str:
            return create_run_for_test(instance, status=status, tags={"dagster/partition": partition}).run_id

        works, cancelled = run(dg.DagsterRunStatus.STARTED, "a"), run(dg.DagsterRunStatus.CANCELED, "b")
        failed = run(dg.DagsterRunStatus.FAILURE, "c")
        assert sensors.wanted(instance, works) == Wanted.FOLLOWED
        assert sensors.wanted(instance, cancelled) == Wanted.CANCELLED
        assert sensors.wanted(instance, failed) == Wanted.NO_MORE
        assert sensors.wanted(instance, "") == sensors.wanted(instance, "of-another-dagster") == Wanted.NO_MORE
        run(dg.DagsterRunStatus.NOT_STARTED, "b")
        run(dg.DagsterRunStatus.STARTING, "c")
        assert sensors.wanted(instance, cancelled) == sensors.wanted(instance, failed) == Wanted.FOLLOWED
