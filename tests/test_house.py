"""The size of what a reader has to hold in mind: files and functions stay short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    path
    for top in ("lorakit", "kernels")
    for path in sorted((ROOT / top).rglob("*.py"))
    if not path.is_relative_to(ROOT / "lorakit" / "kernels")  # a link to kernels/, if it is there
]
LINES_OF_A_FILE = 450
LINES_OF_A_FUNCTION = 60


def too_long(source: str) -> list[str]:
    """A line for the file, if it is too long, and for every function of it that is.

    A function is counted from its first decorator to its last line, with its docstring.
    """
    said = []
    lines = len(source.splitlines())
    if lines > LINES_OF_A_FILE:
        said.append(f"the file has {lines} lines")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start = min(each.lineno for each in [node, *node.decorator_list])
            lines = node.end_lineno - start + 1
            if lines > LINES_OF_A_FUNCTION:
                said.append(f"{node.name} in line {start} has {lines} lines")
    return said


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_files_and_functions_are_short(path):
    assert not too_long(path.read_text(encoding="utf-8"))


def function(lines: int, head: str = "def f():\n") -> str:
    return head + "    x = 1\n" * (lines - head.count("\n"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\n" * 451, ["the file has 451 lines"]),
        (function(61), ["f in line 1 has 61 lines"]),
        (function(61, '@g\ndef f():\n    """Say."""\n'), ["f in line 1 has 61 lines"]),
        (function(61, "async def f():\n"), ["f in line 1 has 61 lines"]),
        ("class A:\n    def f(self):\n" + "        x = 1\n" * 60, ["f in line 2 has 61 lines"]),
        (
            "def f():\n    def g():\n" + "        x = 1\n" * 60,
            ["f in line 1 has 62 lines", "g in line 2 has 61 lines"],
        ),
        (function(60), []),
        (function(60) * 7 + "x = 1\n" * 30, []),
    ],
)
def test_a_planted_length_is_found(source, said):
    assert too_long(source) == said
