"""`lorakit compare`: fine-tune models on tasks, all else equal, and say how they differ."""

import argparse
import sys
from pathlib import Path
from typing import Literal

import lorakit as lk
from lorakit.cli.arguments import Verbs, count, take_overrides
from lorakit.cli.run_file import read_run_file

_KEYS: dict[str, Literal["left", "right", "tie"]] = {"1": "left", "2": "right", "0": "tie"}


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "compare",
        parents=[common],
        help="fine-tune models on tasks with everything else equal, and say how they differ",
        description="Make the runs of a comparison file: models x tasks x "
        "settings x seeds. The same command goes on where an earlier one ended. The output_dir of "
        "a comparison instead of the file prints what it shows; key=value replaces a value of the "
        "file. The exit code is 1 if a run failed.",
    )
    add = parser.add_argument
    add("what", type=Path, metavar="compare.yaml|DIR", help="YAML file of the comparison")
    add("overrides", nargs="*", metavar="key=value", help="value to use instead of the file's")
    add("--dry-run", action="store_true", help="list the runs, with a forecast of their memory")
    add("--only", metavar="TEXT", help="make the runs with this text in their id, such as a task")
    add(
        "--jobs",
        type=count,
        default=1,
        metavar="N",
        help="make N runs at once, each a process of its own (default: one after the other)",
    )
    add(
        "--vote",
        nargs=2,
        metavar="RUN",
        help="show the answers of two runs of DIR side by side, not saying whose they are, and ask "
        "which one is better",
    )
    parser.set_defaults(run=compare, take_rest=take_overrides)


def compare(args: argparse.Namespace) -> int:
    """Make the runs, list them, show what is there or ask for votes, and return the exit code."""
    if args.what.is_dir():
        if args.vote:
            return _vote(lk.Ballot(args.what, *args.vote))
        print(_printable(str(lk.read_comparison(args.what))))
        return 0
    if args.vote:
        raise lk.LorakitError(f"--vote: {args.what} is no directory; name that of a comparison")
    values = read_run_file(args.what, args.overrides)
    config = lk.ComparisonConfig.from_dict(values, str(args.what))
    if args.dry_run:
        return _list(lk.plan_comparison(config, only=args.only))
    result = lk.compare_models(config, only=args.only, at_once=args.jobs)
    print(_printable(str(result)))
    print(f"comparison.json, comparison.md and the runs in {result.folder}")
    if result.interrupted:
        print("lorakit: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 1 if result.failed else 0


def _list(runs: list["lk.ComparedRun"]) -> int:
    """Print the runs of a comparison, with a forecast of the memory of each."""
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    forecasts: dict[tuple[str, str, str], str] = {}
    for number, each in enumerate(runs, 1):
        run = each.run
        rows = ", ".join(f"{count} {part}" for part, count in each.sizes.items())
        line = f"run {number} of {len(runs)}: {run.id} ({each.state}; rows: {rows})"
        if run.is_trained:
            key = run.task, run.model, run.settings
            if key not in forecasts:
                forecasts[key] = _forecast(each, kind)
            line += f", {forecasts[key]}"
        print(line, flush=True)
    return 0


def _forecast(each: "lk.ComparedRun", kind: str) -> str:
    """Return the memory that a run will take, as a few words."""
    planned = lk.PlannedRun.from_run(each.run.config, each.lengths, device=kind)
    free = lk.memory.free_memory(kind)
    forecast = lk.settled_run(planned, free).forecast()
    return f"memory {lk.memory.format_bytes(forecast.reserved)} of {lk.memory.format_bytes(free)}"


def _vote(ballot: "lk.Ballot") -> int:
    """Ask for a vote on one pair after the other, and print the share at the end."""
    print("1: the left one is better, 2: the right one, 0: neither, q: stop")
    while (pair := ballot.next()) is not None:
        prompt = pair.prompt
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
        print(f"\n---- {pair.left_over} to go ----\n{_printable(prompt)}")
        print(f"\n[1] {_printable(pair.left)}\n\n[2] {_printable(pair.right)}")
        try:
            key = input("1, 2, 0 or q: ").strip()
        except EOFError:
            break
        if key == "q":
            break
        if key in _KEYS:
            ballot.vote(pair.ticket, _KEYS[key])
        else:
            print(f"{key!r} is none of 1, 2, 0 and q")
    print(f"\n{ballot.share()}")
    return 0


def _printable(text: str) -> str:
    """Return a text without what would command a terminal: a model may write anything."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
