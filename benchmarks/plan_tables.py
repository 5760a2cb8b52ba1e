"""What fits where: forecasts for published models, as the tables of docs/scale-tables.md.

    python benchmarks/plan_tables.py [--write docs/scale-tables.md] [--models 8B,70B]

`make plan-tables` writes the page. No GPU is needed. Each cell holds the first of the ways below,
in their order, with which the forecast fits the card. Tokens are those of one row, one row at a
time. A way that lorakit cannot forecast is left out. The ways between the first that fits the
smallest card and the last are not forecast: the last one says what is the least.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

from published import PUBLISHED, SIZES

import lorakit as lk

CARDS = {16: "RTX 4080", 24: "RTX 4090", 48: "L40S", 80: "H100"}
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
METHODS = ("LoRA", "QLoRA", "full")


class Way(NamedTuple):
    """A run with the settings that letters stand for."""

    letters: str
    run: lk.PlannedRun


def ways(model: str, method: str, tokens: int, ranks: int) -> list[Way]:
    """Return runs that take less and less memory, and more and more time or bits."""
    config = lk.ModelConfig.from_hf(dict(PUBLISHED[model]))
    quantize = lk.QuantConfig() if method == "QLoRA" else None
    train = lk.TrainConfig(
        train="full" if method == "full" else "adapter",
        per_device_train_batch_size=1,
        max_seq_length=tokens,
        mlp_activations="keep",
    )
    lora = None if method == "full" else lk.LoraConfig(r=16)
    shard: dict[str, Any] = {"ranks": ranks, "shard": "full"} if ranks > 1 else {}
    run = lk.PlannedRun(config, train, lora, quantize, **shard)
    steps = [("", run), ("r", run := run.with_train(mlp_activations="recompute"))]
    steps.append(("c", run := run.with_train(gradient_checkpointing=True)))
    steps.append(("ca", run := run.with_train(activation_offloading=True)))
    steps.append(("ca8", run := run.with_train(optim="adamw_8bit")))
    if quantize is not None:
        ends = dataclasses.replace(
            quantize, embed_tokens="nf4", lm_head=None if config.tie_word_embeddings else "nf4"
        )
        steps.append(("ca8e", run := dataclasses.replace(run, quantize=ends)))
    if lora is not None:
        steps.append((f"{steps[-1][0]}w", dataclasses.replace(run, offload_weights=True)))
    return [Way(*step) for step in steps]


def reserved(way: Way, of: str) -> int | None:
    """Return the bytes that a way takes of a card; None, and say why, if it cannot be forecast."""
    try:
        return way.run.forecast().reserved
    except lk.LorakitError as error:
        print(f"{of} {way.letters}: {error}", file=sys.stderr)
        return None


def row(model: str, method: str, tokens: int, ranks: int) -> str:
    """Return the row of a model and a method, or "" if nothing could be forecast."""
    usable = {name: lk.find_card(name).usable for name in CARDS.values()}
    of, left = f"{SIZES[model]} {method}, {ranks} devices", ways(model, method, tokens, ranks)
    found: list[tuple[str, int]] = []
    while left:
        way = left.pop(0)
        size = reserved(way, of)
        if size is not None:
            found.append((way.letters, size))
            if size <= min(usable.values()):
                left = left[-1:]
    if not found:
        return ""
    cells = []
    for most in usable.values():
        fits = [(letters, size) for letters, size in found if size <= most]
        cells.append(f"{fits[0][1] / 1e9:.1f} {fits[0][0]}".strip() if fits else "no")
    least = min(size for _, size in found) / 1e9
    return f"| {SIZES[model]} | {method} | {' | '.join(cells)} | {least:.1f} |"


def table(models: list[str], methods: list[str], tokens: int, ranks: int) -> list[str]:
    """Return the lines of the table of so many devices; none if nothing could be forecast."""
    rows = [row(model, method, tokens, ranks) for model in models for method in methods]
    if not any(rows):
        return []
    sizes = " | ".join(f"{size} GB" for size in CARDS)
    head = "one device" if ranks == 1 else f"{ranks} devices, weights sharded"
    return [
        f"### {head.capitalize()}",
        "",
        f"| model | method | {sizes} | least, GB |",
        "|---|---|" + "---|" * (len(CARDS) + 1),
        *filter(None, rows),
        "",
    ]


def write(page: Path, lines: list[str]) -> None:
    """Put lines between the two marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    text = "\n".join([f"{before}{BEGIN}", "", *lines, f"{END}{after}"])
    page.write_text(text, encoding="utf-8")


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--models", default=",".join(SIZES.values()))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ranks", default="1,2,8")
    args = parser.parse_args()
    models = [model for model, size in SIZES.items() if size in args.models.split(",")]
    lines = []
    for ranks in map(int, args.ranks.split(",")):
        lines += table(models, args.methods.split(","), args.tokens, ranks)
    print("\n".join(lines))
    if args.write is not None:
        write(args.write, lines)


if __name__ == "__main__":
    main()
