"""Every case in the folder of other people's files has a right value: encoders and CIFAR-10 here, tables beside them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpipes.data.hub import weight_files
from mlpipes.data.sources import Cifar10Source
from mlpipes.errors import DataError
from mlpipes_tests.cases import BEFORE, model_case, model_snapshot, names_of
from mlpipes_tests.data.test_table_cases import LOADS, REFUSED
from mlpipes_tests.training.harness import trainer_on

ENCODERS = {  # and the kind of head that each gets
    "bart": "Bart", "bert": "Bert", "bert_3labels": "Bert", "bert_3labels_128": "Bert", "bert_added_tokens": "Bert",
    "bert_fp16": "Bert", "bert_sharded": "Bert", "camembert": "Camembert", "convbert": "ConvBert", "deberta": "Deberta",
    "deberta_128": "DebertaV2", "deberta_v2": "DebertaV2", "distilbert": "DistilBert", "electra": "Electra",
    "funnel": "Funnel", "gpt2": "GPT2", "longformer": "Longformer", "mobilebert": "MobileBert",
    "modernbert": "ModernBert", "mpnet": "MPNet", "nomic": "NomicBert", "roberta": "Roberta",
    "roberta_vocab_merges": "Roberta", "squeezebert": "SqueezeBert", "xlmr": "XLMRoberta", "xlnet": "XLNet",
}  # fmt: skip
NO_ENCODERS = {
    "bert_auto_map": r"needs code that comes with it \(config\.json: auto_map\), and no such code is run",
    "bert_bad_config": r"config\.json is no configuration that transformers can read: JSONDecodeError",
    "bert_bin": r"pytorch_model\.bin holds weights as a pickle, which is never opened",
    "bert_no_tokenizer": r"has no tokenizer: it needs vocab\.txt or tokenizer\.json",
    "bert_small_vocab": "its tokenizer has ids up to 218, but its embeddings end at 158",
    "bert_trunc_weights": r"model\.safetensors cannot be read",
}
IMAGES = {"plain": [8, 6, 5, 3, 1], "protocol5": [6, 8, 6, 7, 2]}  # and the first labels
NO_IMAGES = {"empty_subset": "hold no image", "float_labels": "labels are float64, expected whole numbers"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of such small models, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_case_has_a_right_value_and_one_of_before(cases: Path) -> None:
    known = {
        "tables": {*LOADS, *REFUSED, "huge_reg.csv"},
        "models": {*ENCODERS, *NO_ENCODERS},
        "cifar": {*IMAGES, *NO_IMAGES},
    }
    assert names_of(cases) == {f"{kind}/{name}" for kind, names in known.items() for name in names} == set(BEFORE)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_of_the_cases_trains_with_each_pooling(name: str, cases: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    workload = model_case(cases, name)
    snapshot = model_snapshot(workload, tmp_path)
    assert snapshot.counts == {"train": 36, "validation": 12, "test": 12}
    folder = cases / "models" / name
    stored = {key: value for part in weight_files(folder) for key, value in load_file(folder / part).items()}
    for pooling in ("own", "mean"):
        hp = workload.hyperparameters(pooling=pooling, precision="fp32")
        trainer = trainer_on(snapshot, workload, hp, "w1-b16-e1-g0", tmp_path / pooling)
        model: Any = trainer.model
        assert type(model).__name__ == f"{ENCODERS[name]}ForSequenceClassification"
        assert model.config.num_labels == 2
        table = model.get_input_embeddings().weight.detach()
        same = [value for value in stored.values() if value.shape == table.shape]
        assert any(torch.equal(value.float(), table) for value in same), "its own weights are read"
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        assert np.isfinite(trainer.run().best.metrics["loss"])


@pytest.mark.parametrize("name", NO_ENCODERS)
def test_what_is_no_encoder_is_refused_when_it_is_prepared(name: str, cases: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=NO_ENCODERS[name]) as caught:
        model_snapshot(model_case(cases, name), tmp_path)
    folder = cases / "models" / name
    assert any(str(path) in str(caught.value) for path in (folder, folder.resolve())), "it is named"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*IMAGES, *NO_IMAGES])
def test_a_folder_of_images_loads_or_is_refused(name: str, cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPES_CIFAR10", str(cases / "cifar" / name))
    if name in IMAGES:
        found = Cifar10Source().load()
        assert found.counts == {"train": 15, "test": 3}
        assert found.splits["train"]["label"].tolist()[:5] == IMAGES[name]
        return
    with pytest.raises(DataError, match=NO_IMAGES[name]) as caught:
        Cifar10Source().load()
    assert re.search(rf"cifar/{name}/", str(caught.value))
