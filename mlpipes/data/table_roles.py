"""Roles of a table's columns: text, second text and label are found where it is clear, and asked for where it is not."""

import re
from collections.abc import Mapping, Sequence

from mlpipes.data.cells import Cell, Foreign, is_blank
from mlpipes.errors import DataError

LABEL_NAMES = ("label", "labels", "target", "class", "category", "score", "sentiment", "stars", "rating", "y")
TEXT_NAMES = (
    "text", "texts", "sentence", "review", "review_text", "review_body", "reviewtext", "tweet", "tweet_text", "comment",
    "comment_text", "message", "document", "content", "body", "post", "utterance", "sms",
)  # fmt: skip
ALSO_TEXTS = (
    "title", "headline", "summary", "abstract", "description", "question", "query", "answer", "premise", "hypothesis",
    "passage", "paragraph", "context", "text_pair",
)  # fmt: skip
"""Names of texts that may stand beside the one that is meant."""
PAIRS = (
    ("premise", "hypothesis"), ("question", "sentence"), ("question", "answer"), ("question", "passage"),
    ("question", "context"), ("query", "passage"), ("query", "document"), ("text", "text_pair"), ("text", "hypothesis"),
)  # fmt: skip
INDEX_NAMES = ("idx", "index", "id", "guid", "uid", "key", "")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
_MONTH = (
    "(jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|may|june?|july?|aug(ust)?|sept?(ember)?|oct(ober)?"
    "|nov(ember)?|dec(ember)?)"
)
_OF_A_DATE = (
    rf"({_MONTH}|(mon|tues?|wed(nes)?|thu(rs?)?|fri|sat(ur)?|sun)(day)?|\d+(st|nd|rd|th)?|\d+(:\d\d)+|\+\d{{4}}|[ap]m|at|of"
    "|utc|gmt|[pmce][sd]t)"
)
DATE = re.compile(
    r"\d{4}[-/]\d{1,2}[-/]\d{1,2}([T ].*)?|\d{1,2}[/.]\d{1,2}[/.]\d{4}( .*)?"
    # `Mon Apr 06 22:19:45 PDT 2009`, `April 6th, 2009 at 10:19 PM`
    rf"|(?=.*\d)(?=.*\b{_MONTH}\b){_OF_A_DATE}([ ,.-]+{_OF_A_DATE})*",
    re.IGNORECASE,
)
_SEVERAL_WORDS = 4
_LOOKED_AT = 2000


def known_name(title: str) -> bool:
    """Whether a cell is what people call columns of texts, labels or row numbers."""
    name = title.strip().lower()
    return name in {*LABEL_NAMES, *TEXT_NAMES, *ALSO_TEXTS, *INDEX_NAMES} - {""} or _numbered(name) is not None


def find_columns(
    table: Mapping[str, Sequence[Cell]], text: str | None, text_pair: str | None, label: str | None
) -> tuple[str, str | None, str]:
    """The columns of text, second text (or None) and label, as far as they are not given.

    Raises DataError listing the candidates where it is not clear, and for a given column that is not there.
    """
    for role, name in (("text", text), ("text_pair", text_pair), ("label", label)):
        if name is not None and name not in table:
            raise DataError(f"there is no column {name!r} for {role}; there are {', '.join(map(repr, table))}")
    given = [name for name in (text, text_pair, label) if name is not None]
    if twice := [name for name in given if given.count(name) > 1]:
        raise DataError(f"the column {twice[0]!r} is given for two roles; each needs its own")
    columns = {name: cells for name, cells in table.items() if not _is_index(name)}
    label = label or _the_label(columns, given)
    if text is not None:
        return text, text_pair, label
    chosen, found_pair = _the_texts({n: c for n, c in columns.items() if n not in (label, text_pair)}, table, text_pair)
    return chosen, text_pair or found_pair, label


def _is_index(name: str) -> bool:
    return name.lower() in INDEX_NAMES or name.startswith(("__index_level_", "Unnamed: "))


