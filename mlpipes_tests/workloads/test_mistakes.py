"""Mistakes in a user's workload: one line that says what is wrong, and where in the user's file."""

import sys
from pathlib import Path

import pytest

from mlpipes.errors import ConfigError, UserError
from mlpipes.orchestration.instance import execute
from mlpipes.training.worker import explained
from mlpipes.workloads.catalog import load_workload
from mlpipes_tests.documents import page
from mlpipes_tests.training.harness import make_job, run_here

PREDICTION = 'return {"value": model(batch["features"])}'
TABLE = '"label": table.target}'
MISTAKES = {
    "column of a batch": (
        'model(batch["features"]) - batch',
        'model(batch["feature"]) - batch',
        "KeyError: 'feature' ({file}, line 65)\n",
    ),
    "no label": (
        TABLE,
        '"target": table.target}',
        "a regression needs a column `label`; the data have features, target",
    ),
    "lengths": (
        TABLE,
        '"label": table.target[:100]}',
        "Diabetes, train: each column must have one row a sample, but their rows are 'features' 442, 'label' 100",
    ),
    "split": (
        'splits={"train":',
        'splits={"training":',
        "Diabetes: the source brings the splits 'training'; it must bring 'train'",
    ),
    "loss a sample": ("** 2).sum()", "** 2)", "`loss` is of shape (8,); it must be the sum over"),
    "another dimension": (
        PREDICTION,
        PREDICTION.replace("])}", "])[:, None]}"),
        "the predictions `value` are of shape (45, 1), the labels of (45,); both must be (N,)",
    ),
    # Once the rest was taken as zeros, and the figures were wrong.
    "rows": (
        PREDICTION,
        PREDICTION.replace("])}", "])[:3]}"),
        "`predict` gives 'value' of shape (3,) for 45 samples",
    ),
    "a mean": (
        PREDICTION,
        PREDICTION.replace("])}", "]).mean()}"),
        "`predict` gives 'value' of shape () for 45 samples",
    ),
    "name": (
        PREDICTION,
        PREDICTION.replace("value", "values"),
        "`predict` gives 'values', but no 'value'",
    ),
}
"""What the workload of the documents has instead of what, and how the message begins."""


def written(folder: Path, name: str, right: str, wrong: str) -> Path:
    """The documents' table with a mistake, as a module."""
    (text,) = [text for text in page("docs/own-data-and-workloads.md").blocks("python") if "load_diabetes" in text]
    assert text.count(right) == 1
    path = folder / f"{name}.py"
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    return path


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_that_shows_when_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    right, wrong, said = MISTAKES[what]
    name = "mistake_" + what.replace(" ", "_")
    file = written(tmp_path, name, right, wrong)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Exception) as caught:
        run_here(make_job(tmp_path / "store", "w1-b32-e1-g0", f"{name}:diabetes"))
    assert explained(caught.value).startswith(said.format(file=file))


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        (
            "    def loss(",
            "    def losses(",
            "TypeError: Can't instantiate abstract class TableRegression with abstract method",
        ),
        ("class TableRegression(Regression):", "class TableRegression(Regression)", "SyntaxError: expected ':'"),
        ("from torch import nn", "from torch import nm", "ImportError: cannot import name 'nm' from 'torch'"),
        ("diabetes = Table", "diabetis = Table", "AttributeError: module 'mistake' has no attribute 'diabetes'"),
    ],
)
def test_a_mistake_that_shows_when_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str, said: str
) -> None:
    file = written(tmp_path, "mistake", right, wrong)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mistake", raising=False)
    with pytest.raises(ConfigError) as caught:
        load_workload("mistake:diabetes")
    sys.modules.pop("mistake", None)
    assert str(caught.value).startswith(f"workload 'mistake:diabetes' cannot be loaded: {said}")
    assert "has no attribute" in said or f"({file}, line " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_demo_says_in_one_line_what_the_users_code_raised(tmp_path: Path) -> None:
    class Job:
        def execute_in_process(self, **_: object) -> None:
            exec(compile("\n1 / 0", tmp_path / "workload.py", "exec"), {})  # noqa: S102

    with pytest.raises(UserError) as caught:
        execute(Job(), instance=None)
    where = f"({tmp_path / 'workload.py'}, line 2)"
    assert str(caught.value).startswith(f"ZeroDivisionError: division by zero {where}. The run in the Dagster UI")
