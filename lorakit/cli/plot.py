"""`lorakit plot`: draw the curves of training runs."""

import argparse
from pathlib import Path

import lorakit as lk
from lorakit.cli.arguments import Verbs, take_runs


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "plot",
        parents=[common],
        help="draw the curves of training runs",
        description="Draw loss, learning rate, gradient norm and tokens per second of training "
        "runs side by side: a PNG for each, and the page that `lorakit report` writes.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="output_dir of a training run")
    parser.add_argument(
        "--out", type=Path, default=Path("plots"), help="directory to write (default: plots)"
    )
    parser.set_defaults(run=plot, take_rest=take_runs)


def plot(args: argparse.Namespace) -> int:
    """Write the plots and their page, and return the exit code."""
    print(f"plots in {lk.plot_runs(args.runs, args.out)}")
    return 0
