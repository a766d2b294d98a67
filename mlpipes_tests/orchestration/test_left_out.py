"""Rows that a source leaves out: shown with counts and shares in the metadata of `dataset`, and many are a warning."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from mlpipes.data.dataset import Dataset, dropped_rows, dropped_warning
from mlpipes.orchestration.assets import workload_assets
from mlpipes.orchestration.resources import ReferenceIOManager, StoreResource
from mlpipes.scales import scales_of
from mlpipes.workloads.catalog import Entry
from mlpipes_tests.conftest import tiny_dataset
from mlpipes_tests.texts import FOLDER, WORDS, write_jsonl

SCALE = "w1-b16-e1-g0"


def materialized(folder: Path, unlabelled: int, blank: int) -> tuple[dict[str, Any], list[str]]:
    """The metadata of `dataset`, and the warnings in the log, of a table of 200 rows of which some lack something."""
    rows: list[dict[str, Any]] = [{"text": f"some words number {n}", "label": "ab"[n % 2]} for n in range(200)]
    for row in rows[:unlabelled]:
        row["label"] = None
    for row in rows[-blank:] if blank else []:
        row["text"] = " "
    write_jsonl(folder / "words.jsonl", rows)
    store = StoreResource(root=str(folder / "store"))
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize(
            workload_assets(Entry("words", "Words", WORDS, scales_of([SCALE], "test")))[:1],
            partition_key=SCALE,
            instance=instance,
            resources={"store": store, "io_manager": ReferenceIOManager(store=store)},
        )
        logged = instance.all_logs(result.run_id)
    (event,) = result.get_asset_materialization_events()
    metadata = {name: value.value for name, value in event.materialization.metadata.items()}
    return metadata, [entry.user_message for entry in logged if entry.level == 30]


@pytest.mark.parametrize(
    ("unlabelled", "blank", "shown", "told"),
    [
        (0, 0, [], None),
        (6, 4, ["train, without label | 6 of 200 rows (3.0%)", "train, without text | 4 of 200 rows (2.0%)"], None),
        (6, 5, ["(3.0%)", "(2.5%)"], "11 of 200 rows of train were left out (5.5%): 6 without label, 5 without text"),
        (60, 0, ["60 of 200 rows (30.0%)"], "60 of 200 rows of train were left out (30.0%): 60 without label."),
    ],
)
def test_rows_that_are_left_out_are_shown_and_many_are_a_warning(
    unlabelled: int,
    blank: int,
    shown: list[str],
    told: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    metadata, warnings = materialized(tmp_path, unlabelled, blank)
    assert ("left_out" in metadata) == bool(shown)
    assert all(part in metadata["left_out"] for part in shown)
    assert [warning for warning in warnings if "left out" in warning] == ([metadata["warning"]] if told else [])
    assert told is None or told in metadata["warning"]
    assert ("warning" in metadata) == (told is not None)


@pytest.mark.parametrize("fact", [3, {"train": 3}, {"valid": {"x": 90}}, {"train": {"x": "many"}}, {"train": {"x": 0}}])
def test_a_fact_of_the_same_name_that_says_something_else_is_none_of_ours(fact: Any) -> None:
    made = tiny_dataset()
    dataset = Dataset(made.splits, made.provenance, {**made.facts, "dropped": fact})
    assert dropped_rows(dataset) == {}
    assert dropped_warning(dataset) is None
