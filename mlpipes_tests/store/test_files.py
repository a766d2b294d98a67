import multiprocessing as mp
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlpipes.errors import CorruptionError, FormatError
from mlpipes.store.files import (
    MANIFEST,
    open_published,
    publishing,
    quarantine,
    read_record,
    write_atomic,
    write_record,
)


def publish(target: Path, content: bytes = b"hello" * 100) -> None:
    with publishing(target, kind="thing", version=1) as draft:
        (draft.path / "a.bin").write_bytes(content)
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "b.bin").write_bytes(b"x")
        draft.meta["fact"] = 1


def test_a_published_directory_comes_back_and_nothing_else_is_left(tmp_path: Path) -> None:
    publish(tmp_path / "t")
    opened = open_published(tmp_path / "t", kind="thing", versions=frozenset({1}))
    assert opened.meta == {"fact": 1}
    assert sorted(opened.files) == ["a.bin", "sub/b.bin"]
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), publishing(tmp_path / "t", kind="thing", version=1) as draft:
        (draft.path / "a.bin").write_bytes(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_no_damage_goes_unnoticed(tmp_path: Path, data: st.DataObject) -> None:
    target = tmp_path / f"t{len(list(tmp_path.iterdir()))}"
    publish(target)
    victim = data.draw(st.sampled_from([target / "a.bin", target / "sub" / "b.bin", target / MANIFEST]))
    content = bytearray(victim.read_bytes())
    match data.draw(st.sampled_from(["flip", "truncate", "remove", "append"])):
        case "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            victim.write_bytes(content)
        case "truncate":
            victim.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        case "append":
            victim.write_bytes(bytes(content) + b"!")
        case _:
            victim.unlink()
    try:
        opened = open_published(target, kind="thing", versions=frozenset({1}))
    except CorruptionError as error:
        assert str(target) in str(error)
    else:
        # Only white space of the manifest may differ without changing what it says.
        assert victim.name == MANIFEST
        assert opened.meta == {"fact": 1}
        assert (target / "a.bin").read_bytes() == b"hello" * 100


def test_wrong_kind_and_version_are_errors(tmp_path: Path) -> None:
    publish(tmp_path / "t")
    with pytest.raises(CorruptionError, match="holds a 'thing', expected a 'model'"):
        open_published(tmp_path / "t", kind="model")
    with pytest.raises(FormatError, match=r"a thing of format 1, and this version reads 2"):
        open_published(tmp_path / "t", kind="thing", versions=frozenset({2}))
    with pytest.raises(FileNotFoundError):
        open_published(tmp_path / "none", kind="thing")


def _publish_slowly(target: str, barrier: object) -> None:
    with publishing(Path(target), kind="thing", version=1) as draft:
        (draft.path / "a.bin").write_bytes(b"same")
        barrier.wait(300)  # type: ignore[attr-defined]


def test_two_writers_at_once_are_safe(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    barrier = context.Barrier(3)
    writers = [context.Process(target=_publish_slowly, args=(str(tmp_path / "t"), barrier)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(300)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    open_published(tmp_path / "t", kind="thing")
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_corrupt_target_is_kept_as_evidence_and_replaced(tmp_path: Path) -> None:
    publish(tmp_path / "t")
    (tmp_path / "t" / "a.bin").write_bytes(b"broken")
    publish(tmp_path / "t")
    assert (tmp_path / "t.corrupt-1" / "a.bin").read_bytes() == b"broken"
    open_published(tmp_path / "t", kind="thing")


def test_records_are_verified(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_record(path, {"value": 1.5, "text": "ü"})
    assert read_record(path) == {"value": 1.5, "text": "ü"}
    path.write_text(path.read_text().replace("1.5", "1.6"))
    with pytest.raises(CorruptionError, match="does not match its checksum"):
        read_record(path)
    path.write_text("{")
    with pytest.raises(CorruptionError, match="not a readable record"):
        read_record(path)
    with pytest.raises(ValueError, match="JSON"):
        write_record(path, {"value": float("nan")})


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_quarantine_never_overwrites(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "f").write_text(str(number))
        assert quarantine(tmp_path / "f").name == f"f.corrupt-{number}"
    assert (tmp_path / "f.corrupt-1").read_text() == "1"


def test_what_appears_under_its_final_name_is_on_the_disk_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a machine that loses power could come back with a name whose bytes never were written."""
    done: list[str] = []
    forced, renamed = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        forced(descriptor)

    def rename(path: Path, target: Path) -> Path:
        done.append("renamed")
        return renamed(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    with publishing(tmp_path / "here" / "thing", kind="thing", version=1) as draft:
        (draft.path / "below").mkdir()
        (draft.path / "below" / "part").write_text("bytes")
        temporary = draft.path.name
    moment = done.index("renamed")
    assert {"part", "below", temporary} <= set(done[:moment])
    assert any(name.startswith(f".tmp-{MANIFEST}") for name in done[:moment]), "the manifest, too"
    assert done[moment + 1 :] == ["here"], "and then the name itself"
