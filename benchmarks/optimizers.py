"""A step of AdamW with resident and with paged state, beside torch's and bitsandbytes', on the CPU.

    python benchmarks/optimizers.py [--values 134217728] [--tensors 8] [--steps 5] [--budget 64]

Every row has a process of its own, one after another: the same fp32 parameters and gradients, one
step that makes the state, then the steps that are timed; the median and the range. Memory is the
process's resident peak beyond what it held with parameters and gradients, mapped files included.
The page file lies in --page-dir, or in the system's directory for temporary files, and in the page
cache as far as there is room: the disk is measured only where it is not.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROWS = {
    "lorakit 32-bit": {"state_bits": 32},
    "lorakit 32-bit paged": {"state_bits": 32, "paged": True},
    "torch fused 32-bit": {},
    "lorakit 8-bit": {"state_bits": 8},
    "lorakit 8-bit paged": {"state_bits": 8, "paged": True},
    "bitsandbytes 8-bit": {},
}


def make(row: str, params: list[torch.nn.Parameter], args: argparse.Namespace):
    if row.startswith("torch"):
        return torch.optim.AdamW(params, fused=True)
    if row.startswith("bitsandbytes"):
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(params)
    import lorakit as lk

    options = dict(ROWS[row])
    if "paged" in options:
        options |= {"page_budget": args.budget << 20, "page_dir": args.page_dir}
    return lk.optim.AdamW(params, **options)


def peak() -> int:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def measure(args: argparse.Namespace) -> dict[str, object]:
    warm = torch.nn.Parameter(torch.ones(1))
    warm.grad = torch.ones(1)
    make(args.row, [warm], args).step()  # what it imports
    n = args.values // args.tensors
    params = [torch.nn.Parameter(torch.ones(n)) for _ in range(args.tensors)]
    for p in params:
        p.grad = torch.full((n,), 1e-3)
    before = peak()
    optimizer = make(args.row, params, args)
    optimizer.step()
    seconds = []
    for _ in range(args.steps):
        started = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "peak": peak() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--values", type=int, default=1 << 27)
    parser.add_argument("--tensors", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--budget", type=int, default=64, help="MiB of pages")
    parser.add_argument("--page-dir", type=Path)
    parser.add_argument("--row", choices=ROWS, help="this one alone, as JSON")
    args = parser.parse_args()
    if min(args.values, args.tensors, args.steps) < 1 or args.tensors > args.values:
        parser.error("--values, --tensors and --steps must be at least 1, tensors at most values")
    if args.row:
        print(json.dumps(measure(args)))
        return
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"bitsandbytes {version('bitsandbytes')}; {args.values} values in {args.tensors} tensors, "
        f"pages under {args.budget} MiB"
    )
    print(f"{'':22}{'ms/step':>9}{'range':>18}{'peak MB':>9}")
    for row in ROWS:
        command = [sys.executable, __file__, *sys.argv[1:], "--row", row]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{row:22} failed with exit code {done.returncode}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        times = [1e3 * each for each in found["seconds"]]
        spread = f"{min(times):.0f}-{max(times):.0f}"
        print(
            f"{row:22}{statistics.median(times):9.0f}{spread:>18}{found['peak'] / 1e6:9.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
