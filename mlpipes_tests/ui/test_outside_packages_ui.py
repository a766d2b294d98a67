"""Workloads of two packages outside mlpipes, from dataset to report in the Dagster UI: a table with RMSE, and JPEGs."""

import json
import re
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlpipes.orchestration.store_identity import CHAIN
from mlpipes_tests.browser import browser_page, picture, see_picture
from mlpipes_tests.conftest import missing
from mlpipes_tests.desk import Desk
from mlpipes_tests.sandbox import CHECKOUT, LOCATION, graphql
from mlpipes_tests.waiting import until

pytestmark = pytest.mark.browser
WORSE, BETTER = "w1-b32-e2-g0", "w2-b32-e20-g0"
"""Of the table: 65 and 62 of RMSE on validation; the worse one is cheaper, and has passed the gates as well."""
IMAGES = "w1-b32-e10-g0"
SCALES = {"diabetes": [WORSE, BETTER], "flowers": [IMAGES]}
METRIC = "root_mean_squared_error"
_MATERIALIZED = """query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode {
  partitionStats { numMaterialized numFailed } assetMaterializations(limit: 1) { runId } } } }"""
_LOCATIONS = """{ workspaceOrError { ... on Workspace { locationEntries { name locationOrLoadError {
  __typename } } } } }"""


def environment_of_its_own(folder: Path) -> None:
    """Give a sandbox a virtual environment that has all of the checkout's, to install into as a user does."""
    own, theirs = folder / ".venv", CHECKOUT / ".venv"
    own.unlink()
    venv.create(own, symlinks=True)
    (site,) = own.glob("lib/python*/site-packages")
    (site / "checkout.pth").write_text(f"import site; site.addsitedir({str(theirs / site.relative_to(own))!r})\n")
    for program in sorted((theirs / "bin").iterdir()):
        path = own / "bin" / program.name
        content = program.read_bytes()
        if path.exists() or program.is_symlink():
            continue
        if content.startswith(b"#!"):  # a script that names its Python
            path.write_bytes(content.replace(bytes(theirs), bytes(own)))
            path.chmod(0o755)
        else:
            path.symlink_to(program)


