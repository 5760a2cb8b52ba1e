"""NF4 on the CPU: lorakit's kernels, its torch reference, and bitsandbytes, in one run.

    python benchmarks/nf4.py [--json rows.json]

Prints the median of repeated runs with its 20th and 80th percentile, and GB/s of the bytes that
have to move (packed codes, scales and the dense tensor, each once). The rows alternate, so that
whatever else the machine does hits all of them.
"""

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version

import bitsandbytes.functional as bnb
import torch

import lorakit as lk

SHAPES = [(576, 576), (1536, 576), (4096, 4096)]


def measure(calls: dict, seconds: float) -> dict[str, list[float]]:
    """Sorted times in ms per call, taken in turn."""
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: sorted(values) for name, values in times.items()}


def reference(function, *args):
    def call():
        with lk.kernels.use_backend("reference"):
            return function(*args)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="per row group")
    parser.add_argument("--json", help="write the rows to this file too")
    args = parser.parse_args()
    versions = {name: version(name) for name in ("lorakit", "torch", "bitsandbytes")}
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, instruction set "
        f"{torch.backends.cpu.get_cpu_capability()}, "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
    )
    print(f"{'op':24} {'shape':>11} {'provider':14} {'ms':>9} {'p20-p80':>17} {'GB/s':>6} {'x':>6}")
    rows = []
    for shape in SHAPES:
        torch.manual_seed(0)
        w = torch.randn(shape)
        q = lk.kernels.quantize_nf4(w)
        packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        half = w.bfloat16()
        packed16, state16 = bnb.quantize_4bit(half, quant_type="nf4", compress_statistics=True)
        n = w.numel()
        groups = {
            ("quantize fp32", 4): {
                "lorakit cpu": lambda w=w: lk.kernels.quantize_nf4(w),
                "lorakit torch": reference(lk.kernels.quantize_nf4, w),
                "bitsandbytes": lambda w=w: bnb.quantize_4bit(
                    w, quant_type="nf4", compress_statistics=True
                ),
            },
            ("dequantize to fp32", 4): {
                "lorakit cpu": lambda q=q: lk.kernels.dequantize_nf4(q),
                "lorakit torch": reference(lk.kernels.dequantize_nf4, q),
                "bitsandbytes": lambda p=packed, s=state: bnb.dequantize_4bit(p, s),
            },
            ("dequantize to bf16", 2): {
                "lorakit cpu": lambda q=q: lk.kernels.dequantize_nf4(q, torch.bfloat16),
                "lorakit torch": reference(lk.kernels.dequantize_nf4, q, torch.bfloat16),
                "bitsandbytes": lambda p=packed16, s=state16: bnb.dequantize_4bit(p, s),
            },
        }
        for (op, dense_bytes), calls in groups.items():
            times = measure(calls, args.seconds)
            peer = statistics.median(times["bitsandbytes"])
            for provider, values in times.items():
                median = statistics.median(values)
                p20, p80 = values[len(values) // 5], values[len(values) * 4 // 5]
                gbs = n * (dense_bytes + q.bits_per_parameter / 8) / median / 1e6
                print(
                    f"{op:24} {shape[0]:>5}x{shape[1]:<5} {provider:14} {median:9.3f} "
                    f"{p20:8.3f}-{p80:<8.3f} {gbs:6.1f} {peer / median:6.1f}"
                )
                rows.append(
                    {"op": op, "shape": shape, "provider": provider, "ms": median, "p20": p20,
                     "p80": p80, "gb_per_s": gbs, "speedup": peer / median, **versions}
                )  # fmt: skip
    print(
        "x: how many times faster than bitsandbytes, same run, double quantization on, blocks of 64"
    )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
