"""Loading into NF4 on the CPU: lorakit beside transformers and bitsandbytes, in one run.

    python benchmarks/load.py [--size 1.5b] [--model DIR] [--repeats 5]

The checkpoint has the shapes of a Qwen2.5, in bf16, with random weights. It is written to DIR,
unless one lies there, or to a temporary directory. Just written or read, it lies in the page cache
where there is room for it: the disk is not measured.

Every load has a process of its own, and the sides take turns. The linear layers are packed, double
quantization on, the tied embedding stays dense. Seconds are medians with their range, without the
imports; memory is the process's resident peak, mapped files included, and beyond the imports: the
peak less theirs. The largest of the repeats is shown.

A side that fails is a row with its error, and the run goes on; the exit code is 1 if it was
lorakit's.
"""

import argparse
import platform
import statistics
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from children import Child, SideError, exit_on_terminate

SIDES = {"lorakit": "lorakit", "transformers, bitsandbytes": "peft"}
PACKAGES = ("lorakit", "torch", "transformers", "bitsandbytes")
# hidden size, MLP, layers, heads, heads of keys and values, vocabulary: Qwen2.5's config.json
SHAPES = {
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "tiny": (128, 192, 2, 2, 1, 512),
}


@dataclass
class Row:
    """One side, as far as it came."""

    name: str
    seconds: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    over_imports_mb: float = 0.0
    model_mb: float = 0.0
    error: str = ""


def config_of(size: str) -> dict:
    """config.json of a Qwen2.5 of that size."""
    hidden, inner, layers, heads, kv_heads, vocabulary = SHAPES[size]
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
    }  # fmt: skip


def measure(folder: str, repeats: int) -> list[Row]:
    """Who fails takes part no longer."""
    rows = [Row(name) for name in SIDES]
    for i in range(repeats):
        for row in (row for row in rows if not row.error):
            try:
                with Child(SIDES[row.name]) as child:
                    imports_mb = child.started()["peak_mb"]
                    found = child.ask("load", folder=folder, dtype="bfloat16")
            except SideError as error:
                row.error = str(error)
                told = row.error
            else:
                row.seconds.append(found["seconds"])
                row.model_mb, peak = found["model_mb"], found["peak_mb"]
                row.peak_mb = max(row.peak_mb, peak)
                row.over_imports_mb = max(row.over_imports_mb, peak - imports_mb)
                told = f"{found['seconds']:.2f} s, {peak:.0f} MB"
            print(f"{row.name}: load {i + 1}/{repeats}, {told}", file=sys.stderr, flush=True)
    return rows


HEADER = (
    f"{'side':28} {'s':>7} {'range':>15} {'peak MB':>8} {'over imports':>12} "
    f"{'model MB':>9} {'x':>6}"
)


def line(row: Row, peer: Row) -> str:
    if row.error:
        return f"{row.name:28} {row.error}"
    seconds, span = statistics.median(row.seconds), f"{min(row.seconds):.2f}-{max(row.seconds):.2f}"
    x = "" if peer.error else f"{statistics.median(peer.seconds) / seconds:.2f}"
    return (
        f"{row.name:28} {seconds:7.2f} {span:>15} {row.peak_mb:8.0f} {row.over_imports_mb:12.0f} "
        f"{row.model_mb:9.1f} {x:>6}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=tuple(SHAPES), default="1.5b", help="of a new checkpoint")
    parser.add_argument("--model", type=Path, help="directory to read, or to write first")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be positive")
    exit_on_terminate()
    with nullcontext(args.model) if args.model else TemporaryDirectory() as folder:
        folder = Path(folder)
        there = (folder / "config.json").exists()
        try:
            with Child("writer") as writer:
                writer.started()
                machine = writer.ask("machine")
                if not there:
                    print(f"writing {folder}", file=sys.stderr, flush=True)
                    writer.ask("random_model", folder=str(folder), config=config_of(args.size))
        except SideError as error:
            sys.exit(f"load: {error}")
        versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        print(
            f"{platform.machine()}, {machine['threads']} threads, instruction set "
            f"{machine['isa']}, {versions}"
        )
        files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        what = str(folder) if there else f"Qwen2.5-{args.size}'s shapes, random"
        print(f"{what}: {files / 1e6:.0f} MB to NF4, {args.repeats} times")
        rows = measure(str(folder), args.repeats)
    print(HEADER)
    for row in rows:
        print(line(row, rows[-1]))
    sys.exit(int(bool(rows[0].error)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
