"""Encoders: what of a model's folder its identity covers."""

from pathlib import Path

import pytest

from mlpipes.workloads.encoders import Pretrained

FILES = ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        *FILES,
        *(
            "tokenizer.model",
            "spiece.model",
            "sentencepiece.bpe.model",
            "merges.txt",
            "vocab.json",
            "added_tokens.json",
        ),
        *(
            "vocab.txt",
            "special_tokens_map.json",
            "model.safetensors.index.json",
            "emoji.dict",
            "words.bin",
            "no_suffix",
        ),
    ],
)
def test_every_file_that_a_tokenizer_or_an_encoder_may_read_counts(model: Path, name: str) -> None:
    found = [Pretrained(str(model)).describe()]
    for text in ("first", "second"):
        (model / name).write_text(text)
        found.append(Pretrained(str(model)).describe())
    assert found[0] != found[1] != found[2]


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE.txt", ".gitattributes", ".cache/x", "onnx/model.onnx", "pytorch_model.bin", "a.py"]
)
def test_what_is_never_read_does_not_count(model: Path, name: str) -> None:
    before = Pretrained(str(model)).describe()
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("x")
    assert Pretrained(str(model)).describe() == before
