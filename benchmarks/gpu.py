"""QLoRA steps and every op on a GPU, at the sizes of an 8B model, beside what others have for them.

    python benchmarks/gpu.py [--parts steps,packed] [--within 600] [--provider Liger] [--op rope]

    steps      forward, backward, clipping and AdamW of one row (`steps.py` says of what)
    packed     the same of ragged rows, which lorakit packs and the peers pad
    peers      both, of peers that change transformers and so get a process of their own
    ops        every op of `cases.py`; `kernels.py` says how they are timed
    products   a few rows times a packed matrix

They run in this order, the most important first, and every row is on disk as soon as it is there
(`gpu_report.py`). When the time is over, parts not begun keep the rows of an earlier run. The
peers are torch, torch.compile, Liger, bitsandbytes with PEFT, and unsloth, as far as they are
installed. A provider that fails is a row with its error, and the run goes on; the exit code is 1 if
one of lorakit's own failed. Each side of a step is built, timed and thrown away before the next, so
that its memory is its own.
"""

import argparse
import datetime
import gc
import importlib.util
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from cases import OURS, PEERS, RANK, WAYS, Setting, Sizes
from gpu_report import NOT_INSTALLED, PARTS, Record, StepRow, markdown, save_plot
from steps import ALONE, KINDS, PROVIDERS, Step, make_rows
from torch.autograd import DeviceType

from kernels import (
    HEADER,
    Clock,
    Row,
    all_rows,
    attempt,
    available,
    line,
    measure,
    surroundings,
)

LEAST = 30  # runs of every provider
PEER_SECONDS = 90.0  # that the process of a peer may take, its imports included
HOST_RUNS, PROFILED_RUNS = 7, 3
LAYERS, TOKENS = 4, (2048, 8192)  # of the step; with fewer tokens launching takes the time
RESERVE = 15.0  # s that a row may take: with less than that left, none is begun


def adapter_sizes(hidden: int, inner: int, kv: int, layers: int) -> tuple[int, ...]:
    """Values of A and B of every linear layer."""
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return tuple(RANK * n for shape in shapes for n in shape) * layers


LARGE = Sizes(
    tokens=4096, hidden=4096, inner=14336, heads=32, kv_heads=8, head_dim=128,
    vocabularies=(128256, 151936), matrices=((4096, 4096), (14336, 4096)),
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 512), trained=adapter_sizes(4096, 14336, 8 * 128, 32),
)  # fmt: skip


@dataclass
class Run:
    """What is measured, with what, and where it goes."""

    setting: Setting
    layers: int
    counts: Sequence[int]  # tokens of the steps
    chosen: Collection[str]
    clock: Clock
    only: str  # of the ops, those whose name holds it
    record: Record
    report: Path
    picture: Path
    end: float  # by time.monotonic()

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.end - time.monotonic()

    def write(self) -> None:
        self.report.write_text(markdown(self.record.parts()), encoding="utf-8")


# ---- a step -------------------------------------------------------------------------------------


def host_ms(step: Step, device: torch.device) -> float:
    """The median of how long it takes until all of a step is launched, the device idle before."""
    times = []
    for _ in range(HOST_RUNS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def profiled(step: Step, device: torch.device) -> tuple[float, float]:
    """The ms in which the device works on a step, and its launches; NaN on a CPU."""
    if device.type != "cuda":
        return math.nan, math.nan
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED_RUNS):
            step()
        torch.cuda.synchronize(device)
    return work_of(profile.events(), PROFILED_RUNS)


def work_of(events: Sequence[Any], runs: int) -> tuple[float, float]:
    """The ms and the number, per run, of the events that took place on the device."""
    found = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
    return sum(e.time_range.elapsed_us() for e in found) / 1e3 / runs, len(found) / runs


