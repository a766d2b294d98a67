"""Tables: roles of columns, what is dropped, hard files, and what is said without data or network."""

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpipes.data.hub import PROBE_SECONDS, model_folder
from mlpipes.data.ragged import Ragged
from mlpipes.data.snapshot import duplicates_warning, snapshot_of
from mlpipes.data.splits import SplitPlan, content_columns, content_hashes, split_dataset
from mlpipes.data.tables import TableSource, infer_roles, is_hub_name, sst2_source
from mlpipes.errors import DataError
from mlpipes.store.layout import Store
from mlpipes.workloads.text_classification import TextClassification
from mlpipes_tests.texts import TINY, write_jsonl


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
    test = write_jsonl(tmp_path / "test.jsonl", [*good, {"text": "a new class of things", "label": "maybe"}])
    dataset = TableSource(str(train), test=str(test)).load()
    assert dataset.counts == {"train": 20, "test": 20}
    assert dataset.facts["class_names"] == ["no", "yes"]
    assert dataset.facts["dropped"]["train"] == {"without label": 1, "without text": 2, "label unseen in training": 0}
    assert dataset.facts["dropped"]["test"]["label unseen in training"] == 1
    with pytest.raises(DataError, match="has 1 class"):
        TableSource(str(write_jsonl(tmp_path / "one.jsonl", good[::2]))).load()


def test_a_test_file_with_labels_that_training_lacks_is_refused_with_counts(tmp_path: Path) -> None:
    rows = [{"text": f"some words number {n}", "label": "ab"[n % 2]} for n in range(40)]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    test = write_jsonl(
        tmp_path / "test.jsonl", [{**row, "label": "c" if n % 4 == 0 else row["label"]} for n, row in enumerate(rows)]
    )
    with pytest.raises(
        DataError, match=r"test\.jsonl: 10 of 40 labels are unknown to training: 'c' \(10 rows\).*class_names="
    ):
        TableSource(str(train), test=str(test)).load()
    dataset = TableSource(str(train), test=str(test), class_names=["a", "b", "c"]).load()
    assert np.bincount(dataset.splits["test"]["label"]).tolist() == [10, 20, 10]


def test_the_same_file_twice_is_no_test_and_empty_files_are_refused(tmp_path: Path) -> None:
    rows = [{"text": f"some words number {n}", "label": "ab"[n % 2]} for n in range(40)]
    path = str(write_jsonl(tmp_path / "x.jsonl", rows))
    with pytest.raises(DataError, match="none of 40 training samples is left, as 40 are also in the test split"):
        split_dataset(TableSource(path, test=path).load(), SplitPlan(0.1))
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"empty\.csv has a header .* but no rows"):
        TableSource(path, test=str(tmp_path / "empty.csv")).load()
    with pytest.raises(DataError, match="a split would be empty"):
        split_dataset(
            TableSource(str(write_jsonl(tmp_path / "y.jsonl", rows[:2]))).load(), SplitPlan(0.1, test_fraction=0.1)
        )


def test_texts_are_the_same_sample_if_both_are_the_same(tmp_path: Path) -> None:
    rows = [
        {"premise": f"a dog and number {n // 3}", "hypothesis": f"it {verb} here", "label": verb}
        for n in range(120)
        for verb in [("runs", "sleeps", "may run")[n % 3]]
    ]
    dataset = TableSource(str(write_jsonl(tmp_path / "nli.jsonl", rows))).load()
    _, report = split_dataset(dataset, SplitPlan(0.1, test_fraction=0.1, stratify_by="label"))
    assert report["train_rows_dropped_because_repeated"] == 0
    shifted = {"text": Ragged.of_texts(["ab", "a"]), "text_pair": Ragged.of_texts(["c", "bc"])}
    assert len(set(content_hashes(shifted, ("text", "text_pair")))) == 2
    assert content_columns((), ["author", "label", "text"]) == ("text",), "whoever else wrote it"


