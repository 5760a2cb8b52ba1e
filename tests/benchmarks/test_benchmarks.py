"""The benchmarks as a user runs them, and all that the GPU's one does, at tiny sizes on the CPU.
What they measure is not judged here.
"""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorakit import kernels

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = [sys.executable, BENCHMARKS / "kernels.py"]
CPU = torch.device("cpu")
TINY = (5, 64, 128, 2, 1, 32, (67,), ((96, 64),), (1, 3), (10, 4100))


def test_rows_and_plot(tmp_path):
    options = ["--op", "rope", "--device", "cpu", "--seconds", "0.01"]
    files = ["--csv", tmp_path / "rows.csv", "--plot", tmp_path / "rows.png"]
    done = subprocess.run([*PROGRAM, *options, *files], capture_output=True, text=True, check=True)
    with open(tmp_path / "rows.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["provider"] for row in rows} >= {"lorakit reference", "torch"}
    assert all(float(row["ms"]) > 0 and float(row["gb_per_s"]) > 0 for row in rows)
    assert len(done.stdout.splitlines()) == len(rows) + 3
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_optimizers():
    command = [BENCHMARKS / "optimizers.py", "--values", "9000", "--tensors", "2", "--steps", "2"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=True, cwd=BENCHMARKS
    )
    rows = done.stdout.splitlines()[2:]
    assert len(rows) == 6
    assert not any("failed" in row for row in rows)


def test_a_backend_that_does_not_run_here():
    options = ["--backend", "triton", "--device", "cpu"]
    done = subprocess.run([*PROGRAM, *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert "backend triton is not installed, or does not run on cpu" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "sees no GPU; benchmarks/kernels.py measures a CPU" in done.stderr


class Programs:
    """benchmarks/cases.py, kernels.py and gpu.py as modules, which import each other by name."""

    def __init__(self, monkeypatch):
        for name in ("cases", "kernels", "gpu"):
            spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
            setattr(self, name, module)
        self.sizes = self.cases.Sizes(*TINY)

    def run(self, folder, providers, only=""):
        """The GPU's program on this CPU: its exit code and its report."""
        setting = self.cases.Setting(CPU, torch.float32, self.sizes)
        clock = self.kernels.Clock(CPU, 0.0, 2)
        files = folder / "gpu.md", folder / "gpu.png"
        code = self.gpu.run(setting, 1, [6], providers, clock, only, *files)
        assert files[1].read_bytes().startswith(b"\x89PNG")
        return code, files[0].read_text()


@pytest.fixture
def programs(monkeypatch):
    return Programs(monkeypatch)


def cells(report):
    """The rows of all its tables."""
    lines = [line.strip("| ").split(" | ") for line in report.splitlines() if line[:2] == "| "]
    return [line for line in lines if line[0] != "---"]


def test_every_op_and_the_step(programs, tmp_path):
    """Liger cannot run here: its rows say so, and nothing else minds."""
    providers = [name for name in programs.kernels.available(CPU) if name != "torch.compile"]
    code, report = programs.run(tmp_path, [*providers, "Liger"])
    assert code == 0
    rows = cells(report)
    setting = programs.cases.Setting(CPU, torch.float32, programs.sizes)
    for make, ops in programs.cases.CASES.items():
        for case in make(setting):
            assert case.op in ops
            if case.op == "frozen_linear":
                continue
            for op in case.passes:
                found = {row[2]: row for row in rows if row[:2] == [op, case.shape]}
                assert found.keys() >= {"lorakit reference"} | case.peers.keys() & set(providers)
                assert all(float(value) > 0 for row in found.values() for value in row[3:6])
                failed = f"- {op} {case.shape}, Liger: " in report
                assert failed == ("Liger" in case.peers)
    products = [row for row in rows if row[0] in ("lorakit cpu", "bitsandbytes")]
    assert len(products) == 3  # the step has bitsandbytes under PEFT's name
    steps = {row[0]: row for row in rows if len(row) > 4 and row[0].startswith(("lorakit", "PEFT"))}
    assert steps.keys() >= {"lorakit reference", "PEFT, bitsandbytes"}
    assert all(float(row[5]) > 0 for row in steps.values())


def test_a_failure_of_ours_is_the_exit_code(programs, tmp_path):
    code, report = programs.run(tmp_path, ["lorakit triton", "torch"], "swiglu")
    assert code == 1
    assert "swiglu 5x128, lorakit triton: RuntimeError: backend 'triton' is forced" in report
    assert [row[:3] for row in cells(report) if row[0] == "swiglu"] == [
        ["swiglu", "5x128", "torch"]
    ]


def test_a_case_that_cannot_be_made(programs, tmp_path, monkeypatch):
    def broken(setting):
        raise MemoryError("no room\nat all")
        yield

    monkeypatch.setattr(
        programs.kernels, "CASES", {broken: ("norm",), programs.cases.norms: ("rms_norm",)}
    )
    code, report = programs.run(tmp_path, ["torch"], "norm")
    assert code == 1
    assert "broken , lorakit: MemoryError: no room\n" in report
    assert any(row[0] == "rms_norm" for row in cells(report))


# Of a packed embedding beside the dense one that it came from; and bitsandbytes packs what was
# rounded to bf16 before, so that some values get the next code.
TOLERANCES = {"nf4 rows": 0.15, "nf4 to bfloat16": 0.05}


@pytest.mark.parametrize("make", ["norms", "rotation", "attentions", "activations", "losses",
                                  "heads", "quantization", "products", "adapters"])  # fmt: skip
def test_peers_compute_the_same(programs, make):
    """Outputs and gradients of every peer that a CPU runs, beside lorakit's."""
    torch.manual_seed(0)
    setting = programs.cases.Setting(CPU, torch.float32, programs.sizes)
    compared = 0
    for case in getattr(programs.cases, make)(setting):
        if case.op == "nf4 quantize":  # their state is another object; its values come next
            continue
        assert not (case.overwrites and case.peers)
        if not case.peers:
            continue

        def results(call, case=case):
            out = call(*case.inputs)
            out = out if isinstance(out, tuple) else (out,)
            given = [y.detach() for y in out]
            return [*given, *(torch.autograd.grad(out, case.inputs, given) if case.inputs else ())]

        with kernels.use_backend("reference"):
            expected = results(case.call)
        for peer in case.peers.keys() - {"Liger"} - programs.cases.WAYS.keys():
            for a, b in zip(results(case.peers[peer]), expected, strict=True):
                error = (a.float() - b.float()).norm() / b.float().norm()
                # fp32 products and sums in another order
                assert error <= TOLERANCES.get(case.op, 1e-5), (case.op, peer)
            compared += 1
    assert compared


def test_crossover(programs):
    def found(vector, tiles, dense):
        ways = {"lorakit vector": vector, "lorakit tiles": tiles, "dequantize, torch": dense}
        return {name: dict(zip((1, 2, 4, 8), ms, strict=True)) for name, ms in ways.items()}

    few_rows = programs.gpu.few_rows
    assert few_rows(found([1, 2, 4, 8], [3, 3, 3, 3], [5, 5, 5, 5])) == (2, 8)
    assert few_rows(found([1, 2, 4, 8], [3, 3, 4, 6], [5, 5, 5, 5])) == (4, 4)
    assert few_rows(found([6, 6, 6, 6], [3, 3, 9, 3], [5, 5, 5, 5])) == (0, 2)
    assert few_rows(found([6, 6, 6, 6], [6, 6, 6, 6], [5, 5, 5, 5])) == (0, 0)
    assert few_rows({"dequantize, torch": {1: 5.0}}) is None


def test_the_docs_quote_the_report_of_the_gpu():
    root = BENCHMARKS.parent
    docs = (root / "docs" / "kernels.md").read_text().partition("## On a GPU")[2]
    quoted = [line for line in docs.partition("## Proven")[0].splitlines() if line[:2] == "| "]
    report = (root / "benchmarks" / "gpu.md").read_text().splitlines()
    assert len(quoted) > 4
    assert set(quoted) <= set(report)