def predicted_ms(run: Run, kind: str, tokens: int) -> float:
    """The busy ms of lorakit's step by `cost_model.py`; NaN for a GPU that it does not know."""
    import cost_model

    name = gpu_name(run.setting.device)
    for known, gpu in cost_model.GPUS.items():
        if known in name:
            sizes = run.setting.sizes
            job = cost_model.Job(sizes, run.layers, make_rows(kind, tokens, sizes.vocabularies[0]))
            return cost_model.busy_ms(cost_model.costs(job), gpu)
    return math.nan


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def step_row(run: Run, kind: str, tokens: int, name: str) -> StepRow:
    s = run.setting
    row = partial(StepRow, name, tokens, kind, layers_of(run))
    rows = make_rows(kind, tokens, s.sizes.vocabularies[0])
    before = run.clock.allocated_mb()
    step, error = attempt(lambda: PROVIDERS[name](s, run.layers, rows))
    if error:
        return row(error=error)
    found = measure({name: lambda: step}, run.clock)[name]
    if found.error:
        return row(error=found.error)
    held = run.clock.allocated_mb() - before
    beyond, error = attempt(lambda: run.clock.peak_mb(step))
    if name == "lorakit graph":
        beyond = math.nan  # a graph's pool is not what torch counts as allocated
    host, error = attempt(lambda: host_ms(step, s.device)) if not error else (None, error)
    if error:
        return row(error=error)
    work, error = attempt(lambda: profiled(step, s.device))
    busy, launches = (math.nan, math.nan) if error else work
    model, model_error = math.nan, ""
    if name == "lorakit triton":
        model, model_error = attempt(lambda: predicted_ms(run, kind, tokens))
    for what in filter(None, (error, model_error)):  # the times stand without it
        print(f"{name}: {what}", flush=True)
    return row(
        ms=found.median, p20=found.quantile(0.2), p80=found.quantile(0.8), host_ms=host,
        busy_ms=busy, launches=launches, model_ms=math.nan if model_error else model,
        tokens_per_s=1e3 * tokens / found.median, model_mb=held, peak_mb=held + beyond,
    )  # fmt: skip


def layers_of(run: Run) -> str:
    return f"{run.layers} layers of {run.setting.sizes.hidden} and {run.setting.sizes.inner}"


def step_rows(run: Run, kind: str, names: Sequence[str]) -> Iterator[StepRow]:
    for name in names:
        for tokens in run.counts:
            yield step_row(run, kind, tokens, name)
            gc.collect()
            if run.setting.device.type == "cuda":
                torch.cuda.empty_cache()


def told(row: StepRow) -> str:
    start = f"{row.tokens:5} {row.rows:6} {row.provider:18} "
    if row.error:
        return start + row.error
    return (
        f"{start}{row.ms:8.1f} ms, host {row.host_ms:.1f}, busy {row.busy_ms:.1f}, "
        f"{row.launches:.0f} launches, model {row.model_ms:.1f}; {row.tokens_per_s:.0f} tokens/s, "
        f"peak {row.peak_mb:.0f} MB"
    )


# ---- the parts ----------------------------------------------------------------------------------


def steps_of(run: Run, kind: str, bandwidth: float) -> Iterator[StepRow]:
    """The reference last: it is there to compare kernels with."""
    names = [name for name in PROVIDERS if name not in ALONE and name in run.chosen]
    yield from step_rows(run, kind, sorted(names, key=lambda name: name == "lorakit reference"))


def ops_of(run: Run, products: bool, bandwidth: float) -> Iterator[Row]:
    def wanted(op: str) -> bool:
        return run.only in op and (op == "frozen_linear") == products

    return all_rows(run.setting, run.chosen, run.clock, bandwidth, wanted)


def peers_of(run: Run, bandwidth: float) -> Iterator[StepRow]:
    """Each measures in a process of its own, which writes its rows."""
    for name, packages in ALONE.items():
        if name not in run.chosen:
            continue
        if not all(map(importlib.util.find_spec, packages)):
            yield StepRow(name, run.counts[0], error=NOT_INSTALLED)
            continue
        command = [sys.executable, __file__, "--alone", name, "--rows", str(run.record.path)]
        limit = min(PEER_SECONDS, run.left)
        try:
            done = subprocess.run([*command, "--within", str(limit)], timeout=limit)
            why = f"its process ended with exit code {done.returncode}" * bool(done.returncode)
        except subprocess.TimeoutExpired:
            why = f"cut off after {limit:.0f} s"
        if why:
            yield StepRow(name, run.counts[0], error=why)


def alone(run: Run, name: str) -> None:
    """The steps of one peer, in this process."""
    for kind in KINDS:
        for row in step_rows(run, kind, [name]):
            run.record.add("peers", row)
            print(told(row), flush=True)
            if run.left < RESERVE:
                return


MEASURED: dict[str, Callable[[Run, float], Iterator[Any]]] = {
    "steps": lambda run, bandwidth: steps_of(run, "dense", bandwidth),
    "packed": lambda run, bandwidth: steps_of(run, "packed", bandwidth),
    "peers": peers_of,
    "ops": lambda run, bandwidth: ops_of(run, False, bandwidth),
    "products": lambda run, bandwidth: ops_of(run, True, bandwidth),
}


