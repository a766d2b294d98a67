"""What is served is what was evaluated, in its last bit, in any company; and a golden request notices what is not."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mlpipes.data.snapshot import open_snapshot
from mlpipes.errors import CorruptionError
from mlpipes.workloads.base import DataInfo
from mlpipes.workloads.golden import GoldenRequest
from mlpipes.workloads.image_classification import BuiltInHyperparameters, ImageClassification
from mlpipes.workloads.served import AtPrecision, answers_in_batches, served_predictions
from mlpipes.workloads.tensors import on_device
from mlpipes.workloads.text_serving import lengths
from mlpipes_tests.texts import FOLDER, HYPER, LONG, NUMBERS, PAIRS, WORDS, long, numbers, pairs, words, write_tables
from mlpipes_tests.training.harness import make_job

CPU = torch.device("cpu")
PRECISIONS = ("fp32", "bf16")
TEXTS: Any = {"words": (WORDS, words), "pairs": (PAIRS, pairs), "numbers": (NUMBERS, numbers), "long": (LONG, long)}


def companies(n: int, count: int, most: int) -> list[np.ndarray]:
    """Rows that are asked for together: each once at least, in random numbers and order."""
    generator = np.random.default_rng(0)
    alone = [np.array([row]) for row in range(0, n, 7)]
    return [*alone, *(generator.choice(n, generator.integers(1, most + 1)) for _ in range(count)), np.arange(n)]


def lively(model: nn.Module) -> nn.Module:
    """With random weights: what an untrained network answers is much the same for all."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


# -- pictures ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("network", "shape"), [("digits", (1, 8, 8)), ("airbench", (3, 32, 32)), ("resnet18", (3, 32, 32))]
)
def test_pictures(network: Any, shape: tuple[int, ...], precision: Any, tmp_path: Path) -> None:
    task: Any = ImageClassification(None, None)  # type: ignore[arg-type]
    hp, n = BuiltInHyperparameters(network=network, flip=network == "airbench", width=16), 61
    images = np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)
    columns = {"image": images, "label": np.zeros(n, dtype=np.int64)}
    info = DataInfo({"class_names": list("abcde")}, task.statistics(columns), precision=precision)
    model = lively(task.build_model(hp, info))
    evaluated = served_predictions(task, model, on_device(columns, CPU), hp, precision)["logits"]
    program = task.deployable(model, hp, info, columns)
    stored = program._stored(AtPrecision(program.module.eval(), precision), tmp_path / "model.pt2")
    assert stored is not None
    for rows in companies(n, 12, 20):
        answers = answers_in_batches(stored, images[rows], task.served_rows)
        assert np.array_equal(answers, evaluated[rows])


def test_without_one_shape_the_bits_depend_on_the_company() -> None:
    """What the rest is for: were this to fail, kernels would have become kinder, and the shapes could be given up."""
    task: Any = ImageClassification(None, None)  # type: ignore[arg-type]
    hp = BuiltInHyperparameters(network="airbench", width=16)
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8)
    info = DataInfo({"class_names": list("abcde")}, task.statistics({"image": images}))
    program = task.deployable(lively(task.build_model(hp, info)), hp, info, {"image": images}).module
    alone, some, all_of_them = (answers_in_batches(program, images, size) for size in (1, 8, 64))
    assert np.allclose(alone, all_of_them, atol=1e-3)
    assert not (np.array_equal(alone, some) and np.array_equal(some, all_of_them))


