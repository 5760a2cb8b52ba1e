"""Speed of one decoding step by how the weights are stored, beside the memory's.

    python benchmarks/decoding.py [--sizes qwen2.5-1.5b] [--layers 4] [--rows 1 8] [--threads 1 2]
                                  [--context 256] [--lora 16] [--repeats 9]

The model is random, of a real model's sizes with fewer layers and a smaller vocabulary: both are
divided by the same number, so that layers and head keep their shares. Every storage takes its turn
in every round, and the figures are medians. "bound" is what the ratio to bf16 would be if all of
both steps were the reading of weights. The last line of a block reads as many bytes as bf16 has, in
the same rounds, with a plain sum. With --lora every row has an adapter of its own.
"""

import argparse
import dataclasses
import platform
import statistics
import time
from array import array

import torch

from lorakit import kernels


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a model: heads of queries and of keys, D of each, and whether its head is tied."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int


SIZES = {
    "smollm2-135m": Sizes(576, 1536, 9, 3, 64, 30, 49152),
    "llama-3.2-1b": Sizes(2048, 8192, 32, 8, 64, 16, 128256),
    "qwen2.5-1.5b": Sizes(1536, 8960, 12, 2, 128, 28, 151936),
}
PAGE = 64  # positions
PACK = {
    "bf16": (None, None),
    "int8": (kernels.quantize_int8, None),
    "int8, head int8": (kernels.quantize_int8, kernels.quantize_int8),
    "nf4": (kernels.quantize_nf4, None),
    "nf4, head int8": (kernels.quantize_nf4, kernels.quantize_int8),
    "nf4, head nf4": (kernels.quantize_nf4, kernels.quantize_nf4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", choices=SIZES, default="qwen2.5-1.5b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--lora", type=int, metavar="RANK")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=PACK, default=list(PACK))
    args = parser.parse_args()
    whole = SIZES[args.sizes]
    vocabulary = whole.vocabulary * args.layers // whole.layers // 64 * 64
    sizes = dataclasses.replace(whole, layers=args.layers, vocabulary=vocabulary)
    print(
        f"{platform.machine()}, instruction set {torch.backends.cpu.get_cpu_capability()}, "
        f"sizes of {args.sizes}, {sizes.layers} of {whole.layers} layers, context {args.context}"
    )
    adapters = 0 if args.lora is None else max(args.rows)
    plans = make_plans(sizes, args.only, adapters, args.lora)
    for threads in args.threads:
        torch.set_num_threads(threads)
        for rows in args.rows:
            measure(plans, sizes, rows, threads, args)


def make_plans(sizes: Sizes, names: list[str], adapters: int, rank: int | None) -> dict:
    """Return a plan for each storage, of the same random weights, and the bytes of its weights."""
    torch.manual_seed(0)
    Q, K = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    H, inner = sizes.hidden, sizes.inner
    shapes = {"q": (Q, H), "k": (K, H), "v": (K, H), "o": (H, Q)}
    shapes |= {"gate": (inner, H), "up": (inner, H), "down": (H, inner)}

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * shape[-1] ** -0.5).bfloat16()

    dense = [{n: random(*shape) for n, shape in shapes.items()} for _ in range(sizes.layers)]
    embedding, norm = random(sizes.vocabulary, H), torch.ones(H, dtype=torch.bfloat16)
    updates = [
        [
            {n: kernels.DecodeUpdate(torch.randn(rank, k) * 0.02, torch.zeros(n_, rank), 1.0)
             for n, (n_, k) in shapes.items()}
            for _ in dense
        ]
        for _ in range(adapters)
    ]  # fmt: skip
    found = {}
    for name in names:
        pack, pack_head = PACK[name]
        layers = [{n: w if pack is None else pack(w) for n, w in each.items()} for each in dense]
        head = embedding if pack_head is None else pack_head(embedding)
        plan = kernels.DecodePlan(
            head,
            [kernels.DecodeLayer(norm, **each, post_attention_norm=norm) for each in layers],
            norm,
            head,
            num_heads=sizes.heads,
            num_kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            eps=1e-5,
            activation="silu",
            adapters=updates,
        )
        found[name] = plan, head.nbytes + sum(w.nbytes for each in layers for w in each.values())
    return found


def measure(plans: dict, sizes: Sizes, rows: int, threads: int, args: argparse.Namespace) -> None:
    """Print a table: a step of `rows` rows with each plan."""
    held = args.context // PAGE + 1  # pages of a row
    shape = (rows * held, PAGE, sizes.kv_heads, sizes.head_dim)
    cached = [[torch.randn(shape).bfloat16() for _ in range(sizes.layers)] for _ in "kv"]
    windows = [None] * sizes.layers
    caches = {n: kernels.DecodeCache(plan, *cached, windows) for n, (plan, _) in plans.items()}
    angles = torch.rand(rows, sizes.head_dim // 2)
    ids, tables = torch.arange(rows), [(angles.cos(), angles.sin())]
    pages = torch.arange(rows * held).view(rows, held).tolist()
    places = [kernels.DecodePlace(args.context, (array("q", each),)) for each in pages]
    numbers = None if args.lora is None else list(range(rows))
    memory = torch.ones(max(size for _, size in plans.values()) // 8, dtype=torch.int64)
    times: dict[str, list[float]] = {name: [] for name in [*plans, "read"]}
    for repeat in range(args.repeats + 1):
        for name, (plan, _) in plans.items():
            started = time.perf_counter()
            kernels.decode_step(plan, ids, tables, caches[name], places, numbers)
            times[name].append(time.perf_counter() - started)
        started = time.perf_counter()
        memory.sum()
        times["read"].append(time.perf_counter() - started)
        if repeat == 0:  # the first round is slower
            times = {name: [] for name in times}
    seconds = {name: statistics.median(each) for name, each in times.items()}
    reading = memory.nbytes / seconds["read"] / 1e9
    first, size = seconds[args.only[0]], plans[args.only[0]][1]
    print(f"{rows} rows, {threads} threads" + (f", LoRA of rank {args.lora}" if args.lora else ""))
    print(f"{'':16} {'ms':>8} {'tokens/s':>9} {'MB':>7} {'GB/s':>6} {'x':>6} {'bound':>6}")
    for name, (_, bytes_) in plans.items():
        print(
            f"{name:16} {1e3 * seconds[name]:8.2f} {rows / seconds[name]:9.1f} {bytes_ / 1e6:7.1f} "
            f"{bytes_ / seconds[name] / 1e9:6.1f} {first / seconds[name]:6.2f} {size / bytes_:6.2f}"
        )
    print(f"{'a plain sum':16} {1e3 * seconds['read']:8.2f} {'':17} {reading:6.1f}")


if __name__ == "__main__":
    main()