def run_parts(run: Run, parts: Collection[str]) -> int:
    """Measure, print and write the parts; return the exit code."""
    bandwidth = run.clock.copy_bandwidth()
    top = heading(run.setting, bandwidth)
    print(top)
    failed = False
    try:
        for part in PARTS:
            if part in parts and run.left < RESERVE:
                print(f"No time is left for {part}.")
            elif part in parts:
                run.record.begin(part, top)
                failed |= run_part(run, part, bandwidth)
    finally:  # Ctrl-C too
        run.write()
        save_plot(run.record.parts(), run.picture)
        print(f"written: {run.record.path}, {run.report}, {run.picture}")
    return int(failed)


def run_part(run: Run, part: str, bandwidth: float) -> bool:
    """Measure and print one; return whether something of lorakit's failed."""
    failed = False
    print(f"{part}\n{HEADER}" if part in ("ops", "products") else part)
    for row in MEASURED[part](run, bandwidth):
        run.record.add(part, row)
        print(told(row) if isinstance(row, StepRow) else line(row), flush=True)
        failed |= row.failed
        if run.left < RESERVE:
            run.record.end(part, "Cut off when the time was over: the rest is missing.")
            break
        run.write()
    return failed


# ---- the surroundings ---------------------------------------------------------------------------


def output_of(*command: str) -> str:
    """The first word that a program says; empty if it is not there, or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.split()[0] if not done.returncode and done.stdout.split() else ""


def heading(s: Setting, bandwidth: float) -> str:
    found = surroundings(s.device, s.dtype)
    commit = output_of("git", "describe", "--always", "--dirty", "--exclude", "*")
    for name in ("transformers", "unsloth"):
        with suppress(PackageNotFoundError):
            found += f", {name} {version(name)}"
    found += f", commit {commit}" if commit else ""
    if s.device.type == "cuda":
        gpu, hip = torch.cuda.get_device_properties(s.device), torch.version.hip
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        runtime = f"ROCm {hip}" if hip else f"driver {driver or '?'}, CUDA {torch.version.cuda}"
        found += (
            f"; compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} "
            f"multiprocessors, {gpu.total_memory / 1e9:.0f} GB, {runtime}"
        )
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return f"{today}: {found}. A copy moves {bandwidth:.0f} GB/s."


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", help=f"default: {','.join(PARTS)}; with --op: ops,products")
    parser.add_argument("--op", default="", help="only ops whose name holds this")
    parser.add_argument("--provider", action="append", help="default: all that are installed")
    parser.add_argument("--within", type=float, default=600.0, help="seconds; default: 600")
    parser.add_argument("--seconds", type=float, default=0.2, help="per op and pass, at least")
    parser.add_argument("--rows", type=Path, default=here / "gpu.jsonl", help="file of all rows")
    parser.add_argument("--markdown", type=Path, default=here / "gpu.md")
    parser.add_argument("--plot", type=Path, default=here / "gpu.png")
    parser.add_argument("--alone", choices=tuple(ALONE), help=argparse.SUPPRESS)
    args = parser.parse_args()
    end = time.monotonic() + args.within
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU; benchmarks/kernels.py measures a CPU")
    device = torch.device("cuda", torch.cuda.current_device())
    parts = ["ops", "products"] if args.op else list(PARTS)
    parts = args.parts.split(",") if args.parts else parts
    for name in parts:
        if name not in PARTS:
            parser.error(f"part {name!r} is none of {', '.join(PARTS)}")
    graph = ["lorakit graph"] if device.type == "cuda" else []
    known = [*(f"lorakit {name}" for name in OURS), *graph, *WAYS, *PEERS, *ALONE]
    chosen = args.provider or [*available(device), *graph, *ALONE]
    for name in chosen:
        if name not in known:
            parser.error(f"provider {name!r} is none of {', '.join(known)}")
    setting, clock = Setting(device, torch.bfloat16, LARGE), Clock(device, args.seconds, LEAST)
    run = Run(
        setting, LAYERS, TOKENS, chosen, clock, args.op, Record(args.rows), args.markdown,
        args.plot, end,
    )  # fmt: skip
    if args.alone:
        alone(run, args.alone)
    else:
        sys.exit(run_parts(run, parts))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # make gpu ends it so when the time is over
        sys.exit(130)