# -- texts -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the tables of the small workloads."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return write_tables(tmp_path)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("kind", "pooling"), [("words", "own"), ("words", "mean"), ("pairs", "own"), ("numbers", "mean"), ("long", "own")]
)
def test_texts(
    kind: str, pooling: Any, precision: Any, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas as pd

    from mlpipes.workloads import served_text_model, text_classification

    for module, name in ((served_text_model, "_has_native_bf16"), (text_classification, "has_native_bf16")):
        monkeypatch.setattr(module, name, lambda *_: True)  # as the evaluation here has it
    name, task = TEXTS[kind]
    snapshot, hp = open_snapshot(make_job(tables, "w1-b32-e1-g0", name).snapshot), HYPER(pooling=pooling)
    info = DataInfo(snapshot.facts, snapshot.meta["statistics"], snapshot.files, precision=precision)
    torch.manual_seed(0)
    model: Any = lively(task.build_model(hp, info))
    columns = snapshot.columns("train")
    evaluated = task.answers(served_predictions(task, model, on_device(columns, CPU), hp, precision), info)
    found = task.deployable(model, hp, info, columns)
    folder = tmp_path / "served"
    folder.mkdir()
    found.write(folder)
    served: Any = served_text_model.TextModel()
    served.load_context(SimpleNamespace(artifacts={"model": str(folder)}))
    asked = pd.DataFrame({each: list(columns[each].texts()) for each in ("text", "text_pair") if each in columns})
    lengths_seen = {task.served_length(int(each)) for each in columns["tokens"].lengths}
    assert len(lengths_seen) > 1 or kind not in ("words", "long")
    for rows in companies(len(asked), 8, 40):
        answers = served.predict(None, asked.iloc[rows])
        for column, values in evaluated.items():
            assert answers[column].tolist() == np.asarray(values)[rows].tolist(), column
    assert len(np.unique(np.asarray(list(evaluated.values())[-1]))) > 1


def test_a_text_model_of_a_gpu_in_bf16_is_registered_and_served_by_a_cpu_without_it(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas as pd

    from mlpipes.workloads import served_text_model, text_classification

    for module, name in ((served_text_model, "_has_native_bf16"), (text_classification, "has_native_bf16")):
        monkeypatch.setattr(module, name, lambda *_: False)
    snapshot, hp = open_snapshot(make_job(tables, "w1-b32-e1-g0", WORDS).snapshot), HYPER()
    info = DataInfo(snapshot.facts, snapshot.meta["statistics"], snapshot.files, precision="bf16")
    model: Any = lively(words.build_model(hp, info))
    found: Any = words.deployable(model, hp, info, snapshot.columns("train"))
    (tmp_path / "served").mkdir()
    found.write(tmp_path / "served")
    served: Any = served_text_model.TextModel()
    served.load_context(SimpleNamespace(artifacts={"model": str(tmp_path / "served")}))
    again = served.predict(None, pd.DataFrame(found.example))
    for column, values in found.answers.items():
        assert again[column].tolist() == list(values), "which is compared when it is registered"


@pytest.mark.parametrize("longest", [1, 15, 16, 17, 24, 64, 100, 128, 512])
def test_lengths_end_with_the_longest_and_waste_little(longest: int) -> None:
    found = lengths(longest)
    assert found == sorted(set(found))
    assert found[-1] == longest
    assert all(after <= before * 1.5 + 1 for before, after in pairwise(found))


# -- golden requests ---------------------------------------------------------------------------------------------------
GIVEN, ANSWER = np.arange(12, dtype=np.uint8).reshape(3, 4), np.linspace(0, 1, 6, dtype=np.float32).reshape(3, 2)


def golden(**changes: Any) -> GoldenRequest:
    return replace(GoldenRequest.of(8, "fp32", GIVEN, ANSWER, exact=True), **changes)


def test_a_golden_request_comes_back_as_it_was_in_every_bit() -> None:
    odd = np.array([0.1, 1e-45, np.float32(1) / 3], dtype=np.float32)
    table = {"text": np.array(["a", "é"], dtype=object), "p": np.array([0.1, 1 / 3])}
    for answer in (odd, table):
        again = GoldenRequest.from_json(golden(answer=answer, given=table).to_json())
        assert again.difference(answer, "fp32") == ""
        assert again.rows == 8
    assert list(again.given) == ["text", "p"]
    with pytest.raises(CorruptionError, match=r"golden\.json cannot be read"):
        GoldenRequest.from_json(b'{"version": 1}')


def test_on_the_same_machine_one_bit_is_a_difference_and_elsewhere_rounding_is_none() -> None:
    near = ANSWER.copy()
    near[1, 1] = np.nextafter(near[1, 1], np.float32(2))
    far = ANSWER + np.float32(0.1)
    assert golden().difference(ANSWER, "fp32") == ""
    assert "bits" in golden().difference(near, "fp32")
    elsewhere = golden(computed_on={"machine": "another"})
    assert elsewhere.difference(near, "fp32") == ""
    assert "differs by up to 0.1" in elsewhere.difference(far, "fp32")
    assert golden(precision="bf16").difference(near, "fp32") == "", "another precision is another computation"
    assert golden().caveat("fp32") == ""
    assert "another kind of machine (machine another there" in elsewhere.caveat("fp32")
    assert "rounds otherwise" in golden(exact=False).caveat("fp32")
    assert "evaluated in bf16" in golden(precision="bf16").caveat("fp32")
    assert "on a GPU" in golden(evaluated_on="cuda").caveat("fp32")
    assert "shape" in elsewhere.difference(ANSWER[:2], "fp32")
    assert "instead of" in elsewhere.difference({"label": ANSWER}, "fp32")
