"""What a merge into NF4 keeps of an adapter's gain, trained with and without quantize_aware.

    python benchmarks/merge_aware.py MODEL [--steps 40] [--rows 48]

The task is to write a number in words: 800 rows to learn from, others held out. All runs have the
same rows, seed, steps and LoRA (rank 8, alpha 16, every linear layer), and compute in fp32. Those
of a group have the same base and learning rate too, and the gain of the group is that of its plain
adapter, as it is before the merge:

    gain = L0 - L1             L0 the held-out loss of the base alone, L1 that of the plain adapter
    kept = (L0 - L) / gain     L the held-out loss of a run's merged model, packed in NF4

The plain adapter on a dense base is merged into it, and the sums are packed then. Seconds are the
process's own time of a run, by steps.
"""

import argparse
import random
import tempfile
import time
from typing import NamedTuple

import torch

import lorakit as lk

ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ONES += ["eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"]
ONES += ["eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


class Side(NamedTuple):
    """A run: what its base is, its quantize_aware, and its learning rate."""

    base: str | None
    aware: str | None
    learning_rate: float


GROUPS = (
    (Side("nf4", None, 1e-4), Side("nf4", "nf4", 1e-4)),
    (Side("nf4", None, 3e-3), Side("nf4", "nf4", 3e-3)),
    (Side(None, None, 3e-4), Side(None, "nf4", 3e-4)),
)


def words(n: int) -> str:
    """A number below 1000 in words."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" and {words(n % 100)}" if n % 100 else "")


def rows() -> list[dict[str, str]]:
    """All 1000 rows, in an order that is always the same."""
    numbers = list(range(1000))
    random.Random(0).shuffle(numbers)
    return [
        {"prompt": f"The number {n} in words is", "completion": f" {words(n)}."} for n in numbers
    ]


class Losses(NamedTuple):
    """Held-out losses of a run: of the base alone, of the adapter on it, and of the merged model.

    `seconds` are those of a step.
    """

    without: float
    adapter: float
    merged: float
    seconds: float


def measured(model_path: str, side: Side, steps: int, held_rows: int) -> Losses:
    """Train, merge, and return the losses."""
    tok, held = lk.load_tokenizer(model_path), rows()[800:][:held_rows]
    model = lk.load_model(model_path, dtype="float32", quantize=side.base)
    without = lk.evaluate(model, tok, held)["loss"]
    torch.manual_seed(0)
    lk.attach(model, lk.LoraConfig(r=8, lora_alpha=16, quantize_aware=side.aware))
    started = time.process_time()
    with tempfile.TemporaryDirectory() as out:
        config = lk.TrainConfig(
            output_dir=out,
            max_steps=steps,
            learning_rate=side.learning_rate,
            per_device_train_batch_size=8,
        )
        lk.train(model, tok, rows()[:800], config)
    seconds = (time.process_time() - started) / steps
    adapter = lk.evaluate(model, tok, held)["loss"]
    lk.merge_and_unload(model, "nf4")
    if side.base is None and side.aware is None:
        lk.quantize(model)
    return Losses(without, adapter, lk.evaluate(model, tok, held)["loss"], seconds)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=48, help="held-out rows")
    args = parser.parse_args()
    print(f"{args.steps} steps")
    print("| base | quantize_aware | rate | without | adapter | merged, NF4 | kept | s a step |")
    print("|---|---|---|---|---|---|---|---|")
    for group in GROUPS:
        gain = None
        for side in group:
            found = measured(args.model, side, args.steps, args.rows)
            gain = found.without - found.adapter if gain is None else gain
            print(
                f"| {side.base or 'dense'} | {side.aware or '-'} | {side.learning_rate:g} "
                f"| {found.without:.3f} | {found.adapter:.3f} | {found.merged:.3f} "
                f"| {(found.without - found.merged) / gain:.0%} | {found.seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
