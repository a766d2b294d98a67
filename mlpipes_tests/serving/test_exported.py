"""A version in a folder: how it is written out, and that nothing in it is trusted before it is verified."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mlpipes.cli.app import app
from mlpipes.serving.current import Folder
from mlpipes.store.files import MANIFEST, digest_of, read_record, write_record
from mlpipes_tests.serving.models import IMAGES, NAME, champion, registered, tracker_in


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with two registered versions, of which the second is champion."""
    home = tmp_path_factory.mktemp("exported")
    tracker = tracker_in(home)
    wanted = [registered(tracker, seed)[1] for seed in (1, 2)]
    np.save(home / "wanted.npy", wanted)
    champion(tracker, "2")
    return home


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """The champion, written out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLPIPES_HOME", str(home))
        assert f"{NAME} version 2 is in {home / 'whole'}" in said("export", "digits", "--output", str(home / "whole"))
    return home / "whole"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return shutil.copytree(whole, tmp_path / "folder")


def said(*arguments: str, code: int = 0) -> str:
    """What a command prints, in a terminal that cuts nothing."""
    done = CliRunner(env={"COLUMNS": "400"}).invoke(app, arguments)
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


def test_what_is_written_out_answers_as_it_was_evaluated(home: Path, whole: Path) -> None:
    assert not [path for path in (whole, *whole.rglob("*")) if not path.stat().st_mode & 0o004], (
        "a container's user reads it"
    )
    source = Folder(whole)
    now = source.wanted_now()
    model = source.get(now)
    assert (now.name, now.version, model.version, model.exact) == (NAME, "2", "2", True)
    assert (model.scale, model.weights, model.fingerprint) == ("w1-b128-e1-g0", f"{2:064x}", "f2")
    assert np.array_equal(np.asarray(model(IMAGES)), np.load(home / "wanted.npy")[1])


def test_files_are_answered_by_what_is_written_out(
    home: Path, whole: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    np.save(tmp_path / "images.npy", IMAGES)
    monkeypatch.setenv("MLPIPES_HOME", str(tmp_path / "another home"))
    asked = ("predict", "--input", str(tmp_path / "images.npy"), "--output", str(tmp_path / "answers.parquet"))
    link = tmp_path / "link"
    link.symlink_to(whole)
    assert "answers are in" in said(*asked, "--model", str(link))
    found = pq.read_table(tmp_path / "answers.parquet")
    answers = np.stack(found["prediction"].to_numpy(zero_copy_only=False))
    assert np.array_equal(answers, np.load(home / "wanted.npy")[1])
    assert set(found["model_of_prediction"].to_pylist()) == {f"{NAME}/2"}
    assert f"of which {len(IMAGES):,} were answered before" in said(*asked, "--model", str(folder)), "the same model"
    for arguments, says in (
        ((), "name a workload, or a folder with --model"),
        (("digits", "w1-b128-e1-g0", "--model", str(whole)), "not both"),
        (("--model", str(tmp_path)), "was not written by `mlpipes export`"),
        (("--model", str(tmp_path / "nothing")), "is no folder with a model"),
    ):
        assert says in said(*asked, *arguments, code=1)
    assert "with --input" in said("predict", "digits", "w1-b128-e1-g0", "text", "--model", str(whole), code=1)


def test_what_cannot_be_written_out_is_told_in_a_line(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLPIPES_HOME", str(home))
    (tmp_path / "file").write_text("")
    for arguments, says in (
        (["digits", "--output", str(whole)], "is there already"),
        (["digits", "--output", str(tmp_path / "file")], "is there already"),
        (["digits", "--output", str(tmp_path / "new"), "--version", "9"], "is not registered"),
        (["digits", "--output", str(tmp_path / "new"), "--version", "1", "--alias", "other"], "not both"),
        (["digits", "--output", "/proc/new"], "/proc cannot be written to"),
        (
            ["digits", "--output", str(tmp_path / "new"), "--alias", "other"],
            "set_registered_model_alias(name, alias, version)",
        ),
        (["digits", "--output", str(tmp_path / "new"), "--version", "9"], "`mlpipes demo --workload digits`"),
        (["nothing", "--output", str(tmp_path / "new")], "nothing"),
    ):
        assert says in said("export", *arguments, code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    said("export", "digits", "--output", str(tmp_path / "empty"))
    assert Folder(tmp_path / "empty").wanted.name == NAME


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a manifest says, with the right checksum, as only somebody else would."""
    content = read_record(folder / MANIFEST)
    change(content)
    write_record(folder / MANIFEST, content)


