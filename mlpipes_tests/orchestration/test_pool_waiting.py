"""Waiting for a slot of a pool: asleep, and until it is cancelled."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import dagster as dg
import pytest
from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._core.execution.plan import instance_concurrency_context
from dagster._utils.interrupts import capture_interrupts

import mlpipes.definitions  # noqa: F401 - which has runs wait so
from mlpipes.orchestration import pool_waiting

pytestmark = pytest.mark.timeout(600)  # a run that does not sleep never ends here


@dg.op(pool="training")
def trained() -> None:
    """What another run's slot keeps waiting."""


@dg.job(executor_def=dg.in_process_executor)
def training() -> None:
    trained()


@pytest.fixture
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dg.DagsterInstance]:
    """One whose only slot another run has."""
    with dg.DagsterInstance.local_temp(str(tmp_path_factory.mktemp("instance"))) as made:
        made.event_log_storage.set_concurrency_slots("training", 1)
        made.event_log_storage.claim_concurrency_slot("training", "another run", "its step")
        yield made


def sleeping(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object]) -> list[float]:
    """What each sleep was to take, when instead of it something is done."""
    asked: list[float] = []
    monkeypatch.setattr(pool_waiting, "sleep", lambda seconds: (asked.append(seconds), meanwhile()))
    return asked


def test_a_run_sleeps_until_it_may_ask_again(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    def let_go() -> None:
        clock[0] += asked[-1] + 0.001
        if len(asked) == 12:
            instance.event_log_storage.free_concurrency_slot_for_step("another run", "its step")

    clock = [time.time()]
    asked = sleeping(monkeypatch, let_go)
    monkeypatch.setattr(pool_waiting, "time", lambda: clock[0])
    monkeypatch.setattr(instance_concurrency_context, "time", SimpleNamespace(time=lambda: clock[0]))
    assert training.execute_in_process(instance=instance).success
    assert len(asked) == 12
    assert all(0.5 < seconds <= 2 for seconds in asked), asked


def test_a_run_that_sleeps_is_cancelled_at_once(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel() -> None:
        instance.report_run_canceling(instance.get_runs()[0])
        os.kill(os.getpid(), signal.SIGINT)  # as Dagster's code server does

    asked = sleeping(monkeypatch, cancel)
    with capture_interrupts(), pytest.raises(DagsterExecutionInterruptedError):
        training.execute_in_process(instance=instance, raise_on_error=True)
    assert len(asked) == 1
    assert [run.status for run in instance.get_runs()] == [dg.DagsterRunStatus.CANCELED]
