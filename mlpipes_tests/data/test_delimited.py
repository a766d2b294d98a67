"""Delimited text: every row fits the header, quotes are decided by looking, and a file without a header loses no row."""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mlpipes.data.tables import TableSource
from mlpipes.errors import DataError


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def loaded(path: Path, **options: Any) -> list[tuple[str, str]]:
    """Texts and labels, as written."""
    dataset = TableSource(str(path), **options).load()
    train, names = dataset.splits["train"], dataset.facts.get("class_names")
    labels = [names[n] if names else str(n) for n in train["label"]]
    return list(zip(train["text"].texts(), labels, strict=True))


GOOD = [("a fine film, really", "pos"), ("dull; and grey", "neg"), ('they said "wow" twice', "pos")]


def delimited(rows: Sequence[tuple[str, str]], delimiter: str) -> str:
    lines = [f'"{text.replace(chr(34), chr(34) * 2)}"{delimiter}{label}' for text, label in rows]
    return "\n".join([f"text{delimiter}label", *lines]) + "\n"


@pytest.mark.parametrize("suffix", ["csv", "tsv", "txt"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_the_one_that_fits(tmp_path: Path, delimiter: str, suffix: str) -> None:
    path = write(tmp_path / f"x.{suffix}", delimited(GOOD, delimiter))
    assert loaded(path) == GOOD
    assert loaded(path, delimiter=delimiter) == GOOD
    excel = write(tmp_path / f"excel.{suffix}", f"sep={delimiter}\n{delimited(GOOD, delimiter)}")
    assert loaded(excel) == GOOD
    with pytest.raises(DataError, match=r"line 1, the header, has one column only.*delimiter=…"):
        loaded(path, delimiter="^")


def test_an_unusual_delimiter_is_named_and_two_that_fit_are_asked_for(tmp_path: Path) -> None:
    assert loaded(write(tmp_path / "x.csv", delimited(GOOD, "~")), delimiter="~") == GOOD
    path = write(tmp_path / "y.csv", "text,label;note\na b,c;x\nd e,f;y\n")
    with pytest.raises(DataError, match=r"every row fits with comma and semicolon.*delimiter=…"):
        loaded(path)
    assert loaded(path, delimiter=",", label="label;note") == [("a b", "c;x"), ("d e", "f;y")]
    with pytest.raises(DataError, match="must be one character"):
        loaded(path, delimiter="||")


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ("one text,pos\na text, with a comma,neg\n", 3),
        ("one text,pos\n\n\nanother,neg,\n", 5),
        ('"over\nlines",pos\nshort\n', 4),
        ("one text,pos\nanother\n", 3),
        ('"open,pos\nnext row,neg,x\n', 3),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, rows: str, line: int) -> None:
    with pytest.raises(DataError, match=rf"x\.csv: line {line} has"):
        loaded(write(tmp_path / "x.csv", "text,label\n" + rows))


def test_a_header_one_name_short_is_taken_for_rs_only_if_rows_are_numbered(tmp_path: Path) -> None:
    rows = [f"text number {n},{'ab'[n % 2]}" for n in range(12)]
    numbered = "\n".join(["text,label", *(f"{n},{row}" for n, row in enumerate(rows, 1))])
    assert loaded(write(tmp_path / "r.csv", numbered))[3] == ("text number 3", "b")
    for wrong in (numbered.replace("\n7,", "\n8,"), "text,label\n1,a text,b\n2,c text,d\n"):
        with pytest.raises(DataError, match=r"line \d has 3 cells, but the header has 2"):
            loaded(write(tmp_path / "w.csv", wrong))


def test_quotes_in_tab_separated_text_are_decided_by_looking_or_asked_for(tmp_path: Path) -> None:
    cases = {
        'NA "is a" word\t0\nan unclosed " quote\t1': ['NA "is a" word', 'an unclosed " quote'],
        '"Great" they said\t0\n"open\t1': ['"Great" they said', '"open'],
        '"with a\ttab"\t0\nnone\t1': ["with a\ttab", "none"],
        '"all"\t0\n"wrapped"\t1': ["all", "wrapped"],
        '"a ""word"" here"\t0\nplain\t1': ['a "word" here', "plain"],
    }
    for rows, texts in cases.items():
        assert [text for text, _ in loaded(write(tmp_path / "x.tsv", f"text\tlabel\n{rows}\n"))] == texts
    path = write(tmp_path / "x.tsv", 'text\tlabel\nplain\t0\n"just quoted"\t1\n')
    with pytest.raises(DataError, match=r"from line 3 on.*quoting=True or quoting=False"):
        loaded(path)
    assert loaded(path, quoting=True)[1][0] == "just quoted"
    assert loaded(path, quoting=False)[1][0] == '"just quoted"'


def test_a_quote_that_swallows_rows_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", 'text,label\nfine,0\n"hello there,0\nfine too,1\nit was bad",0\ndull,1\n')
    with pytest.raises(DataError, match=r"line 3 goes on over lines that look like rows"):
        loaded(path)
    assert loaded(path, quoting=True)[1] == ("hello there,0\nfine too,1\nit was bad", "0")
    assert len(loaded(path, quoting=False)) == 5
    letter = write(tmp_path / "y.csv", 'text,label\n"Dear all,\nso long,\nBob",0\n"x, y\nz",1\nfine,0\n')
    assert loaded(letter)[0][0] == "Dear all,\nso long,\nBob", "lines of a text are no rows"


def test_sloppy_quotes_are_refused_and_never_left_around_texts(tmp_path: Path) -> None:
    for rows in (r'"He said \"hi\"",0' + '\n"fine",1', '"He said "hi" to me",0\n"fine",1\n"dull",0'):
        with pytest.raises(DataError, match=r"quotes seem to wrap cells, but line 2 has text after a closing quote"):
            loaded(write(tmp_path / "x.csv", f"text,label\n{rows}\n"))
    assert loaded(write(tmp_path / "x.csv", 'text,label\n"Ha" he said,0\nfine,1\n'))[0][0] == '"Ha" he said'


def test_long_cells_and_old_line_ends_are_read(tmp_path: Path) -> None:
    long = "word " * 60_000
    for end in ("\n", "\r\n", "\r"):
        path = write(tmp_path / "x.csv", end.join(["text,label", f"{long},a", "short one,b", "", "  "]))
        assert loaded(path) == [(long, "a"), ("short one", "b")]
    separators = "a\u2028b\x85c\x0bd\x1ce"
    assert loaded(write(tmp_path / "y.csv", f"text,label\n{separators},a\nx,b\n"))[0][0] == separators


@pytest.mark.parametrize(
    "first",
    ["a fine film,1", "a fine film,pos", "a fine film indeed it was,excellent", "a fine film,y", "a film,2024-01-01"],
)
def test_a_file_without_a_header_is_noticed_and_keeps_its_first_row(tmp_path: Path, first: str) -> None:
    label = first.split(",")[1]
    other = {"y": "n", "pos": "neg", "1": "0"}.get(label, "other")
    rows = [first, f"a dull one,{other}", f"another,{label if label not in ('excellent', '2024-01-01') else other}"]
    rows.append(rows[-1])
    path = write(tmp_path / "x.csv", "\n".join(rows))
    with pytest.raises(DataError, match=r"seems to have no header.*columns=\[…\]"):
        loaded(path)
    if label != "2024-01-01":
        assert loaded(path, columns=["text", "label"])[0] == (first.split(",")[0], label)


def test_what_looks_like_a_header_is_one(tmp_path: Path) -> None:
    for header, options in (
        ("text,label", {}),
        ("2019,text,label", {}),
        ("0,1", {"text": "0", "label": "1"}),
        ("What do you think of it?,rating", {"text": "What do you think of it?"}),
        ("spam,ham or spam", {"text": "ham or spam", "label": "spam"}),
    ):
        width = header.count(",") + 1
        rows = [["7", "a nice text here", "spam"][-width:], ["8", "another text is here", "eggs"][-width:]]
        if header.startswith("spam"):
            rows = [row[::-1] for row in rows]
        path = write(tmp_path / "x.csv", "\n".join([header, *map(",".join, rows)]))
        assert [text for text, _ in loaded(path, **options)] == ["a nice text here", "another text is here"]


def test_columns_that_do_not_match_the_file_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "text,label\na nice text,a\nanother text,b\n")
    assert len(loaded(path, columns=["text", "label"])) == 2, "the header itself is no row"
    with pytest.raises(DataError, match="line 1 looks like one: 'text', 'label'"):
        loaded(path, columns=["text", "class"])
    with pytest.raises(DataError, match=r"line 1 has 2 cells, but columns= names 3"):
        loaded(path, columns=["text", "label", "source"])
    for wrong in ("text", ["text", "text"], ["text", " label"], ["text"]):
        with pytest.raises(DataError, match="columns="):
            loaded(path, columns=wrong)


