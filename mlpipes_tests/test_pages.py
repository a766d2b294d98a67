"""The documents tell the truth, as far as can be told without running them: links, names of commands, variables, files."""

import ast
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from mlpipes.cli.app import app
from mlpipes_tests.documents import ELSEWHERE, HERE, Page, page, pages, words_of
from mlpipes_tests.sandbox import CHECKOUT

TWO_SCREENS = 110
"""Lines."""
_VARIABLE = re.compile(
    r"(?:MLPIPES|MLFLOW|DAGSTER|RAY|HF|SLURM|CUDA|CUBLAS|GLOO|NCCL|AWS|MALLOC)_[A-Z0-9_]+|PYTHON[A-Z]+|TMPDIR|KUBECONFIG|"
    r"https?_proxy|HTTPS?_PROXY|all_proxy|ALL_PROXY|no_(?:grpc_)?proxy|NO_PROXY"
)
_LANGUAGES = {"bash", "console", "yaml", "python", "text"}

each_page = pytest.mark.parametrize("document", pages(), ids=str)


# -- links ------------------------------------------------------------------------------------------------------------
@each_page
def test_links_and_anchors_lead_somewhere(document: Page) -> None:
    assert len(set(document.anchors)) == len(document.anchors), "two headings with the same anchor"
    for link in document.links:
        target, _, anchor = link.partition("#")
        path = (document.path.parent / target).resolve() if target else document.path
        assert path.is_file(), link
        if anchor:
            assert anchor in Page(path).anchors, link


def test_every_page_is_linked_from_the_readme_and_every_picture_is_shown() -> None:
    readme = page("README.md")
    linked = {(CHECKOUT / link).resolve() for link in readme.links}
    assert {document.path for document in pages()} - {readme.path} <= linked
    shown = {(document.path.parent / link).resolve() for document in pages() for link in document.links}
    assert set((CHECKOUT / "docs" / "images").iterdir()) <= shown


def test_the_readme_has_two_screens() -> None:
    lines = page("README.md").text.splitlines()
    assert len(lines) <= TWO_SCREENS
    assert not [line for line in lines if len(line) > 130 and not line.startswith(("|", "!["))]


# -- commands ---------------------------------------------------------------------------------------------------------
def test_every_command_is_run_by_a_test() -> None:
    """A command in a `bash` block is in exactly one of the lists, and nothing is listed that no document says any more."""
    commands = {command for document in pages() for command in document.commands}
    assert commands == set(HERE) | set(ELSEWHERE)
    assert not set(HERE) & set(ELSEWHERE)
    for where in ELSEWHERE.values():
        file, _, function = where.partition("::")
        assert f"def {function}(" in (CHECKOUT / "mlpipes_tests" / file).read_text(encoding="utf-8"), where


@each_page
def test_blocks_say_what_they_are(document: Page) -> None:
    assert document.languages <= _LANGUAGES


@each_page
def test_commands_exist_with_the_options_that_are_named(document: Page) -> None:
    for command in document.mentioned:
        match words_of(command):
            case ["mlpipes", *words]:
                assert_known(words)
            case ["make", *words]:
                assert_made(words)
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module), command
            case ["pytest", *words]:
                assert all((CHECKOUT / word).exists() for word in words if "/" in word), command


