"""What the docstrings say: short sentences everywhere, and of public names everything that a caller
needs: arguments, results and fields."""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from pathlib import Path

import pytest

import lorakit as lk

ROOT = Path(__file__).parent.parent
FILES = [
    path
    for top in ("lorakit", "kernels", "tests", "benchmarks", "examples")
    for path in sorted((ROOT / top).rglob("*.py"))
    # but a link to kernels/, if it is there, and the faults that are planted below
    if not path.is_relative_to(ROOT / "lorakit" / "kernels") and path != Path(__file__)
]
PUBLIC = {f"lorakit.{name}": getattr(lk, name) for name in lk.__all__}
PUBLIC |= {f"lorakit.kernels.{name}": getattr(lk.kernels, name) for name in lk.kernels.__all__}
CONFIGS = [value for name, value in PUBLIC.items() if name.endswith("Config")]

PREPOSITION = re.compile(
    r"(Of|In|With|From|By|Where|To|For|At|On|As|Within|Beside|Without|After|Before|Under|Over"
    r"|Against|Between|Below|Beyond)\b"
)
FRAGMENT = re.compile(r"The same\b|\S+'s\.$")  # "The same for k.", "cpu.cpp's."
WORDS = re.compile(r"\b(anew|lest|alike|anyhow)\b", re.IGNORECASE)


# ---- the checks ----


def unlike_speech(source: str) -> list[str]:
    """Docstrings of a file that begin as no spoken sentence does, and words that nobody says."""
    said = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if PREPOSITION.match(text) or FRAGMENT.match(text):
                said.append(f"{getattr(node, 'name', 'the file')}: {text.splitlines()[0]}")
    said += [f"the word {word}" for word in WORDS.findall(source)]
    return said


def first_line(text: str | None) -> list[str]:
    """What is wrong with the first line of a public docstring."""
    if not text:
        return ["no docstring"]
    line = inspect.cleandoc(text).splitlines()[0]
    said = []
    if not line.endswith("."):
        said.append("the first line does not end in a period")
    if re.search(r"[.!?] [A-Z]", line):
        said.append("the first line is more than one sentence")
    if PREPOSITION.match(line) or FRAGMENT.match(line):
        said.append("the first line is no spoken sentence")
    return said


def section(text: str, name: str) -> str:
    """The indented lines below `name:` of a docstring in google's style; "" if there are none."""
    found = re.search(rf"^{name}:\n((?:[ ]+.*\n?|\n)+)", inspect.cleandoc(text), re.MULTILINE)
    return textwrap.dedent(found[1]) if found else ""


def entries(text: str) -> set[str]:
    """The names that the lines of a section explain: "x: ..", "q, k: .." or "*rows: ..."."""
    found = re.findall(r"^([*\w]+(?:, [*\w]+)*)(?: \([^)]*\))?:", text, re.MULTILINE)
    return {name.strip("*") for names in found for name in names.split(", ")}


def results(function) -> set[str]:
    """Which of "Returns" and "Yields" a function's docstring needs: it gives something back."""
    if inspect.signature(function).return_annotation in (None, "None"):
        return set()
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    found, inner = set(), [*tree.body]
    while inner:
        node = inner.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Return) and not (
            node.value is None
            or (isinstance(node.value, ast.Constant) and node.value.value is None)
        ):
            found.add("Returns")
        if isinstance(node, ast.YieldFrom | ast.Yield):
            found.add("Yields")
        inner += ast.iter_child_nodes(node)
    # what a context manager yields without a value gives nothing to its caller
    bare = re.search(r"^\s*yield\s*$", inspect.getsource(function), re.MULTILINE)
    return found - ({"Yields"} if bare else set())


