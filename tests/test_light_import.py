"""What `import lorakit` and a first use import: no more than they need, and never a peer."""

import ast
import subprocess
import sys
from pathlib import Path

import lorakit
from tests.test_imports import FOREIGN, imported


def test_the_package_imports_two_small_modules_of_python():
    """`typing` alone would make `import lorakit` five times as slow."""
    tree = ast.parse(Path(lorakit.__file__).read_text(encoding="utf-8"))
    assert imported(tree, "lorakit") == [("importlib", None), ("warnings", None)]


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
