"""Code versions: each kind of code that numbers depend on gives a new one when it is edited, and nothing else does."""

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from textwrap import dedent

import pytest

import mlpipes
from mlpipes.errors import ConfigError
from mlpipes.training import code_version as rules
from mlpipes.training import reached_code as search
from mlpipes.training.code_version import ENGINE_MODULES, code_version, preparation_version

COMPILED = f"outsider/fast{EXTENSION_SUFFIXES[0]}"
OURS = {
    "outsider/__init__.py": "",
    "outsider/common.py": "SCALE = 2\n",
    "outsider/deep/__init__.py": "",
    "outsider/deep/er.py": "LAYERS = 2\n",
    "outsider/named.py": "NAME = 2\n",
    "outsider/starred/__init__.py": "__all__ = ['one']\n",
    "outsider/starred/one.py": "ONE = 2\n",
    "outsider/tasks/__init__.py": "",
    "outsider/tasks/blocks.py": "from .parts import PART\n\n\nclass Block:\n    width = 2\n",
    "outsider/tasks/parts.py": "PART = 2\n",
    "outsider/tasks/models.py": "WIDTH = 2\n",
    "outsider/tasks/late.py": "LATE = 2\n",
    "outsider/tasks/hints.py": "class Hint: ...\n",
    "outsider/tasks/unrelated.py": "NOTHING = 2\n",
    "outsider/tasks/work.py": '''
        """A workload."""

        from importlib import import_module
        from typing import TYPE_CHECKING

        import outsider.deep.er
        import outsider_helper
        import outsider_space.part
        from mlpipes.data.tables import TableSource
        from mlpipes.reporting import figures
        from mlpipes.workloads import networks
        from mlpipes.workloads.base import Workload
        from mlpipes.workloads.catalog import entry
        from mlpipes.workloads.served_text_model import TextModel
        from outsider.fast import kernel
        from outsider.starred import *

        from ..common import SCALE
        from . import models
        from .blocks import Block

        if TYPE_CHECKING:
            from .hints import Hint


        class Work(Workload):
            """What is trained."""

            rate: float = 0.5
            """How fast."""

            def fit(self, x: "Hint") -> float:
                """Fit."""
                from famous.layers import drop
                from transformers import AutoTokenizer

                from .late import LATE

                try:
                    import perhaps_there
                except ImportError:
                    perhaps_there = None

                return drop(x) * LATE * import_module(".named", package="outsider").NAME


        work = Work()
        ''',
    "outsider_helper.py": "HELP = 2\n",
    "outsider_space/part.py": "PART = 2\n",
    COMPILED: "\x7fELF 2",
}
LIBRARY = {
    "famous/__init__.py": "",
    "famous/layers.py": "def drop(x):\n    return x\n",
    "famous_models-2.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: famous-models\nVersion: 2.0\n",
    "tokenizers-0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: tokenizers\nVersion: 0.1\n",
    "famous_models-2.0.dist-info/RECORD": "famous/__init__.py,sha256=a,0\nfamous/layers.py,sha256=b,29\n",
}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(dedent(content))


