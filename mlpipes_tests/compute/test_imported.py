"""What trainings have imported of slow packages, as it is noted for the next."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlpipes.compute.imported import note, noted
from mlpipes_tests.sandbox import CHECKOUT


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is noted."""
    monkeypatch.setenv("MLPIPES_HOME", str(tmp_path))
    return tmp_path / "ray" / "imported.json"


def test_slow_packages_are_noted_beside_a_private_ray_only(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = {"transformersnot", "transformers.integrations.bitsandbytes", "torchvision.io", "wave"}
    for name in ("transformers.models.one.modeling_one", "torchvision", *fast):
        monkeypatch.setitem(sys.modules, name, sys)
    note()
    assert not file.parent.exists()
    file.parent.mkdir()
    note()
    assert {"transformers.models.one.modeling_one", "torchvision"} <= set(noted())
    assert not fast & set(noted())
    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.setitem(sys.modules, "transformers.models.two", sys)
    note()
    assert {"torchvision", "transformers.models.two"} <= set(noted()), "what others have noted stays"


@pytest.mark.parametrize("told", ["", "[", "{}", "3", "[" * 10_000, json.dumps([None, ["transformers"], "os"])])
def test_a_broken_note_is_none(file: Path, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file.parent.mkdir()
    file.write_text(told)
    assert noted() == []
    monkeypatch.setitem(sys.modules, "torchvision", sys)
    note()
    assert "torchvision" in noted()


def test_where_it_cannot_be_noted_nothing_is_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", sys)
    file.mkdir(parents=True)  # whoever writes there gets an error, root too
    note()
    assert noted() == []


_LOOK = """
import os
import torch
seen, before = [], os.listdir("/proc/self/task")
for name in ("is_available", "device_count", "get_device_capability", "init"):
    setattr(torch.cuda, name, lambda *a, name=name, **k: seen.append(name) or 0)
torch._C._cuda_getDeviceCount = lambda: seen.append("count") or 0
import transformers.models.bert.modeling_bert, transformers.models.auto.modeling_auto, torchvision
print(seen, os.listdir("/proc/self/task") == before, torch.cuda.is_initialized())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
def test_slow_packages_neither_look_for_a_gpu_nor_start_threads() -> None:
    command, environment = [sys.executable, "-c", _LOOK], os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, env=environment, check=True)
    assert ended.stdout == "[] True False\n"
