"""Who imports what (the table of the design), and what `import lorakit` costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDARD = set(sys.stdlib_module_names) | {"torch", "tqdm"}
FOREIGN = {"transformers", "peft", "bitsandbytes", "trl", "unsloth", "liger_kernel", "accelerate"}

ALLOWED = {
    "aliases": set(),
    "config": {"aliases"},
    "families": set(),
    "model_config": {"config", "families"},
    "rope": {"model_config"},
    "files": {"config"},
    "hub": {"config", "files", "huggingface_hub"},
    "gguf": {"config", "model_config", "rope", "gguf", "numpy"},
    "tokenizer": {"config", "files", "hub", "gguf", "tokenizers", "jinja2"},
    "metrics": {"config"},
    "scoring": {"config", "data", "formats", "generation", "metrics", "model", "tokenizer"},
    "memory": set(),
    "recompute": set(),
    "model": {"kernels", "config", "model_config", "recompute", "rope"},
    "quantization": {"kernels", "config"},
    "targets": {"config"},
    "initialization": {"config"},
    "combination": {"config", "attached", "lora"},
    "attached": {"config"},
    "lora": {"kernels", "config", "attached"},
    "embeddings": {"kernels", "config", "attached", "lora"},
    "trained_modules": {"attached", "lora"},
    "ia3": {"config", "attached", "lora"},
    "vera": {"config", "lora"},
    "adalora": {"config", "attached", "lora"},
    "prompts": {"config", "attached", "model", "model_config", "tokenizer"},
    "attaching": {
        "config",
        "attached",
        "targets",
        "initialization",
        "lora",
        "embeddings",
        "trained_modules",
        "ia3",
        "vera",
        "adalora",
        "prompts",
        "model",
        "kernels",
    },
    "merging": {
        "config",
        "attached",
        "embeddings",
        "lora",
        "model",
        "quantization",
        "tensors",
        "checkpoint",
    },
    "checkpoint": {
        "config",
        "families",
        "model_config",
        "tokenizer",
        "files",
        "tensors",
        "model",
        "quantization",
        "kernels",
        "attached",
        "memory",
        "hub",
        "gguf",
    },
    "tensors": {"config", "files", "kernels", "safetensors"},
    "adapter": {
        "config",
        "files",
        "attached",
        "experts",
        "lora",
        "embeddings",
        "trained_modules",
        "ia3",
        "vera",
        "adalora",
        "prompts",
        "model",
        "tensors",
    },
    "adapter_loading": {
        "config",
        "files",
        "adapter",
        "attached",
        "attaching",
        "embeddings",
        "experts",
        "vera",
        "adalora",
        "prompts",
        "model",
        "tensors",
    },
    "loftq_initialization": {"config", "lora", "checkpoint", "initialization"},
    "eva_initialization": {"config", "attached", "lora", "initialization"},
    "experts": {"config"},
    "adapter_files": {"adapter", "config", "experts", "files", "tensors"},
    "conversion": {
        "adapter",
        "adapter_files",
        "checkpoint",
        "config",
        "experts",
        "files",
        "kernels",
        "model_config",
        "tensors",
    },
    "report": {"config", "files", "kernels", "quantization", "checkpoint", "matplotlib"},
    "formats": {"config"},
    "row_files": {"config", "formats", "pyarrow"},
    "rows": {"config", "files", "formats", "row_files"},
    "turns": {"config", "tokenizer"},
    "data": {"config", "formats", "rows", "tokenizer", "turns"},
    "packing": {"config", "data"},
    "inspection": {"config", "data", "formats", "tokenizer"},
    "paging": {"config"},
    "paged_state": {"config", "kernels", "paging"},
    "optim": {"config", "kernels", "paged_state"},
    "plots": {"config", "files", "matplotlib"},
    "decoding": {"kernels", "model", "model_config", "rope", "attached"},
    "generation": {"config", "model", "decoding", "tokenizer", "tokenizers"},
    "evaluation": {
        "config",
        "data",
        "model",
        "packing",
        "preference",
        "rows",
        "scoring",
        "tokenizer",
    },
    "row_order": {"config", "data", "packing"},
    "run_log": {"config", "files"},
    "trainer": {
        "adapter",
        "attached",
        "config",
        "data",
        "eva_initialization",
        "evaluation",
        "files",
        "loftq_initialization",
        "lora",
        "memory",
        "model",
        "optim",
        "row_order",
        "rows",
        "run_log",
        "run_state",
        "scoring",
        "tokenizer",
    },
    "preference": {"attached", "config", "model"},
    "run_state": {"attached", "config", "files", "optim", "tensors"},
    "profiling": {"kernels", "config", "model", "tokenizer", "trainer"},
    "cli": {"lorakit", "yaml"},
    "__main__": {"cli"},
    "__init__": set(),
}


def imports(path: Path) -> set[str]:
    """Top names of all imports in a file; relative ones by their first part."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            if node.module:
                found.add(node.module.partition(".")[0])
            else:
                found |= {alias.name for alias in node.names}
    return found


def test_compat_imports_nothing_foreign():
    """Its parts may import any module of lorakit, and no module of lorakit imports them."""
    paths = sorted((ROOT / "lorakit" / "compat").rglob("*.py"))
    assert len(paths) >= 2
    for path in paths:
        assert imports(path) - STANDARD <= set(ALLOWED) | {"lorakit"}, path
        assert "kernels" not in imports(path)


@pytest.mark.parametrize("path", sorted((ROOT / "lorakit").glob("*.py")), ids=lambda p: p.stem)
def test_modules_import_what_the_design_allows(path):
    assert (
        imports(path) - STANDARD <= ALLOWED[path.stem] - {path.stem} | {"gguf"} & ALLOWED[path.stem]
    )


def test_kernels_import_torch_only():
    for path in (ROOT / "kernels").rglob("*.py"):
        inside = {p.stem for folder in (ROOT / "kernels", path.parent) for p in folder.iterdir()}
        assert imports(path) - STANDARD <= inside, path
        assert "lorakit" not in imports(path)
        loads_triton = re.search(
            r"^\s*(import triton|from triton)\b", path.read_text(), re.MULTILINE
        )
        assert bool(loads_triton) == (path.name == "triton.py"), path


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_programs_use_the_public_api(folder):
    for path in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("lorakit"), path


def test_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import lorakit;"
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"lorakit"} | {
        m for m in done.stdout.split() if m.startswith(("__editable__", "_lorakit", "_editable"))
    }


def test_training_and_loading_import_no_peer(tiny_dir):
    code = (
        f"import sys, lorakit as lk; path = {str(tiny_dir)!r};"
        "m = lk.load_model(path, quantize='nf4'); t = lk.load_tokenizer(path);"
        "lk.generate(lk.attach(m), t, 'x', max_new_tokens=1); lk.train;"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & (FOREIGN | {"triton", "matplotlib", "gguf", "pyarrow"})


def test_compat_imports_no_peer():
    code = "import sys, lorakit.compat.peft; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in done.stdout.split()} & FOREIGN


def test_every_public_name_exists():
    import lorakit as lk

    for name in lk.__all__:
        assert getattr(lk, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lk.nothing  # noqa: B018
    assert set(lk.__all__) <= set(dir(lk))