def draw_images(folder: Path) -> None:
    """JPEGs of three brightnesses, with noise."""
    generator = np.random.default_rng(0)
    for brightness, name in ((80, "dark"), (120, "grey"), (160, "bright")):
        (folder / name).mkdir(parents=True)
        for number in range(40):
            pixels = generator.integers(brightness - 60, brightness + 60, (45, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A user who has written and installed both packages, and serves the UI."""
    if not (CHECKOUT / ".venv").is_dir():
        missing("there is no .venv in this checkout")
    made = Desk(tmp_path_factory.mktemp("outside"), SCALES)
    environment_of_its_own(made.path)
    draw_images(made.path / "images")
    made.environment["FLOWERS_IMAGES"] = str(made.path / "images")
    del made.environment["MLPIPES_SCALES"]  # which would name workloads that are not there yet
    pip = ".venv/bin/python -m pip install -q --disable-pip-version-check --no-index --no-deps --no-build-isolation"
    for name, kind in (("diabetes", "tabular"), ("flowers", "image-folder")):
        done = made.run(f".venv/bin/mlpipes new {name} --kind {kind} && {pip} -e {name}")
        assert done.returncode == 0, done.stdout + done.stderr
    made.environment["MLPIPES_SCALES"] = str(made.path / "scales.yaml")
    with made.served():
        yield made


@pytest.fixture(scope="module")
def page(served: Desk) -> Iterator[Any]:
    with browser_page(1150) as opened:
        yield opened


@pytest.fixture(scope="module")
def desk(served: Desk, page: Any) -> Desk:
    """The same, with one workload materialized by clicks and one from the command line, and their reports."""
    served.materialize(page, "diabetes", [WORSE, BETTER])
    done = served.run(f".venv/bin/mlpipes backfill flowers --scale {IMAGES}")
    assert done.returncode == 0, done.stdout + done.stderr
    served.until_done([WORSE, BETTER])
    for workload in SCALES:
        # Nobody asks for the reports: they follow when nothing is in progress any more.
        until(lambda w=workload: has_all(served, w), f"the report of {workload} is there", every=1)
        # The event follows the file.
        until(lambda w=workload: node_of(served, w, "scaling_report")["assetMaterializations"], "Dagster knows of it")
    return served


def report_of(desk: Desk, workload: str) -> dict[str, Any]:
    """The scaling report in the store; empty before there is one."""
    path = desk.home / "store" / "reports" / workload / "scaling_report.json"
    return json.loads(path.read_text())["content"] if path.is_file() else {}


def has_all(desk: Desk, workload: str) -> bool:
    """Whether the report has all scales."""
    return {row["scale"] for row in report_of(desk, workload).get("rows", ())} == set(SCALES[workload])


def node_of(desk: Desk, workload: str, asset: str) -> dict[str, Any]:
    """What Dagster knows of an asset."""
    return graphql(desk.address, _MATERIALIZED, key={"path": [workload, asset]})["assetNodeOrError"]


def partition_of(workload: str, asset: str, scale: str) -> str:
    """The page of a partition of an asset."""
    return f"assets/{workload}/{asset}?view=partitions&partition={scale}"


def see_plot(page: Any, desk: Desk, path: str, entry: str, alternative: str) -> None:
    """Open a picture among an asset's metadata, and see that it is one."""
    row = page.locator("tr", has=page.get_by_text(entry, exact=True))
    see_picture(page, f"{desk.address}/{path}", alternative, row.get_by_text("[Show Markdown]"))


def test_all_assets_of_both_are_materialized(desk: Desk) -> None:
    for workload, scales in SCALES.items():
        for asset in CHAIN:
            assert node_of(desk, workload, asset)["partitionStats"] == {"numMaterialized": len(scales), "numFailed": 0}
    (location,) = graphql(desk.address, _LOCATIONS)["workspaceOrError"]["locationEntries"]
    assert location == {"name": LOCATION, "locationOrLoadError": {"__typename": "RepositoryLocation"}}


@pytest.mark.parametrize("workload", SCALES)
def test_the_graph_shows_the_chain_as_materialized(page: Any, desk: Desk, workload: str) -> None:
    names = [page.get_by_text(name, exact=True) for name in (*CHAIN, "scaling_report")]
    desk.see(page, f"locations/{LOCATION}/asset-groups/{workload}", *names)
    picture(page, f"outside_graph_{workload}")


def test_the_regression_shows_its_error_with_an_interval_and_a_picture(page: Any, desk: Desk) -> None:
    path = partition_of("diabetes", "eval_report", BETTER)
    (row,) = [row for row in report_of(desk, "diabetes")["rows"] if row["scale"] == BETTER]
    interval = f"{row['value']:.4f} [{row['low']:.4f}, {row['high']:.4f}] (n={row['n']})"
    entries = [page.get_by_text(text, exact=True) for text in (f"{METRIC}_95", "baseline")]
    desk.see(page, path, *entries, page.get_by_text(interval))
    picture(page, "outside_eval_report")
    see_plot(page, desk, path, "predictions_plot", "predictions")
    picture(page, "outside_predictions")


def test_the_images_show_their_mistakes(page: Any, desk: Desk) -> None:
    path = partition_of("flowers", "eval_report", IMAGES)
    desk.see(page, path, page.get_by_text("accuracy_95"))
    see_plot(page, desk, path, "confusion_plot", "confusion")
    picture(page, "outside_confusion")


def test_the_lowest_error_is_champion_and_recommended(page: Any, desk: Desk) -> None:
    report = report_of(desk, "diabetes")
    errors = {row["scale"]: row["validation"] for row in report["rows"]}
    assert errors[BETTER] < errors[WORSE]
    assert next(row for row in report["rows"] if row["scale"] == BETTER)["pareto"], "nothing is better at any price"
    assert report["recommendation"].startswith(f"{BETTER} is the best by validation")

    said = re.compile(rf"champion, version \d+ \({BETTER}\)")
    desk.see(page, "assets/diabetes/champion", page.get_by_text(said))
    picture(page, "outside_champion")

    desk.see(page, path := "assets/diabetes/scaling_report", page.get_by_text(f"{BETTER} is the best by validation"))
    picture(page, "outside_scaling_report")
    see_plot(page, desk, path, "plot", "scaling")
    picture(page, "outside_scaling_plot")


def test_the_command_line_knows_them(desk: Desk) -> None:
    listed = desk.run(".venv/bin/mlpipes scales").stdout
    status = desk.run(".venv/bin/mlpipes status").stdout
    for workload, scales in SCALES.items():
        for scale in scales:
            assert re.search(rf"{workload} +{scale} ", listed)
            assert re.search(rf"{workload} +{scale} .* finished ", status)
        done = desk.run(f".venv/bin/mlpipes report {workload}")
        assert done.returncode == 0, done.stderr
        assert "is the best by validation" in " ".join(done.stdout.split())
