"""Messages: whole lines only, of kinds that this version knows, and figures that are no numbers."""

import math
from pathlib import Path

from mlpipes.store.messages import EpochEnded, MessageWriter, Warned, read_messages


def test_messages_are_read_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    assert read_messages(path) == ([], 0)
    path.write_bytes(
        b'{"kind": "warning", "time": 1.5, "text": "a"}\nnot json\n7\n{"kind": "warning", "time": 2.5, "te'
    )
    found, offset = read_messages(path)
    assert found == [Warned(time=1.5, text="a")]
    with path.open("ab") as stream:
        stream.write(b'xt": "b"}\n')
    assert read_messages(path, offset)[0] == [Warned(time=2.5, text="b")]


def test_what_another_version_says_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "news", "time": 1}\n{"kind": "warning", "time": 1, "text": "a", "severity": 3}\n')
    assert read_messages(path)[0] == [Warned(time=1, text="a")]


def test_a_figure_that_is_no_number_comes_back(tmp_path: Path) -> None:
    MessageWriter(tmp_path / "m.jsonl")(
        EpochEnded(epoch=1, epochs=2, step=3, metrics={"loss": math.nan, "x": math.inf})
    )
    (message,) = read_messages(tmp_path / "m.jsonl")[0]
    assert isinstance(message, EpochEnded)
    assert math.isnan(message.metrics["loss"])
    assert message.metrics["x"] == math.inf
