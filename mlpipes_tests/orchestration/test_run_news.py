"""News of runs: one line per change, with partition, cause and retry; none twice, and none of what was there before."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from mlpipes.orchestration.run_news import RunNews, name_of

UI = "http://127.0.0.1:3000"
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@dg.asset(partitions_def=dg.StaticPartitionsDefinition(["good", "told", "raised"]))
def thing(context: dg.AssetExecutionContext) -> None:
    if context.partition_key == "told":
        raise dg.Failure(description="the disk is full.\nMore.", allow_retries=False)
    if context.partition_key == "raised":
        raise ValueError("no such number")


JOB = dg.Definitions(assets=[thing], jobs=[dg.define_asset_job("chain", [thing])]).resolve_job_def("chain")


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}")
    with dg.DagsterInstance.from_config(str(tmp_path)) as opened:
        yield opened


def execute(instance: dg.DagsterInstance, partition: str) -> str:
    result = JOB.execute_in_process(instance=instance, partition_key=partition, run_config=QUIET, raise_on_error=False)
    return result.run_id


def test_each_end_of_a_run_is_told_once(instance: dg.DagsterInstance) -> None:
    news = RunNews(instance, UI)
    assert news.lines() == []
    execute(instance, "good")
    told, raised = execute(instance, "told"), execute(instance, "raised")
    good, *failed = news.lines()
    assert good.startswith("chain good succeeded after ")
    assert failed == [
        f"chain told failed: the disk is full. More: {UI}/runs/{told}",
        f"chain raised failed: ValueError: no such number: {UI}/runs/{raised}",
    ]
    assert news.lines() == []


def test_what_was_there_before_is_no_news_but_its_end_is(instance: dg.DagsterInstance) -> None:
    execute(instance, "good")
    run = instance.create_run_for_job(JOB, tags={"dagster/partition": "good"})
    instance.report_dagster_event(_event(dg.DagsterEventType.RUN_START), run.run_id)
    news = RunNews(instance, UI)
    assert news.lines() == []
    instance.report_run_failed(_run(instance, run.run_id), "Its process died.")
    assert news.lines() == [f"chain good failed: Its process died: {UI}/runs/{run.run_id}"]


def test_a_start_and_a_retry_are_told(instance: dg.DagsterInstance) -> None:
    news = RunNews(instance, UI)
    first = instance.create_run_for_job(JOB, tags={"dagster/partition": "good", "dagster/max_retries": "1"})
    assert news.lines() == [], "it waits in the queue"
    instance.report_dagster_event(_event(dg.DagsterEventType.RUN_START), first.run_id)
    assert news.lines() == [f"chain good started: {UI}/runs/{first.run_id}"]
    instance.add_run_tags(first.run_id, {"dagster/will_retry": "true"})
    instance.report_run_failed(_run(instance, first.run_id), "Its process died.")
    (failed,) = news.lines()
    assert "it is tried again" in failed
    second = instance.create_run_for_job(JOB, tags={"dagster/partition": "good", "dagster/retry_number": "1"})
    instance.report_dagster_event(_event(dg.DagsterEventType.RUN_START), second.run_id)
    assert news.lines() == [f"chain good started again (retry 1): {UI}/runs/{second.run_id}"]
    instance.report_run_canceled(_run(instance, second.run_id))
    assert news.lines() == ["chain good was cancelled"]


def test_a_storage_that_is_away_ends_nothing(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    news = RunNews(instance, UI)
    execute(instance, "good")

    def locked(*_: object, **__: object) -> None:
        raise OSError("database is locked")

    with monkeypatch.context() as patched:
        patched.setattr(dg.DagsterInstance, "get_run_records", locked)
        assert news.lines() == []
    assert len(news.lines()) == 1, "told as soon as it is back"


@pytest.mark.parametrize(
    ("job", "keys", "name"),
    [
        ("digits_chain", ["digits/model"], "digits_chain w1"),
        ("__ASSET_JOB", ["digits/model"], "digits/model w1"),
        ("__ASSET_JOB", ["digits/model", "digits/dataset"], "digits (2 assets) w1"),
        ("__ASSET_JOB", [], "checks w1"),
    ],
)
def test_a_run_is_named_by_its_job_or_its_assets(job: str, keys: list[str], name: str) -> None:
    selection = frozenset(dg.AssetKey.from_user_string(key) for key in keys)
    run = dg.DagsterRun(job, asset_selection=selection, tags={"dagster/partition": "w1"})
    assert name_of(run) == name


def _run(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRun:
    found = instance.get_run_by_id(run_id)
    assert found is not None
    return found


def _event(kind: dg.DagsterEventType) -> dg.DagsterEvent:
    return dg.DagsterEvent(kind.value, "chain")
