"""The cases of other people's files: what each comes to now, and what it came to at commit 0caf262; no test is in here.

`python -m mlpipes_tests.cases FOLDER` prints the table of all of them, as Markdown.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mlpipes.data.snapshot import Snapshot, snapshot_of
from mlpipes.data.sources import Cifar10Source
from mlpipes.data.splits import SplitPlan
from mlpipes.data.tables import TableSource
from mlpipes.errors import UserError
from mlpipes.reporting.report import Table
from mlpipes.store.layout import Store
from mlpipes.workloads.base import DataInfo
from mlpipes.workloads.encoders import Pretrained
from mlpipes.workloads.text_classification import TextClassification

KINDS = ("tables", "models", "cifar")
BEFORE: dict[str, str] = json.loads(Path(__file__).with_name("cases_before.json").read_text(encoding="utf-8"))
"""By `kind/name`: what that commit's own loaders made of it, as `outcome` writes it; of a model, its first training step."""
_LONGEST = 40


def names_of(cases: Path) -> set[str]:
    """All that is in the folder of cases, as `kind/name`."""
    return {f"{kind.name}/{case.name}" for kind in cases.iterdir() for case in kind.iterdir()}


def model_case(cases: Path, name: str) -> TextClassification:
    """A classification of sentences into two classes with one of the encoders."""
    plan = SplitPlan(0.2, test_fraction=0.2, stratify_by="label", content=("text",))
    sentences = TableSource(str(cases / "tables" / "sentiment.csv"))
    return TextClassification(sentences, plan, Pretrained(str(cases / "models" / name)), max_length=48)


def model_snapshot(workload: TextClassification, store: Path) -> Snapshot:
    """Its snapshot, for which the encoder is tried."""
    return snapshot_of(Store(store), workload.source.load().digest(), workload)[0]


def outcome(cases: Path, name: str) -> str:
    """What a case comes to, in a line. Sets the variable that names CIFAR-10's folder."""
    kind, _, case = name.partition("/")
    try:
        if kind == "tables":
            found = TableSource(str(cases / name)).load()
            roles, classes = found.facts["roles"], found.facts.get("class_names")
            columns = [roles[role] for role in ("text", "label", "text_pair") if roles[role] is not None]
            return f"{found.counts['train']} rows, {_classes(classes)}; columns {' '.join(columns)}"
        if kind == "models":
            workload = model_case(cases, case)
            with tempfile.TemporaryDirectory() as scratch:
                snapshot = model_snapshot(workload, Path(scratch))
                info = DataInfo(snapshot.facts, {}, snapshot.files)
                model: Any = workload.build_model(workload.hyperparameters(), info)
            return f"{type(model).__name__}, {model.config.num_labels} classes"
        os.environ["MLPIPES_CIFAR10"] = str(cases / name)
        found = Cifar10Source().load()
        labels = found.splits["train"]["label"].tolist()[:5]
        return f"{found.counts['train']} training and {found.counts['test']} test images, labels {labels}"
    except UserError as error:
        return f"{type(error).__name__}: {str(error).replace(f'{cases}{os.sep}', '')}"


def _classes(names: Any) -> str:
    if names is None:
        return "numbers"
    return "classes " + "|".join(name if len(name) < _LONGEST else f"{name[: _LONGEST // 2]}…" for name in names)


def table(cases: Path) -> str:
    """All cases, before and now, as Markdown."""
    rows = [[name, BEFORE[name], outcome(cases, name)] for name in sorted(names_of(cases))]
    return Table("", ["case", "at 0caf262", "now"], rows).markdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(table(Path(sys.argv[1]).absolute()) + "\n")
