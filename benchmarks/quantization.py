"""What quantization costs in accuracy, on a real model: the error of the weights, and perplexity.

    python benchmarks/quantization.py MODEL [--tokens 4096] [--orders 3]

Error: || W - W' || / || W || of every linear layer but the head, the mean over the layers. Blocks
hold 64 values. int4 is the plain baseline: 15 even steps between -absmax and absmax.

Perplexity: exp of the mean cross-entropy over windows of 512 tokens of the standard library's
source. Everything that is not quantized is rounded to bf16, all products run in fp32, so that the
rows differ by the weights alone.

A rounding goes one way or the other by chance, and on a small model perplexity follows. So every
weight is quantized several times, with its columns in another order, which changes who shares a
block with whom, and the spread is shown: smaller differences say nothing.
"""

import argparse
import math
import platform
import statistics
import sysconfig
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import lorakit as lk

WINDOW = 512
MODULES = ["argparse", "calendar", "csv", "difflib", "fractions", "gettext", "heapq", "imaplib"]
MODULES += ["mailbox", "optparse", "pathlib", "pprint", "random", "shelve", "statistics", "tarfile"]


def packed(quantize: Callable, **options) -> Callable[[Tensor], tuple[Tensor, int]]:
    """A quantizer of weights: w -> what the packed tensor stands for, and its bytes."""

    def run(w: Tensor) -> tuple[Tensor, int]:
        q = quantize(w, **options)
        return lk.kernels.dequantize(q), q.nbytes

    return run


def int4(w: Tensor) -> tuple[Tensor, int]:
    """15 even levels with one fp32 scale per 64 values."""
    blocks = w.reshape(-1, 64)
    step = (blocks.abs().amax(1, keepdim=True) / 7).clamp(min=1e-38)
    return ((blocks / step).round() * step).view(w.shape), w.numel() // 2 + 4 * len(blocks)


def bf16(w: Tensor) -> tuple[Tensor, int]:
    return w.bfloat16().float(), 2 * w.numel()


nf4, fp4 = lk.kernels.quantize_nf4, lk.kernels.quantize_fp4
double = packed(nf4)
int8 = packed(lk.kernels.quantize_int8)
# name -> of the linear layers, of the embedding (with a tied head)
ROWS = {
    "bf16": (bf16, bf16),
    "int4, even steps": (int4, bf16),
    "NF4": (packed(nf4, double_quant=False), bf16),
    "NF4, double quantization": (double, bf16),
    "NF4, searched scales": (packed(nf4, double_quant=False, search_scales=True), bf16),
    "NF4, searched scales, double": (packed(nf4, search_scales=True), bf16),
    "FP4": (packed(fp4, double_quant=False), bf16),
    "FP4, searched scales": (packed(fp4, double_quant=False, search_scales=True), bf16),
    "int8": (int8, bf16),
    "NF4, double; embedding int8": (double, int8),
    "NF4, double; embedding NF4": (double, double),
}


def shuffled(quantize: Callable, order: int, w: Tensor) -> tuple[Tensor, int]:
    """`quantize` with the columns of w in a random order, given back in their own."""
    if order == 0:
        return quantize(w)
    columns = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(order))
    dense, size = quantize(w[:, columns].contiguous())
    return torch.empty_like(dense).index_copy_(1, columns, dense), size


def held_out(tok, tokens: int) -> torch.Tensor:
    """int64 [windows, WINDOW] of the standard library's source."""
    folder = Path(sysconfig.get_path("stdlib"))
    ids = []
    for name in MODULES:
        file = folder / f"{name}.py"
        text = (file if file.exists() else folder / name / "__init__.py").read_text("utf-8")
        ids += tok.encode(text)
    windows = min(tokens, len(ids)) // WINDOW
    return torch.tensor(ids[: windows * WINDOW]).view(windows, WINDOW)


@torch.no_grad()
def perplexity(model, windows: torch.Tensor) -> float:
    total = count = 0
    for rows in windows.split(4):
        loss, n = model.loss(rows, rows)
        total, count = total + loss.item(), count + n.item()
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="directory, .gguf file or Hub id")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--orders", type=int, default=3, help="of the columns")
    args = parser.parse_args()
    windows = held_out(lk.load_tokenizer(args.model), args.tokens)
    print(
        f"{Path(args.model).name}, {windows.numel()} tokens, {args.orders} orders of the columns, "
        f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("lorakit", "torch"))
    )
    print("\n| weights | MB | bits | mean relative error | perplexity | over bf16 |")
    print("|---|---|---|---|---|---|")
    model = lk.load_model(args.model, dtype="float32", device="cpu")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    linear = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    tables = [m for m in (model.model.embed_tokens, model.lm_head) if m is not None]
    original = {layer: layer.weight.clone() for layer in [*linear, *tables]}
    rest = sum(2 * p.numel() for p in model.parameters() if p.dim() == 1)
    base = None
    for label, (of_linear, of_tables) in ROWS.items():
        found = []
        for order in range(args.orders if label != "bf16" else 1):
            size, bits, errors = rest, [], []
            for layer, weight in original.items():
                quantize = of_linear if layer in linear else of_tables
                dense, stored = shuffled(quantize, order, weight)
                layer.weight.copy_(dense)
                size += stored
                if layer in linear:
                    bits.append(8 * stored / weight.numel())
                    errors.append(((dense - weight).norm() / weight.norm()).item())
            found.append(perplexity(model, windows))
        mean = statistics.mean(found)
        base = base or mean
        spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        print(
            f"| {label} | {size / 1e6:.0f} | {statistics.mean(bits):.3f} | "
            f"{statistics.mean(errors):.4f} | {mean:.2f}{spread} | {mean / base - 1:+.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
