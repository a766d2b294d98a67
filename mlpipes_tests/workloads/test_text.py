"""Text workloads: batches, budgets, workers, what is learnt and reported, what is prepared."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch

from mlpipes.data.ragged import Ragged
from mlpipes.data.splits import split_dataset
from mlpipes.data.tables import TableSource
from mlpipes.errors import ConfigError, DataError
from mlpipes.store.outcome import Outcome
from mlpipes.training.checkpoints import Checkpoints
from mlpipes.training.determinism import DataOrder
from mlpipes.training.model import evaluate, export_best, load_model
from mlpipes.workloads.base import DataInfo
from mlpipes.workloads.encoder_models import attending
from mlpipes.workloads.served import served_predictions
from mlpipes.workloads.tensors import on_device
from mlpipes.workloads.text_classification import TextClassification, TextRegression, TextWorkload
from mlpipes_tests.texts import (
    DEEP,
    FOLDER,
    HYPER,
    NUMBERS,
    PAIRS,
    PLAN,
    TINY,
    WORDS,
    Late,
    deep,
    numbers,
    words,
    write_jsonl,
    write_tables,
)
from mlpipes_tests.training.harness import curve, make_job, run, run_here


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the tables of the small workloads."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return write_tables(tmp_path)


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
    free = [run(make_job(tables / "free", f"w{n}-b32-e2-g0", WORDS, **options)) for n in (1, 2)]
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


def test_what_is_left_out_is_neither_trained_nor_served(tables: Path, tmp_path: Path) -> None:
    from mlpipes.data.snapshot import open_snapshot
    from mlpipes.workloads.served_text_model import TextModel

    job, hp = make_job(tables, "w1-b32-e1-g0", DEEP, keep_layers=1), HYPER(keep_layers=1)
    run_here(job)
    checkpoints, snapshot = Checkpoints(job.folder.checkpoints), open_snapshot(job.snapshot)
    trained = checkpoints.load(checkpoints.steps()[-1]).model_state()
    assert any("layer.0." in name for name in trained)
    assert not any("layer.1." in name for name in trained)
    info = DataInfo(snapshot.facts, snapshot.meta["statistics"], snapshot.files)
    model: Any = deep.build_model(hp, info)
    model.load_state_dict(trained)
    columns, served = snapshot.columns("train"), cast(Any, TextModel())
    (tmp_path / "served").mkdir()
    deep.deployable(model.eval(), hp, info, columns).write(tmp_path / "served")
    served.load_context(SimpleNamespace(artifacts={"model": str(tmp_path / "served")}))
    assert len(served.model.base_model.encoder.layer) == 1
    found = served.predict(None, pd.DataFrame({"text": list(columns["text"].texts())}))
    evaluated = served_predictions(deep, model, on_device(columns, torch.device("cpu")), hp, info.precision)
    assert found["label"].tolist() == deep.answers(evaluated, info)["label"]
    with pytest.raises(ConfigError, match="keep_layers is 3, but the encoder has 2 layers"):
        deep.build_model(HYPER(keep_layers=3), info)
    with pytest.raises(ConfigError, match="freeze_layers is 2, but the encoder has 1 layer"):
        deep.build_model(HYPER(keep_layers=1, freeze_layers=2), info)


@pytest.mark.parametrize("pooling", ["own", "mean"])
def test_padding_says_nothing_and_the_served_model_computes_the_same(tables: Path, pooling: Any) -> None:
    from mlpipes.data.snapshot import open_snapshot
    from mlpipes.workloads.served_text_model import TextModel

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


def test_on_a_cpu_short_texts_are_computed_in_bf16_from_state_to_state(
    tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlpipes.data.snapshot import open_snapshot

    snapshot = open_snapshot(make_job(tables, "w1-b32-e1-g0", WORDS).snapshot)
    info = DataInfo(snapshot.facts, snapshot.meta["statistics"], snapshot.files)
    model: Any = words.build_model(HYPER(), info).eval()
    cpu, ids = torch.device("cpu"), torch.arange(1, 9).view(2, 4)

    def states() -> torch.Tensor:
        with torch.no_grad():
            return model.base_model(input_ids=ids).last_hidden_state

    assert states().dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert states().dtype == torch.bfloat16
    for longest, way in ((128, "eager"), (129, "sdpa"), (128, "eager")):
        with attending(model, cpu, 4, longest):
            assert model.config._attn_implementation == way
    rounds: dict[str, set[bool]] = {"served_batch": set(), "predict": set()}

    def noting(name: str, before: Any) -> Any:
        def noted(*arguments: Any, **named: Any) -> Any:
            rounds[name].add(torch.is_autocast_enabled("cpu"))
            return before(*arguments, **named)

        return noted

    for name in rounds:
        monkeypatch.setattr(words, name, noting(name, getattr(words, name)))
    columns = on_device({name: each[np.arange(9)] for name, each in snapshot.columns("test").items()}, cpu)
    served_predictions(words, model, columns, HYPER(), "bf16")
    assert rounds == {"served_batch": {False}, "predict": {True}}, "texts are not rounded, their model is"


def judged(job: Any) -> Any:
    from mlpipes.data.snapshot import open_snapshot

    run_here(job)
    outcome, snapshot = Outcome.read(job.folder.result), open_snapshot(job.snapshot)
    return evaluate(load_model(export_best(job.folder, job.recipe, outcome), snapshot), snapshot, "test")[0], snapshot


def test_sorted_unicode_data_are_learnt_and_the_mistakes_are_shown_as_texts(tables: Path) -> None:
    report, snapshot = judged(make_job(tables, "w1-b16-e20-g0", WORDS, learning_rate=1e-3))
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


@pytest.mark.parametrize("seed", [0, 1])
def test_numbers_are_regressed(tables: Path, seed: int) -> None:
    report, _ = judged(make_job(tables, "w1-b16-e12-g0", NUMBERS, learning_rate=1e-2, seed=seed))
    assert report.estimates["pearson"].value > 0.9
    assert report.estimates["spearman"].low < report.estimates["spearman"].value
    assert report.estimates["mean_absolute_error"].value < 0.5
    assert report.estimates["root_mean_squared_error"].high < report.quantities["baseline"]
    assert 1.3 < report.quantities["baseline"] < 2.1, "numbers from 0 to 5, all as frequent: 1.71"
    assert "predictions" in report.figures


def test_numbers_in_the_right_order_and_of_the_wrong_size_are_not_the_best() -> None:
    """After one epoch the order may be perfect and every number near the mean: correlation alone would select that."""
    labels, sign = np.arange(10.0), (-1.0) ** np.arange(10)
    timid, close = 4.5 + 0.01 * labels, labels + 0.3 * sign
    found = [numbers.validate({"value": values}, {"label": labels}) for values in (timid, close)]
    assert found[0]["pearson"] > found[1]["pearson"]
    assert numbers.selection_key(found[0]) < numbers.selection_key(found[1])


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
    assert all("qqqzzz" in text for text in again.splits["test"]["text"].texts()), "the same rows are held out"
    assert again.files["tokenizer/tokenizer.json"].read_bytes() == vocabularies[0]
