"""Registered versions of each kind as they are served: texts, pairs, numbers, frames, and code of somebody's own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpipes.data.snapshot import open_snapshot
from mlpipes.serving.model import RefusedError, Registered, ServedModel, fetched, load
from mlpipes.store.files import publishing
from mlpipes.store.layout import Store
from mlpipes.tracking.models import EXPORTED, FINGERPRINT, SCALE, WEIGHTS, register
from mlpipes.tracking.runs import Tracker
from mlpipes.workloads import super_resolution
from mlpipes.workloads.base import DataInfo
from mlpipes.workloads.deployables import PythonCode
from mlpipes.workloads.golden import GOLDEN
from mlpipes.workloads.served import served_predictions
from mlpipes.workloads.super_resolution import video_sr
from mlpipes.workloads.tensors import has_native_bf16, on_device
from mlpipes.workloads.tiles import TILE
from mlpipes_tests.serving.models import run_in, tracker_in
from mlpipes_tests.texts import FOLDER, HYPER, NUMBERS, PAIRS, WORDS, numbers, pairs, words, write_tables
from mlpipes_tests.training.harness import make_job

TEXTS: Any = {"words": (WORDS, words), "pairs": (PAIRS, pairs), "numbers": (NUMBERS, numbers)}
PRECISIONS = ("fp32", "bf16") if has_native_bf16(torch.device("cpu")) else ("fp32",)
_DIGESTS = {FINGERPRINT: "f", EXPORTED: "e", SCALE: "w1-b1-e1-g0", WEIGHTS: "w"}


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return tracker_in(tmp_path_factory.mktemp("kinds"))


def served(tracker: Tracker, name: str, deployable: Any, store: Store) -> tuple[ServedModel, Path]:
    """A model, registered and loaded; and the folder that it was loaded from."""
    version = register(tracker, run_in(tracker, name, "f"), f"mlpipes-{name}", deployable, _DIGESTS, [])
    found = tracker.client.get_model_version(f"mlpipes-{name}", version)
    registered = Registered(f"mlpipes-{name}", version, str(found.source), dict(found.tags))
    folder = fetched(tracker, registered, store)
    return load(folder), folder


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_have_the_bits_of_their_evaluation_alone_and_together(
    kind: str, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    name, task = TEXTS[kind]
    snapshot, hp = open_snapshot(make_job(write_tables(tmp_path), "w1-b32-e1-g0", name).snapshot), HYPER()
    info = DataInfo(snapshot.facts, snapshot.meta["statistics"], snapshot.files)
    torch.manual_seed(0)
    model: Any = task.build_model(hp, info).eval()
    columns = snapshot.columns("test")
    moved = on_device(columns, torch.device("cpu"))
    evaluated = task.answers(served_predictions(task, model, moved, hp, "fp32"), info)
    found, _ = served(tracker, kind, task.deployable(model, hp, info, columns), Store(tmp_path))
    assert (found.exact, found.caveat, found.shares) == (True, "", True)
    asked = {
        column.name: np.array(list(columns[column.name].texts()), dtype=object) for column in found.signature.inputs
    }
    for rows in (np.arange(len(columns["label"])), np.array([5]), np.array([7, 0, 7])):
        answer = dict(found({column: values[rows] for column, values in asked.items()}))  # type: ignore[arg-type]
        for column, values in evaluated.items():
            assert answer[column].tolist() == np.asarray(values)[rows].tolist()


@pytest.mark.parametrize("frames", [1, 3])
def test_frames_are_upscaled_whatever_their_size(frames: int, tracker: Tracker, tmp_path: Path) -> None:
    hp = video_sr.hyperparameters(frames=frames)
    info = DataInfo({}, {})
    torch.manual_seed(0)
    model = video_sr.build_model(hp, info).eval()
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 48, 64), dtype=np.uint8)
    deployable = video_sr.deployable(model, hp, info, {"image": images})
    found, _ = served(tracker, f"frames{frames}", replace(deployable, rows=video_sr.served_rows), Store(tmp_path))
    for height, width in ((9, 7), (40, 30)):
        shape = (2, *([frames] if frames > 1 else []), height, width, 3)
        given = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        both, alone = np.asarray(found(given)), np.asarray(found(given[1:]))
        assert both.shape == (2, height * hp.upscale, width * hp.upscale, 3)
        assert both.dtype == np.uint8
        assert np.array_equal(both[1:], alone)
    assert not found.signature.same_shapes


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("network", "frames", "colour"), [("compact", 1, "luma"), ("compact", 3, "luma"), ("edsr", 1, "rgb")]
)
def test_frames_are_upscaled_to_the_pixels_that_the_evaluation_judged(
    network: str, frames: int, colour: str, precision: Any, tracker: Tracker, tmp_path: Path, monkeypatch: Any
) -> None:
    hp = video_sr.hyperparameters(network=network, frames=frames, colour=colour, width=16, depth=2)
    info = DataInfo({}, {}, precision=precision)
    torch.manual_seed(0)
    model: Any = video_sr.build_model(hp, info).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    images = np.random.default_rng(1).integers(0, 256, (2, 3, 2 * TILE[0] + 40, 96), dtype=np.uint8)
    deployable: Any = video_sr.deployable(model, hp, info, {"image": images})
    deployable = replace(deployable, rows=video_sr.served_rows, precision=precision)
    found, _ = served(tracker, f"{network}{frames}{precision}", deployable, Store(tmp_path))
    assert (found.exact, found.caveat) == (True, "")
    judged: list[tuple[torch.Tensor, torch.Tensor]] = []
    make = super_resolution._made

    def noting(of: Any, low: torch.Tensor) -> torch.Tensor:
        judged.append((low, make(of, low)))
        return judged[-1][1]

    monkeypatch.setattr(super_resolution, "_made", noting)
    # The first is judged, and served, in two tiles.
    columns = {"image": images, "size": np.array([[2 * TILE[0] + 40, 96], [46, 62]]), "photograph": np.arange(2)}
    served_predictions(video_sr, model, on_device(columns, torch.device("cpu")), hp, precision)
    assert [low.shape[-2] for low, _ in judged] == [TILE[0] + 20, 23]
    for low, made in judged:
        asked = low.permute(0, 1, 3, 4, 2).to(torch.uint8).numpy()
        answer = np.asarray(found(np.ascontiguousarray(asked if frames > 1 else asked[:, 0])))
        assert np.array_equal(made.round().clamp(0, 255).permute(0, 2, 3, 1).numpy(), answer)


def test_levels_that_hide_other_bits_are_not_called_exact(tracker: Tracker, tmp_path: Path) -> None:
    """Weights in another order in memory: kernels that round otherwise, and for most pictures the same levels."""
    hp, info = video_sr.hyperparameters(), DataInfo({}, {})
    torch.manual_seed(1)
    model: Any = video_sr.build_model(hp, info).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    images = np.random.default_rng(1).integers(0, 256, (2, 3, 48, 64), dtype=np.uint8)
    deployable = video_sr.deployable(model, hp, info, {"image": images})
    deployable = replace(deployable, rows=video_sr.served_rows, memory_format=torch.contiguous_format)
    found, _ = served(tracker, "order", deployable, Store(tmp_path))
    assert not found.exact
    assert "rounds otherwise" in found.caveat


_CODE = """
import mlflow
import pandas as pd


