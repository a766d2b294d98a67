"""What README, docs/ and deploy/ say, taken apart for the tests: headings, links, commands, examples, and who runs what."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from mlpipes_tests.sandbox import CHECKOUT

HERE = {
    # By integration/test_documents.py, in this order, in one folder in which `make demo` was run: command, and what it says.
    # Ray is started first and ended last, so that the commands in between need not start their own.
    ".venv/bin/mlpipes ray up": "Ray runs; dashboard http://127.0.0.1:",
    ".venv/bin/mlpipes ray status": "Ray runs (pid",
    ".venv/bin/mlpipes demo --workload digits --scale w1-b128-e30-g0": "Done in",
    ".venv/bin/mlpipes backfill digits": "Fresh, nothing to do: w1-b128-e30-g0, w2-b128-e30-g0, w4-b128-e30-g0-c0.5",
    ".venv/bin/mlpipes scales": "w4-b128-e30-g0-c0.5",
    ".venv/bin/mlpipes status": "finished",
    ".venv/bin/mlpipes store": "Dagster's history is about the same",
    ".venv/bin/mlpipes checkpoints digits w1-b128-e30-g0": "good",
    ".venv/bin/mlpipes report digits": "scaling report",
    ".venv/bin/mlpipes report digits --deadline 60": "best by validation within 60 s",
    "MLPIPES_CPU_HOUR=0.05 .venv/bin/mlpipes report digits --budget 1": "best by validation within a cost of 1",
    ".venv/bin/mlpipes history digits w1-b128-e30-g0": "passed",
    '.venv/bin/mlpipes promote digits w2-b128-e30-g0 --reason "as good, and twice as fast"': "is champion",
    '.venv/bin/mlpipes rollback digits --reason "changed my mind"': "is champion again",
    ".venv/bin/mlpipes compare digits/w1-b128-e30-g0 digits/w2-b128-e30-g0": "the same model, bit for bit",
    ".venv/bin/mlpipes replay digits w1-b128-e30-g0": "equal, bit for bit",
    ".venv/bin/mlpipes fetch cifar10": "CIFAR-10 is in",
    ".venv/bin/mlpipes new diabetes": "diabetes is written",
    ".venv/bin/mlpipes ray down": "Ray ended.",
}
ELSEWHERE = {
    "make demo": "integration/test_documents.py::test_make_demo_prints_the_table_and_stops_what_it_started",
    "make dev": "integration/test_documents.py::test_the_ui_shows_graph_partition_and_report",
    "make test": "test_pages.py::test_every_command_is_run_by_a_test",  # which runs in it
    "make test-all": "test_pages.py::test_every_command_is_run_by_a_test",
    '.venv/bin/mlpipes predict docstrings w1-b64-e6-g0 "Compute the singular value decomposition of a sparse matrix"': (
        "integration/test_text_chain.py::test_predict_answers_new_texts"
    ),
    ".venv/bin/mlpipes serve digits": ("serving/test_server.py::test_formats_headers_and_the_bits_of_the_evaluation"),
    ".venv/bin/mlpipes serve digits --canary challenger --share 0.1": (
        "serving/test_server.py::test_a_canary_answers_its_share_of_the_clients_with_its_own_bits_and_both_are_compared"
    ),
    ".venv/bin/mlpipes doctor slurm": (
        "integration/test_slurm.py::test_the_doctor_says_what_is_there_and_what_is_missing"
    ),
    ".venv/bin/mlpipes doctor slurm --probe": (
        "integration/test_slurm.py::test_the_doctor_says_what_is_there_and_what_is_missing"
    ),
}
"""Commands that other tests run, with their own data or arguments: file and function."""
_PROMPT = re.compile(r"^\d?\$ ")


@dataclass(frozen=True)
class Page:
    """One document."""

    path: Path

    def __str__(self) -> str:
        return self.path.relative_to(CHECKOUT).as_posix()

    @cached_property
    def text(self) -> str:
        """Its Markdown."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def _tokens(self) -> list[Token]:
        return MarkdownIt("commonmark").enable("table").parse(self.text)

    def _inline(self) -> Iterator[Token]:
        for token in self._tokens:
            yield from token.children or ()

    def blocks(self, language: str) -> list[str]:
        """The fenced blocks of a language, in order."""
        return [token.content for token in self._tokens if token.type == "fence" and token.info == language]

    @property
    def languages(self) -> set[str]:
        """Those of all fenced blocks; empty for a block that names none."""
        return {token.info for token in self._tokens if token.type == "fence"}

    @property
    def anchors(self) -> list[str]:
        """Those of its headings, as GitHub makes them."""
        headings = [after for token, after in pairwise(self._tokens) if token.type == "heading_open"]
        return [re.sub(r"[^\w\- ]", "", heading.content.lower()).replace(" ", "-") for heading in headings]

    @property
    def links(self) -> list[str]:
        """What links and pictures point to."""
        found = [token.attrGet("href" if token.type == "link_open" else "src") for token in self._inline()]
        return [str(target) for target in found if target]

    @property
    def code(self) -> list[str]:
        """What is set as code within sentences."""
        return [token.content for token in self._inline() if token.type == "code_inline"]

    @property
    def commands(self) -> list[str]:
        """Lines of its `bash` blocks: to be run as they are."""
        return [line for block in self.blocks("bash") for line in block.strip().splitlines()]

    @property
    def mentioned(self) -> list[str]:
        """Commands that a person types: of `bash` and `console` blocks, and within sentences."""
        typed = [line for block in self.blocks("console") for line in block.splitlines() if _PROMPT.match(line)]
        return self.commands + [_PROMPT.sub("", line) for line in typed] + self.code

    def sections(self, level: int = 2) -> dict[str, str]:
        """The Markdown below each heading of a level."""
        parts = re.split(rf"^{'#' * level} (.+)$", self.text, flags=re.MULTILINE)[1:]
        return dict(zip(parts[::2], parts[1::2], strict=True))


def pages() -> list[Page]:
    """README, the pages of docs/, and the notes for Slurm."""
    docs = sorted((CHECKOUT / "docs").glob("*.md"))
    return [Page(path) for path in (CHECKOUT / "README.md", *docs, CHECKOUT / "deploy" / "slurm" / "README.md")]


def page(name: str) -> Page:
    """The page at a path in the checkout."""
    return Page(CHECKOUT / name)


def words_of(command: str) -> list[str]:
    """A command's words, less the variables set before it and the folder that its program is in; [] for no command."""
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    while words and re.match(r"[A-Z][A-Z0-9_]*=", words[0]):
        words.pop(0)
    return [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else []
