"""Microbenchmarks of the ops, beside torch, PEFT and bitsandbytes, in one run.

    python benchmarks/kernels.py [--op rms_norm] [--backend cpu] [--device cuda] [--csv FILE]

Every row is the median of repeated runs with its 20th and 80th percentile; the providers of an op
take turns, so that whatever else the machine does hits all of them. GB/s counts the bytes that have
to move, each tensor once; `copy` is that as a share of what a plain copy reaches in the same run;
`x` is the time of the fastest peer over this one's; `MB` is the peak of memory beyond the inputs,
for backward together with its forward (on a GPU). Backward is timed alone.

On a GPU the clock is the device's own. Before every run a buffer larger than any cache is written a
few times: the inputs come from memory, and the host gets ahead, so that launching takes no time.

`cases.py` holds the ops, and `gpu.py` runs them at the sizes of an 8B model.
"""

import argparse
import csv
import importlib.util
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import CASES, GPU_ONLY, OURS, OVERWRITES, PEERS, WAYS, Case, Setting, Sizes, dtype_name
from torch import Tensor

import lorakit as lk

SMALL = Sizes(
    tokens=1024, hidden=2048, inner=5632, heads=16, kv_heads=4, head_dim=128,
    vocabularies=(32768, 151936), matrices=((1536, 576), (4096, 4096)), rows=(1, 16, 256),
    trained=(1 << 22,), streamed=1 << 24,
)  # fmt: skip
# Bytes, and how often they are written. The largest cache of a GPU has 256 MB (AMD's MI300X); the
# host needs 2 ms, on an H100 six times the 1 GB, for a backward that Python launches.
FLUSH, FLUSHES = 1 << 30, 6


@dataclass(frozen=True)
class Row:
    op: str
    shape: str
    provider: str
    ms: float = math.nan
    p20: float = math.nan
    p80: float = math.nan
    gb_per_s: float = math.nan
    copy: float = math.nan
    x: float = math.nan
    mb: float = math.nan
    error: str = ""  # the first line of what went wrong; the numbers are NaN then

    @property
    def failed(self) -> bool:
        """Whether it is one of lorakit's backends, and went wrong."""
        backends = ("lorakit", *(f"lorakit {name}" for name in OURS))
        return bool(self.error) and self.provider in backends


# ---- who takes part -----------------------------------------------------------------------------


def fits(backend: str, device: torch.device) -> bool:
    """Whether it is installed, and runs on `device`."""
    try:
        with lk.kernels.use_backend(backend):
            return {"triton": "cuda", "cpu": "cpu"}.get(backend, device.type) == device.type
    except RuntimeError:
        return False


def available(device: torch.device) -> list[str]:
    """The providers that are installed, and run on `device`."""
    found = [f"lorakit {backend}" for backend in OURS if fits(backend, device)]
    found += WAYS if "lorakit triton" in found else ()
    for peer, packages in PEERS.items():
        installed = all(importlib.util.find_spec(package) for package in packages)
        if installed and (device.type == "cuda" or peer not in GPU_ONLY):
            found.append(peer)
    return found


def providers(case: Case, chosen: Collection[str]) -> dict[str, Callable[..., object]]:
    def ours(backend: str) -> Callable[..., object]:
        def run(*inputs: Tensor):
            with lk.kernels.use_backend(backend):
                return case.call(*inputs)

        return run

    calls = {f"lorakit {name}": ours(name) for name in case.kernels} | case.peers
    if "torch" in case.peers and "torch.compile" in chosen:  # which imports for seconds
        calls["torch.compile"] = torch.compile(case.peers["torch"], dynamic=False)
    return {name: call for name, call in calls.items() if name in chosen}


# ---- measuring ----------------------------------------------------------------------------------


