"""Steps that train a whole model on the CPU: lorakit beside transformers with torch's AdamW.

    python benchmarks/full.py MODEL [--dtype float32] [--layers 8] [--length 256] [--steps 5]

MODEL is a directory or a .gguf file, of which --layers takes the first layers only. With bfloat16
the weights of lorakit are in it, and those of transformers in fp32 under autocast, as its Trainer
has them. Each side has a process of its own, and they take turns, one step each, on dense rows of
their own, with labels on all tokens. Figures are medians of the steps after the warm-up, ratios the
medians of the steps' ratios; memory is the peak of the process beyond its imports.
"""

import argparse
import statistics
import sys
from contextlib import ExitStack
from tempfile import TemporaryDirectory

from children import Child, SideError, exit_on_terminate

# what a row is called -> the side
SIDES = {
    "lorakit": "full",
    "lorakit, 8-bit state": "full8bit",
    "transformers, torch's AdamW": "transformers",
}
PEER = "transformers, torch's AdamW"
WARM_UP = 2
AGREE = 0.02  # how far first losses may lie apart: both round to bf16, in other places


def measure(folder: str, job: argparse.Namespace, batches: list) -> dict[str, dict]:
    """Return what each side tells: its times, losses and memory."""
    found: dict[str, dict] = {}
    with ExitStack() as stack:
        children = {name: stack.enter_context(Child(side)) for name, side in SIDES.items()}
        for name, child in children.items():
            imports = child.started()["peak_mb"]
            child.ask("load", folder=folder, dtype=job.dtype)
            child.ask("prepare", rank=1, checkpointing=job.checkpointing)
            found[name] = {"imports": imports, "seconds": [], "losses": []}
        for i, rows in enumerate(batches):
            for name, child in children.items():
                told = child.ask("step", rows=rows, packing=False)
                each = found[name]
                each["losses"].append(told["loss"])
                each["peak"] = told["peak_mb"]
                if i >= WARM_UP:
                    each["seconds"].append(told["seconds"])
    return found


def report(found: dict[str, dict], tokens: int) -> int:
    """Print the table; return the exit code, 1 if the sides did not do the same."""
    peer = found[PEER]
    print(
        f"{'side':28} {'tokens/s':>9} {'ratio':>6} {'over imports':>13} {'ratio':>6} {'losses':>15}"
    )
    for name, each in found.items():
        rate = tokens / statistics.median(each["seconds"])
        pairs = zip(peer["seconds"], each["seconds"], strict=True)
        faster = statistics.median(a / b for a, b in pairs)
        memory = each["peak"] - each["imports"]
        smaller = memory / (peer["peak"] - peer["imports"])
        losses = f"{each['losses'][0]:.4f} {each['losses'][-1]:.4f}"
        print(f"{name:28} {rate:9.1f} {faster:6.2f} {memory:10.0f} MB {smaller:6.2f} {losses:>15}")
    first = [each["losses"][0] for each in found.values()]
    if max(first) - min(first) > AGREE * min(first):
        print(f"Not the same job: the first losses differ by more than {AGREE:.0%}.")
        return 1
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help=".gguf file or directory")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--layers", type=int, help="take the first layers only")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=1, help="rows of a step")
    parser.add_argument("--steps", type=int, default=5, help=f"after {WARM_UP} to warm up")
    parser.add_argument("--checkpointing", action="store_true")
    job = parser.parse_args()
    exit_on_terminate()
    with TemporaryDirectory() as folder:
        try:
            with Child("writer") as writer:
                writer.started()
                machine = writer.ask("machine")
                writer.ask("first_layers", source=job.model, folder=folder, count=job.layers)
                count, options = job.steps + WARM_UP, {"length": job.length, "batch": job.batch}
                made = writer.ask("rows", folder=folder, kind="dense", count=count, **options)
            print(
                f"{machine['threads']} threads, instruction set {machine['isa']}; {job.model}, "
                f"{job.layers or 'all'} layers, {job.dtype}, {job.batch} rows of {job.length} "
                f"tokens, {job.steps} steps after {WARM_UP}"
            )
            found = measure(folder, job, made["batches"])
        except SideError as error:
            sys.exit(f"full: {error}")
    sys.exit(report(found, job.length * job.batch))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
