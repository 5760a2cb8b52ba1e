"""Microbenchmarks of the ops, beside torch and bitsandbytes, in one run.

    python benchmarks/kernels.py [--op rms_norm] [--backend cpu] [--device cuda] [--csv FILE]

Every row is the median of repeated runs with its 20th and 80th percentile; the providers of an op
take turns, so that whatever else the machine does hits all of them. GB/s counts the bytes that have
to move, each tensor once; `copy` is that as a share of what a plain copy of 256 MB reaches in the
same run; `x` is the time of the last provider, the peer, over this one's. Backward is timed alone.
"""

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import lorakit as lk

OURS = ("triton", "cpu", "reference")


@dataclass(frozen=True)
class Case:
    """An op at a shape: how each provider runs it, and the bytes that must move."""

    op: str
    shape: str
    moved: int
    call: Callable[[], object]  # lorakit's, on the backend that is forced around it
    peers: dict[str, Callable[[], object]]
    inputs: tuple[Tensor, ...] = ()  # with respect to which backward is timed, if any
    moved_back: int = 0
    kernels: tuple[str, ...] = ("triton", "reference")  # the backends that the op has


@dataclass(frozen=True)
class Row:
    op: str
    shape: str
    provider: str
    ms: float
    p20: float
    p80: float
    gb_per_s: float
    copy: float
    x: float


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    ops, size = lk.kernels, dtype.itemsize

    def random(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)

    T, H, inner, V = 1024, 2048, 5632, 32768
    x, w = random(T, H), random(H, grad=False)
    yield Case(
        "rms_norm", f"{T}x{H}", 2 * T * H * size, lambda: ops.rms_norm(x, w, 1e-5),
        {"torch": lambda: F.rms_norm(x, (H,), w, 1e-5)}, (x,), 3 * T * H * size,
    )  # fmt: skip

    q, k = random(1, T, 16, 128), random(1, T, 4, 128)
    angle = torch.randn(1, T, 64, device=device)
    cos, sin = angle.cos(), angle.sin()
    both = torch.cat([cos, cos], -1)[:, :, None].to(dtype), torch.cat([sin, sin], -1)[:, :, None]

    def rotate_half(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([-b, a], -1)

    def by_torch() -> tuple[Tensor, Tensor]:
        c, s = both
        return q * c + rotate_half(q) * s, k * c + rotate_half(k) * s

    turned = 2 * T * 20 * 128 * size
    yield Case(
        "rope", f"{T}x20x128", turned, lambda: ops.rope(q, k, cos, sin), {"torch": by_torch},
        (q, k), turned,
    )  # fmt: skip

    gate, up = random(T, inner), random(T, inner)
    n = T * inner * size
    yield Case(
        "swiglu", f"{T}x{inner}", 3 * n, lambda: ops.swiglu(gate, up),
        {"torch": lambda: F.silu(gate) * up}, (gate, up), 5 * n,
    )  # fmt: skip
    yield Case(
        "geglu", f"{T}x{inner}", 3 * n, lambda: ops.geglu(gate, up),
        {"torch": lambda: F.gelu(gate, approximate="tanh") * up}, (gate, up), 5 * n,
    )  # fmt: skip

    logits, labels = random(T, V), torch.randint(V, (T,), device=device)
    yield Case(
        "cross_entropy", f"{T}x{V}", T * V * size, lambda: ops.cross_entropy(logits, labels)[0],
        {"torch": lambda: F.cross_entropy(logits.float(), labels, reduction="sum")}, (logits,),
        2 * T * V * size,
    )  # fmt: skip

    state = [torch.randn(1 << 22, device=device) for _ in range(2)]
    state += [torch.zeros(1 << 22, device=device) for _ in range(2)]
    parameter = torch.nn.Parameter(state[0].clone())
    parameter.grad = state[1]
    optimizer = torch.optim.AdamW([parameter], fused=True)
    options = {"step": 9, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    yield Case(
        "adamw", "4M", 28 << 22, lambda: ops.adamw_step(*[[t] for t in state], **options),
        {"torch fused": optimizer.step},
    )  # fmt: skip
    yield from nf4_cases(device)


def nf4_cases(device: torch.device) -> Iterator[Case]:
    """Double quantization on, blocks of 64."""
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        bnb = None
    ops = lk.kernels
    for shape in ((1536, 576), (4096, 4096)):
        w = torch.randn(shape, device=device)
        q, n, name = ops.quantize_nf4(w), w.numel(), f"{shape[0]}x{shape[1]}"

        def pack(w: Tensor = w):
            return bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)

        peers = {} if bnb is None else {"bitsandbytes": pack}
        yield Case(
            "nf4 quantize", name, 4 * n + q.nbytes, lambda w=w: ops.quantize_nf4(w), peers,
            kernels=OURS,
        )  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16):
            peers = {}
            if bnb is not None:
                packed, state = pack(w.to(dtype))
                peers = {"bitsandbytes": lambda p=packed, s=state: bnb.dequantize_4bit(p, s)}
            yield Case(
                f"nf4 to {str(dtype).removeprefix('torch.')}", name, q.nbytes + n * dtype.itemsize,
                lambda q=q, d=dtype: ops.dequantize_nf4(q, d), peers, kernels=OURS,
            )  # fmt: skip