def test_headers_are_stripped_and_doubled_or_repeated_ones_are_errors(tmp_path: Path) -> None:
    assert loaded(write(tmp_path / "x.csv", " Text ,\tLabel\na b,x\nc d,y\n"), text="Text")[0] == ("a b", "x")
    with pytest.raises(DataError, match="names 'text' twice"):
        loaded(write(tmp_path / "x.csv", "text,label,text \na,b,c\nd,e,f\n"))
    for again in ("\ufefftext,label", "Text,Label", "text, label "):
        with pytest.raises(DataError, match="line 3 repeats the header"):
            loaded(write(tmp_path / "x.csv", f"text,label\na,b\n{again}\nc,d\n"))


def test_a_column_without_a_name_is_an_index_or_empty(tmp_path: Path) -> None:
    assert loaded(write(tmp_path / "x.csv", ",text,label,,\n0,a,b,,\n1,c,d,,\n")) == [("a", "b"), ("c", "d")]
    numbered = write(
        tmp_path / "x.csv", ",0,1\n" + "".join(f"{n},some words of text {n},x\n" for n in range(3)) + "3,other,y\n"
    )
    assert loaded(numbered)[1:] == [("some words of text 1", "x"), ("some words of text 2", "x"), ("other", "y")]
    with pytest.raises(DataError, match="seems to have no header"):
        loaded(write(tmp_path / "x.csv", "0,some words of a text,0\n1,other words of a text,1\n"))
    with pytest.raises(DataError, match=r"line 3 has ' and the rest' in column 3, which has no name"):
        loaded(write(tmp_path / "x.csv", "label,text,,\nb,a,,\nd,c, and the rest,\n"))


