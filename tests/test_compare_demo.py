"""The demo of comparisons: its rows, and whole in `make test-all`."""

import importlib.util
import json
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

import lorakit as lk

PROGRAM = Path(__file__).parent.parent / "examples" / "compare_demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("compare_demo", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_of_three_tasks(demo, tmp_path):
    (tmp_path / "email").mkdir()
    (tmp_path / "email" / "m.py").write_text(
        "class A:\n"
        "    def read(self, size=-1):\n"
        '        """Read some bytes now.\n\n        More.\n        """\n'
        "        return self.file.read(size)\n"
    )
    (tmp_path / "email" / "broken.py").write_text("def (")
    rows = demo.task_rows(tmp_path, 5, 0)
    assert rows["package"] == []  # there is no row of another class
    assert rows["signature"] == [
        {
            "prompt": "def read(self, size=-1):\nParts:",
            "completion": " name: read; argument: self; argument: size",
        }
    ]
    [row] = rows["describe"]
    assert row["completion"] == " Read some bytes now."
    assert row["prompt"].startswith("def read(self, size=-1):\n    return self.file")


@pytest.fixture(scope="module")
def rows(demo):
    return demo.task_rows(Path(sysconfig.get_paths()["stdlib"]), 600, 0)


def test_rows_of_the_standard_library(rows):
    assert {name: len(found) > 400 for name, found in rows.items()} == {
        "package": True, "signature": True, "describe": True,
    }  # fmt: skip
    classes = Counter(row["completion"] for row in rows["package"])
    assert len(classes) == 4
    assert len(set(classes.values())) == 1
    for found in rows.values():
        assert len({row["prompt"] for row in found}) == len(found)
        assert not any(row["prompt"].endswith(" ") for row in found)


@pytest.mark.slow
def test_the_whole_comparison(smollm2, tmp_path):
    """A short one: each task is learned by at least one of the learning rates."""
    command = [sys.executable, PROGRAM, smollm2, "--output-dir", tmp_path, "--rows", "320"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "comparison.json").read_text())
    assert len(values["runs"]) == 9
    for task in values["tasks"]:
        before, *after = [row["scores"][task["metrics"][0]]["value"] for row in task["rows"]]
        assert max(after) > before
        assert task["rows"][0]["export"]["q8_0"]["bytes"] > 100e6
    assert lk.read_comparison(tmp_path).values == values
    assert "signature" in (tmp_path / "comparison.html").read_text(encoding="utf-8")
