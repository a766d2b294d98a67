"""Encoders of many kinds as models: what of them is left out, and what of them is frozen."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mlpipes.errors import ConfigError
from mlpipes.workloads.encoder_models import build, freeze, logits_of
from mlpipes.workloads.encoders import ENCODER, TOKENIZER
from mlpipes_tests.workloads.encoder_kinds import KINDS, model_in, tokenizers_in


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tokenizers_in(tmp_path_factory.mktemp("tokenizers"))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_left_out_from_above(kind: str, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    sizes = {"encoder_layers": 2} if kind == "bart" else {}
    model_in(tmp_path / ENCODER, kind, tokenizers, **sizes)
    (tmp_path / TOKENIZER).mkdir()
    if kind == "funnel":
        with pytest.raises(ConfigError, match="keep_layers is 1, but the layers of funnel come in blocks"):
            build(tmp_path, 3, None, None, 0.0, layers=1)
        return
    whole, both, lower = (build(tmp_path, 3, None, None, 0.0, layers=layers).eval() for layers in (None, 2, 1))
    states = [model.base_model.state_dict() for model in (whole, both, lower)]
    assert states[0].keys() == states[1].keys()
    assert states[2].keys() < states[0].keys() or kind == "albert"  # whose layers are one, computed twice
    assert all(torch.equal(states[0][name], kept) for name, kept in states[2].items() if "pooler" not in name)
    ids = {"input_ids": torch.tensor([[5, 6, 7, 2]])}  # BART looks for its end
    with torch.no_grad():
        one, two = (logits_of(model, "mean", None, **ids) for model in (lower, whole))
    assert not torch.allclose(one, two)
    lower.save_pretrained(tmp_path / "saved")  # as it is served
    again: Any = type(lower).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(lower.state_dict()[name], tensor) for name, tensor in again.state_dict().items())
    with pytest.raises(ConfigError, match="keep_layers is 3, but the encoder has 2 layers"):
        build(tmp_path, 3, None, None, 0.0, layers=3)


def test_nothing_is_frozen_unasked_and_shared_layers_cannot_be(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    for kind in KINDS:
        model_in(tmp_path / kind, kind, tokenizers)
        model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / kind)
        if kind == "albert":
            with pytest.raises(ConfigError, match="share their weights"):
                freeze(model, True, 1)
        else:
            freeze(model, True, 1)
            frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
            assert 0 < len(frozen) < len(list(model.parameters())) * 0.75, kind