def function_faults(function) -> list[str]:
    """What a caller of a public function is not told."""
    function = inspect.unwrap(function)
    text = function.__doc__
    said = first_line(text)
    if not text:
        return said
    named = entries(section(text, "Args"))
    parameters = [name for name in inspect.signature(function).parameters if name != "self"]
    said += [f"Args: does not name {name}" for name in parameters if name not in named]
    said += [f"Args: names {name}, which is none" for name in sorted(named - set(parameters))]
    needed = results(function)
    if needed and not any(section(text, name) for name in ("Returns", "Yields")):
        said.append(f"{needed.pop()}: is missing")
    return said


def undocumented_fields(config: type) -> list[str]:
    """The fields of a dataclass that neither a text below them nor "Attributes:" explains."""
    told = set()
    for cls in config.__mro__[:-1]:
        if not dataclasses.is_dataclass(cls):
            continue
        told |= entries(section(cls.__doc__ or "", "Attributes"))
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for node, after in itertools.pairwise(body):
            text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(node, ast.AnnAssign) and text and isinstance(after.value.value, str):
                told.add(node.target.id)
    return [f.name for f in dataclasses.fields(config) if f.name not in told]


# ---- what they find in lorakit ----


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_docstrings_are_spoken_sentences(path):
    assert not unlike_speech(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstrings_tell_the_caller_everything(name):
    value = PUBLIC[name]
    if inspect.isfunction(value):
        assert not function_faults(value)
    elif inspect.isclass(value) or inspect.ismodule(value):
        assert not first_line(value.__doc__)


@pytest.mark.parametrize("config", CONFIGS, ids=[config.__name__ for config in CONFIGS])
def test_every_field_of_a_setting_is_explained(config):
    assert dataclasses.is_dataclass(config)
    assert not undocumented_fields(config)


# ---- what they find where something is planted ----


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ('def f():\n    """Of every layer: its rank."""\n', ["f: Of every layer: its rank."]),
        ('class A:\n    """The same for k."""\n', ["A: The same for k."]),
        ('async def f():\n    """cpu.cpp\'s."""\n', ["f: cpu.cpp's."]),
        ('"""With a cache."""\n', ["the file: With a cache."]),
        ("x = 1  # read anew, and alike\n", ["the word anew", "the word alike"]),
        ('def f():\n    """Offset of the row."""\n', []),
        ('def f():\n    """Forward and backward, for the same rows."""\n', []),
    ],
)
def test_a_planted_fragment_is_found(source, said):
    assert unlike_speech(source) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, ["no docstring"]),
        ("Return the rank", ["the first line does not end in a period"]),
        ("Return the rank. Or none.", ["the first line is more than one sentence"]),
        ("For k.", ["the first line is no spoken sentence"]),
        ("Return the rank.\n\n    From the config.", []),
    ],
)
def test_a_planted_first_line_is_found(text, said):
    assert first_line(text) == said


def silent(x, *rows, **options):
    """Return the sum."""
    return x


def partly(q, k, v):
    """Add up.

    Args:
        q, k: Two of the parts,
            which: go on here.
        w (int): No parameter.

    Raises:
        ValueError: Never.
    """
    yield q


def fine(x, *rows, **options):
    """Return the sum.

    Args:
        x: A number.
        *rows: More of them.
        **options: What else there is.

    Returns:
        The sum.
    """
    return x


def without_result(self) -> None:
    """Do it."""

    def inner():
        return 1

    return print(inner())


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            silent,
            [
                "Args: does not name x",
                "Args: does not name rows",
                "Args: does not name options",
                "Returns: is missing",
            ],
        ),
        (
            partly,
            ["Args: does not name v", "Args: names w, which is none", "Yields: is missing"],
        ),
        (fine, []),
        (without_result, []),
    ],
)
def test_a_planted_silence_is_found(function, said):
    assert function_faults(function) == said


@dataclasses.dataclass
class Base:
    """Settings.

    Attributes:
        a: The first.
    """

    a: int = 0
    b: int = 0


@dataclasses.dataclass
class Inherited(Base):
    """More settings."""

    c: int = 0
    """The third."""
    d: int = 0


def test_a_planted_field_is_found():
    assert undocumented_fields(Inherited) == ["b", "d"]
