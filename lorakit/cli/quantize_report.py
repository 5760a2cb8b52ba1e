"""`lorakit quantize-report`: print what quantization would do to each layer of a model."""

import argparse
from pathlib import Path

import lorakit as lk
from lorakit.cli.arguments import MODEL_HELP, Verbs, count, take_overrides
from lorakit.cli.run_file import yaml_value


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "quantize-report",
        parents=[common],
        help="show what quantization would do to each layer of a model",
        description="Quantize each layer of a model, one at a time, and print its bits per "
        "parameter, relative error and cosine. key=value sets a field of QuantConfig, as in "
        "quant_type=fp4 or search_scales=true.",
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a field of QuantConfig")
    parser.add_argument(
        "--worst",
        type=count,
        default=10,
        help="list this many layers again, the worst first (default: 10)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        default=Path("quantize-report.png"),
        help="PNG to write (default: quantize-report.png)",
    )
    parser.add_argument(
        "--no-plot", action="store_const", dest="plot", const=None, help="print only, write no PNG"
    )
    parser.set_defaults(run=quantize_report, take_rest=take_overrides)


def quantize_report(args: argparse.Namespace) -> int:
    """Print the report, write its plot, and return the exit code."""
    if args.plot is not None and (not args.plot.name or args.plot.is_dir()):
        raise lk.LorakitError(f"--plot {args.plot}: not the name of a file")
    config = {override.partition("=")[0]: yaml_value(override) for override in args.overrides}
    report = lk.quantize_report(args.model, config)
    print(report.table(args.worst))
    if args.plot is not None:
        report.save_plot(args.plot)
        print(f"plot in {args.plot}")
    return 0
