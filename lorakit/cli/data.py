"""`lorakit data`: look at rows of training data, check them, and write the better part of them.

`show` and `lint` write nothing. `split`, `dedup`, `balance` and `sample` write new files; the file
that they read stays as it is.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lorakit as lk
from lorakit.cli.arguments import MODEL_HELP, OUT_HELP, TEMPLATE_HELP, Verbs, count


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb and its actions to the command line."""
    parser = verbs.add_parser(
        "data",
        help="look at rows of training data, check them, split, deduplicate, balance or sample",
        description="Look at rows of training data as the model sees them, check them, or write "
        "some of them to new files.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("file", type=Path, help="JSONL, JSON, CSV, TSV or Parquet file of rows")
    source.add_argument("--format", help="format of the rows (default: what their fields say)")
    source.add_argument(
        "--skip-empty", action="store_true", help="leave out rows with an empty answer"
    )
    _add_reading(actions, [common, source])
    _add_writing(actions, [common, source])


def _add_reading(actions: Verbs, parents: list[argparse.ArgumentParser]) -> None:
    """Add the actions that look at rows with a model's tokenizer."""
    rows = argparse.ArgumentParser(add_help=False)
    rows.add_argument("--model", required=True, help=MODEL_HELP)
    rows.add_argument("--chat-template", help=TEMPLATE_HELP)
    rows.add_argument(
        "--train-on",
        default="completion",
        help="the tokens that are learned: completion (the default), last_turn or all",
    )

    show = actions.add_parser(
        "show",
        parents=[*parents, rows],
        help="print the tokens of the first rows with their labels coloured",
        description="Print the tokens of the first rows, a bar between them. What is learned is "
        "coloured, or in double brackets where the output is no terminal.",
    )
    show.add_argument("--rows", type=count, default=3, help="print this many rows (default: 3)")
    show.add_argument("--no-color", action="store_true", help="use brackets on a terminal too")
    show.set_defaults(run=data_show)

    lint = actions.add_parser(
        "lint",
        parents=[*parents, rows],
        help="report duplicates, lengths, class balance, private strings and leaks",
        description="Report lengths, scripts, class balance, duplicates and near ones, empty "
        "turns, answers that repeat the question, strings that look private, over-long rows and "
        "rows that cannot be used. The exit code is 1 if any row cannot be used, or the file gives "
        "away a row of the one that --against names.",
    )
    lint.add_argument(
        "--max-seq-length",
        type=count,
        default=1024,
        help="a row of more tokens is over-long (default: 1024)",
    )
    lint.add_argument(
        "--near",
        type=float,
        default=0.8,
        metavar="SIMILARITY",
        help="near duplicates share this part of what they say, from 0.3 to 1 (default: 0.8)",
    )
    lint.add_argument(
        "--against",
        type=Path,
        metavar="TEST",
        help="file of rows to test a model on, which those of the first file may give away",
    )
    lint.add_argument("--json", action="store_true", help="print the report as JSON")
    lint.set_defaults(run=data_lint)


def _add_writing(actions: Verbs, parents: list[argparse.ArgumentParser]) -> None:
    """Add the actions that write some of the rows to new files."""
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument("--out", type=Path, required=True, help="new .jsonl file to write")
    _add_dedup(actions, [*parents, out])
    _add_drawing(actions, [*parents, out])
    split = actions.add_parser(
        "split",
        parents=parents,
        help="divide rows into files for training, validation and testing",
        description="Divide rows into files. The content of a row decides its file, so equal rows "
        "are in one file, and rows that come later move no others.",
    )
    split.add_argument("--out", type=Path, required=True, help=OUT_HELP)
    split.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[80, 10, 10],
        metavar="SHARE",
        help="shares of train, validation and test in percent, or of the first two "
        "(default: 80 10 10)",
    )
    split.set_defaults(run=data_split)


LEFT_OUT = " Rows that are left out are counted, and the first of them named."


def _add_dedup(actions: Verbs, parents: list[argparse.ArgumentParser]) -> None:
    """Add the action that leaves out what repeats."""
    dedup = actions.add_parser(
        "dedup",
        parents=parents,
        help="write rows without those that repeat an earlier one",
        description="Write rows without those that repeat an earlier one." + LEFT_OUT,
    )
    dedup.add_argument(
        "--near",
        type=float,
        metavar="SIMILARITY",
        help="leave out near duplicates too: rows that share this part of what they say with an "
        "earlier one, from 0.3 to 1, such as 0.8",
    )
    dedup.set_defaults(run=data_dedup)


