"""Every op and a QLoRA step on a GPU, at the sizes of an 8B model, beside what others have for it.

    python benchmarks/gpu.py [--op cross_entropy] [--provider Liger] [--markdown FILE] [--plot FILE]

The peers are torch, torch.compile, Liger, and bitsandbytes with PEFT, as far as they are installed.
`cases.py` holds the ops, `kernels.py` says how they are timed. A provider that fails is a row with
its error, and the run goes on; the exit code is 1 if one of lorakit's own failed.

The step is forward, backward and AdamW, with adapters of rank 16 on all linear layers of a random
decoder in NF4, embedding and head dense. The peer is the same shape in transformers. Each side is
built, timed and thrown away before the next, so that its memory is its own.
"""

import argparse
import datetime
import gc
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
from cases import OURS, PEERS, RANK, SCALING, WAYS, Setting, Sizes, mixed_precision, with_peft
from torch import Tensor, nn

import lorakit as lk
import lorakit.models.decoder  # the decoder itself: load_model would want a file
from kernels import (
    HEADER,
    Clock,
    Row,
    all_rows,
    attempt,
    available,
    draw_bars,
    line,
    measure,
    surroundings,
)

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEAST = 30  # runs of every provider
# what arithmetic bounds, where a share of the bandwidth says nothing
PRODUCTS = ("attention", "frozen_linear", "linear_cross_entropy", "lora_linear", "lora_mlp")


def adapter_sizes(hidden: int, inner: int, kv: int, layers: int) -> tuple[int, ...]:
    """Values of A and B of every linear layer."""
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return tuple(RANK * n for shape in shapes for n in shape) * layers


LARGE = Sizes(
    tokens=4096, hidden=4096, inner=14336, heads=32, kv_heads=8, head_dim=128,
    vocabularies=(128256, 151936), matrices=((4096, 4096), (14336, 4096)),
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 512), trained=adapter_sizes(4096, 14336, 8 * 128, 32),
)  # fmt: skip
LAYERS, TOKENS = 4, (2048, 8192)  # of the step; with fewer tokens launching takes the time


# ---- the step -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepRow:
    tokens: int
    provider: str
    ms: float = math.nan
    p20: float = math.nan
    p80: float = math.nan
    tokens_per_s: float = math.nan
    model_mb: float = math.nan  # the packed model, its adapters and their optimizer
    peak_mb: float = math.nan
    error: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.error) and self.provider.startswith("lorakit")


def decoder(s: Setting, layers: int) -> nn.Module:
    """lorakit's, random, packed, with adapters."""
    n = s.sizes
    config = lk.ModelConfig(
        "llama", n.vocabularies[0], n.hidden, n.inner, layers, n.heads, n.kv_heads, n.head_dim
    )
    with torch.device("meta"):
        model = lorakit.models.decoder.Decoder(config)
    model = model.to(s.dtype).to_empty(device=s.device).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1)
    return lk.attach(lk.quantize(model), lk.LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK)))


def peers_decoder(s: Setting, layers: int) -> nn.Module:
    """The same shape of transformers', bitsandbytes and PEFT."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    n = s.sizes
    config = LlamaConfig(
        vocab_size=n.vocabularies[0], hidden_size=n.hidden, intermediate_size=n.inner,
        num_hidden_layers=layers, num_attention_heads=n.heads, num_key_value_heads=n.kv_heads,
        head_dim=n.head_dim, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(s.device):
        model = AutoModelForCausalLM.from_config(config, dtype=s.dtype)
    return with_peft(model.requires_grad_(False), PROJECTIONS)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def our_step(s: Setting, layers: int, ids: Tensor, backend: str) -> Callable[[], None]:
    model = decoder(s, layers).train()
    optimizer = lk.optim.AdamW(trained(model))

    def step() -> None:
        with lk.kernels.use_backend(backend):
            loss, count = model.loss(ids, ids)
            (loss / count).backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peers_step(s: Setting, layers: int, ids: Tensor) -> Callable[[], None]:
    model = peers_decoder(s, layers).train()
    optimizer = torch.optim.AdamW(trained(model), fused=True)

    def step() -> None:
        with mixed_precision(s.device, s.dtype):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step_rows(
    s: Setting, layers: int, counts: Sequence[int], chosen: Collection[str], clock: Clock
) -> Iterator[StepRow]:
    for tokens in counts:
        ids = torch.randint(s.sizes.vocabularies[0], (1, tokens), device=s.device)
        makers = {f"lorakit {name}": partial(our_step, s, layers, ids, name) for name in OURS}
        makers["PEFT, bitsandbytes"] = partial(peers_step, s, layers, ids)
        for name, make in makers.items():
            if name in chosen:
                yield step_row(tokens, name, make, clock)
                gc.collect()
                if s.device.type == "cuda":
                    torch.cuda.empty_cache()


def step_row(
    tokens: int, name: str, make: Callable[[], Callable[[], None]], clock: Clock
) -> StepRow:
    before = clock.allocated_mb()
    step, error = attempt(make)
    if error:
        return StepRow(tokens, name, error=error)
    found = measure({name: lambda: step}, clock)[name]
    if found.error:
        return StepRow(tokens, name, error=found.error)
    held = clock.allocated_mb() - before
    beyond, error = attempt(lambda: clock.peak_mb(step))
    if error:
        return StepRow(tokens, name, error=error)
    ms, span = found.median, (found.quantile(0.2), found.quantile(0.8))
    return StepRow(tokens, name, ms, *span, 1e3 * tokens / ms, held, held + beyond)


# ---- the report ---------------------------------------------------------------------------------


def driver() -> str:
    """The version of NVIDIA's driver, if its tool is there to say it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(ask, capture_output=True, text=True).stdout.split()
    return told[0] if told else "unknown"


