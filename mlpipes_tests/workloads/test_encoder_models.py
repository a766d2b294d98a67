"""Encoders of many kinds as models: what of them is left out, and what of them is frozen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from mlpipes.errors import ConfigError
from mlpipes.workloads.encoder_models import build, freeze, keep, logits_of
from mlpipes.workloads.encoders import ENCODER, TOKENIZER
from mlpipes_tests.workloads.encoder_kinds import KINDS, model_in, tokenizers_in


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tokenizers_in(tmp_path_factory.mktemp("tokenizers"))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_left_out_from_above(kind: str, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    model_in(tmp_path / ENCODER, kind, tokenizers)
    (tmp_path / TOKENIZER).mkdir()
    if why := {"funnel": "can be left out", "bart": "has a decoder, too"}.get(kind):
        with pytest.raises(ConfigError, match=rf"keep_layers is 1, but .*{kind} .*({why})"):
            build(tmp_path, 3, None, None, 0.0, layers=1)
        return
    whole, lower = (build(tmp_path, 3, None, None, 0.0, layers=layers).eval() for layers in (None, 1))
    before, kept = (model.base_model.state_dict() for model in (whole, lower))
    assert kept.keys() < before.keys() or kind == "albert"  # whose layers are one, computed twice
    assert all(torch.equal(before[name], tensor) for name, tensor in kept.items() if "pooler" not in name)
    ids = {"input_ids": torch.tensor([[5, 6, 7, 2]])}
    with torch.no_grad():
        one, two = (logits_of(model, "mean", None, **ids) for model in (lower, whole))
    assert not torch.allclose(one, two)
    lower.save_pretrained(tmp_path / "saved")  # as it is served
    again: Any = type(lower).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(lower.state_dict()[name], tensor) for name, tensor in again.state_dict().items())
    with pytest.raises(ConfigError, match="keep_layers is 3, but the encoder has 2 layers"):
        build(tmp_path, 3, None, None, 0.0, layers=3)


@pytest.mark.parametrize(
    ("kind", "sizes", "why"),
    [
        ("albert", {"num_hidden_layers": 4, "num_hidden_groups": 2}, "shares them in groups"),
        ("perceiver", {}, "not count its layers"),
        ("t5", {"num_layers": 4}, "a decoder, too"),
    ],
)
def test_where_none_can_be_left_out_that_is_said_before_anything_is_trained(
    kind: str, sizes: dict[str, Any], why: str
) -> None:
    config: Any = AutoConfig.for_model(kind, **sizes)
    with pytest.raises(ConfigError, match=f"keep_layers is 2, but an encoder of the kind {kind} .*{why}") as caught:
        keep(config, 2)
    assert "\n" not in str(caught.value)


def test_what_a_configuration_says_of_each_layer_is_left_out_too(tmp_path: Path) -> None:
    config: Any = AutoConfig.for_model("gpt_neo", num_layers=4, attention_types=[[["global", "local"], 2]])
    keep(config, 2)
    config.save_pretrained(tmp_path)
    again: Any = AutoConfig.from_pretrained(tmp_path)
    assert (again.num_hidden_layers, again.attention_layers) == (2, ["global", "local"])


def test_what_is_frozen_is_the_encoder_and_not_what_has_as_many_layers() -> None:
    config = AutoConfig.for_model(
        "canine", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_hash_buckets=64
    )
    keep(config, 1)
    model: Any = AutoModelForSequenceClassification.from_config(config)
    freeze(model, False, 1)
    frozen = {name.split(".layer.")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"canine.encoder"}


def test_nothing_is_frozen_unasked_and_shared_layers_cannot_be(tokenizers: dict[str, Path], tmp_path: Path) -> None:
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