def _the_label(columns: Mapping[str, Sequence[Cell]], taken: Sequence[str]) -> str:
    candidates = [name for name in columns if name not in taken]
    likely = [name for name in candidates if name.lower() in LABEL_NAMES]
    if not likely:
        # Without a telling name: the only one that repeats itself, or holds fractions.
        likely = [name for name in candidates if _is_like_a_label(name, columns[name])]
        texts = (*TEXT_NAMES, *ALSO_TEXTS)
        others = [n for n in candidates if n not in likely and n.lower() not in texts and not is_wordy(columns[n])]
        likely += others if len(likely) == 1 else []
    if len(likely) == 1:
        return likely[0]
    raise DataError(
        f"which column is the label? Candidates: {', '.join(map(repr, likely)) or 'none'}, of the columns "
        f"{', '.join(map(repr, columns))}. Say it with label=…"
    )


def _the_texts(
    columns: Mapping[str, Sequence[Cell]], table: Mapping[str, Sequence[Cell]], pair: str | None
) -> tuple[str, str | None]:
    named = [name for name in columns if name.lower() in TEXT_NAMES]
    called = [name for name in columns if name.lower() in ALSO_TEXTS or _numbered(name.lower()) is not None]
    wordy = [name for name in columns if is_wordy(columns[name])]
    candidates = list(dict.fromkeys([*named, *called, *wordy]))
    if pair is None and len(candidates) == 2 and (both := _pair(candidates)):
        return both
    if len(candidates) == 1:
        return candidates[0], None
    if len(named) == 1 and not any(_pair([named[0], name]) for name in called):
        return named[0], None
    listed = candidates or [name for name, cells in columns.items() if any(isinstance(cell, str) for cell in cells)]
    raise DataError(
        f"which column is the text? Candidates: {', '.join(map(repr, listed)) or 'none'}, of the columns "
        f"{', '.join(map(repr, table))}{_foreign(columns)}. Say it with text=… (and text_pair=…)."
    )


def _foreign(columns: Mapping[str, Sequence[Cell]]) -> str:
    kinds = {name: next((c.kind for c in cells if isinstance(c, Foreign)), None) for name, cells in columns.items()}
    return "".join(f" ({name!r} holds values of type {kind}, not texts)" for name, kind in kinds.items() if kind)


def _pair(names: Sequence[str]) -> tuple[str, str] | None:
    """Two names in order, if both of them say that they belong together."""
    for first, second in (names, names[::-1]):
        a, b = first.lower(), second.lower()
        if (a, b) in PAIRS:
            return first, second
        one, two = _numbered(a), _numbered(b)
        if one and two and one[0] == two[0] and (one[1], two[1]) in (("1", "2"), ("a", "b"), ("0", "1")):
            return first, second
    return None


def _numbered(name: str) -> tuple[str, str] | None:
    """Stem and number of names such as `sentence1`, `text_b`, `question 2`."""
    match = re.fullmatch(r"(sentence|text|question|premise|document|sent|query|tweet|review)[_ ]?([012ab])", name)
    return (match[1], match[2]) if match else None


def _sample(cells: Sequence[Cell]) -> list[Cell]:
    """Cells from all over a column: a file may be sorted."""
    some = cells[:: max(1, len(cells) // _LOOKED_AT)]
    found = [cell for cell in some if not is_blank(cell)]
    return found or [cell for cell in cells if not is_blank(cell)][:_LOOKED_AT]


def is_wordy(cells: Sequence[Cell]) -> bool:
    """Whether cells hold several words on average, and are not all dates."""
    some = _sample(cells)
    words = [len(cell.split()) for cell in some if isinstance(cell, str)]
    if not some or len(words) < len(some) or sum(words) / len(words) < _SEVERAL_WORDS:
        return False
    return not all(isinstance(cell, str) and DATE.fullmatch(cell.strip()) for cell in some)


def _is_like_a_label(name: str, cells: Sequence[Cell]) -> bool:
    some = [cell.strip() for cell in _sample(cells) if isinstance(cell, str)]
    if not some or is_wordy(cells) or name.lower() in (*TEXT_NAMES, *ALSO_TEXTS):
        return False
    if re.search(r"(^|[_ ])(id|ids|date|time|timestamp|index)$", name.lower()) or all(DATE.fullmatch(c) for c in some):
        return False
    if all(NUMBER.fullmatch(cell) for cell in some) and any(not float(cell).is_integer() for cell in some):
        return True
    return len(set(some)) <= 0.5 * len(some)
