"""Carried out of lorakit/cli.py."""

import argparse

import lorakit as lk


def show_adapter(args: argparse.Namespace) -> int:
    print(lk.describe_adapter(args.adapter))
    return 0


def convert_adapter_files(args: argparse.Namespace) -> int:
    print(lk.convert_adapter(args.adapter, args.out, base_model=args.base_model, rank=args.rank))
    return 0
