"""`lorakit report`: write a page about training runs as one file."""

import argparse
from pathlib import Path

import lorakit as lk
from lorakit.cli.arguments import Verbs, take_runs


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "report",
        parents=[common],
        help="write a page about training runs as one file",
        description="Write the page of the board as one HTML file: curves, settings, evaluations, "
        "samples and comparisons, as they are now. It opens in a browser without a network.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUNS",
        help="output_dir of a training run, or a folder that holds runs and comparisons",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="file to write (default: report.html)"
    )
    parser.set_defaults(run=report, take_rest=take_runs)


def report(args: argparse.Namespace) -> int:
    """Write the page, and return the exit code."""
    print(f"report in {lk.write_report(args.runs, args.out)}")
    return 0
