"""The folders of the ops have the same names, and the public functions say what they take."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from lorakit import kernels

ROOT = Path(__file__).parents[2] / "kernels"
FOLDERS = sorted(path.name for path in (ROOT / "ops").iterdir() if (path / "__init__.py").exists())
ALLOWED = {"__init__.py", "reference.py", "cpu.py", "cpu.cpp", "triton.py"}
# What a folder has beside those: the parts that its backends share.
EXTRA = {
    "adamw": {"clipped.py", "remainder.py", "lists.py", "state.py"},
    "attention": {"documents.py", "flash.py", "sinks.py"},
    "cross_entropy": {"linear.py"},
    "decode": {"plan.py", "operands.py", "dots.h"},
    "delta_net": {"passes.py"},
    "experts": {"layers.py", "passes.py"},
    "frozen_linear": {"dense.py"},
    "gguf_blocks": {"fits.py", "layouts.py"},
    "lora_linear": {"float8.py", "passes.py", "spans.py", "straight_through.py", "tensors.py"},
    "nf4": {"tensor.py", "packed.h"},
    "products": {"terms.py", "sums.h", "pairs.h", "floats.h"},
    "rms_norm": {"row.h"},
    "rope": {"norms.py"},
    "swiglu": {"activation.py", "updates.py"},
}
FUNCTIONS = [name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))]
CLASSES = [name for name in kernels.__all__ if inspect.isclass(getattr(kernels, name))]


def files(folder: str) -> set[str]:
    return {path.name for path in (ROOT / "ops" / folder).iterdir() if path.is_file()}


def imports_ctypes(path: Path) -> bool:
    return "import ctypes" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_holds_the_op_its_reference_and_its_backends(folder):
    found = files(folder)
    assert {"__init__.py", "reference.py"} <= found
    assert found == (found & ALLOWED) | EXTRA.get(folder, set())
    assert "cpu.cpp" not in found or "cpu.py" in found


@pytest.mark.parametrize("folder", FOLDERS)
def test_ctypes_stays_in_cpu_py(folder):
    for path in (ROOT / "ops" / folder).glob("*.py"):
        assert path.name == "cpu.py" or not imports_ctypes(path), path


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_maths_stands_first(folder):
    """A formula, or a picture of the memory, set off from the text by four spaces."""
    module = importlib.import_module(f"lorakit.kernels.ops.{folder}")
    assert re.search(r"^    \S", module.__doc__, re.MULTILINE)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_function_hides_the_folder(folder):
    """`from lorakit.kernels.ops import rope` is the folder, whatever was imported before."""
    assert isinstance(getattr(kernels.ops, folder), ModuleType)
    assert not (ROOT / folder).exists()
    assert not isinstance(getattr(kernels, folder, None), ModuleType)


def section(doc: str, name: str) -> str:
    """The lines of a section of a docstring in Google's convention."""
    _, found, rest = doc.partition(f"\n{name}:\n")
    return re.split(r"\n(?=\S)", rest)[0] if found else ""


def named(text: str) -> set[str]:
    return set(re.findall(r"^    (\w+):", text, re.MULTILINE))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_tells_its_arguments_and_what_it_returns(name):
    function = inspect.unwrap(getattr(kernels, name))
    doc = inspect.getdoc(function)
    assert named(section(doc, "Args")) == set(inspect.signature(function).parameters)
    returns = inspect.signature(function).return_annotation
    if name != "use_backend":  # a context
        assert bool(section(doc, "Returns")) == (returns not in (None, "None"))
    tree = ast.parse(inspect.getsource(function))
    if any(isinstance(node, ast.Raise) for node in ast.walk(tree)):
        assert section(doc, "Raises")


@pytest.mark.parametrize("name", CLASSES)
def test_a_public_class_tells_its_parts(name):
    """What makes it; a dataclass tells that as its attributes."""
    doc = inspect.getdoc(getattr(kernels, name))
    told = named(section(doc, "Args")) or named(section(doc, "Attributes"))
    assert told == set(inspect.signature(getattr(kernels, name)).parameters)
