import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mlpipes.errors import CorruptionError, FormatError
from mlpipes.store.files import MANIFEST
from mlpipes.store.outcome import Best
from mlpipes.training.checkpoints import Checkpoints, Progress
from mlpipes.training.determinism import weights_digest

STEP = 7


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint of a small model and AdamW's state."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(tmp_path_factory.mktemp("checkpoints"))
    checkpoints.save(
        model.state_dict(), [optimizer.state_dict()], Progress(step=STEP, history=[["train/loss", 0.5, 7, 1]])
    )
    return checkpoints.folder


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_truncated_or_flipped_bytes_never_load_silently(written: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(written, folder)
    checkpoints, good = Checkpoints(folder), Checkpoints(written).load(STEP)
    victim = checkpoints.path(STEP) / data.draw(st.sampled_from([MANIFEST, "model.safetensors", "optimizers.pt"]))
    content = bytearray(victim.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        victim.write_bytes(content[:position])
    else:
        content[position] ^= 1 << data.draw(st.integers(0, 7))
        victim.write_bytes(content)
    try:
        found = checkpoints.load(STEP)
    except CorruptionError as error:
        assert str(folder) in str(error)
        return
    # Only white space around the manifest's JSON can go without changing what is said.
    assert victim.name == MANIFEST
    assert found.progress == good.progress
    assert weights_digest(found.model_state()) == weights_digest(good.model_state())


def test_a_checkpoint_of_another_version_is_left_alone_with_both_versions_named(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlpipes.training.checkpoints as module

    folder = tmp_path / "other"
    shutil.copytree(written, folder)
    monkeypatch.setattr(module, "VERSION", 2)
    with pytest.raises(FormatError, match=r"a checkpoint of format 1, and this version reads 2.*fresh: true"):
        Checkpoints(folder).latest()
    assert [path.name for path in folder.iterdir()] == [f"step-{STEP:08d}"], "it is not corrupt, and nobody starts over"


def test_if_the_latest_and_best_is_corrupt_the_one_before_still_has_its_own_best(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4)):
        checkpoints.save(
            model.state_dict(),
            [optimizer.state_dict()],
            Progress(step=step, best=Best(step=best, epoch=best, metrics={})),
        )
    assert checkpoints.steps() == [1, 3, 4]
    (checkpoints.path(4) / "optimizers.pt").write_bytes(b"x")
    found, messages = checkpoints.latest()
    assert found is not None
    assert found.step == 3
    assert "quarantined" in messages[0]


def test_a_checkpoint_under_another_ones_name_is_refused(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(written, folder)
    Checkpoints(folder).path(STEP).rename(Checkpoints(folder).path(STEP + 1))
    with pytest.raises(CorruptionError, match=rf"says that it is of step {STEP}: it was renamed"):
        Checkpoints(folder).load(STEP + 1)


def test_a_checkpoint_whose_best_one_is_corrupt_is_passed_over(tmp_path: Path) -> None:
    """What is exported in the end is the best one: a training that went on from there could not give it."""
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step, best in ((1, 1), (2, 2), (3, 2)):
        state = {"weight": torch.full((2,), float(step))}
        checkpoints.save(state, [], Progress(step=step, best=Best(step=best, epoch=best, metrics={})))
    (checkpoints.path(2) / "optimizers.pt").write_bytes(b"x")
    found, messages = checkpoints.latest()
    assert found is not None
    assert found.step == 1
    assert "step 3 is passed over, because its best checkpoint is unusable" in messages[0]
