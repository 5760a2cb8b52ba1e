"""`lorakit data show` and `data lint`: look at rows of training data, or check them."""

import argparse
import sys
from pathlib import Path

import lorakit as lk
from lorakit.cli.arguments import MODEL_HELP, TEMPLATE_HELP, Verbs, count


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb and its two actions to the command line."""
    parser = verbs.add_parser(
        "data",
        help="look at rows of training data as the model sees them, or check them",
        description="Look at rows of training data as the model sees them, or check them.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    rows = argparse.ArgumentParser(add_help=False)
    rows.add_argument("file", type=Path, help="JSONL, JSON, CSV, TSV or Parquet file of rows")
    rows.add_argument("--model", required=True, help=MODEL_HELP)
    rows.add_argument("--chat-template", help=TEMPLATE_HELP)
    rows.add_argument("--format", help="format of the rows (default: what their fields say)")
    rows.add_argument(
        "--skip-empty", action="store_true", help="leave out rows with an empty answer"
    )
    rows.add_argument(
        "--train-on",
        default="completion",
        help="the tokens that are learned: completion (the default), last_turn or all",
    )

    show = actions.add_parser(
        "show",
        parents=[common, rows],
        help="print the tokens of the first rows with their labels coloured",
        description="Print the tokens of the first rows, a bar between them. What is learned is "
        "coloured, or in double brackets where the output is no terminal.",
    )
    show.add_argument("--rows", type=count, default=3, help="print this many rows (default: 3)")
    show.add_argument("--no-color", action="store_true", help="use brackets on a terminal too")
    show.set_defaults(run=data_show)

    lint = actions.add_parser(
        "lint",
        parents=[common, rows],
        help="report duplicates, lengths, class balance, empty turns and over-long rows",
        description="Report lengths, class balance, duplicates, empty turns, over-long rows and "
        "rows that cannot be used. The exit code is 1 if any row cannot be used.",
    )
    lint.add_argument(
        "--max-seq-length",
        type=count,
        default=1024,
        help="a row of more tokens is over-long (default: 1024)",
    )
    lint.set_defaults(run=data_lint)


def data_show(args: argparse.Namespace) -> int:
    """Print the first rows as the model sees them, and return the exit code."""
    rows = lk.read_rows(args.file, format=args.format, skip_empty=args.skip_empty)
    tok = lk.load_tokenizer(args.model, chat_template=args.chat_template)
    color = sys.stdout.isatty() and not args.no_color
    print(lk.show_rows(rows, tok, args.rows, train_on=args.train_on, color=color))
    return 0


def data_lint(args: argparse.Namespace) -> int:
    """Print a report on the rows, and return 1 if any row cannot be used."""
    errors: list[str] = []
    rows = lk.read_rows(args.file, format=args.format, errors=errors, skip_empty=args.skip_empty)
    tok = lk.load_tokenizer(args.model, chat_template=args.chat_template)
    report = lk.lint_rows(
        rows, tok, max_seq_length=args.max_seq_length, train_on=args.train_on, errors=errors
    )
    print(report)
    return 1 if report.unusable else 0
