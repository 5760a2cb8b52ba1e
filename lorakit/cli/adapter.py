"""`lorakit adapter show` and `adapter convert`: look at an adapter, or make it plain LoRA."""

import argparse
from pathlib import Path

import lorakit as lk
from lorakit.cli.arguments import ADAPTER_HELP, MODEL_HELP, OUT_HELP, Verbs, count


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb and its two actions to the command line."""
    parser = verbs.add_parser(
        "adapter",
        help="look at an adapter, or make plain LoRA of it",
        description="Look at an adapter on disk, or make plain LoRA of it.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    show = actions.add_parser(
        "show",
        parents=[common],
        help="print ranks, scalings and norms of each layer",
        description="Print rank, scaling and norms of each layer of an adapter, what is stored "
        "beside them, and warnings.",
    )
    show.add_argument("adapter", type=Path, help=ADAPTER_HELP)
    show.set_defaults(run=adapter_show)

    convert = actions.add_parser(
        "convert",
        parents=[common],
        help="write an adapter as plain LoRA, which every server understands",
        description="Write an adapter as plain LoRA: one rank, one lora_alpha, short names of the "
        "layers. rsLoRA and patterns of ranks and alphas are folded in exactly; DoRA is "
        "approximated, and the error of each layer printed.",
    )
    convert.add_argument("adapter", type=Path, help=ADAPTER_HELP)
    convert.add_argument("out", type=Path, help=OUT_HELP)
    convert.add_argument(
        "--base-model", help=f"{MODEL_HELP}; DoRA, fused experts and a .gguf adapter need it"
    )
    convert.add_argument(
        "--rank",
        type=count,
        help="rank of every layer (default: the largest rank of a layer; for DoRA twice that)",
    )
    convert.set_defaults(run=adapter_convert)


def adapter_show(args: argparse.Namespace) -> int:
    """Print what an adapter holds, and return the exit code."""
    print(lk.describe_adapter(args.adapter))
    return 0


def adapter_convert(args: argparse.Namespace) -> int:
    """Write an adapter as plain LoRA, print what changed, and return the exit code."""
    print(lk.convert_adapter(args.adapter, args.out, base_model=args.base_model, rank=args.rank))
    return 0