def edit(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content, f"{path} has no {old!r}"
    path.write_text(content.replace(old, new))


def fresh() -> None:
    """As in another process: what is installed is looked up again."""
    importlib.invalidate_caches()
    search._distributions.cache_clear()
    search._workers.cache_clear()


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a made-up package of a user, a library in `site-packages`, and a copy of mlpipes, all to be edited."""
    write(tmp_path, OURS)
    write(tmp_path / "site-packages", LIBRARY)
    copy = tmp_path / "mlpipes"
    shutil.copytree(Path(mlpipes.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert mlpipes.__spec__ is not None
    monkeypatch.setattr(mlpipes.__spec__, "submodule_search_locations", [str(copy)])
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    monkeypatch.syspath_prepend(str(tmp_path))
    fresh()
    yield tmp_path
    fresh()


def training() -> str:
    fresh()
    return code_version("outsider.tasks.work:work")


def preparing() -> str:
    fresh()
    return preparation_version("outsider.tasks.work:work")


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, old, new)


def append(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("a") as file:
            file.write("\nNEW = 1\n")

    return change


def release(folder: Path) -> None:
    edit(folder / "site-packages/famous_models-2.0.dist-info/METADATA", "Version: 2.0", "Version: 2.1")


def release_tokenizers(folder: Path) -> None:
    edit(folder / "site-packages/tokenizers-0.1.dist-info/METADATA", "Version: 0.1", "Version: 0.2")


def install_what_was_missing(folder: Path) -> None:
    write(folder, {"perhaps_there.py": "THERE = True\n"})


def build_from_a_folder(folder: Path) -> None:
    write(folder / "site-packages", {"famous_models-2.0.dist-info/direct_url.json": '{"url": "file:///x"}'})


BOTH = {
    "the workload's module": replace("outsider/tasks/work.py", "= 0.5", "= 0.25"),
    "a module beside it (from . import models)": replace("outsider/tasks/models.py", "2", "3"),
    "a name of a module beside it (from .blocks import Block)": replace("outsider/tasks/blocks.py", "2", "3"),
    "what that imports": replace("outsider/tasks/parts.py", "2", "3"),
    "a module above (from ..common import SCALE)": replace("outsider/common.py", "2", "3"),
    "a sub-package's module": replace("outsider/deep/er.py", "2", "3"),
    "the package's __init__": replace("outsider/__init__.py", "", "import os\n"),
    "an __init__ on the way": replace("outsider/deep/__init__.py", "", "DEEP = 2\n"),
    "a top-level module beside the package": replace("outsider_helper.py", "2", "3"),
    "a part of a namespace": replace("outsider_space/part.py", "2", "3"),
    "a module imported in a function": replace("outsider/tasks/late.py", "2", "3"),
    "a module imported by its name": replace("outsider/named.py", "2", "3"),
    "a module of a star": replace("outsider/starred/one.py", "2", "3"),
    "a compiled module": replace(COMPILED, "2", "3"),
    "a default of an argument": replace("outsider/tasks/work.py", '"Hint") ->', '"Hint" = 1) ->'),
    "a workload's module of mlpipes": append("mlpipes/workloads/networks.py"),
    "the contract that it fulfils": append("mlpipes/workloads/base.py"),
    "a package of mlpipes on the way": append("mlpipes/workloads/__init__.py"),
    "a library's release": release,
    "a library built from a folder": build_from_a_folder,
    "a library that does the work of another": release_tokenizers,
    "an optional import, once it is there": install_what_was_missing,
}


@pytest.mark.parametrize("change", BOTH.values(), ids=BOTH)
def test_code_that_a_workload_runs_counts(code: Path, change: Callable[[Path], None]) -> None:
    before = training(), preparing()
    change(code)
    assert training() != before[0]
    assert preparing() != before[1]


@pytest.mark.parametrize("module", ENGINE_MODULES)
def test_each_numeric_module_of_the_engine_counts_for_training(code: Path, module: str) -> None:
    before = training()
    append(f"{module.replace('.', '/')}.py")(code)
    assert training() != before


@pytest.mark.parametrize("module", ["tables", "splits", "dataset", "ragged", "snapshot", "hub"])
def test_what_reads_splits_and_writes_data_counts_for_the_snapshot(code: Path, module: str) -> None:
    """Training sees the bytes: these count by the snapshot's digest, but for the columns that batches are cut from."""
    before = training(), preparing()
    append(f"mlpipes/data/{module}.py")(code)
    assert preparing() != before[1]
    assert (training() != before[0]) == (module == "ragged")


def rewrap(folder: Path) -> None:
    edit(folder / "outsider/tasks/work.py", "LATE * import_module(", "LATE * import_module(  # a comment\n")


UNRELATED = {
    "a comment": replace("outsider/tasks/models.py", "WIDTH", "# how wide\nWIDTH"),
    "the docstring of a module": replace("outsider/tasks/work.py", "A workload.", "The workload."),
    "the docstring of a class": replace("outsider/tasks/work.py", "What is trained.", "Trained."),
    "the docstring of a method": replace("outsider/tasks/work.py", '"""Fit."""', '"""Fitted, or not."""'),
    "no docstring at all": replace("outsider/tasks/work.py", '"""Fit."""', ""),
    "the docstring of an attribute": replace("outsider/tasks/work.py", "How fast.", "How fast it learns."),
    "formatting": rewrap,
    "quotes and blank lines": replace("outsider/starred/__init__.py", "['one']", '[\n\n    "one",\n]'),
    "a module that nothing imports": replace("outsider/tasks/unrelated.py", "2", "3"),
    "a module for type checkers": replace("outsider/tasks/hints.py", "...", "hint = 1"),
    "a library's file, of the same release": replace("site-packages/famous/layers.py", "return x", "return x + 0"),
    "reports": append("mlpipes/reporting/figures.py"),
    "the catalog": replace("mlpipes/workloads/catalog.py", '"w1-b128-e30-g0", ', ""),
    "the served model": append("mlpipes/workloads/served_text_model.py"),
    "how models are deployed": replace("mlpipes/workloads/deployables.py", "TOLERANCE = 1e-3", "TOLERANCE = 2e-3"),
    "how packages are found": append("mlpipes/workloads/packages.py"),
    "what an entry is": append("mlpipes/workloads/entry.py"),
    "checkpoints": append("mlpipes/training/checkpoints.py"),
    "the store": append("mlpipes/store/files.py"),
}


@pytest.mark.parametrize("change", UNRELATED.values(), ids=UNRELATED)
def test_tidying_up_and_other_code_do_not_count(code: Path, change: Callable[[Path], None]) -> None:
    before = training(), preparing()
    change(code)
    assert (training(), preparing()) == before


def test_nothing_is_imported(code: Path) -> None:
    training()
    preparing()
    assert not {"outsider", "outsider_helper", "famous"} & set(sys.modules)


def test_a_workload_of_one_file_and_its_neighbour(code: Path) -> None:
    write(code, {"alone.py": "from neighbour import N\nwork = N\n", "neighbour.py": "N = 2\n"})
    before = code_version("alone:work")
    edit(code / "neighbour.py", "2", "3")
    assert code_version("alone:work") != before


def test_an_installed_package_counts_by_its_code_with_all_of_its_distribution(code: Path) -> None:
    site = code / "site-packages"
    write(
        site,
        {
            "shipped/__init__.py": "",
            "shipped/work.py": "import famous\nfrom shipped_nets import NET\nwork = NET\n",
            "shipped_nets.py": "NET = 2\n",
            "shipped-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: shipped\nVersion: 1.0\n",
            "shipped-1.0.dist-info/RECORD": "shipped/__init__.py,,\nshipped/work.py,,\nshipped_nets.py,,\n",
        },
    )

    def version() -> str:
        fresh()
        return code_version("shipped.work:work")

    versions = [version()]
    for change in (
        lambda: edit(site / "shipped/work.py", "work = NET", "work = NET + 1"),
        lambda: edit(site / "shipped_nets.py", "2", "3"),
        lambda: release(code),
    ):
        change()
        versions.append(version())
    assert len(set(versions)) == 4
    edit(site / "famous/layers.py", "return x", "return x + 0")
    assert version() == versions[-1]


def test_an_installed_part_of_a_namespace_counts_by_its_code(code: Path) -> None:
    site = code / "site-packages"
    described = "Metadata-Version: 2.1\nName: acme-work\nVersion: 1.0\n"
    write(site, {"acme/work.py": "work = 2\n", "acme_work-1.0.dist-info/METADATA": described})
    write(site, {"acme_work-1.0.dist-info/RECORD": "acme/work.py,,\n"})
    fresh()
    before = code_version("acme.work:work")
    edit(site / "acme/work.py", "2", "3")
    assert code_version("acme.work:work") != before


def test_the_release_of_torch_counts_and_that_of_a_library_without_numbers_does_not(code: Path) -> None:
    versions = []
    for library, release in (("pydantic", "0.1"), ("pydantic", "0.2"), ("torch", "0.1"), ("torch", "0.2")):
        described = {
            "METADATA": f"Metadata-Version: 2.1\nName: {library}\nVersion: {release}\n",
            "RECORD": f"{library}/__init__.py,,\n",
        }
        write(code / "site-packages", {f"{library}-0.dist-info/{name}": text for name, text in described.items()})
        versions.append(training())
    assert versions[0] == versions[1]
    assert len({*versions[1:]}) == 3


def test_what_the_catalog_reaches() -> None:
    """By name, so that whoever moves a module or a library sees what a training's identity gains or loses by it."""
    found = {}
    for name, rule in (("training", code_version), ("preparing", preparation_version)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                rules, "reached_code", lambda *given, name=name: found.setdefault(name, search.reached_code(*given))
            )
            rule("mlpipes.workloads.text_classification:docstrings")
    modules = {
        name: {m.removeprefix("mlpipes.") for m in code.modules if m.count(".") == 2} for name, code in found.items()
    }
    workloads = {"base", "classification", "optimization", "regression", "tensors", "text_classification"}
    workloads |= {"encoders", "encoder_models", "encoder_trial"}
    assert modules["training"] == {f"workloads.{name}" for name in workloads} | {
        name.removeprefix("mlpipes.") for name in ENGINE_MODULES
    }
    data = {"dataset", "docstrings", "hub", "ragged", "snapshot", "splits", "tables"}
    data |= {"cells", "delimited", "labels", "table_files", "table_roles"}
    assert modules["preparing"] == {f"workloads.{n}" for n in workloads} | {f"data.{n}" for n in data}
    assert set(found["training"].libraries) == {"numpy", "safetensors", "tokenizers", "torch", "transformers"}
    assert set(found["preparing"].libraries) >= {"datasets", "numpy", "pandas", "pyarrow", "tokenizers", "transformers"}


@pytest.mark.parametrize("name", ["outsider.tasks.wrok", "nobody", "outsider_space", "outsider.tasks.work.Work"])
def test_a_module_without_a_file_is_an_error(code: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"no module '{name}'"):
        code_version(f"{name}:work")


def test_a_mistyped_module_of_the_engine_is_an_error(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "ENGINE_MODULES", (*ENGINE_MODULES, "mlpipes.training.gradients"))
    with pytest.raises(ConfigError, match=r"no module 'mlpipes\.training\.gradients'"):
        training()


def test_a_file_that_is_no_python_is_named_with_its_line(code: Path) -> None:
    edit(code / "outsider/tasks/models.py", "WIDTH = 2", "HEIGHT = 1\nWIDTH = (2")
    with pytest.raises(ConfigError, match=r"outsider/tasks/models\.py, line 2: "):
        training()
