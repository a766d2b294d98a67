"""Roles of columns: guessed where it is clear, and asked for, with the candidates, where it is not."""

from typing import Any

import pytest

from mlpipes.data.tables import infer_roles
from mlpipes.errors import DataError

COUNT = 40
PROSE = [f"some longer text with the number {n}" for n in range(COUNT)]
BITS = [n % 2 for n in range(COUNT)]
PLACES = [f"{['Paris', 'New York', 'Lagos, Nigeria'][n % 3]} {n}" for n in range(COUNT)]
DATES = [f"2024-01-{n % 28 + 1:02}" for n in range(COUNT)]
WORDS = [["fire", "flood", "storm"][n % 3] for n in range(COUNT)]
IDS = [f"{n:08x}" for n in range(COUNT)]


def roles(**columns: Any) -> tuple[str, str | None, str]:
    found = infer_roles({name.replace("__space__", " "): cells for name, cells in columns.items()})
    return found.text, found.text_pair, found.label


@pytest.mark.parametrize(
    "beside",
    [
        {"location": PLACES}, {"date": DATES}, {"id": IDS}, {"doc_id": IDS}, {"keyword": WORDS}, {"__index_level_0__": IDS},
        {"note": [None] * 30 + ["a remark"] * 10}, {"extra": [None] * 20 + ["a later key with several words"] * 20},
        {"summary": PROSE}, {"when": [f"{n % 12 + 1}/1/2024" for n in range(COUNT)]}, {"Unnamed: 0": list(range(COUNT))},
    ],
)  # fmt: skip
def test_the_text_is_the_column_that_is_called_so_whatever_stands_beside_it(beside: dict[str, Any]) -> None:
    assert roles(**beside, text=PROSE, target=BITS) == ("text", None, "target")
    assert roles(label=BITS, Review=PROSE, **beside) == ("Review", None, "label")


def test_a_column_with_several_words_is_the_text_if_it_is_the_only_one() -> None:
    assert roles(location=PLACES, remark=PROSE, label=BITS) == ("remark", None, "label")
    assert roles(date=DATES, remark=PROSE, label=BITS) == ("remark", None, "label")
    assert roles(remark=PROSE, polarity=BITS) == ("remark", None, "polarity")
    assert roles(remark=PROSE, price=[n + 0.5 for n in range(COUNT)]) == ("remark", None, "price")
    for columns, listed in (
        ({"remark": PROSE, "reply": PROSE}, "'remark', 'reply'"),
        ({"place": PLACES}, "'place'"),
        ({"when": [f"Mon Apr {n:02} 22:19:45 PDT 2009" for n in range(COUNT)]}, "'when'"),
        ({"when": [f"April {n}th, 2009 at 10:19 PM" for n in range(COUNT)]}, "'when'"),
        ({"uid": IDS, "code": IDS}, "'code'"),
        ({"title": PROSE, "body_of_it": PROSE}, "'title', 'body_of_it'"),
        ({"text": PROSE, "tweet": PROSE}, "'text', 'tweet'"),
    ):
        with pytest.raises(DataError, match=rf"which column is the text\? Candidates: {listed}, of the columns"):
            roles(**columns, label=BITS)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("sentence1", "sentence2"), ("Sentence1", "Sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
        ("question", "sentence"), ("text_a", "text_b"), ("query", "passage"), ("text", "text_pair"),
    ],
)  # fmt: skip
def test_a_pair_is_one_only_when_both_names_say_so(first: str, second: str) -> None:
    for names in ((first, second), (second, first)):
        assert roles(idx=list(range(COUNT)), **dict.fromkeys(names, PROSE), label=BITS) == (first, second, "label")
    with pytest.raises(DataError, match="which column is the text"):
        roles(**{first: PROSE, second: PROSE, "remark of it": PROSE, "label": BITS})


def test_half_a_pair_given_leaves_the_other_to_be_found() -> None:
    table = {"remark": PROSE, "reply": PROSE, "label": BITS}
    assert infer_roles(table, text_pair="reply").as_dict()["text"] == "remark"
    assert infer_roles(table, text="reply").text_pair is None


@pytest.mark.parametrize(
    "columns",
    [
        {"remark": PROSE, "user_id": BITS}, {"remark": PROSE, "date": DATES}, {"remark": PROSE, "a": BITS, "b": WORDS},
        {"remark": PROSE, "a": BITS, "place": PLACES}, {"remark": PROSE, "when": DATES}, {"remark": PROSE},
        {"remark": PROSE, "label": BITS, "score": BITS},
    ],
)  # fmt: skip
def test_a_label_that_is_not_clear_is_asked_for(columns: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="which column is the label"):
        roles(**columns)
