"""QLoRA on two processes of one thread each, beside one process of two threads.

    python benchmarks/ranks.py MODEL [--steps 6] [--rounds 3] [--parts 2]
        [--tokens 512]

MODEL is a Hugging Face directory or a .gguf file. The three sides take turns, one short run each:

    one       one process, two threads
    ordered   two processes, one thread each, gradients added in the order of micro-batches
    fast      the same, gradients added by one all-reduce

All take the same steps of --parts micro-batches, which are packed rows of --tokens tokens. Tokens a
second are the medians of a run's steps after the first two; a ratio is the median of the rounds'.
Bytes are those that the second process has written in a step, as Linux counts them: to sockets,
since it writes no files. They are compared with the formula of docs/scale.md.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

WARM_UP = 2
SIDES = {"one": (1, "ordered"), "ordered": (2, "ordered"), "fast": (2, "fast")}


def rows(n: int = 400) -> list[dict[str, str]]:
    """Return rows of unlike length."""
    rng = random.Random(0)
    found = []
    for _ in range(n):
        numbers = [rng.randint(1, 999) for _ in range(rng.randint(2, 24))]
        text = " + ".join(map(str, numbers))
        found.append({"prompt": f"Add {text}. ", "completion": f"{text} = {sum(numbers)}"})
    return found


def written() -> int:
    """Return how many bytes this process has written."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def train(args: argparse.Namespace) -> None:
    """Take the run of one side, as one of its processes, and leave what it has measured."""
    import torch

    import lorakit as lk

    model, tok = lk.load_model(args.model, quantize="nf4"), lk.load_tokenizer(args.model)
    torch.manual_seed(0)
    lk.attach(model, lk.LoraConfig(r=16, lora_alpha=32))
    lk.tune_allocator()
    config = lk.TrainConfig(
        str(args.child / "run"),
        max_steps=WARM_UP + args.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=args.parts,
        packing=True,
        max_seq_length=args.tokens,
        reduce=SIDES[args.side][1],
    )
    sent = [written()]
    lk.train(model, tok, rows(), config, after_step=lambda: sent.append(written()))
    values = sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = [after - before for before, after in pairwise(sent[1:])]
    found = {"sent": steps, "values": values}
    (args.child / os.environ.get("RANK", "0")).write_text(json.dumps(found))


def measured(args: argparse.Namespace, side: str) -> tuple[float, list[int], int]:
    """Return tokens a second, bytes of each step, and the number of values that train."""
    count = SIDES[side][0]
    with socket.socket() as s, TemporaryDirectory() as folder:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
        s.close()
        words = [sys.executable, __file__, *sys.argv[1:], "--child", folder, "--side", side]
        threads = {"OMP_NUM_THREADS": str(2 // count)}
        group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        children = [
            subprocess.Popen(
                words,
                env={**os.environ, **threads, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(count)
        ]
        try:
            codes = [child.wait(1800) for child in children]
        finally:
            for child in children:
                child.kill()
        if any(codes):
            raise SystemExit(f"{side}: a process ended with {codes}")
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").open()]
        rates = [line["tokens_per_second"] for line in lines if line["step"] > WARM_UP]
        found = json.loads((Path(folder) / str(count - 1)).read_text())
        return statistics.median(rates), found["sent"], found["values"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="of a packed row")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        train(args)
        return
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            rate, sent, values = measured(args, side)
            found[side].append(rate)
            line = f"{side:8} {rate:8.1f} tokens/s"
            if side != "one":
                rounds = -(-args.parts // 2)
                bytes_of_formula = (rounds + 1 if side == "ordered" else 2) * 4 * values // 2
                middle = int(statistics.median(sent))
                line += f", {middle:,} bytes a step; the formula says {bytes_of_formula:,}"
            print(line, flush=True)
    for side in ("ordered", "fast"):
        ratios = [ours / one for ours, one in zip(found[side], found["one"], strict=True)]
        print(
            f"{side}: {statistics.median(ratios):.2f} times the tokens a second of one process "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
