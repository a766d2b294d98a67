"""What the demo leaves behind, looked at in the Dagster UI that `mlpipes dev` serves; pictures are kept."""

from collections.abc import Iterator

import pytest

from mlpipes_tests.browser import OUTPUT, browser_page, see, see_picture
from mlpipes_tests.conftest import missing
from mlpipes_tests.sandbox import CHECKOUT, Sandbox, end, free_port, wait_for

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the Dagster UI of a folder in which two scales of digits were trained."""
    if not (CHECKOUT / ".venv" / ".installed").is_file():
        missing("`make install` was not run in this checkout, and a test must not install into it")
    folder = Sandbox(tmp_path_factory.mktemp("checkout"))
    try:
        demo = folder.run(".venv/bin/mlpipes demo --scale w1-b128-e30-g0 --scale w2-b128-e30-g0")
        assert demo.returncode == 0, demo.stdout + demo.stderr
        port, mlflow = free_port(), free_port()
        options = ("--port", str(port), "--mlflow", "--mlflow-port", str(mlflow))
        server = folder.start(".venv/bin/mlpipes", "dev", *options, log="dev.log")
        try:
            wait_for(f"http://127.0.0.1:{port}/server_info")
            wait_for(f"http://127.0.0.1:{mlflow}/health")
            yield f"http://127.0.0.1:{port}"
        finally:
            end(server)
    finally:
        folder.run(".venv/bin/mlpipes ray down")


def test_the_ui_shows_graph_partition_and_report(ui: str) -> None:
    with browser_page(1000) as page:
        assets = ("dataset", "snapshot", "checkpoints", "model", "eval_report", "champion", "scaling_report")
        group = f"{ui}/locations/mlpipes.definitions/asset-groups/digits"
        see(page, group, *(page.get_by_text(name, exact=True) for name in assets))
        page.screenshot(path=OUTPUT / "graph.png")

        partition = f"{ui}/assets/digits/checkpoints?view=partitions&partition=w2-b128-e30-g0"
        see(page, partition, page.get_by_text("weights_digest", exact=True))
        see_picture(page, partition, "loss and validation curves", page.get_by_text("[Show Markdown]"))
        page.screenshot(path=OUTPUT / "checkpoints.png")

        see(page, f"{ui}/assets/digits/scaling_report", page.get_by_text("efficiency"))
        page.screenshot(path=OUTPUT / "scaling_report.png")