@pytest.mark.parametrize(("repeats", "told"), [(1, False), (10, True)])
def test_many_duplicates_are_told(tmp_path: Path, repeats: int, told: bool) -> None:
    rows = [{"text": f"some words number {n}", "label": "ab"[n % 2]} for n in range(100)]
    workload = TextClassification(
        TableSource(str(write_jsonl(tmp_path / "x.jsonl", rows + rows[:repeats]))),
        SplitPlan(0.1, test_fraction=0.1, stratify_by="label"),
        TINY,
        max_length=32,
    )
    snapshot, _ = snapshot_of(Store(tmp_path / "store"), workload.source.load().digest(), workload)
    warning = duplicates_warning(snapshot)
    assert bool(warning) == told
    if warning:
        assert warning.startswith(f"{repeats} of {100 + repeats} training rows were dropped: {repeats} repeat another")
        assert "the same text" in warning


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("glue", True), ("nyu-mll/glue", True), ("org/x-v1.1", True), ("org/wiki.en", True), ("x-2.0", True),
        ("gone.csv", False), ("gone.csv.gz", False), ("a/gone.parquet", False), ("gone.dat", False), ("org/x.CSV", False),
        ("a/b/c", False), ("data[1]", False), ("data*", False), ("./x", False), ("~/x", False), ("/x", False),
        ("a b", False), ("folder", False), ("", False),
    ],
)  # fmt: skip
def test_names_of_files_are_never_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, hub: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert is_hub_name(name) == hub
    if not hub:
        with pytest.raises(DataError, match=r"there is no file|is a folder|unknown type"):
            TableSource(name).load()


@pytest.mark.parametrize("name", ["x[1]*?.csv", "we ird%20ü#x.csv", "data.v1.csv", "{a}.csv"])
def test_a_file_is_the_one_of_that_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text,label\na nice text,x\nanother text,y\n")
    assert TableSource(str(tmp_path / name)).load().counts == {"train": 2}


def test_classes_of_a_hub_data_set_have_its_names_and_minus_one_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "when": datasets.Value("timestamp[us, tz=Nowhere/AtAll]"),
        }
    )

    def split(labels: list[int]) -> Any:
        rows = {"sentence": [f"some words of a sentence {n}" for n in range(len(labels))], "label": labels}
        return datasets.Dataset.from_dict({**rows, "when": [None] * len(labels)}, features=features)

    found = {"train": split([1, 0, 1, -1]), "validation": split([1, 1, 0]), "hidden": split([-1, -1])}
    monkeypatch.setattr("mlpipes.data.hub.load_hub_dataset", lambda name, config: found)
    dataset = TableSource("org/x-v1.1", test="validation").load()
    assert dataset.facts["class_names"] == ["neg", "pos"]
    assert [dataset.splits[split]["label"].tolist() for split in ("train", "test")] == [[1, 0, 1], [1, 1, 0]]
    assert dataset.facts["dropped"]["train"]["without label"] == 1
    with pytest.raises(DataError, match="'hidden': no row of 2 has both"):
        TableSource("org/x-v1.1", test="hidden").load()
    with pytest.raises(DataError, match="no split 'test'; it has 'train', 'validation', 'hidden'"):
        TableSource("org/x-v1.1", test="test").load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "ranking"}, "task='ranking'"),
        ({"class_names": "ab"}, "class_names='ab'"),
        ({"class_names": ["a", "a"]}, "each once"),
        ({"class_names": ["a"]}, "at least two"),
        ({"class_names": ["a", "b"], "task": "regression"}, "leave one of them out"),
        ({"config": "sst2"}, "config='sst2' is for data sets of the hub"),
        ({"delimiter": ";"}, "are for delimited text"),
        ({"text": "label", "label": "label"}, "given for two roles"),
        ({"label": "nope"}, "no column 'nope' for label"),
        ({"label": ["label"]}, r"label=\['label'\]: write it as text"),
        ({"class_names": {"a", "b"}}, "must be a list of names"),
        ({"class_names": 2}, "must be a list of names"),
        ({"quoting": "no"}, "quoting='no': it is True, False or None"),
        ({"delimiter": 9}, "delimiter=9: write it as text"),
        ({"encoding": "\0"}, "Say another encoding="),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(4)])
    with pytest.raises(DataError, match=message):
        TableSource(str(path), **options).load()


def test_words_that_mean_missing_elsewhere_and_quotes_stay_text(tmp_path: Path) -> None:
    lines = ["sentence\tlabel", 'NA "is a" word\t0', "null\t1", 'an unclosed " quote\t0', "fine as it is\t1"]
    (tmp_path / "train.tsv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "dev.tsv").write_text("\n".join(lines), encoding="utf-8")
    dataset = sst2_source(tmp_path).load()
    assert list(dataset.splits["train"]["text"].texts()) == [line.split("\t")[0] for line in lines[1:]]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        TableSource(str(tmp_path / "gone.csv")).load()
    with pytest.raises(DataError, match="name too long"):
        TableSource(str(tmp_path / ("x" * 300 + ".csv"))).load()
    with pytest.raises(DataError, match="as text"):
        TableSource(tmp_path / "gone.csv").load()  # pyright: ignore[reportArgumentType]
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
