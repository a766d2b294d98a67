"""Docstrings as a data set: the same paragraphs in the same order as a walk through every node finds."""

import ast
import gc
import inspect
from pathlib import Path

import pytest

from mlpipes.data import docstrings
from mlpipes.data.docstrings import DocstringSource, _statements
from mlpipes.errors import DataError

_NESTED = '''
"""Module."""
class A:
    """Class."""
    def first(self, f=lambda: 1 if True else 2): "First."
try:
    def tried(): "Tried."
except ImportError:
    async def handled(): "Handled."
else:
    def other(): "Other."
finally:
    def final(): "Final."
if x := [lambda: y for y in z]:
    while x:
        for x in y:
            def looped(): "Looped."
        else:
            def unbroken(): "Unbroken."
else:
    with x as y:
        def opened(): "Opened."
match x:
    case [1, *_] if (lambda: x)():
        def matched():
            "Matched."
            def inner(): "Inner."
try:
    pass
except* ValueError:
    class Grouped: "Grouped."
'''


@pytest.mark.parametrize("text", [_NESTED, *map(inspect.getsource, (ast, inspect, pytest))])
def test_statements_are_met_in_the_order_of_a_walk_through_all_nodes(text: str) -> None:
    tree, kinds = ast.parse(text), (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    expected = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    assert [node for node in _statements(tree) if isinstance(node, kinds)] == expected
    assert text is not _NESTED or len(expected) == 13


def test_there_is_no_looking_for_garbage_meanwhile_and_then_it_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile = list[bool]()

    def nothing(_: str) -> list[Path]:
        meanwhile.append(gc.isenabled())
        raise DataError("nothing")

    monkeypatch.setattr(docstrings, "_files", nothing)
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with pytest.raises(DataError):
                DocstringSource().load()
            assert gc.isenabled() == enabled
        finally:
            gc.enable()
    assert meanwhile == [False, False]