def fits(backend: str, device: torch.device) -> bool:
    """Whether it is installed, and runs on `device`."""
    try:
        with lk.kernels.use_backend(backend):
            return {"triton": "cuda", "cpu": "cpu"}.get(backend, device.type) == device.type
    except RuntimeError:
        return False


def providers(case: Case, chosen: list[str]) -> dict[str, Callable[[], object]]:
    def ours(backend: str) -> Callable[[], object]:
        def run():
            with lk.kernels.use_backend(backend):
                return case.call()

        return run

    mine = {f"lorakit {name}": ours(name) for name in chosen if name in case.kernels}
    return mine | case.peers


def backward_of(call: Callable[[], object], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    out = call()
    out = out if isinstance(out, tuple) else (out,)
    grads = [torch.ones_like(y) for y in out]
    return lambda: torch.autograd.grad(out, inputs, grads, retain_graph=True)


def measure(
    calls: dict[str, Callable[[], object]], seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Sorted times in ms per call, taken in turn."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else nullcontext
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            synchronize()
            started = time.perf_counter()
            call()
            synchronize()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: sorted(values) for name, values in times.items()}


def rows_of(case: Case, chosen: list[str], seconds: float, bandwidth: float, device) -> list[Row]:
    calls = providers(case, chosen)
    passes = [(case.op, calls, case.moved)]
    if case.inputs:
        back = {name: backward_of(call, case.inputs) for name, call in calls.items()}
        passes.append((f"{case.op} backward", back, case.moved_back))
    rows = []
    for op, run, moved in passes:
        times = measure(run, seconds, device)
        peer = statistics.median(list(times.values())[-1])
        for provider, values in times.items():
            median = statistics.median(values)
            rate = moved / median / 1e6
            p20, p80 = values[len(values) // 5], values[len(values) * 4 // 5]
            share = rate / bandwidth
            row = Row(op, case.shape, provider, median, p20, p80, rate, share, peer / median)
            rows.append(row)
    return rows


def save_plot(rows: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(f"{row.op}\n{row.shape}" for row in rows))
    kinds = list(dict.fromkeys(row.provider for row in rows))
    figure = Figure(figsize=(9, 0.5 * len(rows) / len(kinds) * 1.6 + 2), layout="constrained")
    axes = figure.add_subplot()
    for i, kind in enumerate(kinds):
        mine = [row for row in rows if row.provider == kind]
        at = [names.index(f"{row.op}\n{row.shape}") + 0.8 * i / len(kinds) for row in mine]
        axes.barh(at, [row.copy for row in mine], height=0.8 / len(kinds), label=kind)
    axes.set_yticks([i + 0.4 for i in range(len(names))], names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("bytes that must move per second, over those of a copy")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--op", help="only ops whose name holds this")
    parser.add_argument("--backend", action="append", choices=OURS, help="default: all that fit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--seconds", type=float, default=2.0, help="per op and pass")
    parser.add_argument("--csv", type=Path, help="write the rows to this file too")
    parser.add_argument("--plot", type=Path, help="PNG to draw them into")
    args = parser.parse_args()
    device = torch.device(args.device)
    chosen = args.backend or [name for name in OURS if fits(name, device)]
    for name in chosen:
        if not fits(name, device):
            parser.error(f"backend {name} is not installed, or does not run on {device}")
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    known = {}
    for name in ("lorakit", "torch", "triton", "bitsandbytes"):
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    where = torch.cuda.get_device_name() if device.type == "cuda" else (
        f"{platform.machine()}, {torch.get_num_threads()} threads, instruction set "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )  # fmt: skip
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copying = measure({"copy": lambda: target.copy_(source)}, 1.0, device)["copy"]
    bandwidth = 2 * source.numel() / statistics.median(copying) / 1e6
    print(", ".join([where, dtype, *(f"{name} {number}" for name, number in known.items())]))
    print(f"a copy: {bandwidth:.1f} GB/s")
    print(
        f"{'op':24} {'shape':>11} {'provider':18} {'ms':>9} {'p20-p80':>17} {'GB/s':>6} "
        f"{'copy':>5} {'x':>6}"
    )
    rows = []
    for case in cases(device, getattr(torch, dtype)):
        if args.op is not None and args.op not in case.op:
            continue
        for row in rows_of(case, chosen, args.seconds, bandwidth, device):
            rows.append(row)
            print(
                f"{row.op:24} {row.shape:>11} {row.provider:18} {row.ms:9.3f} "
                f"{row.p20:8.3f}-{row.p80:<8.3f} {row.gb_per_s:6.1f} {row.copy:5.2f} {row.x:6.1f}",
                flush=True,
            )
    if args.csv is not None:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(map(asdict, rows))
    if args.plot is not None:
        save_plot(rows, args.plot)


if __name__ == "__main__":
    main()
