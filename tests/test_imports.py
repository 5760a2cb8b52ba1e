"""The order of the rooms: who may import what."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDARD = set(sys.stdlib_module_names) | {"torch", "tqdm"}
FOREIGN = {"transformers", "peft", "bitsandbytes", "trl", "unsloth", "liger_kernel", "accelerate"}

# A room imports from itself and from rooms on lines before its own; the set holds the libraries
# that it may import beside torch, tqdm and Python's own.
ORDER = [
    {"kernels": {"triton"}},
    {"config": set()},
    {"files": {"huggingface_hub", "safetensors", "numpy", "gguf", "yaml"}},
    {"models": {"tokenizers", "jinja2", "numpy", "gguf"}},
    {"adapters": set(), "data": {"datasets", "numpy", "pyarrow"}},
    {"inference": {"tokenizers", "llguidance"}},
    {"serving": {"starlette", "uvicorn", "prometheus_client"}},
    {"evaluation": {"lm_eval", "matplotlib", "sacrebleu", "transformers"}},
    {"export": {"numpy", "xllamacpp", "yaml"}},
    {"training": {"jsonschema", "mlflow", "referencing", "tensorboard", "trackio", "wandb"}},
    {"comparison": {"yaml"}},
    {"board": {"matplotlib", "numpy", "starlette", "uvicorn", "yaml"}},
    {"compat": set()},
]
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
LIBRARIES = {room: found for rooms in ORDER for room, found in rooms.items()}
# The command line, the examples and the benchmarks use the public API, `import lorakit as lk`.
PUBLIC_ONLY = {"cli": set()}


def imported(tree: ast.AST, package: str) -> list[tuple[str, str | None]]:
    """Return (module, name) of every import in a file of `package`, absolute; name is None for
    `import module`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
            module = ".".join([*parents] * bool(node.level) + [node.module] * bool(node.module))
            found += [(module, alias.name) for alias in node.names]
    return found


def violations(source: str, package: str) -> list[str]:
    """Return a sentence for every import in a file of `package` that the order of rooms forbids."""
    tree, said = ast.parse(source), []
    room = package.split(".")[1] if "." in package else ""
    for module, name in imported(tree, package):
        top, *inner = module.split(".")
        if top in FOREIGN - LIBRARIES.get(room, set()):
            said.append(f"{module} is for tests and benchmarks")
        elif top != "lorakit":
            allowed = LIBRARIES.get(room, PUBLIC_ONLY.get(room, set()))
            if top not in STANDARD | allowed:
                said.append(f"{room} may not import {module}")
        else:
            other = inner[0] if inner else name if name in FLOOR or name in PUBLIC_ONLY else None
            if room in PUBLIC_ONLY:
                if other not in (None, room):
                    said.append(f"{room} uses the public API, not lorakit.{other}")
            elif other is None:
                said.append(f"{room} imports lorakit itself, which stands after every room")
            elif other != room and not (other in FLOOR and FLOOR[other] < FLOOR[room]):
                said.append(f"{room} imports {other}, which does not stand before it")
        private = name is not None and name.startswith("_") and not name.startswith("__")
        if private and top == "lorakit":
            said.append(f"{name} is private to {module}")
    modules = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.level or str(node.module).startswith("lorakit"))
        for alias in node.names
        if alias.name[0].islower()
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if private and node.value.id in modules:
                said.append(f"{node.attr} is private to {node.value.id}")
    return said


def modules() -> list[tuple[Path, str]]:
    """Return every file of the package with the name of the package that it lies in."""
    found = []
    for top in (ROOT / "lorakit", ROOT / "kernels"):
        for path in sorted(top.rglob("*.py")):
            parts = path.parent.relative_to(ROOT).parts
            parts = ("lorakit", *parts) if parts[0] == "kernels" else parts
            found.append((path, ".".join(parts)))
    return found


FILES = [(path, package) for path, package in modules() if package != "lorakit"]


@pytest.mark.parametrize(
    ("path", "package"), FILES, ids=[str(path.relative_to(ROOT)) for path, _ in FILES]
)
def test_imports_keep_the_order_of_rooms(path, package):
    assert not violations(path.read_text(encoding="utf-8"), package)


def test_every_room_is_in_the_table():
    rooms = {package.split(".")[1] for _, package in FILES}
    assert rooms == set(FLOOR) | set(PUBLIC_ONLY)


@pytest.mark.parametrize(
    ("package", "line", "said"),
    [
        ("lorakit.models", "from lorakit.adapters.attach import attach", "imports adapters"),
        ("lorakit.adapters", "from lorakit.data.rows import read_rows", "imports data"),
        ("lorakit.data", "from lorakit.adapters.attach import attach", "imports adapters"),
        ("lorakit.training", "import lorakit.compat.peft", "imports compat"),
        ("lorakit.models", "from ..training import optim", "imports training"),
        ("lorakit.files", "from lorakit import models", "imports models"),
        ("lorakit.training", "import lorakit", "lorakit itself"),
        ("lorakit.kernels.ops.nf4", "from lorakit.config.errors import check", "imports config"),
        ("lorakit.kernels", "import numpy", "may not import numpy"),
        ("lorakit.config", "import yaml", "may not import yaml"),
        ("lorakit.training", "import peft", "for tests and benchmarks"),
        ("lorakit.training", "from transformers.models import llama", "for tests and benchmarks"),
        ("lorakit.training", "from lorakit.models.load import _secret", "_secret is private"),
        ("lorakit.kernels.ops.rope", "from ..nf4 import _secret", "_secret is private"),
        (
            "lorakit.training",
            "from lorakit.models import load\nload._secret()",
            "_secret is private",
        ),
        ("lorakit.cli", "from lorakit.training.train import train", "uses the public API"),
    ],
)
def test_a_planted_import_against_the_order_is_found(package, line, said):
    [found] = violations(line, package)
    assert said in found


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("lorakit.training", "from lorakit.models.load import load_model"),
        ("lorakit.models", "from lorakit import kernels"),
        ("lorakit.adapters.methods", "from lorakit.adapters.layers.lora import LoraLinear"),
        ("lorakit.cli", "import lorakit as lk\nfrom lorakit import LorakitError, __version__"),
        ("lorakit.cli", "from lorakit.cli.run_file import read_run_file"),
        ("lorakit.kernels.ops.rope", "from ... import dispatch\nfrom . import reference"),
    ],
)
def test_an_import_within_the_order_passes(package, line):
    assert not violations(line, package)


def test_only_files_named_triton_import_triton():
    for path, package in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        loads = any(module.split(".")[0] == "triton" for module, _ in imported(tree, package))
        assert loads == (path.name == "triton.py"), path


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_programs_use_the_public_api(folder):
    for path in (ROOT / folder).glob("*.py"):
        for module, name in imported(ast.parse(path.read_text(encoding="utf-8")), folder):
            assert name is None or not module.startswith("lorakit."), path


def test_compat_is_nobodys_foundation():
    for path, package in FILES:
        if not package.startswith("lorakit.compat"):
            for module, _ in imported(ast.parse(path.read_text(encoding="utf-8")), package):
                assert not module.startswith("lorakit.compat"), path
