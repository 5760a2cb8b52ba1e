"""The benchmarks as a user runs them, and all that the GPU's one does, at tiny sizes on the CPU.
What they measure is not judged here.
"""

import csv
import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorakit as lk
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
def test_full(tiny_dir):
    """All sides begin with the same loss, and end with the same one after three steps."""
    options = ["--dtype", "float32", "--layers", "1", "--length", "16", "--steps", "1"]
    command = [sys.executable, BENCHMARKS / "full.py", tiny_dir, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    _, _, *rows = done.stdout.splitlines()
    assert [row[:28].strip() for row in rows] == [
        "lorakit", "lorakit, 8-bit state", "transformers, torch's AdamW"
    ]  # fmt: skip
    first, last = zip(*(map(float, row.split()[-2:]) for row in rows), strict=True)
    assert max(first) - min(first) < 1e-3
    assert max(last) - min(last) < 1e-2


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
    """The programs for a GPU as modules, which import each other by name."""

    def __init__(self, monkeypatch):
        names = "cases", "kernels", "sides", "shapes", "steps", "gpu_report", "cost_model", "gpu"
        for name in names:
            spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
            setattr(self, name, module)
        self.sizes = self.cases.Sizes(*TINY)

    def plan(self, folder, providers, only="", seconds=600.0):
        """The run of the GPU's program on this CPU."""
        setting = self.cases.Setting(CPU, torch.float32, self.sizes)
        clock = self.kernels.Clock(CPU, 0.0, 2)
        record = self.gpu_report.Record(folder / "gpu.jsonl")
        files = folder / "gpu.md", folder / "gpu.png"
        end = time.monotonic() + seconds
        return self.gpu.Run(setting, 1, [6, 24], providers, clock, only, record, *files, end)

    def run(self, folder, providers, parts, only=""):
        """Its exit code and its report."""
        run = self.plan(folder, providers, only)
        code = self.gpu.run_parts(run, parts)
        assert run.picture.read_bytes().startswith(b"\x89PNG")
        return code, run.report.read_text()


@pytest.fixture
def programs(monkeypatch):
    return Programs(monkeypatch)


def cells(report):
    """The rows of all its tables."""
    lines = [line.strip("| ").split(" | ") for line in report.splitlines() if line[:2] == "| "]
    return [line for line in lines if line[0] != "---"]


def test_every_op(programs, tmp_path):
    """Liger cannot run here: its rows say so, and nothing else minds."""
    providers = [name for name in programs.kernels.available(CPU) if name != "torch.compile"]
    code, report = programs.run(tmp_path, [*providers, "Liger"], ["ops", "products"])
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
    assert len(products) == 2


@pytest.fixture
def known_gpu(programs, monkeypatch):
    """This CPU has the name of a GPU that the cost model knows."""
    monkeypatch.setattr(programs.gpu, "gpu_name", lambda device: "NVIDIA H100 80GB HBM3")


@pytest.mark.slow
def test_the_steps(programs, tmp_path, known_gpu, monkeypatch):
    """Dense and packed, with what a CPU has of their figures, and the prediction for a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setitem(programs.steps.PROVIDERS, "lorakit triton", programs.steps.PROVIDERS[
        "lorakit cpu"])  # fmt: skip
    names = ["lorakit triton", "lorakit reference", "PEFT, bitsandbytes"]
    code, report = programs.run(tmp_path, names, ["steps", "packed"])
    assert code == 0, report
    titles, *rows = (row for row in cells(report))
    rows = [dict(zip(titles, row, strict=True)) for row in rows if row != titles]
    assert [(row["provider"], row["tokens"]) for row in rows[:6]] == [
        ("lorakit triton", "6"), ("lorakit triton", "24"), ("PEFT, bitsandbytes", "6"),
        ("PEFT, bitsandbytes", "24"), ("lorakit reference", "6"), ("lorakit reference", "24"),
    ]  # fmt: skip
    assert [row["rows"] for row in rows] == ["dense"] * 6 + ["packed"] * 6
    for row in rows:
        assert all(float(row[name]) > 0 for name in ("ms", "p20", "p80", "host ms", "tokens/s"))
        assert {row["busy ms"], row["launches"], row["peak MB"]} == {"-"}
        assert (row["model ms"] != "-") == (row["provider"] == "lorakit triton")


def test_a_failure_of_ours_is_the_exit_code(programs, tmp_path):
    code, report = programs.run(tmp_path, ["lorakit triton", "torch"], ["ops"], "swiglu")
    assert code == 1
    assert "swiglu 5x128, lorakit triton: RuntimeError: backend 'triton' is forced" in report
    assert [row[:3] for row in cells(report) if row[0] == "swiglu"] == [
        ["swiglu", "5x128", "torch"]
    ]
    assert programs.run(tmp_path, ["lorakit triton"], ["steps"])[0] == 1


def test_a_case_that_cannot_be_made(programs, tmp_path, monkeypatch):
    def broken(setting):
        raise MemoryError("no room\nat all")
        yield

    monkeypatch.setattr(
        programs.kernels, "CASES", {broken: ("norm",), programs.cases.norms: ("rms_norm",)}
    )
    code, report = programs.run(tmp_path, ["torch"], ["ops"], "norm")
    assert code == 1
    assert "broken , lorakit: MemoryError: no room\n" in report
    assert any(row[0] == "rms_norm" for row in cells(report))


# ---- a run that is cut off ----------------------------------------------------------------------


def test_every_row_is_on_disk_at_once(programs, tmp_path, monkeypatch):
    """Whoever kills a run finds what it had measured, and the next run can go on from it."""
    run = programs.plan(tmp_path, [])

    def rows(run, bandwidth):
        for i in range(3):
            yield programs.gpu.StepRow(f"lorakit {i}", i, ms=1.0)
            found = run.record.parts()["steps"].rows
            assert [row.tokens for row in found] == list(range(i + 1))
            assert f"| lorakit {i} |" in run.report.read_text()
        raise KeyboardInterrupt

    monkeypatch.setitem(programs.gpu.MEASURED, "steps", rows)
    with pytest.raises(KeyboardInterrupt):
        programs.gpu.run_parts(run, ["steps"])
    with open(run.record.path, "a", encoding="utf-8") as file:
        file.write('{"part": "steps", "prov')  # killed while it wrote
    assert len(run.record.parts()["steps"].rows) == 3
    run.record.begin("ops", "elsewhere")
    assert len(run.record.parts()["steps"].rows) == 3
    assert run.record.parts()["ops"].heading == "elsewhere"


def test_when_the_time_is_over(programs, tmp_path, monkeypatch):
    """No row is begun, and a part that was not begun keeps the rows of an earlier run."""
    run = programs.plan(tmp_path, ["torch"], "rms_norm")
    programs.gpu.run_parts(run, ["ops"])
    before = run.record.parts()["ops"].rows
    late = programs.plan(tmp_path, ["torch"], seconds=programs.gpu.RESERVE + 30)

    def rows(run, bandwidth):
        yield programs.gpu.StepRow("lorakit reference", 1, ms=1.0)
        run.end -= 31
        yield programs.gpu.StepRow("lorakit reference", 2, ms=1.0)
        pytest.fail("there was no time for a third one")

    monkeypatch.setitem(programs.gpu.MEASURED, "steps", rows)
    assert programs.gpu.run_parts(late, ["ops", "steps"]) == 0
    found = late.record.parts()
    assert [row.tokens for row in found["steps"].rows] == [1, 2]
    assert found["steps"].ended in late.report.read_text()
    assert found["ops"].rows == before


def test_a_part_measured_again_replaces_its_rows(programs, tmp_path):
    run = programs.plan(tmp_path, [])
    row = programs.gpu.StepRow("lorakit triton", 8, "packed", ms=2.0, busy_ms=1.5)
    for heading in ("first", "second"):
        run.record.begin("packed", heading)
        run.record.add("packed", row)
    found = run.record.parts()["packed"]
    assert (found.heading, len(found.rows)) == ("second", 1)
    # NaN is unlike itself, so that the texts are compared
    assert repr(found.rows[0]) == repr(row)


# ---- peers in a process of their own ------------------------------------------------------------


def test_peers_that_are_not_installed(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(programs.gpu, "ALONE", {"unsloth": ("no_such_package",)})
    code, report = programs.run(tmp_path, ["unsloth"], ["peers"])
    assert code == 0
    assert "Not installed: unsloth.\n" in report
    assert report.endswith("## Failed\n\nNothing.\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_peer_whose_process_fails(programs, tmp_path, monkeypatch):
    """Here it finds no GPU."""
    monkeypatch.setattr(programs.gpu, "ALONE", {"PEFT, Liger": ()})
    code, report = programs.run(tmp_path, ["PEFT, Liger"], ["peers"])
    assert code == 0
    assert "dense, PEFT, Liger: its process ended with exit code 2\n" in report


def test_the_process_of_a_peer(programs, tmp_path, monkeypatch):
    """What it writes, with PEFT in the place of the peers that no CPU runs."""
    monkeypatch.setitem(programs.gpu.PROVIDERS, "PEFT, Liger", programs.steps.peft_step)
    run = programs.plan(tmp_path, [])
    run.record.begin("peers", "here")
    programs.gpu.alone(run, "PEFT, Liger")
    found = run.record.parts()["peers"].rows
    assert [(row.rows, row.tokens) for row in found] == [
        ("dense", 6), ("dense", 24), ("packed", 6), ("packed", 24)
    ]  # fmt: skip
    assert all(row.ms > 0 and not row.error for row in found)


def test_work_of_the_device(programs):
    """Only what took place on the device counts, and no range that someone gave a name."""

    def event(kind, us, named=False):
        span = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(device_type=kind, time_range=span, is_user_annotation=named)

    cpu, gpu = programs.gpu.DeviceType.CPU, programs.gpu.DeviceType.CUDA
    events = [event(cpu, 50), event(gpu, 1000), event(gpu, 3000), event(gpu, 4000, named=True)]
    assert programs.gpu.work_of(events, 2) == (2.0, 1.0)


# ---- the rows of a step -------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [2048, 8192])
def test_packed_rows(programs, tokens):
    rows = programs.steps.make_rows("packed", tokens, 1000)
    lengths = [len(ids) for ids, _ in rows]
    assert sum(lengths) == tokens
    # whole tokens, of 2,048 and more
    assert tokens / (len(rows) * max(lengths)) == pytest.approx(0.55, abs=0.002)
    learned = sum(label != -100 for _, labels in rows for label in labels)
    assert learned / tokens == pytest.approx(0.4, abs=0.002)
    for ids, labels in rows:
        prompt = labels.count(-100)
        assert labels == [-100] * prompt + ids[prompt:]
    [(ids, labels)] = programs.steps.make_rows("dense", tokens, 1000)
    assert len(ids) == tokens
    assert ids == labels


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_steps_compute_the_same_loss(programs, kind):
    """lorakit's packed rows beside transformers' padded ones, of the same weights."""
    setting = programs.cases.Setting(CPU, torch.float32, programs.sizes)
    rows = programs.steps.make_rows(kind, 48, 67)
    model = programs.steps.decoder(setting, 2)
    found = programs.steps.our_loss(setting, model, rows)().item()
    theirs = AutoModelForCausalLM.from_config(programs.steps.llama(setting, 2), dtype=torch.float32)
    theirs.load_state_dict(lk.merge_and_unload(model).state_dict())  # new adapters add nothing
    expected = programs.steps.peers_loss(setting, theirs, rows)().item()
    assert found == pytest.approx(expected, rel=1e-5)  # fp32 sums in another order


# Of a packed embedding beside the dense one that it came from; and bitsandbytes packs what was
# rounded to bf16 before, so that some values get the next code.
TOLERANCES = {"nf4 rows": 0.15, "nf4 to bfloat16": 0.05}


@pytest.mark.parametrize("make", ["norms", "rotation", "attentions", "delta_nets", "activations",
                                  "losses", "heads", "quantization", "products",
                                  "adapters"])  # fmt: skip
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
        for peer in case.peers.keys() - {*programs.cases.GPU_ONLY} - programs.cases.WAYS.keys():
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

    few_rows = programs.gpu_report.few_rows
    assert few_rows(found([1, 2, 4, 8], [3, 3, 3, 3], [5, 5, 5, 5])) == (2, 8)
    assert few_rows(found([1, 2, 4, 8], [3, 3, 4, 6], [5, 5, 5, 5])) == (4, 4)
    assert few_rows(found([6, 6, 6, 6], [3, 3, 9, 3], [5, 5, 5, 5])) == (0, 2)
    assert few_rows(found([6, 6, 6, 6], [6, 6, 6, 6], [5, 5, 5, 5])) == (0, 0)
    assert few_rows({"dequantize, torch": {1: 5.0}}) is None


def test_the_report_of_the_gpu_is_of_its_rows(programs):
    parts = programs.gpu_report.Record(BENCHMARKS / "gpu.jsonl").parts()
    assert programs.gpu_report.markdown(parts) == (BENCHMARKS / "gpu.md").read_text()
    assert all(part.heading for part in parts.values())


def test_the_docs_quote_the_report_of_the_gpu():
    root = BENCHMARKS.parent
    docs = (root / "docs" / "kernels.md").read_text().partition("## On a GPU")[2]
    quoted = [line for line in docs.partition("## Proven")[0].splitlines() if line[:2] == "| "]
    report = (root / "benchmarks" / "gpu.md").read_text().splitlines()
    assert len(quoted) > 4
    assert set(quoted) <= set(report)