def assert_known(words: list[str]) -> None:
    """The command line has a command of that name, with options of those names."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while (commands := getattr(command, "commands", None)) and rest:
        name = rest.pop(0)
        assert name in commands, f"mlpipes has no command {' '.join(words)}"
        command = commands[name]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    for word in rest:
        assert not word.startswith("-") or word in known, f"mlpipes {' '.join(words)}: there is no option {word}"


def assert_made(words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, f"make {' '.join(words)}: {done.stderr}"
    if words[0] == "dev":
        port = next((word.removeprefix("PORT=") for word in words if word.startswith("PORT=")), "3000")
        assert f"mlpipes dev --port {port}" in done.stdout
        assert ("--mlflow" in done.stdout) == ("MLFLOW=1" in words)


def test_an_option_that_is_not_there_is_noticed() -> None:
    with pytest.raises(AssertionError, match="no option --detached"):
        assert_known(["backfill", "digits", "--detached"])
    with pytest.raises(AssertionError, match="no command ray restart"):
        assert_known(["ray", "restart"])
    with pytest.raises(AssertionError, match="No rule"):
        assert_made(["no-such-target"])


# -- files ------------------------------------------------------------------------------------------------------------
@each_page
def test_files_and_modules_that_are_named_exist(document: Page) -> None:
    roots = [CHECKOUT, CHECKOUT / "mlpipes", CHECKOUT / "mlpipes_tests"]
    made = (
        (CHECKOUT / ".gitignore").read_text(encoding="utf-8").split()
    )  # by whoever works here, and not in a new clone
    for name in document.code:
        if re.fullmatch(r"[\w/]+/\w+\.(?:py|yaml|md)|(?:mlpipes|mlpipes_tests|docs|deploy)/[\w/]*", name):
            assert name in made or any((root / name).exists() for root in roots), name
        elif re.fullmatch(r"(?:mlpipes|mlpipes_tests)(?:\.\w+)+", name):
            assert importlib.util.find_spec(name), name


def test_the_tree_names_files_that_exist() -> None:
    (tree,) = page("docs/development.md").blocks("text")
    folder, seen = CHECKOUT, 0
    for line in tree.splitlines():
        name = line.split()[0]
        path = (folder if line.startswith(" ") else CHECKOUT) / name
        assert path.exists(), name
        assert path.is_dir() == name.endswith("/"), name
        folder = folder if line.startswith(" ") else path
        seen += 1
    assert seen > 10
    packages = {f"{path.parent.name}/" for path in (CHECKOUT / "mlpipes").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"^  (\w+/)", tree, re.MULTILINE)), "a package that the tree does not show"


# -- environment variables --------------------------------------------------------------------------------------------
def documented(*sections: str) -> set[str]:
    """The variables in the first columns of some tables of configuration.md."""
    found = page("docs/configuration.md").sections()
    cells = [cell for section in sections for cell in re.findall(r"^\| (`.+?) \|", found[section], re.MULTILINE)]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def variables_in(*paths: Path) -> set[str]:
    """Environment variables that Python files read or set: what looks like the name of one, and what is looked up."""
    return {name for path in paths for name in _strings(ast.parse(path.read_text(encoding="utf-8")))}


def _strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _VARIABLE.fullmatch(node.value):
                yield node.value
        elif isinstance(node, ast.Call | ast.Subscript) and (name := _looked_up(node)):
            yield name


def _looked_up(node: ast.Call | ast.Subscript) -> str | None:
    """The name in `os.environ["…"]`, `os.environ.get("…")`, `os.getenv("…")`, however it looks."""
    function, first = (
        (node.value, node.slice) if isinstance(node, ast.Subscript) else (node.func, [*node.args, None][0])
    )
    if not re.search(r"\benviron(\.(get|pop|setdefault))?$|\bgetenv$", ast.unparse(function)):
        return None
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def test_every_environment_variable_is_in_the_table_and_nothing_else() -> None:
    table = documented(
        "Environment variables of mlpipes",
        "Variables of other programs that matter",
        "Variables that mlpipes sets for its own processes",
        "Variables that are dropped",
    )
    assert table == variables_in(*(CHECKOUT / "mlpipes").rglob("*.py"))


def test_the_variables_of_tests_benchmarks_and_make_are_in_their_tables() -> None:
    tests, table = CHECKOUT / "mlpipes_tests", documented("Variables of tests and benchmarks")
    read = variables_in(tests / "conftest.py", *(tests / "benchmarks").glob("*.py"))
    of_the_program = variables_in(*(CHECKOUT / "mlpipes").rglob("*.py"))
    assert {name for name in read - of_the_program if name.startswith("MLPIPES_")} <= table
    assert table <= variables_in(*tests.rglob("*.py"))
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    used, fixed = set(re.findall(r"\$\(([A-Z_]+)\)", makefile)), set(re.findall(r"^([A-Z_]+) :?=", makefile, re.M))
    assert documented("Variables of make") == used - fixed - {"MAKE"}  # its own


def test_a_variable_is_found_however_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        'import os\nA = "MLPIPES_NEW"\nos.environ["odd"]\nos.environ.get("other", "x")\nos.getenv("third")\n'
    )
    assert variables_in(path) == {"MLPIPES_NEW", "odd", "other", "third"}