class Clock:
    """Times single runs on one device: at least `least` of every provider, in `seconds` or more."""

    def __init__(self, device: torch.device, seconds: float, least: int):
        self.device, self.seconds, self.least = device, seconds, least
        self.buffer, self.warm_up = None, 1
        if device.type == "cuda":
            self.warm_up = 3
            self.buffer = torch.empty(FLUSH, dtype=torch.uint8, device=device)

    def ms(self, run: Callable[[], object]) -> float:
        if self.buffer is None:
            started = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FLUSHES):
            self.buffer.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def copy_bandwidth(self) -> float:
        """GB/s, read and written, of a copy of 1 GB; on a CPU of 256 MB."""
        size = 1 << 30 if self.device.type == "cuda" else 1 << 28
        source = torch.empty(size, dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        found = measure({"copy": lambda: lambda: target.copy_(source)}, self)["copy"]
        return 2 * size / found.median / 1e6

    def peak_mb(self, run: Callable[[], object]) -> float:
        """The peak of allocated memory during `run`, beyond what was there; NaN on a CPU."""
        if self.device.type != "cuda":
            return math.nan
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e6

    def allocated_mb(self) -> float:
        """The memory that is allocated; NaN on a CPU."""
        if self.device.type != "cuda":
            return math.nan
        return torch.cuda.memory_allocated(self.device) / 1e6


class Measured(NamedTuple):
    times: list[float]  # ms, ascending; none where it failed
    error: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    def quantile(self, q: float) -> float:
        return self.times[int(q * len(self.times))]


def attempt(run: Callable[[], Any]) -> tuple[Any, str]:
    """What it returns, and the first line of its error: one of both."""
    try:
        return run(), ""
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {text[0]}"


def measure(
    prepared: dict[str, Callable[[], Callable[[], object]]], clock: Clock
) -> dict[str, Measured]:
    """Times of what each of `prepared` returns, in turn; who fails takes part no longer."""
    times, errors = {name: [] for name in prepared}, {}

    def turn(once: Callable[[str], object]) -> None:
        for name in [name for name in prepared if name not in errors]:
            _, error = attempt(lambda name=name: once(name))
            if error:
                errors[name] = error

    for _ in range(clock.warm_up):
        turn(lambda name: prepared[name]()())
    end, rounds = time.perf_counter() + clock.seconds, 0
    while len(errors) < len(prepared) and (rounds < clock.least or time.perf_counter() < end):
        turn(lambda name: times[name].append(clock.ms(prepared[name]())))
        rounds += 1
    return {
        name: Measured([], errors[name]) if name in errors else Measured(sorted(values))
        for name, values in times.items()
    }


def backward_of(call: Callable[..., object], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Runs forward; what it returns runs backward. The outputs are their own gradients, but for a
    loss, whose is 1.
    """
    out = call(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    grads = [y.detach().clone() if y.dim() else torch.ones_like(y) for y in out]
    return lambda: torch.autograd.grad(out, inputs, grads)


def rows_of(case: Case, chosen: Collection[str], clock: Clock, bandwidth: float) -> list[Row]:
    calls = providers(case, chosen)

    def inputs(name: str) -> tuple[Tensor, ...]:
        if name not in OVERWRITES and not case.overwrites:
            return case.inputs
        return tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in case.inputs)

    def forward(name: str) -> Callable[[], object]:
        return partial(calls[name], *inputs(name))

    def backward(name: str) -> Callable[[], object]:
        return backward_of(calls[name], inputs(name))

    def both(name: str) -> Callable[[], object]:
        given = inputs(name)
        return lambda: backward_of(calls[name], given)()

    passes = [(case.op, forward, forward, case.moved)]
    if len(case.passes) == 2:
        passes.append((case.passes[1], backward, both, case.moved_back))
    rows = []
    for op, timed, weighed, moved in passes:
        found = measure({name: partial(timed, name) for name in calls}, clock)
        peers = [m.median for name, m in found.items() if name in PEERS and not m.error]
        fastest = min(peers, default=math.nan)
        for name, measured in found.items():
            mb, error = attempt(lambda name=name, weighed=weighed: clock.peak_mb(weighed(name)))
            error = measured.error or error
            if error:
                rows.append(Row(op, case.shape, name, error=error))
                continue
            ms = measured.median
            rate, span = moved / ms / 1e6, (measured.quantile(0.2), measured.quantile(0.8))
            row = Row(op, case.shape, name, ms, *span, rate, rate / bandwidth, fastest / ms, mb)
            rows.append(row)
    return rows


def all_rows(
    setting: Setting, chosen: Collection[str], clock: Clock, bandwidth: float,
    wanted: Callable[[str], bool],
) -> Iterator[Row]:  # fmt: skip
    """Yield the rows of all cases whose op is `wanted`; one that cannot be made says so."""
    for make, ops in CASES.items():
        found = make(setting) if any(map(wanted, ops)) else iter(())
        while True:
            case, error = attempt(lambda found=found: next(found, None))
            if error:
                yield Row(make.__name__, "", "lorakit", error=error)
            if case is None:
                break
            if wanted(case.op):
                yield from rows_of(case, chosen, clock, bandwidth)


# ---- the report ---------------------------------------------------------------------------------

HEADER = (
    f"{'op':29} {'shape':>18} {'provider':18} {'ms':>9} {'p20-p80':>17} {'GB/s':>6} "
    f"{'copy':>5} {'x':>6} {'MB':>7}"
)


def line(row: Row) -> str:
    start = f"{row.op:29} {row.shape:>18} {row.provider:18} "
    if row.error:
        return start + row.error
    x, mb = ("" if math.isnan(value) else f"{value:.1f}" for value in (row.x, row.mb))
    span = f"{row.p20:8.3f}-{row.p80:<8.3f}"
    numbers = f"{row.ms:9.3f} {span} {row.gb_per_s:6.1f} {row.copy:5.2f} {x:>6} {mb:>7}"
    return start + numbers.rstrip()


def surroundings(device: torch.device, dtype: torch.dtype) -> str:
    """The device, the dtype and the versions that figures belong to."""
    if device.type == "cuda":
        found = [torch.cuda.get_device_name(device)]
    else:
        isa = torch.backends.cpu.get_cpu_capability()
        found = [
            platform.machine(), f"{torch.get_num_threads()} threads", f"instruction set {isa}"
        ]  # fmt: skip
    found.append(dtype_name(dtype))
    for name in ("lorakit", "torch", "triton", "liger-kernel", "bitsandbytes", "peft"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def draw_bars(rows: list[Row], axes) -> None:
    """The bandwidth of every row, as a share of a copy's."""
    names = list(dict.fromkeys(f"{row.op}\n{row.shape}" for row in rows))
    kinds = list(dict.fromkeys(row.provider for row in rows))
    for i, kind in enumerate(kinds):
        mine = [row for row in rows if row.provider == kind]
        at = [names.index(f"{row.op}\n{row.shape}") + 0.8 * i / len(kinds) for row in mine]
        axes.barh(at, [row.copy for row in mine], height=0.8 / len(kinds), label=kind)
    axes.set_yticks([i + 0.4 for i in range(len(names))], names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("bytes that must move per second, over those of a copy")
    if kinds:
        axes.legend(fontsize="small", loc="lower right")


def save_plot(rows: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2 + 0.25 * len(rows)), layout="constrained")
    draw_bars([row for row in rows if not row.error], figure.add_subplot())
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--op", default="", help="only ops whose name holds this")
    parser.add_argument("--backend", action="append", choices=OURS, help="default: all that fit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--seconds", type=float, default=2.0, help="per op and pass")
    parser.add_argument("--csv", type=Path, help="write the rows to this file too")
    parser.add_argument("--plot", type=Path, help="PNG to draw them into")
    args = parser.parse_args()
    device = torch.device(args.device)
    for name in args.backend or ():
        if not fits(name, device):
            parser.error(f"backend {name} is not installed, or does not run on {device}")
    chosen = available(device)
    if args.backend:
        chosen = [f"lorakit {name}" for name in args.backend] + [n for n in chosen if n in PEERS]
    chosen.remove("torch.compile")  # takes minutes; gpu.py has it
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    clock = Clock(device, args.seconds, 5)
    bandwidth = clock.copy_bandwidth()
    print(surroundings(device, dtype))
    print(f"a copy: {bandwidth:.1f} GB/s")
    print(HEADER)
    rows = []
    setting = Setting(device, dtype, SMALL)
    for row in all_rows(setting, chosen, clock, bandwidth, lambda op: args.op in op):
        rows.append(row)
        print(line(row), flush=True)
    if args.csv is not None:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(map(asdict, rows))
    if args.plot is not None:
        save_plot(rows, args.plot)
    if any(row.failed for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
