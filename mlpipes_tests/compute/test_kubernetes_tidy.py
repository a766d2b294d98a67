"""Which RayJobs and pods are tidied up, and which are left alone."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mlpipes.compute.kubernetes_api import KubernetesApi
from mlpipes.compute.kubernetes_manifest import (
    FOLDER_ANNOTATION,
    PREFIX,
)
from mlpipes.compute.kubernetes_tidy import Wanted, tidy
from mlpipes_tests.compute.kubernetes_objects import (
    settings,
)


@pytest.mark.parametrize(
    ("run", "status", "ended", "has_result", "deleted"),
    [
        ("over", "Running", 0, False, False),
        ("over", "Running", 0, True, True),
        ("over", "Complete", 10, False, True),
        ("goes-on", "Complete", 10, True, False),
        ("cancelled", "Running", 0, False, True),  # whoever cancelled it did not reach the cluster
        ("cancelled", "Suspended", 0, False, True),
        ("", "Running", 0, True, False),  # a video of the command line, delivered once before
        ("", "Failed", 10, False, False),  # whoever asked for it looks once a second or so, and goes on
        ("", "Failed", 4000, False, True),
    ],
)
def test_what_is_tidied_up(
    run: str,
    status: str,
    ended: int,
    has_result: bool,
    deleted: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if has_result:
        (tmp_path / "result.json").touch()
    end = (datetime.now(UTC) - timedelta(seconds=ended)).isoformat()
    job = {
        "metadata": {"name": "j-a1", "annotations": {FOLDER_ANNOTATION: str(tmp_path), f"{PREFIX}/dagster-run": run}},
        "status": {"jobDeploymentStatus": status, "endTime": end},
    }
    gone: list[str] = []
    states = {"goes-on": Wanted.FOLLOWED, "cancelled": Wanted.CANCELLED}
    monkeypatch.setattr(KubernetesApi, "items", lambda api, path, **_: [job] if "rayjobs" in path else [])
    monkeypatch.setattr(KubernetesApi, "delete", lambda api, path, **_: gone.append(path))
    said = list(tidy(settings(), str(tmp_path), lambda run: states.get(run, Wanted.NO_MORE)))
    assert [path.endswith("j-a1") for path in gone] == [True] * deleted
    assert len(said) == deleted


@pytest.mark.parametrize("wanted", [Wanted.FOLLOWED, Wanted.NO_MORE])
def test_pods_that_a_dead_node_holds_are_removed_whoever_follows(
    wanted: Wanted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations = {FOLDER_ANNOTATION: str(tmp_path), f"{PREFIX}/dagster-run": "some"}
    job = {"metadata": {"name": "j-a1", "annotations": annotations}, "status": {"jobDeploymentStatus": "Running"}}

    def pod(name: str, job: str, ready: str, **metadata: str) -> dict[str, Any]:
        conditions = [{"type": "Ready", "status": ready}, {"type": "ContainersReady", "status": ready}]
        return {
            "metadata": {"name": name, "labels": {f"{PREFIX}/job": job}, **metadata},
            "status": {"conditions": conditions},
        }

    now = datetime.now(UTC).isoformat()
    pods = [
        pod("dead", "j-a1", "Unknown", deletionTimestamp=now),
        pod("alive", "j-a1", "True"),
        pod("silent", "j-a1", "Unknown"),  # for a moment only, perhaps
        pod("ends", "j-a1", "True", deletionTimestamp=now),
        pod("other", "other-a1", "Unknown", deletionTimestamp=now),
    ]
    gone: list[str] = []
    monkeypatch.setattr(KubernetesApi, "items", lambda api, path, **_: [job] if "rayjobs" in path else pods)
    monkeypatch.setattr(KubernetesApi, "delete", lambda api, path, **_: gone.append(path.rpartition("/")[2]))
    (said,) = tidy(settings(), str(tmp_path), lambda _: wanted)
    assert gone == ["dead"]
    assert said == "pod dead of RayJob j-a1 was held by a node that does not answer: removed"
