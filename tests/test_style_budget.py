"""The style budgets of CONTRIBUTING.md, read off the syntax tree of every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "edgecnn").rglob("*.py"))
EVERYTHING = [
    *PACKAGE,
    *(
        path
        for folder in ("tests", "examples", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ),
]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def public_functions(body: list[ast.stmt]) -> Iterator[Function]:
    """Public functions of a module, and public methods of its public classes."""
    for node in body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)


def parameters(function: Function) -> list[ast.arg]:
    arguments = function.args
    found = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return found[1:] if found and found[0].arg in ("self", "cls") else found


def is_stub(function: Function) -> bool:
    """A Protocol's `def inputs(self) -> int: ...`, whose class says what it means."""
    return len(function.body) == 1 and ast.unparse(function.body[0]) == "..."


def broken_budgets(source: str, in_package: bool) -> list[str]:
    """What is wrong with a file, one text per finding, in the order of the budgets."""
    tree = ast.parse(source)
    num_lines = len(source.splitlines())
    found = [f"{num_lines} lines, at most {MAX_FILE_LINES}"] if num_lines > MAX_FILE_LINES else []
    for function in functions(tree):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            found.append(f"{function.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
        if in_package and len(parameters(function)) > MAX_PARAMETERS:
            found.append(
                f"{function.name} has {len(parameters(function))} parameters, at most {MAX_PARAMETERS}"
            )
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            found.append(f"line {node.lineno}: import *")
        if in_package and isinstance(node, ast.Assert):
            found.append(f"line {node.lineno}: assert outside tests")
    return found + (broken_promises(tree) if in_package else [])


def broken_promises(tree: ast.Module) -> list[str]:
    """What a module's public face lacks."""
    found = [] if ast.get_docstring(tree) else ["no module docstring"]
    for function in public_functions(tree.body):
        if function.args.kwarg:
            found.append(f"{function.name} takes **{function.args.kwarg.arg}")
        bare = [argument.arg for argument in parameters(function) if argument.annotation is None]
        if bare or function.returns is None:
            found.append(f"{function.name} lacks annotations: {', '.join(bare) or 'its result'}")
        if not ast.get_docstring(function) and not is_stub(function):
            found.append(f"{function.name} has no docstring")
    return found


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_the_budgets(path: Path) -> None:
    assert broken_budgets(path.read_text(encoding="utf-8"), in_package=path in PACKAGE) == []


def test_there_are_files_to_check() -> None:
    assert len(PACKAGE) > 10


LONG_FUNCTION = '"""Doc."""\ndef f() -> None:\n    """Doc."""\n' + "    pass\n" * 59


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        ('"""Doc."""\n' * 401, "401 lines, at most 400"),
        (LONG_FUNCTION, "f has 61 lines, at most 60"),
        ('"""D."""\ndef _f(a, b, c, d, e, f, g, h, i): ...', "_f has 9 parameters, at most 8"),
        ('"""D."""\nfrom os import *', "line 2: import *"),
        ('"""D."""\nassert True', "line 2: assert outside tests"),
        ("x = 1", "no module docstring"),
        ('"""D."""\ndef f(**options: int) -> None:\n    """D."""', "f takes **options"),
        ('"""D."""\ndef f(a) -> None:\n    """D."""', "f lacks annotations: a"),
        ('"""D."""\nclass C:\n    def f(self, a: int):\n        """D."""', "f lacks annotations: its result"),
        ('"""D."""\ndef f() -> None:\n    pass', "f has no docstring"),
    ],
)
def test_each_budget_is_noticed(source: str, finding: str) -> None:
    assert broken_budgets(source, in_package=True) == [finding]


def test_self_is_not_counted_and_private_names_are_free() -> None:
    source = '"""D."""\nclass C:\n    def _f(self, a, b, c, d, e, f, g, h): ...\ndef _g(**k): ...\n'
    assert broken_budgets(source, in_package=True) == []
