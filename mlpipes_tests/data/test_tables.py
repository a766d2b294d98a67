"""Tables: roles of columns, what is dropped, hard files, and what is said without data or network."""

import socket
from pathlib import Path
from typing import Any

import pytest

from mlpipes.data.hub import PROBE_SECONDS, model_folder
from mlpipes.data.tables import TableSource, infer_roles, sst2_source
from mlpipes.errors import DataError
from mlpipes_tests.texts import write_jsonl


def test_roles_are_inferred_or_the_candidates_are_listed() -> None:
    text = ["a film about nothing", "another film of note", "the third one here"]
    assert infer_roles({"idx": [1, 2, 3], "sentence": text, "label": [0, 1, 0]}).as_dict() == {
        "text": "sentence", "text_pair": None, "label": "label", "task": "classification",
    }  # fmt: skip
    pair = infer_roles({"sentence1": text, "sentence2": text, "label": ["x", "y", "x"]})
    assert (pair.text, pair.text_pair) == ("sentence1", "sentence2")
    assert infer_roles({"text": text, "score": [0.5, 2.25, 1.0]}).task == "regression"
    assert infer_roles({"text": text, "stars": [5.0, 2.0, 1.0]}).task == "classification"
    with pytest.raises(DataError, match=r"which column is the text.*'a', 'b', 'c'"):
        infer_roles({"a": text, "b": text, "c": text, "label": [0, 1, 0]})
    with pytest.raises(DataError, match=r"which column is the label.*'label', 'score'"):
        infer_roles({"a": text, "label": [0, 1, 0], "score": [1, 2, 3]})
    with pytest.raises(DataError, match="no column 'nope' for text"):
        infer_roles({"a": text, "label": [0, 1, 0]}, text="nope")
    with pytest.raises(DataError, match="looks like no class"):
        infer_roles({"text": text * 10, "label": list(range(30))})


def test_what_is_missing_or_unseen_is_dropped_and_counted(tmp_path: Path) -> None:
    good = [{"text": f"some words of class {n % 2} number {n}", "label": ["no", "yes"][n % 2]} for n in range(20)]
    bad = [{"text": "", "label": "yes"}, {"text": "  ", "label": "no"}, {"text": "unlabelled words", "label": None}]
    train = write_jsonl(tmp_path / "train.jsonl", good + bad)
    test = write_jsonl(tmp_path / "test.jsonl", [good[0], {"text": "a new class of things", "label": "maybe"}])
    dataset = TableSource(str(train), test=str(test)).load()
    assert dataset.counts == {"train": 20, "test": 1}
    assert dataset.facts["class_names"] == ["no", "yes"]
    assert dataset.facts["dropped"]["train"] == {"without label": 1, "without text": 2, "label unseen in training": 0}
    assert dataset.facts["dropped"]["test"]["label unseen in training"] == 1
    with pytest.raises(DataError, match="has 1 class"):
        TableSource(str(write_jsonl(tmp_path / "one.jsonl", good[::2]))).load()


def test_words_that_mean_missing_elsewhere_and_quotes_stay_text(tmp_path: Path) -> None:
    lines = ["sentence\tlabel", 'NA "is a" word\t0', "null\t1", 'an unclosed " quote\t0', "fine as it is\t1"]
    (tmp_path / "train.tsv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "dev.tsv").write_text("\n".join(lines), encoding="utf-8")
    dataset = sst2_source(tmp_path).load()
    assert list(dataset.splits["train"]["text"].texts()) == [line.split("\t")[0] for line in lines[1:]]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        TableSource(str(tmp_path / "gone.csv")).load()
    (tmp_path / "x.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match="unknown type"):
        TableSource(str(tmp_path / "x.xlsx")).load()
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as parquet"):
        TableSource(str(tmp_path / "x.parquet")).load()


def test_without_network_and_data_one_short_probe_is_all_that_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries' own clients would try for minutes."""
    attempts: list[tuple[Any, float | None]] = []

    def refuse(self: socket.socket, address: Any) -> None:
        attempts.append((address, self.gettimeout()))
        raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("HTTPS_PROXY", "https_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DataError, match=r"hub cannot be reached.*hf download nobody/nothing"):
        model_folder("nobody/nothing")
    with pytest.raises(DataError, match=r"hub cannot be reached.*load_dataset"):
        TableSource("nobody/nothing").load()
    assert attempts == [(("127.0.0.1", 9), PROBE_SECONDS)] * 2
