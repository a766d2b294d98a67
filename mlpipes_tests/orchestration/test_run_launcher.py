"""The run launcher's health check."""

from typing import Any

import pytest
from dagster._core.launcher.base import WorkerStatus

from mlpipes.orchestration import run_launcher
from mlpipes.orchestration.run_launcher import SupervisedRunLauncher


def test_a_worker_whose_code_server_is_gone_is_dead_after_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = SupervisedRunLauncher()
    run: Any = type("Run", (), {"run_id": "r"})()
    monkeypatch.setattr(launcher, "_get_grpc_client_for_termination", lambda run_id: None)
    clock = [100.0]
    monkeypatch.setattr(run_launcher.time, "monotonic", lambda: clock[0])
    assert launcher.supports_check_run_worker_health
    assert launcher.check_run_worker_health(run).status == WorkerStatus.RUNNING
    clock[0] += run_launcher.GRACE_SECONDS
    assert launcher.check_run_worker_health(run).status == WorkerStatus.NOT_FOUND