def program(folder: Path) -> Path:
    (found,) = folder.rglob("*.pt2")
    return found


def another_answer(folder: Path) -> None:
    """A golden request that the model does not answer so, below a manifest that is right."""
    (golden,) = folder.rglob("golden.json")
    content = json.loads(golden.read_text())
    content["answer"]["data"][0] += 1
    golden.write_text(json.dumps(content))
    shutil.move(folder, folder.with_name("old"))
    from mlpipes.store.files import publishing

    with publishing(folder, kind="served model", version=1) as draft:
        shutil.move(folder.with_name("old") / "model", draft.path / "model")
        draft.meta |= read_record(folder.with_name("old") / MANIFEST)["meta"]


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (shutil.rmtree, "is no folder with a model; `mlpipes export"),
    "of MLflow": (lambda folder: (folder / MANIFEST).unlink(), "was not written by `mlpipes export`"),
    "cut manifest": (lambda folder: (folder / MANIFEST).write_text('{"sha'), "is not a readable record"),
    "changed manifest": (
        lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace(NAME, "mlpipes-other")),
        "does not match its checksum",
    ),
    "a file less": (lambda folder: program(folder).unlink(), "is missing"),
    "a cut file": (lambda folder: program(folder).write_bytes(b"x"), "has 1 bytes, its manifest says"),
    "a changed byte": (
        lambda folder: program(folder).write_bytes(b"x" + program(folder).read_bytes()[1:]),
        "its bytes changed after it was written",
    ),
    "a file more": (lambda folder: (folder / "model" / "a.pt2").write_text(""), "does not belong to it"),
    "another kind": (lambda folder: rewritten(folder, lambda c: c.update(kind="snapshot")), "holds a 'snapshot'"),
    "another format": (lambda folder: rewritten(folder, lambda c: c.update(version=2)), "another version of mlpipes"),
    "no name": (lambda folder: rewritten(folder, lambda c: c["meta"].pop("name")), "says not what it should"),
    "odd version": (
        lambda folder: rewritten(folder, lambda c: c["meta"].update(version="x")),
        "says not what it should",
    ),
    "odd files": (lambda folder: rewritten(folder, lambda c: c.update(files=["a"])), "says not what it should"),
    "odd content": (lambda folder: write_list(folder / MANIFEST), "says not what it should"),
    "another answer": (another_answer, "golden request otherwise"),
}


def write_list(path: Path) -> None:
    path.write_text(json.dumps({"sha256": digest_of([1]), "content": [1]}))


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_folder_is_told_in_a_line(kind: str, folder: Path) -> None:
    spoil, says = BAD[kind]
    spoil(folder)
    told = said("serve", "--model", str(folder), "--port", "0", code=1)
    assert says in told
    assert "Traceback" not in told


def test_a_folder_has_one_version_of_one_model(folder: Path) -> None:
    for arguments in (["--version", "1"], ["--alias", "other"]):
        assert "has one version" in said("serve", "--model", str(folder), *arguments, code=1)
    assert "name a workload, or a folder" in said("serve", code=1)
    source = Folder(folder)
    rewritten(folder, lambda content: content["meta"].update(name="mlpipes-other"))
    with pytest.raises(Exception, match="has mlpipes-other by now"):
        source.wanted_now()
