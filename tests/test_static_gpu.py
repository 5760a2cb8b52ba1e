"""The static budget: every Triton kernel, compiled for GPU targets, spills nothing, fits in shared
memory, and is no worse than the committed figures.
"""

import csv
import importlib
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
PROGRAM, BASELINE = ROOT / "benchmarks" / "static_gpu.py", ROOT / "benchmarks" / "static_gpu.csv"


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (r["provider"], r["op"], r["kernel"], r["target"], i): r for i, r in enumerate_equal(rows)
    }


def enumerate_equal(rows):
    """Rows with a number among those of the same op, kernel and target: rope launches one twice."""
    seen = {}
    for row in rows:
        key = row["provider"], row["op"], row["kernel"], row["target"]
        seen[key] = seen.get(key, -1) + 1
        yield seen[key], row


def no_worse(row, found):
    """No figure more than 5 % worse than the baseline's, registers by two more."""
    worse = {
        "registers": int(found["registers"]) > 1.05 * int(row["registers"]) + 2,
        "shared": int(found["shared"]) > 1.05 * int(row["shared"]),
        "wide": float(found["wide"]) < 0.95 * float(row["wide"]),
        "instructions": float(found["instructions"]) > 1.05 * float(row["instructions"]),
        "special": float(found["special"]) > 1.05 * float(row["special"]),
    }
    return [name for name, is_worse in worse.items() if is_worse]


def check(targets, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(PROGRAM.parent)
    static_gpu = importlib.import_module("static_gpu")
    chosen = [option for target in targets or static_gpu.TARGETS for option in ("--target", target)]
    subprocess.run(
        [sys.executable, PROGRAM, *chosen, "--csv", tmp_path / "found.csv"],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        check=True,
        capture_output=True,
    )
    found, rows = read(tmp_path / "found.csv"), read(BASELINE)
    targets = targets or static_gpu.TARGETS
    assert found.keys() == {key for key in rows if key[0] == "lorakit" and key[3] in targets}
    for key, figures in found.items():
        assert figures["spilled"] == "0", key
        assert int(figures["shared"]) <= static_gpu.SHARED_LIMIT[figures["target"]], key
        if version("triton").startswith("3.9."):  # what the baseline was compiled with
            assert not no_worse(rows[key], figures), (key, figures, rows[key])


def test_budget(tmp_path, monkeypatch):
    check(["sm_90", "gfx942"], tmp_path, monkeypatch)


@pytest.mark.slow
def test_budget_of_every_target(tmp_path, monkeypatch):
    check(None, tmp_path, monkeypatch)
