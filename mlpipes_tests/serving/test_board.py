"""The board for Grafana and the alerts of serving: they ask for figures that a server has, by labels that these have."""

import json
import re
from collections.abc import Iterator
from typing import Any

from mlpipes.serving.metrics import Metrics
from mlpipes_tests.sandbox import CHECKOUT

FOLDER = CHECKOUT / "deploy" / "helm" / "mlpipes" / "monitoring"
OF_PROMETHEUS = {"pod", "namespace", "mlpipes_io_part", "le"}
"""Labels that a PodMonitor adds, and a histogram's own."""


def figures() -> dict[str, set[str]]:
    """The series of a server, and their labels."""
    found: dict[str, set[str]] = {}
    collectors: list[Any] = list(Metrics().registry._collector_to_names)
    for collector in collectors:
        for name in collector.describe():
            kinds = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}[name.type]
            found |= {name.name + kind: set(getattr(collector, "_labelnames", ())) for kind in kinds}
    return found


def queries() -> Iterator[tuple[str, str]]:
    """Each expression, and what is written beside it with its labels."""
    board = json.loads((FOLDER / "serving.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield target["expr"], target["legendFormat"]
    for line in re.findall(r"expr: (.*)", (FOLDER / "rules.yaml").read_text()):
        if "mlpipes_serve" in line:
            yield line, ""


def test_they_ask_for_what_a_server_has() -> None:
    known, asked = figures(), set()
    for expression, legend in queries():
        names = set(re.findall(r"\bmlpipes_serve_\w+", expression))
        assert names, expression
        assert names <= set(known), expression
        labels = set().union(*(known[name] for name in names)) | OF_PROMETHEUS
        groups = re.findall(r"\b(?:by|on) \(([^)]*)\)", expression)
        used = {label.strip() for group in groups for label in group.split(",")}
        used |= set(re.findall(r"(\w+)=~?\"", expression)) | set(re.findall(r"{{(\w+)}}", legend))
        assert used <= labels, f"{expression} {legend}: {used - labels}"
        asked |= names
    unasked = {name.removesuffix("_total") for name in known} - {name.removesuffix("_total") for name in asked}
    assert {name for name in unasked if "dropped" not in name and "shadow" not in name and "_count" not in name} <= {
        f"mlpipes_serve_{name}" for name in ("swaps", "seconds_sum", "batch_rows_bucket", "confidence_bucket")
    }


def test_no_panel_lies_on_another() -> None:
    for path in FOLDER.glob("*.json"):
        panels: list[dict[str, Any]] = json.loads(path.read_text())["panels"]
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
        assert len(set(places)) == len(panels) == len({panel["id"] for panel in panels})
