"""Messages: whole lines only."""

from pathlib import Path

from mlpipes.store.messages import read_messages


def test_messages_are_read_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    assert read_messages(path) == ([], 0)
    path.write_bytes(b'{"kind": "a"}\nnot json\n7\n{"kind": "b"')
    found, offset = read_messages(path)
    assert found == [{"kind": "a"}]
    with path.open("ab") as stream:
        stream.write(b"}\n")
    assert read_messages(path, offset)[0] == [{"kind": "b"}]