class Model(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: pd.DataFrame, params=None):
        return pd.DataFrame({"size": [len(text) * FACTOR for text in model_input["text"]]})


FACTOR = 2
mlflow.models.set_model(Model())
"""


def test_code_of_somebodys_own_is_served_each_request_alone_and_what_has_changed_is_refused(
    tracker: Tracker, tmp_path: Path
) -> None:
    code = tmp_path / "own.py"
    code.write_text(_CODE)
    own = PythonCode(code, lambda folder: None, {"text": ["a", "bc"]}, {"size": [2, 4]}, ("pandas", "mlflow"))
    found, folder = served(tracker, "own", own, Store(tmp_path))
    assert not found.shares
    assert found.exact
    answer: Any = found({"text": np.array(["abc"], dtype=object)})
    assert answer["size"].tolist() == [6]
    (golden,) = folder.rglob(GOLDEN)
    content = json.loads(golden.read_text())
    content["answer"]["columns"][0][1]["data"][0] = 3
    golden.write_text(json.dumps(content))
    with pytest.raises(Exception, match=r"golden\.json (does not match its checksum|has \d+ bytes)"):
        load(folder)


def test_a_version_that_cannot_be_loaded_is_refused_with_its_cause(tracker: Tracker, tmp_path: Path) -> None:
    code = tmp_path / "own.py"
    code.write_text(_CODE)
    own = PythonCode(code, lambda folder: None, {"text": ["a"]}, {"size": [2]}, ("pandas", "mlflow"))
    _, folder = served(tracker, "broken", own, Store(tmp_path))
    broken = tmp_path / "broken"
    with publishing(broken, kind="served model", version=1) as draft:
        shutil.copytree(folder / "model", draft.path / "model")
        (draft.path / "model" / "own.py").write_text("raise RuntimeError('no luck')")
        draft.meta |= {"name": "m", "version": "1", "tags": {}}
    with pytest.raises(RefusedError, match=r"m version 1 cannot be served: .*no luck"):
        load(broken)
