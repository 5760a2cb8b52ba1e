"""Carried out of lorakit/cli.py."""

import argparse

import lorakit as lk
from lorakit.cli.run_file import yaml_value


def merge(args: argparse.Namespace) -> int:
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise lk.LorakitError(f"{args.out} is there already, and not empty: choose another name")
    if args.base == "nf4" and args.quantize not in ("nf4", "fp4"):
        raise lk.LorakitError("--base nf4 packs again what was packed: add --quantize nf4")
    model = lk.load_model(args.model, dtype=args.dtype, quantize=args.quantize)
    lk.load_adapter(model, args.adapter)
    print(lk.merge(model, args.base))
    lk.save_model(model, args.out, packed=args.base == "nf4")
    print(f"model in {args.out}")
    return 0


def quantize_report(args: argparse.Namespace) -> int:
    if args.plot is not None and (not args.plot.name or args.plot.is_dir()):
        raise lk.LorakitError(f"--plot {args.plot}: not the name of a file")
    config = {override.partition("=")[0]: yaml_value(override) for override in args.overrides}
    report = lk.quantize_report(args.model, config)
    print(report.table(args.worst))
    if args.plot is not None:
        report.save_plot(args.plot)
        print(f"plot in {args.plot}")
    return 0
