"""How long an API server has been away, as the run launcher on Kubernetes counts it."""

import pytest

from mlpipes.orchestration import kubernetes_run_launcher
from mlpipes.orchestration.kubernetes_run_launcher import AWAY_SECONDS, PatientK8sRunLauncher


def test_an_api_server_is_away_since_it_did_not_answer_first_and_not_since_anybody_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(kubernetes_run_launcher.time, "monotonic", lambda: clock[0])
    launcher = PatientK8sRunLauncher.__new__(PatientK8sRunLauncher)

    def after(seconds: float) -> float:
        clock[0] += seconds
        return launcher._away_seconds()

    assert after(2 * AWAY_SECONDS) == 0, "nobody had asked before"
    assert after(60) == 60
    assert after(100) == 160
    assert after(AWAY_SECONDS) == 0, "for so long there were no runs to ask about"
    assert after(10) == 10
