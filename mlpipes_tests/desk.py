"""A user's desk: Dagster's UI, in which workloads are materialized by clicks, and one that `mlpipes dev` serves."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mlpipes.orchestration.backfill import DagsterUi
from mlpipes_tests.browser import leave, see
from mlpipes_tests.prepared import mlflow_store
from mlpipes_tests.sandbox import LOCATION, Sandbox, end, free_port, graphql, wait_for
from mlpipes_tests.waiting import comes, until

_LAUNCHED = """{ runsOrError { ... on Runs { results { jobName } } }
  partitionBackfillsOrError { ... on PartitionBackfills { results { id } } } }"""
_RUNS = """{ runsOrError { ... on Runs { results { runId status jobName tags { key value } } } } }"""


class Ui:
    """Dagster's UI at an address, and what is done in it by clicks, with the `scales` that it offers of each workload.

    Workloads have four scales at most, for it shows no more of them by name; and no two a scale of one name: runs are found
    by it.
    """

    def __init__(self, address: str, scales: Mapping[str, Sequence[str]]) -> None:
        self.address, self.scales = address, scales

    def runs(self, scale: str, job: str | None = None) -> list[str]:
        """The statuses of a scale's runs, the latest first."""
        return [run["status"] for run in self._runs(scale, job)]

    def run_of(self, scale: str) -> str:
        """The id of a scale's latest run."""
        return self._runs(scale)[0]["runId"]

    def _runs(self, scale: str, job: str | None = None) -> list[dict[str, Any]]:
        partition = {"key": "dagster/partition", "value": scale}
        found = graphql(self.address, _RUNS)["runsOrError"]["results"]
        return [run for run in found if partition in run["tags"] and job in (None, run["jobName"])]

    def until_done(self, scales: Sequence[str], job: str | None = None) -> None:
        """Wait until the latest run of each scale has succeeded; in vain if one has failed in a step, or was cancelled."""

        def failed() -> str:
            found = {key: run for key in scales for run in self._runs(key, job)[:1]}
            tags = {key: {tag["key"]: tag["value"] for tag in run["tags"]} for key, run in found.items()}
            # A run whose process was lost is retried.
            failures = [key for key in found if tags[key].get("dagster/failure_reason") == "STEP_FAILURE"]
            cancelled = [key for key, run in found.items() if run["status"] == "CANCELED"]
            why = DagsterUi(self.address).failure
            return "; ".join([f"{key}: {why(found[key]['runId'])}" for key in failures] + cancelled)

        until(
            lambda: all(self.runs(key, job)[:1] == ["SUCCESS"] for key in scales),
            f"{scales} are done",
            vain=failed,
            every=1,
        )

    def go(self, page: Any, path: str) -> None:
        """Open a page of the Dagster UI."""
        page.goto(f"{self.address}/{path}")

    def see(self, page: Any, path: str, *shown: Any, click: Any = None) -> None:
        """Open a page of the Dagster UI, and see that it shows something, after a click if one is given."""
        see(page, f"{self.address}/{path}", *shown, click=click)

    def materialize(self, page: Any, workload: str, scales: Sequence[str]) -> None:
        """Launch a workload's chain for some scales, as a user does."""
        offered = self.scales[workload]
        chosen = {k: page.locator(f"[data-tooltip='{k}']").last.get_by_role("img", name="close") for k in offered}
        launch = page.get_by_role("button", name=re.compile("^Launch (1 run|backfill)"))

        def are_chosen(wanted: Sequence[str]) -> bool:
            return {key for key, cross in chosen.items() if cross.count()} == set(wanted)

        def dialog_is_filled() -> bool:
            self.go(page, f"locations/{LOCATION}/jobs/{workload}_chain")
            page.get_by_role("button", name="Materialize all").first.click()
            page.get_by_role("button", name="All", exact=True).click()  # by default those that are missing are chosen
            page.get_by_role("button", name="Custom").click()
            # What is missing may come to be known late, and be chosen then, instead of what was chosen by hand.
            page.wait_for_load_state("networkidle")
            if not comes(lambda: are_chosen(offered)):
                return False
            for key in set(offered) - set(scales):
                chosen[key].click()
            page.wait_for_load_state("networkidle")
            return comes(lambda: are_chosen(scales))

        until(dialog_is_filled, f"{scales} are chosen in the dialog", every=1)
        before = self._launched(workload)
        launch.click()
        # Who leaves the page sooner takes it back.
        until(lambda: self._launched(workload) > before, "the launch is known")
        leave(page)

    def _launched(self, workload: str) -> int:
        """How many runs of the chain and backfills there are."""
        found = graphql(self.address, _LAUNCHED)
        chains = [run for run in found["runsOrError"]["results"] if run["jobName"] == f"{workload}_chain"]
        return len(chains) + len(found["partitionBackfillsOrError"]["results"])


class Desk(Sandbox, Ui):
    """A sandbox with a running `mlpipes dev`."""

    def __init__(self, path: Path, scales: Mapping[str, Sequence[str]], *, held: bool = False) -> None:
        super().__init__(path, held=held)
        mlflow_store(self.home / "mlflow" / "mlflow.db")
        self.port, self.mlflow_port = str(free_port()), str(free_port())
        Ui.__init__(self, f"http://127.0.0.1:{self.port}", scales)
        file = path / "scales.yaml"
        file.write_text(yaml.safe_dump({name: list(keys) for name, keys in scales.items()}))
        self.environment |= {"MLPIPES_SCALES": str(file), "MLPIPES_DAGSTER_UI": self.address}

    @contextmanager
    def served(self) -> Iterator[None]:
        """Serve both UIs; the Ray that the trainings started ends with them."""
        options = ("--port", self.port, "--mlflow", "--mlflow-port", self.mlflow_port)
        dev = self.start(".venv/bin/mlpipes", "dev", *options)
        try:
            wait_for(f"{self.address}/server_info", dev)
            yield
        finally:
            end(dev)
            self.run(".venv/bin/mlpipes ray down")
