"""The microbenchmarks as a user runs them; what they measure is not judged here."""

import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM = [sys.executable, ROOT / "benchmarks" / "kernels.py"]


def test_rows_and_plot(tmp_path):
    options = ["--op", "nf4 quantize", "--device", "cpu", "--seconds", "0.01"]
    files = ["--csv", tmp_path / "rows.csv", "--plot", tmp_path / "rows.png"]
    done = subprocess.run([*PROGRAM, *options, *files], capture_output=True, text=True, check=True)
    with open(tmp_path / "rows.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["provider"] for row in rows} >= {"lorakit reference", "bitsandbytes"}
    assert all(float(row["ms"]) > 0 and float(row["gb_per_s"]) > 0 for row in rows)
    assert len(done.stdout.splitlines()) == len(rows) + 3
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_a_backend_that_does_not_run_here():
    options = ["--backend", "triton", "--device", "cpu"]
    done = subprocess.run([*PROGRAM, *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert "backend triton is not installed, or does not run on cpu" in done.stderr
