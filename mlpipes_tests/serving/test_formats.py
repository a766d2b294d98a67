"""What requests may look like, for models that take tables: each way of writing one, and each way of being wrong."""

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpipes.errors import UserError
from mlpipes.serving.formats import described, of_csv, of_mlflow, of_protocol, parsed, to_mlflow, to_protocol
from mlpipes.serving.signature import MOST_ROWS, BadRequestError, Column, Signature, cut, is_finite, joined

PAIRS = Signature((Column("text", "str", ()), Column("n", "int64", ())), (), is_tensor=False, answers_tensor=False)
FRAMES = Signature((Column("", "uint8", (-1, -1, 3)),), (), is_tensor=True, answers_tensor=True)
WANTED = {"text": ["a", "é"], "n": [1, 2]}


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_split": {"columns": ["text", "n"], "data": [["a", 1], ["é", 2]]}},
        {"dataframe_split": {"columns": ["n", "text"], "data": [[1, "a"], [2, "é"]], "index": [0, 1]}},
        {"dataframe_records": [{"text": "a", "n": 1}, {"n": 2, "text": "é"}]},
        {"instances": [{"text": "a", "n": 1}, {"text": "é", "n": 2}]},
        {"inputs": {"text": ["a", "é"], "n": [1, 2.0]}, "params": {}},
    ],
)
def test_a_table_is_the_same_however_it_is_written(body: Any) -> None:
    found = of_mlflow(parsed(json.dumps(body).encode(), PAIRS), PAIRS)
    assert {name: column.tolist() for name, column in dict(found).items()} == WANTED  # type: ignore[arg-type]
    assert found["n"].dtype == np.int64  # type: ignore[call-overload]
    for mark in ("", "\ufeff"):  # that Excel writes before a CSV in UTF-8
        csv = of_csv(f'{mark}n,text\r\n1,a\r\n2,"é"\r\n'.encode(), PAIRS)
        assert {name: column.tolist() for name, column in dict(csv).items()} == WANTED  # type: ignore[arg-type]
    tensors = [
        {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "é"]},
        {"name": "n", "shape": [2], "datatype": "INT64", "data": [1, 2]},
    ]
    same = of_protocol({"inputs": tensors}, PAIRS)
    assert {name: column.tolist() for name, column in dict(same).items()} == WANTED  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({"inputs": {"text": ["a"]}}, "inputs.n", "missing"),
        ({"inputs": {"text": ["a"], "n": [1], "m": [2]}}, "inputs.m", "no such column"),
        ({"inputs": {"text": ["a"], "n": [1, 2]}}, "inputs", "one length"),
        ({"inputs": {"text": [1], "n": [1]}}, "inputs.text[0]", "a text is wanted, not a number"),
        ({"inputs": {"text": [None], "n": [1]}}, "inputs.text[0]", "not null"),
        ({"inputs": {"text": ["\ud800"], "n": [1]}}, "inputs.text[0]", "surrogate"),
        ({"inputs": {"text": ["a"], "n": ["1"]}}, "inputs.n[0]", "a number is wanted, not a text"),
        ({"inputs": {"text": ["a"], "n": [True]}}, "inputs.n[0]", "a number is wanted, not true or false"),
        ({"inputs": {"text": ["a"], "n": [1.5]}}, "inputs.n[0]", "no whole number"),
        ({"inputs": {"text": ["a", "b"], "n": [1, 2**70]}}, "inputs.n[1]", "too large"),
        ({"inputs": {"text": [["a"]], "n": [1]}}, "inputs.text", "shape"),
        ({"inputs": {"text": "a", "n": [1]}}, "inputs.text", "a list"),
        ({"inputs": {"text": [], "n": []}}, "inputs.text", "1 to 4,096"),
        ({"dataframe_split": {"columns": ["text"]}}, "dataframe_split", "`columns` and `data`"),
        ({"dataframe_split": {"columns": ["n", "n"], "data": []}}, "dataframe_split.columns", "each once"),
        ({"dataframe_split": {"columns": ["text", "n"], "data": [["a"]]}}, "dataframe_split.data[0]", "2 values"),
        (
            {"dataframe_records": [{"text": "a", "n": 1}, {"text": "a"}]},
            "dataframe_records[1]",
            "not those of the first",
        ),
        ({"dataframe_records": ["a"]}, "dataframe_records[0]", "an object"),
        ({"dataframe_records": []}, "dataframe_records.text", "missing"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(body: Any, field: str, says: str) -> None:
    with pytest.raises(BadRequestError, match=r".") as caught:
        of_mlflow(body, PAIRS)
    assert caught.value.field == field
    assert says in str(caught.value)


def test_more_lists_than_samples_have_are_not_read_for_others_would_wait() -> None:
    images = Signature((Column("", "uint8", (3, 4, 5)),), (), is_tensor=True, answers_tensor=True)
    for lists, signature in (
        ("[]," * 2_000_000, images),
        ("[0]," * 1_500_000, FRAMES),
        ("{}," * 2_000_000, PAIRS),
    ):
        with pytest.raises(BadRequestError, match="more lists are in it than 4,096 samples are written with"):
            parsed(f'{{"inputs": [{lists[:-1]}]}}'.encode(), signature)
    # As many as are taken at once are, in the format that takes most lists; and so are brackets that are in texts.
    body = json.dumps({"inputs": np.zeros((MOST_ROWS, 3, 4, 5), int).tolist()}).encode()
    assert len(of_mlflow(parsed(body, images), images)) == MOST_ROWS
    texts = ['["\\{{[' * 5000, "["]
    found = of_mlflow(parsed(json.dumps({"inputs": {"text": texts, "n": [1, 2]}}).encode(), PAIRS), PAIRS)
    assert dict(found)["text"].tolist() == texts  # type: ignore[arg-type]


def test_looking_for_lists_takes_no_more_memory_than_some_bodies() -> None:
    for text in ("[" * 8_000_000, '\\"[' * 2_600_000):
        body = f'{{"inputs": {{"text": ["{text}"], "n": [1]}}}}'.encode()
        tracemalloc.start()
        assert parsed(body, PAIRS)["inputs"]["text"] == [text.replace("\\", "")]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10 * len(body)


def test_texts_among_numbers_take_no_memory_of_their_longest() -> None:
    digits = Signature((Column("", "uint8", (8,)),), (), is_tensor=True, answers_tensor=True)
    for body in ({"inputs": ["a" * 1_000_000] + [""] * 499}, {"inputs": [["a" * 1_000_000] + [""] * 7] * 60}):
        tracemalloc.start()
        with pytest.raises(BadRequestError, match=r"shape|a number is wanted, not a text"):
            of_mlflow(body, digits)
        tensor = {"name": "x", "shape": [60, 8], "datatype": "UINT8", "data": body["inputs"]}
        with pytest.raises(BadRequestError, match=r"a number is wanted, not a text|values are there"):
            of_protocol({"inputs": [tensor]}, digits)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10_000_000, "bytes"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_only_utf_8_is_read(encoding: str) -> None:
    body = json.dumps({"inputs": {"text": ["∰"], "n": [1]}}, ensure_ascii=False)
    assert parsed(body.encode("utf-8-sig"), PAIRS) == parsed(body.encode(), PAIRS)
    with pytest.raises(BadRequestError, match="JSON in UTF-8 is wanted"):
        parsed(body.encode(encoding), PAIRS)


def test_data_of_a_tensor_is_flat_or_nested_as_its_shape_says() -> None:
    pixels = np.arange(24).reshape(1, 2, 4, 3)
    tensor = {"name": "x", "shape": [1, 2, 4, 3], "datatype": "UINT8"}
    for data in (pixels, pixels.ravel()):
        assert np.array_equal(of_protocol({"inputs": [tensor | {"data": data.tolist()}]}, FRAMES), pixels)  # type: ignore[arg-type]
    with pytest.raises(
        BadRequestError, match=r"inputs\[0\]\.data: it is nested as \(1, 4, 2, 3\), the shape says \(1, 2,"
    ):
        of_protocol({"inputs": [tensor | {"data": pixels.reshape(1, 4, 2, 3).tolist()}]}, FRAMES)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "names of the columns"),
        (b"\xff\xfe", "UTF-8"),
        (b'text,n\n"a', "CSV in UTF-8"),
        (b"text,n\na,x", "'x' is no number"),
        (b"text,n\na," + b"1" * 5000, "is no number"),
        (b"text,n\na", "a list of 2 values"),
        (b"text,n", "1 to 4,096"),
    ],
)
def test_what_is_wrong_with_a_csv_is_told(body: bytes, says: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        of_csv(body, PAIRS)
    assert says in str(caught.value)
    with pytest.raises(BadRequestError, match="CSV cannot hold"):
        of_csv(body, FRAMES)


def test_frames_may_have_any_size_but_must_be_frames() -> None:
    found = of_mlflow({"inputs": np.zeros((2, 4, 5, 3), int).tolist()}, FRAMES)
    assert isinstance(found, np.ndarray)
    assert found.shape == (2, 4, 5, 3)
    for shape in ((2, 4, 5, 4), (4, 5, 3), (1, 0, 5, 3)):
        with pytest.raises(BadRequestError):
            of_mlflow({"inputs": np.zeros(shape, int).tolist()}, FRAMES)


def test_answers_are_written_and_taken_apart_again() -> None:
    table = {"label": np.array(["x", "y"], dtype=object), "p": np.array([0.1, 1 / 3])}
    assert to_mlflow(table) == {"predictions": [{"label": "x", "p": 0.1}, {"label": "y", "p": 1 / 3}]}
    assert [each["datatype"] for each in to_protocol(table)] == ["BYTES", "FP64"]
    both = joined([table, cut(table, 0, 1)])
    assert to_mlflow(both)["predictions"][2] == {"label": "x", "p": 0.1}
    assert is_finite(both)
    assert not is_finite({"p": np.array([np.nan])})
    assert described(PAIRS)["inputs"][1] == {"name": "n", "datatype": "INT64", "shape": [-1]}


def test_types_that_are_not_served_are_told_when_the_model_is_loaded() -> None:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    text = Schema([ColSpec(DataType.string, "text")])
    assert Signature.of(ModelSignature(text, text)).inputs == (Column("text", "str", ()),)
    with pytest.raises(UserError, match="'when' is of type datetime, which is not served"):
        Signature.of(ModelSignature(Schema([ColSpec(DataType.datetime, "when")]), text))
    with pytest.raises(UserError, match="without a signature"):
        Signature.of(None)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
_KEYS = st.sampled_from(["inputs", "instances", "dataframe_split", "dataframe_records", "params", "columns", "data"])


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(_KEYS, _JSON | st.dictionaries(_KEYS | st.sampled_from(["text", "n"]), _JSON), max_size=3) | _JSON
)
def test_whatever_json_comes_it_is_an_answer_or_a_bad_request(body: Any) -> None:
    for signature in (PAIRS, FRAMES):
        for read in (of_mlflow, of_protocol):
            try:
                read(body, signature)
            except BadRequestError as error:
                assert str(error)


_TENSOR = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["text", "n", "x"]),
        "shape": st.lists(st.integers(-1, 5), max_size=4) | _JSON,
        "datatype": st.sampled_from(["UINT8", "BYTES", "INT64", "FP32"]),
        "data": _JSON | st.lists(st.integers(-1, 300), max_size=8),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_TENSOR, max_size=3))
def test_whatever_tensors_come_too(tensors: Any) -> None:
    for signature in (PAIRS, FRAMES):
        try:
            of_protocol({"inputs": tensors}, signature)
        except BadRequestError as error:
            assert str(error)