def test_encodings_are_found_by_their_mark_named_or_asked_for(tmp_path: Path) -> None:
    text = "text,label\ncafé “здравей” 日本,a\nплохо,b\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert loaded(write(tmp_path / "x.csv", text, encoding))[1][0] == "плохо"
    unmarked = write(tmp_path / "y.csv", text, "utf-16-be")
    with pytest.raises(DataError, match="encoding="):
        loaded(unmarked)
    with pytest.raises(DataError, match=r"zero bytes in its first line.*encoding='utf-16-le'"):
        loaded(write(tmp_path / "z.csv", "text,label\nab,c\nde,f\n", "utf-16-le"))
    assert loaded(unmarked, encoding="utf-16-be")[1][0] == "плохо"
    with pytest.raises(DataError, match="no mark of byte order; say encoding='utf-16-le' or 'utf-16-be'"):
        loaded(unmarked, encoding="utf-16")
    latin = write(tmp_path / "l.csv", "text,label\nfine,a\ncafé,b\n", "latin-1")
    with pytest.raises(
        DataError, match=r"l\.csv is not utf-8: line 3 has the bytes b'\\xe9.*encoding='cp1252'.*save it as UTF-8"
    ):
        loaded(latin)
    assert loaded(latin, encoding="latin-1")[1][0] == "café"
    with pytest.raises(DataError, match="no encoding that Python knows"):
        loaded(latin, encoding="martian")
    with pytest.raises(DataError, match="begins with the mark of utf-8-sig, but encoding='latin-1'"):
        loaded(write(tmp_path / "x.csv", text, "utf-8-sig"), encoding="latin-1")


def test_gzip_is_unpacked_and_other_packing_is_named(tmp_path: Path) -> None:
    packed = gzip.compress(delimited(GOOD, ",").encode())
    for name in ("x.csv.gz", "x.csv"):
        (tmp_path / name).write_bytes(packed)
        assert loaded(tmp_path / name) == GOOD
    (tmp_path / "cut.csv.gz").write_bytes(packed[:-9])
    with pytest.raises(DataError, match=r"cannot be unpacked.*complete"):
        loaded(tmp_path / "cut.csv.gz")
    with pytest.raises(DataError, match="not packed with gzip"):
        loaded(write(tmp_path / "plain.csv.gz", "text,label\n"))
    with pytest.raises(DataError, match="packed as zip"):
        loaded(write(tmp_path / "excel.csv", "PK\x03\x04"))
