"""Carried out of lorakit/cli.py."""

import argparse
import sys

import lorakit as lk


def show_data(args: argparse.Namespace) -> int:
    rows = lk.read_rows(args.file, format=args.format)
    tok = lk.load_tokenizer(args.model)
    color = sys.stdout.isatty() and not args.no_color
    print(lk.show_rows(rows, tok, args.rows, train_on=args.train_on, color=color))
    return 0


def lint_data(args: argparse.Namespace) -> int:
    errors: list[str] = []
    rows = lk.read_rows(args.file, format=args.format, errors=errors)
    tok = lk.load_tokenizer(args.model)
    options = {"max_seq_length": args.max_seq_length, "train_on": args.train_on}
    report = lk.lint_rows(rows, tok, **options, errors=errors)
    print(report)
    return 1 if report.unusable else 0
