"""Encoders of many kinds: each trains with every pooling and is served as it was trained, or is refused in one line."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlpipes.data.hub import weight_files
from mlpipes.data.snapshot import Snapshot, snapshot_of, warnings_of
from mlpipes.data.splits import SplitPlan
from mlpipes.data.tables import TableSource
from mlpipes.errors import ConfigError, DataError, UserError
from mlpipes.store.layout import Store
from mlpipes.workloads import served_text_model, text_classification
from mlpipes.workloads.base import DataInfo
from mlpipes.workloads.encoders import ENCODER, TOKENIZER, Pretrained, tokenizer_of, wordpiece_tokenizer
from mlpipes.workloads.served import served_predictions
from mlpipes.workloads.served_text_model import TextModel
from mlpipes.workloads.tensors import on_device
from mlpipes.workloads.text_classification import TextClassification
from mlpipes_tests.training.harness import trainer_on
from mlpipes_tests.workloads.encoder_kinds import END, KINDS, model_in, texts, tokenizers_in


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    frame = pd.DataFrame({"text": texts(), "label": ["good", "bad"] * 30})
    frame.to_csv(folder / "one.csv", index=False)
    frame.assign(second=[f"the {text}" for text in reversed(texts())]).to_csv(folder / "two.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tokenizers_in(tmp_path_factory.mktemp("tokenizers"))


def workload_of(tables: Path, folder: Path, table: str = "one.csv", **options: Any) -> TextClassification:
    roles: dict[str, Any] = {"text": "text", "label": "label"} | ({"text_pair": "second"} if table == "two.csv" else {})
    plan = SplitPlan(0.2, test_fraction=0.2, stratify_by="label", content=("text",))
    return TextClassification(TableSource(str(tables / table), **roles), plan, Pretrained(str(folder)), **options)


def snapshot_for(workload: TextClassification, root: Path) -> Snapshot:
    return snapshot_of(Store(root), workload.source.load().digest(), workload)[0]


@pytest.mark.parametrize("table", ["one.csv", "two.csv"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains_with_each_pooling_and_is_served_as_it_was_trained(
    kind: str, table: str, tables: Path, tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = workload_of(tables, model_in(tmp_path / "model", kind, tokenizers), table, max_length=64)
    for module, name in ((text_classification, "has_native_bf16"), (served_text_model, "_has_native_bf16")):
        monkeypatch.setattr(module, name, lambda *_: True)
    snapshot = snapshot_for(workload, tmp_path)
    info = DataInfo(snapshot.facts, snapshot.meta["statistics"], snapshot.files)
    columns = snapshot.columns("train")
    rows = columns["tokens"].lengths.argsort()[[0, len(columns["label"]) // 2, -1]]
    torch.use_deterministic_algorithms(True)
    for pooling in ("own", "mean"):
        hp = workload.hyperparameters(pooling=pooling, precision="fp32", learning_rate=1e-3)
        trainer = trainer_on(snapshot, workload, hp, "w1-b16-e1-g0", tmp_path / pooling)
        before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
        assert np.isfinite(trainer.run().best.metrics["loss"])
        model: Any = trainer.model.eval()
        changed = [name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])]
        assert any("embed" in n or "wte" in n or "shared" in n for n in changed), (
            "the encoder learns, not the head only"
        )
        moved = on_device(columns, torch.device("cpu"))
        with torch.no_grad():
            batch = workload.batch(moved, torch.from_numpy(rows), hp, augment=False)
            logits = workload.predict(model, batch, hp)["logits"]
            alone = workload.predict(model, workload.batch(moved, torch.from_numpy(rows[:1]), hp, augment=False), hp)
        assert (logits[0] - logits[2]).abs().max() > 1e-4, "texts make a difference"
        looks = kind in ("convbert", "fnet", "funnel")  # across the end of a text, into its padding
        assert ("looks past the end" in " ".join(warnings_of(snapshot))) == looks
        if not looks:
            assert torch.allclose(alone["logits"][0], logits[0], atol=1e-5), "padding makes none"
        raw = pd.DataFrame({n: list(columns[n].texts()) for n in ("text", "text_pair") if n in columns})
        names = [f"p({name})" for name in info.facts["class_names"]]
        served: Any = TextModel()
        # In bf16, transformers 5.23 masks DeBERTa's scores with a number that bfloat16 does not have.
        for precision in ("fp32",) if kind == "deberta" else ("bf16", "fp32"):
            (served_folder := tmp_path / f"served-{pooling}-{precision}").mkdir()
            workload.deployable(model, hp, replace(info, precision=precision), columns).write(served_folder)
            served.load_context(SimpleNamespace(artifacts={"model": str(served_folder)}))
            evaluated = workload.answers(served_predictions(workload, model, moved, hp, precision), info)
            for asked in (rows, np.arange(len(raw))):
                found = served.predict(None, raw.iloc[asked])
                assert all(found[name].tolist() == np.asarray(evaluated[name])[asked].tolist() for name in names)
        if not looks:
            assert (
                np.abs(served.predict(None, raw.iloc[rows])[names] - logits.double().softmax(1).numpy()).max(None)
                < 1e-5
            )


def test_a_head_that_comes_with_the_model_is_never_used(
    tables: Path, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    heads = []
    for outputs in (2, 3):
        folder = model_in(tmp_path / str(outputs), "bert", tokenizers, num_labels=outputs)
        snapshot = snapshot_for(workload := workload_of(tables, folder, max_length=48), tmp_path / f"s{outputs}")
        assert not [name for name in load_file(snapshot.files / ENCODER / "model.safetensors") if "classifier" in name]
        torch.manual_seed(1)
        info = DataInfo(snapshot.facts, {}, snapshot.files)
        model: Any = workload.build_model(workload.hyperparameters(), info)
        old = load_file(folder / "model.safetensors")
        assert torch.equal(model.bert.embeddings.word_embeddings.weight, old["bert.embeddings.word_embeddings.weight"])
        assert model.classifier.weight.shape == (2, 16)
        assert outputs != 2 or not torch.equal(model.classifier.weight, old["classifier.weight"])
        assert model.classifier.weight.std() < 0.05, "drawn anew, not read"
        heads.append(model.config.id2label)
    assert heads == [{0: "bad", 1: "good"}] * 2


def test_sharded_weights_are_one_model(tables: Path, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    whole = model_in(tmp_path / "whole", "bert", tokenizers)
    shutil.copytree(whole, tmp_path / "parts", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForSequenceClassification.from_pretrained(whole).save_pretrained(tmp_path / "parts", max_shard_size="8KB")
    names = weight_files(tmp_path / "parts")
    assert len(names) > 2
    states = []
    for name in ("whole", "parts"):
        snapshot = snapshot_for(workload := workload_of(tables, tmp_path / name, max_length=48), tmp_path / f"s-{name}")
        torch.manual_seed(0)
        info = DataInfo(snapshot.facts, {}, snapshot.files)
        states.append(workload.build_model(workload.hyperparameters(), info).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    (tmp_path / "parts" / names[1]).unlink()
    with pytest.raises(DataError, match=f"lacks {names[1]} of the {len(names)} files"):
        workload_of(tables, tmp_path / "parts").encoder.describe()


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-500])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def of_another(folder: Path) -> None:
    save_file({"other.weight": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})


def not_finite(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["bert.embeddings.word_embeddings.weight"].fill_(float("nan"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def foreign(folder: Path) -> None:
    wordpiece_tokenizer(["東京 寿司 京都"], 50).save_pretrained(folder)


def broken(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("tokenizer.json", "tokenizer_config.json"), "has no tokenizer"),
        (without("tokenizer.json"), "has no tokenizer"),
        (broken, "no tokenizer that transformers can read"),
        (foreign, "knows 0% of the training texts' words"),
        (edited("config.json", vocab_size=30), "is no|does not load|do not"),
        (without("config.json"), "has no config.json"),
        (edited("config.json", model_type="unheard_of"), "no configuration that transformers can read"),
        (edited("config.json", model_type="unheard_of", auto_map={"AutoConfig": "x.X"}), "no such code is run"),
        (edited("config.json", model_type="vit"), "no classifier of texts"),
        (edited("config.json", hidden_size=32), "does not load"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert",'), "no configuration"),
        (cut_short, "cannot be read"),
        (pickled, r"pytorch_model.bin holds weights as a pickle"),
        (of_another, r"parameters \(BertModel\) are not in its weights"),
        (not_finite, "not finite"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line_before_anything_starts(
    spoil: Callable[[Path], None], message: str, tables: Path, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    folder = model_in(tmp_path / "model", "bert", tokenizers)
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        snapshot_for(workload_of(tables, folder, max_length=48), tmp_path)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_ids_and_positions_fit_the_embeddings(tables: Path, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    small = model_in(tmp_path / "small", "bert", tokenizers, vocab_size=40)
    with pytest.raises(DataError, match="embeddings end at 39"):
        snapshot_for(workload_of(tables, small, max_length=48), tmp_path)
    roberta = model_in(tmp_path / "roberta", "roberta", tokenizers)
    with pytest.raises(ConfigError, match="max_length is 66, but the encoder takes 64 tokens"):
        snapshot_for(workload_of(tables, roberta, max_length=66), tmp_path)


def test_an_encoder_without_a_table_of_embeddings_is_tried_all_the_same(
    tables: Path, tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertPreTrainedModel

    def none_there(model: Any) -> Any:
        raise NotImplementedError("as CANINE's, which hashes characters")

    folder = model_in(tmp_path / "model", "bert", tokenizers)
    monkeypatch.setattr(BertPreTrainedModel, "get_input_embeddings", none_there)
    assert snapshot_for(workload_of(tables, folder, max_length=48), tmp_path).counts["train"] == 36


def test_merges_without_their_vocabulary_are_no_tokenizer(
    tables: Path, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    folder = model_in(tmp_path / "model", "roberta", tokenizers, vocab_size=400)  # room for a <mask> of the class's own
    found = json.loads((folder / "tokenizer.json").read_text())["model"]
    without("tokenizer.json", "tokenizer_config.json")(folder)
    (folder / "vocab.json").write_text(json.dumps(found["vocab"]))
    with pytest.raises(DataError, match="has no tokenizer that transformers can read"):
        snapshot_for(workload_of(tables, folder, max_length=48), tmp_path)
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in found["merges"]))
    assert snapshot_for(workload_of(tables, folder, max_length=48), tmp_path).counts["train"] == 36


def test_what_a_tokenizer_lacks_is_kept_with_it_and_the_users_files_stay(
    tables: Path, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    folder = model_in(tmp_path / "model", "gpt2", tokenizers)
    before = (folder / "config.json").read_bytes()
    snapshot = snapshot_for(workload_of(tables, folder, max_length=48), tmp_path)
    tokenizer = tokenizer_of(snapshot.files)
    assert tokenizer.pad_token == END
    assert json.loads((snapshot.files / ENCODER / "config.json").read_text())["pad_token_id"] == tokenizer.pad_token_id
    assert (folder / "config.json").read_bytes() == before
    xlnet = snapshot_for(
        workload_of(tables, model_in(tmp_path / "xlnet", "xlnet", tokenizers), max_length=48), tmp_path / "x"
    )
    assert json.loads((xlnet.files / TOKENIZER / "tokenizer_config.json").read_text())["padding_side"] == "left"
