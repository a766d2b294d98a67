"""The first steps of small trainings are what they were: bit for bit where bits can be promised, to rounding anywhere."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mlpipes.training.loop import Trainer
from mlpipes_tests.conftest import missing
from mlpipes_tests.texts import FOLDER
from mlpipes_tests.training.golden import CASES, EXACT, RENEW, first_difference, golden, portable_traces, trace

KINKS = {"fp32": 1e-3, "bf16": 2e-2}
"""How far losses of other kernels may be off, as a share: by and by, rounding flips winners in a max-pooling."""


@pytest.fixture(scope="module")
def portable() -> dict[str, Any]:
    found = portable_traces()
    if found["key"] != golden()["key"]:
        missing(
            f"golden.json has values for {golden()['key']} and none for {found['key']}. If the commit before this change "
            f"passes with the old ones, write them anew: {RENEW}"
        )
    return found


@pytest.mark.parametrize("case", EXACT)
def test_the_first_steps_are_bit_for_bit_what_they_were(portable: dict[str, Any], case: str) -> None:
    difference = first_difference(golden()["traces"][case], portable["traces"][case])
    others = {
        name: f"{then}, here {portable['made_with'][name]}"
        for name, then in golden()["made_with"].items()
        if then != portable["made_with"][name]
    }
    assert difference is None, (
        f"{case}: {difference}. If this is meant, write the golden values anew and say so in the commit: {RENEW}. "
        f"Versions that differ from those then: {others or 'none'}"
    )


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a trace sets in the environment is undone."""
    for name in ("MLPIPES_CIFAR10", FOLDER):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("environment")
def test_whatever_kernels_this_machine_has_the_losses_are_the_same_to_rounding(case: str, tmp_path: Path) -> None:
    before, now = golden()["traces"][case]["steps"], trace(case, tmp_path)["steps"]
    assert [step["rows"] for step in now] == [step["rows"] for step in before]
    for number, (step, then) in enumerate(zip(now, before, strict=True), start=1):
        assert math.isclose(step["loss"], then["loss"], rel_tol=KINKS[case.split()[1]]), f"loss of step {number}"


def test_one_last_bit_is_noticed_where_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = trace("digits fp32", tmp_path / "before")
    assert first_difference(before, trace("digits fp32", tmp_path / "again")) is None
    step = Trainer._step

    def disturbed(trainer: Trainer) -> None:
        step(trainer)
        if trainer.progress.step == 2:
            with torch.no_grad():
                weight = next(p for p in trainer.model.parameters() if p.requires_grad).view(-1)
                weight[0] = torch.nextafter(weight[0], torch.tensor(2.0))

    monkeypatch.setattr(Trainer, "_step", disturbed)
    difference = first_difference(before, trace("digits fp32", tmp_path / "disturbed"))
    assert difference is not None
    assert difference.startswith("step 2: weights ")


def test_each_stage_is_named() -> None:
    before = golden()["traces"]["digits fp32"]
    for stage in ("rows", "loss", "gradient", "weights"):
        found = copy.deepcopy(before)
        for step in found["steps"][2:]:  # as it would be: from there on everything differs
            step.update(dict.fromkeys(step, "other")) if stage == "rows" else step.update({stage: "other"})
        difference = first_difference(before, found)
        assert difference is not None
        assert difference.startswith(f"step 3: {stage} other, before ")
