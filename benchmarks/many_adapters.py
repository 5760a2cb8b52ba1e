"""Adapters that learn in one pass over one model, against one after the other.

    python benchmarks/many_adapters.py MODEL [--steps 5] [--rows 1] [--tokens 16]

Eight adapters of ranks 4 to 64, each with rows and a learning rate of its own, on NF4 in fp32. In
turn a session gives all of them a step by one pass (`Session.forward_backward_many`), and another
one gives each a step by itself. It prints the time of the steps, by the clock and by what the
processors did, how far the weights are apart in the end, and the memory.

The memory of the one pass is compared with that of one adapter which learns all these rows at once,
and what the other seven take: weights, gradients and AdamW's state, 16 bytes a parameter. Each is
the peak of a process of its own.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import lorakit as lk

RANKS = (4, 8, 12, 16, 24, 32, 48, 64)
RATES = {f"r{rank}": 1e-4 * (1 + i) for i, rank in enumerate(RANKS)}
Rows = dict[str, list[dict[str, str]]]


def session_of(model: str, ranks: tuple[int, ...], rows: int) -> lk.Session:
    """Return a session with an adapter of each rank, the same each time."""
    torch.manual_seed(0)
    loaded = lk.load_model(model, dtype="float32", quantize="nf4")
    for rank in ranks:
        lk.attach(loaded, lk.LoraConfig(r=rank, lora_alpha=16), name=f"r{rank}")
    config = lk.TrainConfig(per_device_train_batch_size=rows, train_on="all")
    return lk.Session(loaded, lk.load_tokenizer(model), config)


def rows_of(tok: object, rows: int, tokens: int, seed: int) -> Rows:
    """Return texts for each adapter, of about so many tokens: a word is one or two."""
    generator = torch.Generator().manual_seed(seed)
    words = ["the", "of", "and", "to", "in", "is", "you", "that", "he", "was", "for", "on", "are"]

    def text() -> str:
        picked = torch.randint(len(words), (tokens,), generator=generator).tolist()
        return " ".join(words[i] for i in picked)

    return {name: [{"text": text()} for _ in range(rows)] for name in RATES}


def in_one(session: lk.Session, rows: Rows) -> int:
    """Give every adapter a step by one pass; return how many tokens it had."""
    told = session.forward_backward_many(rows)
    for name, rate in RATES.items():
        session.optim_step(rate, adapter=name)
    return sum(each.tokens for each in told.values())


def one_by_one(session: lk.Session, rows: Rows) -> int:
    """Give every adapter a step by itself."""
    tokens = 0
    for name, rate in RATES.items():
        tokens += session.forward_backward(rows[name], adapter=name).tokens
        session.optim_step(rate, adapter=name)
    return tokens


def timed(step: Callable[[lk.Session, Rows], int], session: lk.Session, rows: Rows) -> list[float]:
    """Return seconds by the clock, seconds of the processors, and tokens of a step."""
    clock, busy = time.perf_counter(), time.process_time()
    tokens = step(session, rows)
    return [time.perf_counter() - clock, time.process_time() - busy, tokens]


def apart(first: lk.Session, second: lk.Session) -> tuple[float, float]:
    """Return the largest difference of a weight, and that of a matrix by its length."""
    largest = relative = 0.0
    others = dict(second.model.named_parameters())
    for name, p in first.model.named_parameters():
        if "lora_" in name:
            difference = (p - others[name]).detach()
            largest = max(largest, difference.abs().max().item())
            length = others[name].norm().clamp(min=1e-12)
            relative = max(relative, (difference.norm() / length).item())
    return largest, relative


def peak(model: str, ranks: tuple[int, ...], rows: int, tokens: int) -> float:
    """Return the peak of this process, in MB, with three steps of adapters of these ranks."""
    session = session_of(model, ranks, rows * len(RANKS) // len(ranks))
    for step in range(3):
        given = rows_of(session.tok, rows, tokens, step)
        if len(ranks) == len(RANKS):
            in_one(session, given)
        else:
            session.forward_backward([row for some in given.values() for row in some])
            session.optim_step(1e-4)
    return lk.memory.peak_memory_mb(session.model.device)


def peak_of_child(args: argparse.Namespace, ranks: tuple[int, ...]) -> float:
    options = ["--rows", str(args.rows), "--tokens", str(args.tokens), "--peak", *map(str, ranks)]
    command = [sys.executable, __file__, args.model, *options]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a directory or a file of a model")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1, help="rows of a step of each adapter")
    parser.add_argument("--tokens", type=int, default=16, help="words of a row")
    parser.add_argument("--peak", type=int, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(peak(args.model, tuple(args.peak), args.rows, args.tokens))
        return
    together, alone = (session_of(args.model, RANKS, args.rows) for _ in range(2))
    spent = {"one pass": [0.0] * 3, "one by one": [0.0] * 3}
    for step in range(args.steps + 1):
        rows = rows_of(together.tok, args.rows, args.tokens, step)
        for name, function, session in (
            ("one pass", in_one, together),
            ("one by one", one_by_one, alone),
        ):
            found = timed(function, session, rows)
            if step:  # the first warms up
                spent[name] = [a + b for a, b in zip(spent[name], found, strict=True)]
    print(f"{len(RANKS)} adapters of ranks {RANKS}, {args.rows} rows of {args.tokens} words each")
    print(f"{'':12}{'tokens/s':>10}{'processor s':>13}")
    for name, (clock, busy, tokens) in spent.items():
        print(f"{name:12}{tokens / clock:10.1f}{busy:13.2f}")
    (clock, busy, _), (clock_alone, busy_alone, _) = spent.values()
    print(f"{'ratio':12}{clock_alone / clock:10.2f}{busy_alone / busy:13.2f}")
    largest, relative = apart(together, alone)
    print(f"weights apart by {largest:.1e} at most; a matrix by {relative:.1e} of its length")
    sizes = dict.fromkeys(RANKS, 0)
    for name, p in together.model.named_parameters():
        for rank in RANKS:
            sizes[rank] += p.numel() * (f".adapters.r{rank}.lora_" in name)
    found, one = peak_of_child(args, RANKS), peak_of_child(args, RANKS[-1:])
    bound = one + 16 * sum(sizes[rank] for rank in RANKS[:-1]) / 1e6
    print(f"peak {found:.0f} MB; one adapter with these rows, and seven more: {bound:.0f} MB; "
          f"ratio {found / bound:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