def _add_drawing(actions: Verbs, parents: list[argparse.ArgumentParser]) -> None:
    """Add the actions that draw rows at random."""
    drawn = argparse.ArgumentParser(add_help=False)
    drawn.add_argument("--seed", type=int, default=0, help="seed of the drawn rows (default: 0)")
    balance = actions.add_parser(
        "balance",
        parents=[*parents, drawn],
        help="write equally many rows of each class",
        description="Write equally many rows of each class, drawn at random." + LEFT_OUT,
    )
    balance.add_argument(
        "--by", metavar="FIELD", help="field that holds the class of a row (default: the answer)"
    )
    balance.add_argument(
        "--most", type=count, help="most rows of a class (default: those of the smallest)"
    )
    balance.set_defaults(run=data_balance)
    sample = actions.add_parser(
        "sample",
        parents=[*parents, drawn],
        help="write a random sample of the rows",
        description="Write a random sample of the rows, in their order.",
    )
    sample.add_argument("--rows", type=count, required=True, help="number of rows to write")
    sample.set_defaults(run=data_sample)


def data_show(args: argparse.Namespace) -> int:
    """Print the first rows as the model sees them, and return the exit code."""
    rows = lk.read_rows(args.file, format=args.format, skip_empty=args.skip_empty)
    tok = lk.load_tokenizer(args.model, chat_template=args.chat_template)
    color = sys.stdout.isatty() and not args.no_color
    print(lk.show_rows(rows, tok, args.rows, train_on=args.train_on, color=color))
    return 0


def data_lint(args: argparse.Namespace) -> int:
    """Print a report on the rows, and return 1 if any row cannot be used or is given away."""
    rows, errors = _readable(args)
    tok = lk.load_tokenizer(args.model, chat_template=args.chat_template)
    report = lk.lint_rows(
        rows,
        tok,
        max_seq_length=args.max_seq_length,
        train_on=args.train_on,
        errors=errors,
        near=args.near,
        against=None if args.against is None else lk.read_rows(args.against, format=args.format),
    )
    print(json.dumps(report.as_dict()) if args.json else report)
    return 1 if report.unusable or report.leaks else 0


PARTS = ("train", "validation", "test")
NAMED = 5  # rows that were left out of a file


def data_split(args: argparse.Namespace) -> int:
    """Divide rows into files of a new directory, and return the exit code."""
    shares = [share / 100 for share in args.shares]
    if not 2 <= len(shares) <= len(PARTS) or abs(sum(shares) - 1) > 1e-9:
        raise lk.LorakitError("--shares: give two or three percentages that sum to 100")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise lk.LorakitError(f"{args.out} is not empty; name a new directory")
    rows, errors = _readable(args)
    parts = dict(zip(PARTS, lk.split_rows(rows, shares), strict=False))
    wanted = {
        name: part for (name, part), share in zip(parts.items(), shares, strict=True) if share
    }
    lk.write_rows({args.out / f"{name}.jsonl": part for name, part in wanted.items()})
    for name, part in wanted.items():
        share = len(part) / len(rows)
        print(f"{args.out / name}.jsonl: {len(part):,} of {len(rows):,} rows ({share:.1%})")
    _print_some("rows that cannot be used", errors)
    return 0


def data_dedup(args: argparse.Namespace) -> int:
    """Write rows without duplicates, and return the exit code."""
    rows, errors = _readable(args)
    return _write_mended(args, lk.dedup_rows(rows, near=args.near), errors)


def data_balance(args: argparse.Namespace) -> int:
    """Write equally many rows of each class, and return the exit code."""
    rows, errors = _readable(args)
    mended = lk.balance_rows(rows, by=args.by, most=args.most, seed=args.seed)
    return _write_mended(args, mended, errors)


def data_sample(args: argparse.Namespace) -> int:
    """Write a sample of rows, and return the exit code."""
    rows, errors = _readable(args)
    return _write_mended(args, lk.sample_rows(rows, args.rows, seed=args.seed), errors)


def _readable(args: argparse.Namespace) -> tuple[Sequence[Any], list[str]]:
    """Return the rows that can be used, and what is wrong with the others."""
    errors: list[str] = []
    rows = lk.read_rows(args.file, format=args.format, errors=errors, skip_empty=args.skip_empty)
    return rows, errors


def _write_mended(args: argparse.Namespace, mended: lk.Mended, errors: list[str]) -> int:
    """Write the rows that stay, say what does not, and return the exit code."""
    lk.write_rows({args.out: mended.rows})
    total = len(mended.rows) + len(mended.dropped) + len(errors)
    print(f"{args.out}: {len(mended.rows):,} of {total:,} rows")
    _print_some("rows left out", mended.dropped)
    _print_some("rows that cannot be used", errors)
    return 0


def _print_some(what: str, found: list[str]) -> None:
    """Print a count and the first few of what was found, or nothing if there is none."""
    if found:
        print(f"{what}: {len(found):,}")
        print("".join(f"  {line}\n" for line in found[:NAMED]), end="")
        print(f"  and {len(found) - NAMED:,} more\n" * (len(found) > NAMED), end="")
