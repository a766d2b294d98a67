"""Text workloads: roles of columns, hard data, batches, budgets, workers, the report."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpipes.data.hub import model_folder
from mlpipes.data.ragged import Ragged
from mlpipes.data.splits import SplitPlan, split_dataset
from mlpipes.data.tables import TableSource, infer_roles, sst2_source
from mlpipes.errors import ConfigError, DataError
from mlpipes.training.checkpoints import Checkpoints
from mlpipes.training.determinism import DataOrder
from mlpipes.training.export import evaluate, export_best, load_model
from mlpipes.training.tensors import on_device
from mlpipes.workloads.base import DataInfo
from mlpipes.workloads.encoders import Tiny
from mlpipes.workloads.text_classification import TextClassification, TextRegression, TextWorkload
from mlpipes_tests.training.harness import curve, make_job, run, run_here

TINY = Tiny(vocabulary=300, hidden=16, layers=1, heads=2, intermediate=32, positions=64)
PLAN = SplitPlan(0.2, test_fraction=0.2, content=("text",))
PAIR_PLAN = SplitPlan(0.2, test_fraction=0.2, content=("text", "text_pair"))
FOLDER = "MLPIPES_TEST_TABLES"
"""Where the tables of the workloads below lie; worker processes find it in their environment."""


def table(name: str, **options: Any) -> TableSource:
    return TableSource(str(Path(os.environ.get(FOLDER, "/nowhere")) / name), **options)


class Late:
    """A source whose file is looked up when it is loaded."""

    def __init__(self, name: str, **options: Any) -> None:
        self.name, self.options = name, options

    def load(self) -> Any:
        return table(self.name, **self.options).load()


HYPER = TextClassification(Late("x.csv"), PLAN, TINY).hyperparameters
words = TextClassification(Late("words.jsonl"), PLAN, TINY, max_length=32)
pairs = TextClassification(Late("pairs.tsv"), PAIR_PLAN, TINY, max_length=48)
numbers = TextRegression(
    Late("numbers.csv"), SplitPlan(0.2, test_fraction=0.2, content=("text",), stratify_by=None), TINY, max_length=32
)
deep = TextClassification(Late("words.jsonl"), PLAN, replace(TINY, layers=2), max_length=32)
WORDS, PAIRS, NUMBERS, DEEP = (
    f"mlpipes_tests.workloads.test_text:{name}" for name in ("words", "pairs", "numbers", "deep")
)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small learnable tables; the label-sorted one is `words`."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
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
    write_jsonl(tmp_path / "words.jsonl", rows)
    lines = ["sentence1\tsentence2\tlabel"]
    for number in range(240):
        first, second = generator.choice(["red", "green", "blue"], 2)
        lines.append(f'it "is" {first} {number}\tit is {second} indeed {number}\t{int(first == second)}')
    (tmp_path / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    lines = ["text,score"]
    for number in range(240):
        value = generator.integers(0, 6)
        lines.append(f"{'good ' * value}{'bad ' * (5 - value)}film {number},{value + 0.25}")
    (tmp_path / "numbers.csv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


# -- roles and hard data ----------------------------------------------------------------------------------------------
def test_roles_are_inferred_or_the_candidates_are_listed() -> None:
    text = ["a film about nothing", "another film of note", "the third one here"]
    assert infer_roles({"idx": [1, 2, 3], "sentence": text, "label": [0, 1, 0]}).as_dict() == {
        "text": "sentence", "text_pair": None, "label": "label", "task": "classification",
    }  # fmt: skip
    pair = infer_roles({"sentence1": text, "sentence2": text, "label": ["x", "y", "x"]})
    assert (pair.text, pair.text_pair) == ("sentence1", "sentence2")
    assert infer_roles({"text": text, "score": [0.5, 2.25, 1.0]}).task == "regression"
    assert infer_roles({"text": text, "stars": [5.0, 2.0, 1.0]}).task == "classification"
    with pytest.raises(DataError, match=r"which column is the text.*'a', 'b', 'c'"):
        infer_roles({"a": text, "b": text, "c": text, "label": [0, 1, 0]})
    with pytest.raises(DataError, match=r"which column is the label.*'label', 'score'"):
        infer_roles({"a": text, "label": [0, 1, 0], "score": [1, 2, 3]})
    with pytest.raises(DataError, match="no column 'nope' for text"):
        infer_roles({"a": text, "label": [0, 1, 0]}, text="nope")
    with pytest.raises(DataError, match="looks like no class"):
        infer_roles({"text": text * 10, "label": list(range(30))})


def test_what_is_missing_or_unseen_is_dropped_and_counted(tmp_path: Path) -> None:
    good = [{"text": f"some words of class {n % 2} number {n}", "label": ["no", "yes"][n % 2]} for n in range(20)]
    bad = [{"text": "", "label": "yes"}, {"text": "  ", "label": "no"}, {"text": "unlabelled words", "label": None}]
    train = write_jsonl(tmp_path / "train.jsonl", good + bad)
    test = write_jsonl(tmp_path / "test.jsonl", [good[0], {"text": "a new class of things", "label": "maybe"}])
    dataset = TableSource(str(train), test=str(test)).load()
    assert dataset.counts == {"train": 20, "test": 1}
    assert dataset.facts["class_names"] == ["no", "yes"]
    assert dataset.facts["dropped"]["train"] == {"without label": 1, "without text": 2, "label unseen in training": 0}
    assert dataset.facts["dropped"]["test"]["label unseen in training"] == 1
    with pytest.raises(DataError, match="has 1 class"):
        TableSource(str(write_jsonl(tmp_path / "one.jsonl", good[::2]))).load()


def test_words_that_mean_missing_elsewhere_and_quotes_stay_text(tmp_path: Path) -> None:
    lines = ["sentence\tlabel", 'NA "is a" word\t0', "null\t1", 'an unclosed " quote\t0', "fine as it is\t1"]
    (tmp_path / "train.tsv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "dev.tsv").write_text("\n".join(lines), encoding="utf-8")
    dataset = sst2_source(tmp_path).load()
    assert list(dataset.splits["train"]["text"].texts()) == [line.split("\t")[0] for line in lines[1:]]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        TableSource(str(tmp_path / "gone.csv")).load()
    (tmp_path / "x.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match="unknown type"):
        TableSource(str(tmp_path / "x.xlsx")).load()
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as parquet"):
        TableSource(str(tmp_path / "x.parquet")).load()


def test_without_network_and_data_the_error_comes_within_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"hub cannot be reached.*hf download nobody/nothing"):
        model_folder("nobody/nothing")
    with pytest.raises(DataError, match=r"hub cannot be reached.*load_dataset"):
        TableSource("nobody/nothing").load()
    assert time.monotonic() - began < 15


def test_a_thousand_classes_are_split_learnt_and_reported(tmp_path: Path) -> None:
    rows = [{"text": f"the item called i{n % 1000} in row {n}", "label": f"c{n % 1000}"} for n in range(3000)]
    dataset = TableSource(str(write_jsonl(tmp_path / "many.jsonl", rows))).load()
    assert len(dataset.facts["class_names"]) == 1000
    splits, _ = split_dataset(dataset, PLAN)
    assert len(splits["test"]["label"]) == 600
    assert len(np.unique(splits["train"]["label"])) == 1000
    from mlpipes.reporting.classification import classification_report
    from mlpipes.reporting.report import Table

    logits = np.eye(1000)[splits["test"]["label"]]
    logits[::3] = np.roll(logits[::3], 1, axis=1)
    report = classification_report(
        logits, splits["test"]["label"], dataset.facts["class_names"], lambda r, c: Table("x", ["a"], [[i] for i in c])
    )
    assert report.estimates["accuracy"].value == pytest.approx(2 / 3)
    assert 0.6 < report.estimates["matthews_correlation"].value < 0.7
    assert len(report.tables[0].rows) == 50


def test_matthews_and_macro_f1_agree_with_scikit_learn() -> None:
    from sklearn import metrics

    from mlpipes.reporting.classification import _bootstrapped

    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 500)
    predicted = np.where(generator.random(500) < 0.6, labels, generator.integers(0, 4, 500))
    found = _bootstrapped(labels, predicted, 4)
    assert found["macro_f1"].value == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))
    assert found["matthews_correlation"].value == pytest.approx(metrics.matthews_corrcoef(labels, predicted))
    assert found["matthews_correlation"].low < found["matthews_correlation"].value < found["matthews_correlation"].high


def test_rare_classes_and_groups_are_split_as_they_should() -> None:
    from mlpipes.data.dataset import Dataset, Provenance

    labels = np.array([0] * 900 + [1] * 90 + [2] * 10)
    columns = {"text": Ragged.of_texts(f"row {n}" for n in range(1000)), "label": labels, "file": np.arange(1000) // 7}
    dataset = Dataset({"train": columns}, Provenance("x", "", "", ""), {})
    splits, _ = split_dataset(dataset, PLAN)
    for split, share in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
        counts = np.bincount(splits[split]["label"], minlength=3)
        assert np.abs(counts - share * np.array([900, 90, 10])).max() <= 2
    splits, _ = split_dataset(dataset, SplitPlan(0.1, test_fraction=0.2, content=("text",), group_by="file"))
    files = [set(splits[split]["file"]) for split in ("train", "validation", "test")]
    assert not files[0] & files[1]
    assert not files[0] & files[2]
    assert not files[1] & files[2]
    assert abs(len(splits["test"]["label"]) - 200) <= 7
    splits, _ = split_dataset(dataset, SplitPlan(0.1, test_fraction=0.2, content=("text",), train_cap=100))
    assert np.bincount(splits["train"]["label"], minlength=3).tolist() == [90, 9, 1]


# -- batches ----------------------------------------------------------------------------------------------------------
def test_length_buckets_read_every_row_once_and_pad_little() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    order, again = (DataOrder(1000, 32, seed=5, lengths=lengths) for _ in range(2))
    batches = [order.batch(1, step) for step in range(order.steps_per_epoch)]
    assert len(torch.cat(batches).unique()) == 31 * 32
    assert all(torch.equal(batch, again.batch(1, step)) for step, batch in enumerate(batches))
    padded = sum(int(lengths[batch].max()) * 32 for batch in batches)
    assert padded < 1.1 * sum(int(lengths[batch].sum()) for batch in batches)
    means = [lengths[batch].mean() for batch in batches]
    assert np.abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5, "batches come in random order"


def test_ragged_columns_pad_and_pick_rows() -> None:
    column = Ragged.of([np.array([1, 2, 3]), np.array([]), np.array([4])], np.int32)
    assert column[np.array([2, 0])].lengths.tolist() == [1, 3]
    tensor = on_device({"tokens": column}, torch.device("cpu"))["tokens"]
    ids, real = tensor.padded(torch.tensor([2, 0, 1]))
    assert ids.tolist() == [[4, 0, 0], [1, 2, 3], [0, 0, 0]]
    assert real.sum(1).tolist() == [1, 3, 0]


def test_a_token_budget_changes_memory_and_not_the_model(tables: Path) -> None:
    options = {"dropout": 0.0, "precision": "fp32", "learning_rate": 1e-3}
    whole = run_here(make_job(tables / "a", "w1-b32-e2-g0", WORDS, **options))
    parts = run_here(make_job(tables / "b", "w1-b32-e2-g0", WORDS, max_tokens=60, **options))
    first, second = (
        np.array([row[1] for row in outcome["history"] if row[0] == "train/loss"]) for outcome in (whole, parts)
    )
    assert np.abs(first - second).max() < 1e-4
    columns = on_device({"tokens": Ragged.of([np.zeros(n) for n in (5, 9, 30, 2)], np.int32)}, torch.device("cpu"))
    hp = HYPER(max_tokens=20)
    found = words.micro_batches(columns, torch.arange(4), hp)
    assert [part.tolist() for part in found] == [[0, 1], [2], [3]]


# -- training ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{"precision": "fp32"}, {"precision": "bf16", "freeze_embeddings": True}])
def test_any_number_of_workers_gives_the_same_bits(tables: Path, options: dict[str, Any]) -> None:
    """In buckets, and with a token budget that cuts each shard into parts."""
    job = {n: make_job(tables / str(n), "w1-b32-e1-g0", WORDS, max_tokens=60, **options) for n in (1, 2, 3, 4)}
    outcomes = [run(job[n], workers=n) for n in job]
    assert len({outcome["weights_digest"] for outcome in outcomes}) == 1
    assert len({str(curve(outcome)) for outcome in outcomes}) == 1


def test_with_a_shard_for_each_worker_scales_agree_to_rounding(tables: Path) -> None:
    options = {"logical_shards": None, "precision": "fp32", "dropout": 0.0, "learning_rate": 1e-4}
    free = [run(make_job(tables / "free", f"w{n}-b32-e2-g0", WORDS, **options)) for n in (1, 4)]
    losses = [np.array([row[1] for row in outcome["history"] if row[0] == "train/loss"]) for outcome in free]
    assert np.abs(losses[0] - losses[1]).max() < 1e-5


def test_crashed_and_resumed_equals_uninterrupted(tables: Path) -> None:
    expected = run_here(make_job(tables / "whole", "w1-b32-e3-g0", WORDS))
    job = make_job(tables / "broken", "w1-b32-e3-g0", WORDS, every_steps=2)
    run(job, crash=9)
    outcome = run(job)
    assert outcome["resumed_from_step"] == 8
    assert outcome["weights_digest"] == expected["weights_digest"]
    assert curve(outcome) == curve(expected)


def test_what_is_frozen_stays_as_it_was_and_the_rest_learns(tables: Path) -> None:
    from mlpipes.data.snapshot import open_snapshot
    from mlpipes.training.determinism import mixed_seed

    job = make_job(tables, "w1-b32-e1-g0", DEEP, freeze_layers=1)
    run_here(job)
    checkpoints, snapshot = Checkpoints(job.folder.checkpoints), open_snapshot(job.snapshot)
    trained = checkpoints.load(checkpoints.steps()[-1]).model_state()
    info = DataInfo(snapshot.facts, snapshot.meta["statistics"], snapshot.files)
    torch.manual_seed(mixed_seed(0, "model"))
    before = deep.build_model(HYPER(freeze_layers=1), info).state_dict()
    same = {name for name in before if torch.equal(before[name], trained[name])}
    assert {name for name in before if "embeddings" in name or "layer.0." in name} <= same
    assert not {name for name in before if "layer.1." in name or "classifier" in name} & same
    with pytest.raises(ConfigError, match="freeze_layers is 3, but the encoder has 2 layers"):
        deep.build_model(HYPER(freeze_layers=3), info)


@pytest.mark.parametrize("pooling", ["own", "mean"])
def test_padding_says_nothing_and_the_served_model_computes_the_same(tables: Path, pooling: Any) -> None:
    from mlpipes.data.snapshot import open_snapshot
    from mlpipes.tracking.text_model import TextModel

    job, hp = make_job(tables, "w1-b32-e1-g0", WORDS), HYPER(pooling=pooling)
    snapshot = open_snapshot(job.snapshot)
    info = DataInfo(snapshot.facts, snapshot.meta["statistics"], snapshot.files)
    torch.manual_seed(0)
    model: Any = words.build_model(hp, info).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # an untrained encoder says much the same of any token
            parameter.normal_(std=0.3)
    columns = on_device(snapshot.columns("train"), torch.device("cpu"))
    short, long = columns["tokens"].offsets.diff().argsort()[[0, -1]].tolist()
    with torch.no_grad():
        alone, beside = (
            words.predict(model, words.batch(columns, torch.tensor(rows), hp, augment=False), hp)["logits"][0]
            for rows in ([short], [short, long])
        )
        assert torch.allclose(alone, beside, atol=1e-4)
        served: Any = TextModel()
        served.model = model
        model.config.mlpipes = {"pooling": pooling}
        batch = words.batch(columns, torch.tensor([short, long]), hp, augment=False)
        ids = batch["input_ids"].masked_fill(~batch["attention_mask"], 0)
        again = served._logits({"input_ids": ids, "attention_mask": batch["attention_mask"].long()})
    assert torch.allclose(again[0], beside, atol=1e-4)
    assert (again[0] - again[1]).abs().max() > 1e-2


def judged(job: Any) -> Any:
    from mlpipes.data.snapshot import open_snapshot

    outcome, snapshot = run_here(job), open_snapshot(job.snapshot)
    return evaluate(load_model(export_best(job.folder, job.recipe, outcome), snapshot), snapshot, "test")[0], snapshot


def test_sorted_unicode_data_are_learnt_and_the_mistakes_are_shown_as_texts(tables: Path) -> None:
    report, snapshot = judged(make_job(tables, "w1-b16-e20-g0", WORDS, learning_rate=3e-3))
    assert report.estimates["accuracy"].value > 0.9
    assert set(report.estimates) == {"accuracy", "macro_f1", "matthews_correlation"}
    assert snapshot.facts["class_names"] == ["cat", "dog", "日本語"]
    assert sorted(np.bincount(np.asarray(snapshot.columns("test")["label"]))) == [20, 20, 20]
    files = {path.name for path in snapshot.files.rglob("*")}
    assert {"tokenizer.json", "config.json"} <= files
    report, _ = judged(make_job(tables, "w1-b16-e1-g0", WORDS, learning_rate=1e-6))
    (mistakes,) = [table for table in report.tables if table.title == "Most confident mistakes"]
    assert mistakes.columns == ["label → prediction", "text"]
    assert " → " in mistakes.rows[0][0]


def test_pairs_carry_both_texts_and_their_types(tables: Path) -> None:
    job = make_job(tables, "w1-b16-e2-g0", PAIRS)
    report, snapshot = judged(job)
    columns = snapshot.columns("train")
    assert snapshot.facts["roles"]["text_pair"] == "sentence2"
    assert columns["tokens"].lengths.tolist() == columns["types"].lengths.tolist()
    assert set(np.unique(columns["types"].values)) == {0, 1}
    assert "accuracy" in report.estimates


def test_numbers_are_regressed(tables: Path) -> None:
    report, _ = judged(make_job(tables, "w1-b16-e12-g0", NUMBERS, learning_rate=1e-2))
    assert report.estimates["pearson"].value > 0.8
    assert report.estimates["spearman"].low < report.estimates["spearman"].value
    assert report.estimates["mean_absolute_error"].value < 1.0
    assert "predictions" in report.figures


def test_the_wrong_task_and_too_long_sequences_are_refused(tables: Path, tmp_path: Path) -> None:
    for wrong, message in (
        (TextRegression(Late("words.jsonl"), PLAN, TINY), "the labels are classes"),
        (TextClassification(Late("numbers.csv"), PLAN, TINY), "real numbers"),
        (TextClassification(Late("words.jsonl"), PLAN, TINY, max_length=65), "takes 64 tokens"),
    ):
        with pytest.raises((DataError, ConfigError), match=message):
            prepare(wrong, tmp_path)


def prepare(workload: TextWorkload, scratch: Path) -> Any:
    import tempfile

    dataset = workload.source.load()
    splits, _ = split_dataset(dataset, workload.split)
    return workload.prepare(splits, dataset.facts, Path(tempfile.mkdtemp(dir=scratch)))


def test_long_texts_are_cut_and_counted(tmp_path: Path) -> None:
    rows = [{"text": f"word {n} " + "x y z " * (2000 if n % 4 == 0 else 1), "label": n % 2} for n in range(40)]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    workload = TextClassification(TableSource(str(path)), PLAN, TINY, max_length=32)
    prepared = prepare(workload, tmp_path)
    assert max(len(row["text"]) for row in rows) > 10_000
    assert sum(prepared.facts["truncated"].values()) == 10
    assert prepared.splits["train"]["tokens"].lengths.max() == 32


def test_the_vocabulary_sees_the_training_split_only_and_comes_out_the_same(tables: Path, tmp_path: Path) -> None:
    first, second = (prepare(words, tmp_path) for _ in range(2))
    vocabularies = [p.files["tokenizer/tokenizer.json"].read_bytes() for p in (first, second)]
    assert vocabularies[0] == vocabularies[1]
    only_test = set(first.splits["test"]["text"].texts())
    assert only_test
    rows = [json.loads(line) for line in (tables / "words.jsonl").read_text().splitlines()]
    changed = [{**row, "text": row["text"] + " qqqzzz"} if row["text"] in only_test else row for row in rows]
    write_jsonl(tables / "words.jsonl", changed)
    again = prepare(words, tmp_path)
    assert again.files["tokenizer/tokenizer.json"].read_bytes() == vocabularies[0]