def heading(s: Setting, bandwidth: float) -> str:
    found = surroundings(s.device, s.dtype)
    if s.device.type == "cuda":
        gpu, hip = torch.cuda.get_device_properties(s.device), torch.version.hip
        runtime = f"ROCm {hip}" if hip else f"driver {driver()}, CUDA {torch.version.cuda}"
        found += (
            f"; compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} "
            f"multiprocessors, {gpu.total_memory / 1e9:.0f} GB, {runtime}"
        )
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return f"{today}: {found}. A copy moves {bandwidth:.0f} GB/s."


def table(titles: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first cells stand on the left."""
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def step_table(rows: list[StepRow]) -> str:
    titles = ["provider", "tokens", "ms", "p20", "p80", "tokens/s", "model MB", "peak MB"]
    return table(titles, [
        [row.provider, str(row.tokens), *(number(v, 1) for v in (row.ms, row.p20, row.p80)),
         *(number(v, 0) for v in (row.tokens_per_s, row.model_mb, row.peak_mb))]
        for row in rows if not row.error
    ])  # fmt: skip


def op_table(rows: list[Row]) -> str:
    titles = ["op", "shape", "provider", "ms", "p20", "p80", "GB/s", "copy", "x", "MB"]
    return table(titles, [
        [row.op, row.shape, row.provider, *(number(v, 3) for v in (row.ms, row.p20, row.p80)),
         number(row.gb_per_s, 0), number(row.copy, 2), number(row.x, 2), number(row.mb, 1)]
        for row in rows if not row.error
    ])  # fmt: skip


def by_rows(rows: list[Row]) -> dict[str, dict[str, dict[int, float]]]:
    """The products with a packed matrix: matrix -> provider -> M -> ms."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row.op == "frozen_linear" and not row.error:
            M, _, matrix = row.shape.partition(" x ")
            found.setdefault(matrix, {}).setdefault(row.provider, {})[int(M)] = row.ms
    return found


def few_rows(found: dict[str, dict[int, float]]) -> tuple[int, int] | None:
    """What FEW_ROWS of kernels/ops/frozen_linear should say: up to how many rows one at a time is
    the fastest, and up to how many one of the two ways beats dequantizing; of those measured.
    """
    vector, tiles, dense = (found.get(name, {}) for name in (*WAYS, "dequantize, torch"))
    counts = sorted(vector.keys() & tiles.keys() & dense.keys())
    if not counts:
        return None
    packed = list(takewhile(lambda M: min(vector[M], tiles[M]) < dense[M], counts))
    single = list(takewhile(lambda M: vector[M] <= tiles[M], packed))
    return max(single, default=0), max(packed, default=0)


def product_tables(rows: list[Row]) -> str:
    parts = []
    for matrix, found in by_rows(rows).items():
        counts = sorted({M for times in found.values() for M in times})
        cells = [
            [name, *(number(times.get(M, math.nan), 4) for M in counts)]
            for name, times in found.items()
        ]
        parts.append(table([f"{matrix}, ms for M =", *map(str, counts)], cells))
        best = few_rows(found)
        if best is not None:
            parts.append(f"For {matrix} the crossover is FewRows{best}.\n")
    return "\n".join(parts)


def markdown(heading: str, steps: list[StepRow], rows: list[Row], step_shape: str) -> str:
    others = [row for row in rows if row.op != "frozen_linear"]
    failed = [
        f"- QLoRA step, {r.tokens} tokens, {r.provider}: {r.error}\n" for r in steps if r.error
    ]
    failed += [f"- {r.op} {r.shape}, {r.provider}: {r.error}\n" for r in rows if r.error]
    return "\n".join([
        "# On a GPU\n",
        f"`python benchmarks/gpu.py`, {heading}\n",
        "Medians, with the 20th and 80th percentile. `GB/s`: the bytes that must move, each tensor "
        "once; `copy`: that\nover a copy's; `x`: the time of the fastest peer over this one's; "
        "`MB`: the peak of memory beyond the inputs,\nfor backward with its forward.\n",
        f"## A QLoRA step: {step_shape}\n",
        step_table(steps),
        "## Ops\n",
        op_table(others),
        "## Products of M rows with a packed matrix\n",
        product_tables(rows),
        "## Failed\n",
        "".join(failed) or "Nothing.\n",
    ])  # fmt: skip


def save_plot(rows: list[Row], path: Path) -> None:
    """Left the bandwidth of the ops that memory bounds, right the products over their rows."""
    from matplotlib.figure import Figure

    streams = [r for r in rows if not r.error and r.op.partition(" ")[0] not in PRODUCTS]
    groups = len({(row.op, row.shape) for row in streams})
    products = by_rows(rows)
    figure = Figure(figsize=(15, max(8, 0.4 * groups)), layout="constrained")
    left, right = figure.subfigures(1, 2)
    draw_bars(streams, left.subplots())
    panels = right.subplots(max(1, len(products)), squeeze=False)[:, 0]
    for axes, (matrix, found) in zip(panels, products.items(), strict=False):
        for provider, times in found.items():
            axes.plot(list(times), list(times.values()), marker="o", label=provider)
        counts = sorted({M for times in found.values() for M in times})
        axes.set(xscale="log", yscale="log", xlabel="rows M", ylabel="ms", title=matrix)
        axes.set_xticks(counts, [str(M) for M in counts], minor=False)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def run(
    s: Setting, layers: int, counts: Sequence[int], chosen: Collection[str], clock: Clock,
    only: str, report: Path, picture: Path,
) -> int:  # fmt: skip
    """Measures, prints and writes everything; the exit code."""
    bandwidth = clock.copy_bandwidth()
    top = heading(s, bandwidth)
    print(top)
    print(HEADER)
    rows, steps = [], []
    for row in all_rows(s, chosen, clock, bandwidth, only):
        rows.append(row)
        print(line(row), flush=True)
    shape = f"{layers} layers of {s.sizes.hidden} and {s.sizes.inner}, r = {RANK}"
    if only in "qlora step":
        print(f"QLoRA step: {shape}")
        for row in step_rows(s, layers, counts, chosen, clock):
            steps.append(row)
            told = row.error or f"{row.tokens_per_s:.0f} tokens/s, peak {row.peak_mb:.0f} MB"
            print(f"{row.tokens:5} {row.provider:18} {told}", flush=True)
    report.write_text(markdown(top, steps, rows, shape), encoding="utf-8")
    save_plot(rows, picture)
    print(f"written: {report}, {picture}")
    return int(any(row.failed for row in [*rows, *steps]))


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--op", default="", help="only ops whose name holds this")
    parser.add_argument("--provider", action="append", help="default: all that are installed")
    parser.add_argument("--seconds", type=float, default=0.5, help="per op and pass, at least")
    parser.add_argument("--markdown", type=Path, default=here / "gpu.md")
    parser.add_argument("--plot", type=Path, default=here / "gpu.png")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU; benchmarks/kernels.py measures a CPU")
    device = torch.device("cuda", torch.cuda.current_device())
    known = [*(f"lorakit {name}" for name in OURS), *WAYS, *PEERS]
    chosen = args.provider or available(device)
    for name in chosen:
        if name not in known:
            parser.error(f"provider {name!r} is none of {', '.join(known)}")
    setting, clock = Setting(device, torch.bfloat16, LARGE), Clock(device, args.seconds, LEAST)
    files = args.markdown, args.plot
    sys.exit(run(setting, LAYERS, TOKENS, chosen, clock, args.op, *files))


if __name__ == "__main__":
    main()
