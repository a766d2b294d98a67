"""Small text workloads and their tables, which many tests train on; no test is in here."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlpipes.data.splits import SplitPlan
from mlpipes.data.tables import TableSource
from mlpipes.workloads.encoders import Tiny
from mlpipes.workloads.text_classification import TextClassification, TextRegression

TINY = Tiny(vocabulary=300, hidden=16, layers=1, heads=2, intermediate=32, positions=64)
PLAN = SplitPlan(0.2, test_fraction=0.2, stratify_by="label", content=("text",))
PAIR_PLAN = SplitPlan(0.2, test_fraction=0.2, stratify_by="label", content=("text", "text_pair"))
FOLDER = "TABLES_OF_TESTS"
"""Names the folder with the tables of the workloads below; worker processes find it in their environment."""


class Late:
    """A source whose file is looked up when it is loaded."""

    def __init__(self, name: str, **options: Any) -> None:
        self.name, self.options = name, options

    def load(self) -> Any:
        return TableSource(str(Path(os.environ[FOLDER]) / self.name), **self.options).load()


HYPER = TextClassification(Late("x.csv"), PLAN, TINY).hyperparameters
words = TextClassification(Late("words.jsonl"), PLAN, TINY, max_length=32)
pairs = TextClassification(Late("pairs.tsv"), PAIR_PLAN, TINY, max_length=48)
numbers = TextRegression(Late("numbers.csv"), SplitPlan(0.2, test_fraction=0.2, content=("text",)), TINY, max_length=32)
deep = TextClassification(Late("words.jsonl"), PLAN, replace(TINY, layers=2), max_length=32)
long = TextClassification(Late("long.jsonl"), PLAN, replace(TINY, positions=256), max_length=160)
"""A third of the texts is cut: they have no padding, and are so long that attention has another kernel."""
WORDS, PAIRS, NUMBERS, DEEP, LONG = (f"{__name__}:{name}" for name in ("words", "pairs", "numbers", "deep", "long"))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def write_tables(folder: Path) -> Path:
    """Write small learnable tables into a folder; `words` is sorted by label. Returns the folder."""
    generator = np.random.default_rng(0)
    vocabulary = {
        "cat": ["purr", "whisker", "mouse"],
        "dog": ["bark", "bone", "leash"],
        "日本語": ["東京", "寿司", "☂️"],
    }
    rows = []
    for label, own in sorted(vocabulary.items()):  # sorted by label: a split that does not shuffle would miss a class
        for number in range(100):
            some = [str(generator.choice([*own, "the", "a", "of"])) for _ in range(generator.integers(3, 25))]
            rows.append({"idx": number, "text": f"{' '.join(some)} {label[0]} {number}", "label": label})
    write_jsonl(folder / "words.jsonl", rows)
    letters = np.random.default_rng(1)
    texts = [" ".join(letters.choice([*"abcdefgh"], 20 if number % 3 else 250)) for number in range(100)]
    labelled = [{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(texts)]
    write_jsonl(folder / "long.jsonl", labelled)
    lines = ["sentence1\tsentence2\tlabel"]
    for number in range(240):
        first, second = generator.choice(["red", "green", "blue"], 2)
        lines.append(f'it "is" {first} {number}\tit is {second} indeed {number}\t{int(first == second)}')
    (folder / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    lines = ["text,score"]
    for number in range(240):
        value = generator.integers(0, 6)
        lines.append(f"{'good ' * value}{'bad ' * (5 - value)}film {number},{value + 0.25}")
    (folder / "numbers.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder
