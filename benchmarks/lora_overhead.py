"""What a call of an adapted layer costs beside its arithmetic: a layer of 64 features, few rows.

    python benchmarks/lora_overhead.py [--repeats 9] [--calls 2000]

Microseconds per call of nn.Linear alone, of lorakit's layer on it and of PEFT's, in turn, on one
thread; the median of the repeats, and PEFT's over ours. In fp32 both compute in fp32. In bf16 the
adapters are fp32, as both have them by default: PEFT then computes their products in fp32, lorakit
in bf16.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import peft
import torch
from torch import Tensor, nn

import lorakit as lk

FEATURES, RANK = 64, 8


def layers(dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return one layer alone, and with an adapter of each library."""

    def holder() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(FEATURES, FEATURES)).to(dtype)

    config = peft.LoraConfig(r=RANK, target_modules=["0"])
    return {
        "nn.Linear": holder()[0],
        "lorakit": lk.attach(holder(), lk.LoraConfig(r=RANK, target_modules=["0"]))[0],
        "peft": peft.get_peft_model(holder(), config).base_model.model[0],
    }


def microseconds(layer: Callable[[Tensor], Tensor], x: Tensor, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        layer(x)
    return (time.perf_counter() - started) / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--calls", type=int, default=2000)
    args = parser.parse_args()
    if args.repeats < 1 or args.calls < 1:
        parser.error("--repeats and --calls must be at least 1")
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, 1 thread, lorakit {lk.__version__}, torch {torch.__version__}, "
        f"peft {version('peft')}; us per call of a layer of {FEATURES} features, rank {RANK}"
    )
    print(f"{'dtype':10}{'rows':>5}{'grad':>6}{'nn.Linear':>11}{'lorakit':>9}{'peft':>8}{'x':>7}")
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 16):
            for grad in (True, False):
                x, found = torch.randn(rows, FEATURES).to(dtype), {}
                with torch.set_grad_enabled(grad):
                    sides = layers(dtype)
                    for _ in range(args.repeats):
                        for name, layer in sides.items():
                            found.setdefault(name, []).append(microseconds(layer, x, args.calls))
                plain, ours, theirs = (statistics.median(times) for times in found.values())
                print(
                    f"{str(dtype).removeprefix('torch.'):10}{rows:5}{'yes' if grad else 'no':>6}"
                    f"{plain:11.1f}{ours:9.1f}{theirs:8.1f}{theirs / ours:7.2f}"
                )


if __name__ == "__main__":
    main()
